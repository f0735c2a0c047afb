"""Sheets of pictures for the validation prompts, before and after training."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ldm import images, samplers
from ldm.model import StableDiffusion
from ldm.runtime import progress_bar, replacing, uncompiled, written
from ldm.training.run import Run


def sheet_path(run: Run, name: str) -> Path:
    """The path of the sheet "before", "after" or "before_after" of a run."""
    return run.folder / "sheets" / f"{name}.png"


def make_sheet(run: Run, sd: StableDiffusion, when: str) -> None:
    """Makes the sheet "before", unless it exists already, or "after", in the main process."""

    def work() -> None:
        if when == "after" or not sheet_path(run, when).exists():
            plain = uncompiled(run.settings.compile)
            with run.precision.sampling(), plain, run.enough_memory("sampling", f"while it made the sheet {when}"):
                _save(run, when, images.grid(sample(run, sd, when)))

    run.on_main(work)


def make_comparison(run: Run, photographs: Sequence[images.Picture]) -> Path:
    """Makes the sheet that shows the photographs, and the sheets "before" and "after" side by side below them."""
    squares = [images.square(picture, run.settings.resolution) for picture in photographs]
    top = images.grid([("photographs of the subject", squares[: 2 * run.settings.num_validation_images])])
    left, right = (images.open_picture(sheet_path(run, name)) for name in ("before", "after"))
    return _save(run, "before_after", images.beside(top, left, right))


def _save(run: Run, name: str, sheet: Image.Image) -> Path:
    path = sheet_path(run, name)
    with written(path), replacing(path) as temporary:
        sheet.save(temporary, format="PNG")
    return path


def sample(run: Run, sd: StableDiffusion, when: str) -> list[images.Row]:
    """A row of pictures for each validation prompt; every row, before and after, has the same seeds."""
    settings = run.settings
    prompts = settings.validation_prompt or settings.prompts
    seeds = range(settings.seed, settings.seed + settings.num_validation_images)
    jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
    batches = [jobs[i : i + settings.sample_batch_size] for i in range(0, len(jobs), settings.sample_batch_size)]
    total = len(batches) * samplers.find(settings.sampler).evaluations(settings.sample_steps)
    pictures = []
    with progress_bar(run.stop, f"sheet {when}", total) as progress:
        for batch in batches:
            pictures += sd.generate(
                [prompt for prompt, _ in batch],
                steps=settings.sample_steps,
                guidance=settings.guidance_scale,
                sampler=settings.sampler,
                seeds=[seed for _, seed in batch],
                height=settings.resolution,
                width=settings.resolution,
                progress=progress,
            )
    n = len(seeds)
    return [(f"{prompt} ({when})", pictures[i * n : (i + 1) * n]) for i, prompt in enumerate(prompts)]
