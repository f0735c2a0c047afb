"""DreamBooth: teaches a Stable Diffusion one subject from a few photographs (Ruiz et al. 2023).

    python train.py                                         the embedded model, four pictures, a few minutes on a CPU
    python train.py --model v1-5-pruned-emaonly.safetensors --instance-data-dir dog \\
        --instance-prompt "a photo of sks dog" --class-prompt "a photo of a dog"
    torchrun --nproc-per-node 8 train.py ...                the same on eight GPUs

Read it from top to bottom: `main` is the story, `train` the loop, `gradients` the algorithm.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ldm import dreambooth, images
from ldm.errors import RunError
from ldm.formats import abbreviate
from ldm.model import StableDiffusion
from ldm.runtime import cli, processes
from ldm.runtime.processes import World
from ldm.runtime.signals import Stop
from ldm.samplers import evaluations
from ldm.training import batches, optimizer
from ldm.training.class_pictures import ClassPictures
from ldm.training.precision import Precision, set_exactness
from ldm.training.run import Run, digest
from ldm.training.settings import Settings, parse
from ldm.training.state import TrainingState

TINY = Path(__file__).parent / "weights" / "tiny" / "train.toml"


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(argv, TINY)
    world = processes.start(settings.device)
    precision = Precision(settings.mixed_precision, world.device)
    set_exactness(settings.allow_tf32, settings.deterministic)

    # All that could be wrong with the input is found out here, before anything is written.
    run = Run(settings, world)
    with world.agreed():
        photographs = images.find_pictures(settings.instance_data_dir, "--instance-data-dir")
        sd = load(settings, world)
        if world.main:
            sd.check_finite()
    base = world.on_main(sd.source_fingerprint)
    with world.agreed():
        class_pictures = plan(sd, settings, run, photographs, base)
    trainee = dreambooth.Trainee(sd, settings.train_text_encoder, settings.gradient_checkpointing)
    state = TrainingState(sd, trainee, settings, precision, base)
    given = photographs + (class_pictures.own if class_pictures is not None else [])
    checkpoint = run.start({"base": base, "pictures": digest(given)}, state.size)
    tell(world, sd.summary)
    if checkpoint is not None:
        tell(world, f"going on from {checkpoint}")
    elif settings.resume_from_checkpoint is not None:
        tell(world, f"no checkpoint in {run.checkpoints} yet: beginning anew")

    with Stop() as stop:
        # The base model before it sees the subject: what it makes of the prompts, and what it knows of the class.
        with precision.autocast():
            if world.main and not run.sheet("before").exists():
                run.save_sheet("before", images.grid(samples(sd, settings, "before")))
            complete = class_pictures is None or class_pictures.generate(sd, settings.sample_batch_size, world, stop)
        if complete:
            rows, conditioning = prepare(sd, settings, world, precision, photographs, class_pictures)
            if checkpoint is not None:
                state.restore(*run.load(checkpoint))
            try:
                train(settings, world, run, precision, state, trainee, rows, conditioning, stop)
            except torch.OutOfMemoryError:
                hints = (
                    "--gradient-checkpointing, --mixed-precision bf16, --use-8bit-adam or a lower --train-batch-size"
                )
                raise RunError(f"{world.device} ran out of memory at step {state.step + 1}; give {hints}") from None
        if state.step == settings.max_train_steps:
            finish(sd, settings, world, run, precision, photographs, state)
        else:
            when = f"after step {state.step}" if complete else "before training"
            tell(world, f"stopped {when}; --resume-from-checkpoint latest goes on from there")
    world.close()


def train(
    settings: Settings,
    world: World,
    run: Run,
    precision: Precision,
    state: TrainingState,
    trainee: dreambooth.Trainee,
    rows: list[batches.Rows],
    conditioning: Tensor,
    stop: Stop,
) -> None:
    """From the state's step to the last, or until a signal ends it early, with all saved."""
    model, overflows = world.wrap(trainee), 0
    progress = {"initial": state.step, "total": settings.max_train_steps, "desc": "training", "unit": "step"}
    with tqdm(**progress, disable=not world.main) as bar:
        while state.step < settings.max_train_steps:
            began, step = time.perf_counter(), state.step + 1
            if trainee.text_encoder_trains and step > (settings.text_encoder_stop_step or math.inf):
                optimizer.freeze(trainee.text_encoder.parameters())
                model = world.wrap(trainee)
            factor = optimizer.lr_factor(
                settings.lr_scheduler, step, settings.lr_warmup_steps, settings.max_train_steps
            )
            optimizer.set_lr(state.optimizer, factor)

            state.optimizer.zero_grad(set_to_none=True)
            sums = gradients(settings, world, precision, state, model, rows, conditioning)
            *sums, signals = world.sum([*sums, float(stop.asked)])
            loss, subject, prior = (total / (settings.gradient_accumulation_steps * world.size) for total in sums)
            check_finite("loss", loss, step)
            norm = precision.step(state.optimizer, list(state.parameters.values()), settings.max_grad_norm)
            state.draws += 1

            metrics = {"step": step, "loss": loss, "subject_loss": subject, "prior_loss": prior, "grad_norm": norm}
            metrics |= {"lr": settings.learning_rate * factor, "seconds": round(time.perf_counter() - began, 4)}
            updated = math.isfinite(norm)
            if updated:
                overflows = 0
                state.advance()
                run.log(**metrics)
                bar.update()
                bar.set_postfix(loss=f"{loss:.4f}", subject=f"{subject:.4f}", prior=f"{prior:.4f}", refresh=False)
            else:  # fp16 overflowed: the same step again, with other rows and a lower scale; else it is an error
                if not precision.scaler.is_enabled():
                    check_finite("norm of the gradients", norm, step)
                overflows += 1
                run.log(**metrics | {"grad_norm": None}, skipped=True, scale=precision.scaler.get_scale())
                if overflows == 50:
                    raise RunError(f"fp16 overflowed {overflows} times in a row at step {step}; take bf16")
            if signals or (updated and step % settings.checkpointing_steps == 0):
                run.save(state)
            if signals:
                break


def gradients(
    settings: Settings,
    world: World,
    precision: Precision,
    state: TrainingState,
    model: nn.Module,
    rows: list[batches.Rows],
    conditioning: Tensor,
) -> list[float]:
    """Leaves the gradient of one global batch in the parameters. Returns the sums of this process's losses."""
    batch, accumulation = settings.train_batch_size, settings.gradient_accumulation_steps
    schedule = state.sd.schedule
    is_class = torch.arange(len(rows) * batch, device=world.device) >= batch  # instance rows first, class rows after
    sums = torch.zeros(3, dtype=torch.float64)
    for part in range(accumulation):
        # Which rows these are depends on the draw alone, not on how many processes share it or in how many parts.
        first = ((state.draws * accumulation + part) * world.size + world.rank) * batch
        drawn = [kind.draw(settings.seed, first, batch) for kind in rows]
        z, noise, t = (torch.cat(column) for column in zip(*drawn, strict=True))
        weight = None
        if settings.snr_gamma is not None:
            weight = dreambooth.min_snr_weight(schedule.snr(t), settings.snr_gamma, schedule.config.prediction)

        with world.averaging(model, now=part == accumulation - 1):
            with precision.autocast():
                prediction = model(schedule.add_noise(z, noise, t), t, conditioning)
            target = schedule.target(z, noise, t)
            losses = dreambooth.dreambooth_loss(prediction, target, is_class, settings.prior_loss_weight, weight)
            precision.backward(losses[0] / accumulation)
        sums += torch.stack(losses).detach().cpu().double()
    return sums.tolist()


def load(settings: Settings, world: World) -> StableDiffusion:
    source = {"ema": settings.ema, "prediction": settings.prediction_type, "variant": settings.variant}
    return StableDiffusion.load(settings.model, world.device, **source)


def plan(sd: StableDiffusion, settings: Settings, run: Run, photographs: list[Path], base: str) -> ClassPictures | None:
    """The class pictures to have, as the base model of that fingerprint makes them.

    Raises InputError for settings and pictures that the model can't be trained with.
    """
    sd.check_size(settings.resolution, settings.resolution)
    sd.schedule.spaced(settings.sample_steps)
    pictures, class_pictures = photographs, None
    if settings.with_prior_preservation:
        guidance = settings.class_guidance_scale
        recipe = {
            "prompt": settings.class_prompt,
            "sampler": settings.sampler,
            "steps": settings.sample_steps,
            "guidance_scale": settings.guidance_scale if guidance is None else guidance,
            "resolution": settings.resolution,
            "prediction": sd.config.schedule.prediction,
            "model": base,
        }
        folder = settings.class_data_dir or run.folder / "class"
        class_pictures = ClassPictures(folder, settings.num_class_images, settings.seed, recipe)
        pictures = pictures + [path for path in class_pictures.paths if path.exists()]
    for path in pictures:
        images.load_picture(path, settings.resolution)
    return class_pictures


def prepare(
    sd: StableDiffusion,
    settings: Settings,
    world: World,
    precision: Precision,
    photographs: list[Path],
    class_pictures: ClassPictures | None,
) -> tuple[list[batches.Rows], Tensor]:
    """Pictures become latents and prompts context, once for all steps where they can; what does not train freezes.

    Returns the rows of each kind, and the ids (P, L) of their prompts if the text encoder trains, else the context.
    """
    kinds, prompts = [("instance", photographs)], [settings.instance_prompt]
    if class_pictures is not None:
        kinds, prompts = [*kinds, ("class", class_pictures.paths)], [*prompts, settings.class_prompt]
    views = {"crop": settings.random_crop, "flip": settings.random_flip, "bar": world.main}
    rows = [batches.training_rows(sd, kind, paths, settings.resolution, **views) for kind, paths in kinds]
    if settings.random_crop:
        sd.freeze(sd.vae, torch.float32)
    else:
        sd.forget_encoder()
        sd.freeze(sd.vae, precision.dtype)
    ids = sd.tokenizer(prompts).to(world.device)
    if settings.train_text_encoder:
        return rows, ids
    with torch.no_grad():
        context = sd.text_encoder(ids)
    sd.freeze(sd.text_encoder, precision.dtype)
    return rows, context


def finish(
    sd: StableDiffusion,
    settings: Settings,
    world: World,
    run: Run,
    precision: Precision,
    photographs: list[Path],
    state: TrainingState,
) -> None:
    """Writes the model, and the sheets that show what it has learned."""
    if not world.main:
        return
    with state.averaged(), precision.autocast():
        if left_out := run.save_model(state):
            print(f"not in the model: {abbreviate(left_out)}")
        after = images.grid(samples(sd, settings, "after"))
    run.save_sheet("after", after)
    squares = [images.square(path, settings.resolution) for path in photographs]
    shown = images.grid([("photographs of the subject", squares[: 2 * settings.num_validation_images])])
    run.save_sheet("before_after", images.beside(shown, Image.open(run.sheet("before")), after))
    print(f"model: {run.model_path}\nsheet: {run.sheet('before_after')}")


def samples(sd: StableDiffusion, settings: Settings, when: str) -> list[images.Row]:
    """A row of pictures for each validation prompt, the same seeds in every row and every time."""
    prompts = settings.validation_prompt or tuple(filter(None, (settings.instance_prompt, settings.class_prompt)))
    seeds = range(settings.seed, settings.seed + settings.num_validation_images)
    jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
    batches = [jobs[i : i + settings.sample_batch_size] for i in range(0, len(jobs), settings.sample_batch_size)]
    total = len(batches) * evaluations(settings.sampler, settings.sample_steps)
    pictures = []
    with tqdm(total=total, desc=f"sheet {when}", unit="step") as bar:
        for batch in batches:
            pictures += sd.generate(
                [prompt for prompt, _ in batch],
                steps=settings.sample_steps,
                guidance=settings.guidance_scale,
                sampler=settings.sampler,
                seeds=[seed for _, seed in batch],
                height=settings.resolution,
                width=settings.resolution,
                progress=bar.update,
            )
    n = len(seeds)
    return [(f"{prompt} ({when})", pictures[i * n : (i + 1) * n]) for i, prompt in enumerate(prompts)]


def check_finite(what: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise RunError(f"the {what} is {value} at step {step}, and nothing was saved of it; lower --learning-rate")


def tell(world: World, text: str) -> None:
    if world.main:
        print(text)


if __name__ == "__main__":
    with cli.reported("train.py"):
        main()
