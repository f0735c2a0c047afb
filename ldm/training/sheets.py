"""Sheets of pictures for the validation prompts: before training, at each validation, and after training."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm import images, samplers
from ldm.model import StableDiffusion
from ldm.runtime import replacing, uncompiled, written
from ldm.sampling import contact_sheet
from ldm.settings import Settings
from ldm.training.run import Run

PROMPTS = "ldm.prompts"  # the text in a sheet's file that has the prompts of its rows


def sheet_path(run: Run, name: str) -> Path:
    """The path of a run's sheet: "before", "step-000100", "after", "before_after", or "steps", which has all steps."""
    return run.folder / "sheets" / f"{name}.png"


def make_sheet(run: Run, sd: StableDiffusion, when: str) -> None:
    """Makes the sheet "before", unless it exists already, or "after", in the main process."""

    def work() -> None:
        if when == "after" or not sheet_path(run, when).exists():
            batches = len(_batches(run.settings))
            total = batches * samplers.find(run.settings.sampler).evaluations(run.settings.sample_steps)
            with run.progress_bar(f"sheet {when}", total) as progress, _sampling(run, when):
                path = _save(run, when, contact_sheet.grid(sample(run.settings, sd, when, progress)))
            run.lines.tracker.picture(0 if when == "before" else run.settings.max_train_steps, "sheet", path)
        if when == "after" and run.settings.validation_steps is not None:
            make_steps(run)

    run.on_main(work)


def make_step_sheet(run: Run, sd: StableDiffusion, step: int) -> Path:
    """Makes the sheet of a step in this process, and then `make_steps`. Returns its path.

    Raises RunError if the memory does not suffice, for a picture of NaN, and if a sheet can't be written; Stopped if a
    signal comes.
    """
    with _sampling(run, f"of step {step}"):
        sheet = contact_sheet.grid(sample(run.settings, sd, f"step {step}", run.stop.check))
    path = _save(run, step_name(step), sheet)
    make_steps(run)
    return path


def step_name(step: int) -> str:
    """The name of a step's sheet."""
    return f"step-{step:06d}"


def make_comparison(run: Run, photographs: Sequence[images.Picture]) -> Path:
    """Makes the sheet that shows the photographs, and the sheets "before" and "after" side by side below them."""
    squares = [images.square(picture, run.settings.resolution) for picture in photographs]
    top = contact_sheet.grid([("photographs of the subject", squares[: 2 * run.settings.num_validation_images])])
    left, right = (images.open_picture(sheet_path(run, name)) for name in ("before", "after"))
    return _save(run, "before_after", contact_sheet.beside(top, left, right))


def make_steps(run: Run) -> None:
    """Makes the sheet "steps" of the sheets that there are: a row a step, a column a prompt, its first picture."""
    found = [path.stem.removeprefix("step-") for path in sheet_path(run, "steps").parent.glob("step-*.png")]
    steps = sorted(int(number) for number in found if number.isdecimal())
    names = {"before training": "before"} | {f"step {step}": step_name(step) for step in steps}
    names["after training"] = "after"
    sheets, prompts = {}, prompts_of(run.settings)
    for label, name in names.items():
        if sheet_path(run, name).exists():
            with images.open_picture(sheet_path(run, name)) as sheet:
                if sheet.info.get(PROMPTS) == json.dumps(prompts):  # a resumed run may have been given other prompts
                    sheets[label] = images.to_rgb(sheet)
    rows = [
        (label, contact_sheet.first_column(sheet, len(prompts), run.settings.resolution))
        for label, sheet in sheets.items()
    ]
    row = contact_sheet.grid(rows[:1], prompts)
    most = max(1, images.MAX_PIXELS // (row.width * row.height))
    _save(run, "steps", contact_sheet.grid(rows[-most:], prompts))


def prompts_of(settings: Settings) -> tuple[str, ...]:
    """The prompts of a sheet's rows."""
    return settings.validation_prompt or settings.prompts


@contextmanager
def _sampling(run: Run, which: str) -> Iterator[None]:
    plain = uncompiled(run.settings.compile)
    with run.precision.sampling(), plain, run.enough_memory("sampling", f"while it made the sheet {which}"):
        yield


def _save(run: Run, name: str, sheet: Image.Image) -> Path:
    path, text = sheet_path(run, name), PngInfo()
    text.add_text(PROMPTS, json.dumps(prompts_of(run.settings)))
    with written(path), replacing(path) as temporary:
        sheet.save(temporary, format="PNG", pnginfo=text)
    return path


def _batches(settings: Settings) -> list[list[tuple[str, int]]]:
    """(prompt, seed) of each picture, in batches. Every row of every sheet has the same seeds."""
    seeds = range(settings.seed, settings.seed + settings.num_validation_images)
    jobs = [(prompt, seed) for prompt in prompts_of(settings) for seed in seeds]
    return [jobs[i : i + settings.sample_batch_size] for i in range(0, len(jobs), settings.sample_batch_size)]


def sample(
    settings: Settings, sd: StableDiffusion, when: str, progress: Callable[[], object]
) -> list[contact_sheet.Row]:
    """A row of pictures for each validation prompt. progress: called after each evaluation of the UNet."""
    pictures = []
    for batch in _batches(settings):
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
    n = settings.num_validation_images
    return [(f"{prompt} ({when})", pictures[i * n : (i + 1) * n]) for i, prompt in enumerate(prompts_of(settings))]
