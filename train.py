"""DreamBooth: teaches a Stable Diffusion one subject from a few photographs (Ruiz et al. 2023).

    python train.py                                         the embedded model, four pictures, a few minutes on a CPU
    python train.py --model v1-5-pruned-emaonly.safetensors --instance-data-dir dog \\
        --instance-prompt "a photo of sks dog" --class-prompt "a photo of a dog"
    torchrun --nproc-per-node 8 train.py ...                the same on eight GPUs

Read it from top to bottom: `main` is the story, `train` the loop, `dreambooth_step` the algorithm.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported ends without a traceback

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ldm import images, training
from ldm.dreambooth import Batch, Losses, Trainable, dreambooth_loss, min_snr_weight
from ldm.formats import abbreviate, illustrate
from ldm.images import Picture
from ldm.model import StableDiffusion
from ldm.runtime import Stopped, cli, processes
from ldm.training import Batches, ClassPictures, Run, Settings, TrainingState

TINY = Path(__file__).resolve().parent / "weights" / "tiny" / "train.toml"


def main(
    argv: Sequence[str] | None = None, tuning: Callable[[StableDiffusion, Settings], Trainable] = training.tuning_of
) -> None:
    """tuning: what trains; see `Trainable`. The settings decide between the whole networks, a LoRA and a token."""
    settings = training.parse(argv, TINY)
    world = processes.start(settings.device)
    training.set_exactness(settings.allow_tf32, settings.deterministic)
    with Run(settings, world) as run:  # inside, a signal ends the current work, then this block
        state, photographs, class_pictures = begin(run, tuning)
        # Pictures by the base model before training: the sheet and the class pictures.
        training.make_sheet(run, state.trainable.sd, "before")
        if class_pictures is not None:
            class_pictures.generate(run, state.trainable.sd)
        batches = prepare(run, state, photographs, class_pictures)
        run.restore(state)
        train(run, state, batches)
        finish(run, state, photographs)
    world.close()


def train(run: Run, state: TrainingState, batches: Batches) -> None:
    """Runs the remaining steps. On a signal, finishes the step, saves and raises Stopped."""
    accumulation = run.settings.gradient_accumulation_steps
    with run.training(state):
        while state.step < run.settings.max_train_steps and not run.stopped:
            if state.start_step():  # learning rate, zero_grad; True if the set of trained parameters changed
                model = run.world.wrap(state.trainable)
            losses = []
            for batch in batches.take(state.taken):  # yields `accumulation` batches
                with run.world.averaging(model, now=batch.last):
                    losses.append(dreambooth_step(run, state, model, batch))
                    run.precision.backward(losses[-1].total / accumulation)
            numbers = run.reduce(losses, state.clip_gradients())  # on their way from the device
            metrics = state.update(numbers)  # on an fp16 overflow the weights stay; the step runs again on new rows
            run.log(numbers, metrics)
            run.save_if_due(state)
    if state.step < run.settings.max_train_steps:
        raise Stopped


def dreambooth_step(run: Run, state: TrainingState, model: torch.nn.Module, batch: Batch) -> Losses:
    """Adds noise to the latents of subject and class, predicts it, and returns the two terms of DreamBooth, eq. 2.

    model: `state.trainable`, wrapped so that processes average its gradients.
    """
    settings, schedule = run.settings, state.trainable.sd.schedule
    noisy = schedule.add_noise(batch.latents, batch.noise, batch.t)
    with run.precision.autocast():
        prediction = model(noisy, batch.t, batch.prompts)
        target = schedule.target(batch.latents, batch.noise, batch.t)
        if settings.predicts_prior:  # the base model's own prediction takes the place of class pictures
            rows = batch.class_rows
            target = target.index_copy(0, rows, state.trainable.base(noisy[rows], batch.t[rows]).float())
    weight = None
    if settings.snr_gamma is not None:
        weight = min_snr_weight(schedule.snr(batch.t), settings.snr_gamma, schedule.config.prediction)
    return dreambooth_loss(prediction, target, batch.is_class, settings.prior_loss_weight, weight)


def begin(
    run: Run, tuning: Callable[[StableDiffusion, Settings], Trainable]
) -> tuple[TrainingState, list[Picture], ClassPictures | None]:
    """Loads the model and the photographs, and begins the run. Raises InputError for wrong input before it begins."""
    settings, world = run.settings, run.world
    with run.together():
        photographs = [images.read_picture(path) for path in images.find_pictures(settings.instance_data_dir)]
        sd = load(run)
    base = run.on_main(sd.source_fingerprint)
    with run.together():
        class_pictures = plan_class_pictures(run, sd, base)
        own = [images.read_picture(path) for path in class_pictures.own] if class_pictures else []
        generated = [path for path in class_pictures.paths if path.exists()] if class_pictures else []
        for picture in [*photographs, *generated]:
            images.load_picture(picture, settings.resolution)
    state = TrainingState(tuning(sd, settings), settings, run.precision, base)
    world.print_main(sd.summary)
    training.tell_preflight(run, tuning, state, photographs, class_pictures)  # a dry run ends here
    checkpoint = run.begin(state, photographs, own)
    if checkpoint is not None:
        world.print_main(f"resuming from {checkpoint}")
    elif settings.resume_from_checkpoint is not None:
        world.print_main(f"no checkpoint in {run.claim.checkpoints} yet: starting from the base model")
    return state, photographs, class_pictures


def load(run: Run) -> StableDiffusion:
    """The base model, on this process's device. Raises InputError for settings that do not suit it."""
    settings = run.settings
    source = {"ema": settings.ema, "prediction": settings.prediction_type, "variant": settings.variant}
    sd = StableDiffusion.load(settings.model, run.world.device, **source, mapped=False)
    sd.prefer_device_layout()
    sd.check_size(settings.resolution, settings.resolution)
    sd.schedule.check_steps(settings.sample_steps)
    if run.world.main:
        sd.check_finite()
    return sd


def plan_class_pictures(run: Run, sd: StableDiffusion, base: str) -> ClassPictures | None:
    """The class pictures that the run needs; None without the prior term. base: the base model's fingerprint."""
    settings = run.settings
    if not settings.with_prior_preservation or settings.predicts_prior:
        return None
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
    return ClassPictures(folder, settings.num_class_images, settings.seed, recipe)


def prepare(
    run: Run, state: TrainingState, photographs: list[Picture], class_pictures: ClassPictures | None
) -> Batches:
    """Encodes pictures and prompts once where possible, and casts frozen networks to the compute type."""
    settings, sd = run.settings, state.trainable.sd
    kinds = [("instance", settings.instance_prompt, photographs)]
    with run.world.agreed():
        if class_pictures is not None:
            kinds.append(("class", settings.class_prompt, class_pictures.read(run)))
        rows = [training.make_rows(run, sd, *kind) for kind in kinds]
    if settings.predicts_prior:
        state.trainable.keep_base(settings.class_prompt, run.precision.dtype)
        rows.append(replace(rows[0], prompt=settings.class_prompt, is_class=True))  # the same noisy latents
    if settings.random_crop:
        sd.freeze(sd.vae, torch.float32)
    else:
        sd.forget_encoder()
        sd.freeze(sd.vae, run.precision.dtype)
    state.trainable.prepare(tuple(dict.fromkeys(part.prompt for part in rows)), run.precision.dtype)
    return Batches(rows, settings, run.world)


def finish(run: Run, state: TrainingState, photographs: list[Picture]) -> None:
    """Writes the result, and the sheets that show what the model has learned."""
    with state.averaged():
        path, left_out = run.world.on_main(lambda: state.save_result(run.folder))
        if left_out:
            run.world.print_main(f"not in the model: {abbreviate(left_out)}")
        training.make_sheet(run, state.trainable.sd, "after")
    sheet = run.world.on_main(lambda: training.make_comparison(run, photographs))
    run.world.on_main(lambda: illustrate(path, sheet))
    run.world.print_main(f"model: {path}\nsheet: {sheet}")


if __name__ == "__main__":
    with cli.reported("train.py"):
        main()
