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
from pathlib import Path

import torch

from ldm import data, images, preflight, report, training
from ldm.data import Batches, Subject
from ldm.dreambooth import Batch, Losses, Trainable, mask_weight, min_snr_weight, row_errors, two_terms
from ldm.formats import abbreviate, illustrate
from ldm.guidance import seen
from ldm.model import StableDiffusion
from ldm.runtime import Stopped, cli, processes
from ldm.settings import Settings
from ldm.training import ClassPictures, Run, TrainingState
from ldm.validation import Validation, hold_out

TINY = Path(__file__).resolve().parent / "weights" / "tiny" / "train.toml"


def main(
    argv: Sequence[str] | None = None, tuning: Callable[[StableDiffusion, Settings], Trainable] = training.tuning_of
) -> None:
    """tuning: what trains; see `Trainable`. The settings decide between the whole networks, a LoRA and a token."""
    settings = training.parse(argv, TINY)
    world = processes.start(settings.device)
    training.set_exactness(settings.allow_tf32, settings.deterministic)
    with Run(settings, world) as run:  # inside, a signal ends the current work, then this block
        state, subjects, class_pictures = begin(run, tuning)
        # Pictures by the base model before training: the sheet and the class pictures.
        training.make_sheet(run, state.trainable.sd, "before")
        for pictures in class_pictures:
            pictures.generate(run, state.trainable.sd)
        report.begin(run, subjects, class_pictures)
        validation = Validation(run, state, subjects, class_pictures)
        batches = prepare(run, state, subjects, class_pictures)
        run.restore(state)
        train(run, state, batches, validation)
        finish(run, state, subjects)
        validation.tell_advice()
        report.finish(run)
    world.close()


def train(run: Run, state: TrainingState, batches: Batches, validation: Validation) -> None:
    """Runs the remaining steps. On a signal, finishes the step, saves and raises Stopped."""
    accumulation = run.settings.gradient_accumulation_steps
    with run.training(state):
        validate(run, state, validation)
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
            validate(run, state, validation)
            run.save_if_due(state)
    if state.step < run.settings.max_train_steps:
        report.update(run)
        raise Stopped


def validate(run: Run, state: TrainingState, validation: Validation) -> None:
    """Every --validation-steps: losses of held-out pictures, language drift, a sheet. Training does not notice."""
    if validation.is_due(state):
        validation.measure(state)
        report.update(run)


def dreambooth_step(run: Run, state: TrainingState, model: torch.nn.Module, batch: Batch) -> Losses:
    """Adds noise to the latents of subject and class, predicts it, and returns the two terms of DreamBooth, eq. 2.

    model: `state.trainable`, wrapped so that processes average its gradients.
    """
    settings, schedule = run.settings, state.trainable.sd.schedule
    noisy = seen(schedule.add_noise(batch.latents, batch.noise, batch.t), batch.extra)  # beside a mask, to paint in
    with run.precision.autocast():
        prediction = model(noisy, batch.t, batch.prompts)
        target = schedule.target(batch.latents, batch.noise, batch.t)
        if settings.predicts_prior:  # the base model's own prediction takes the place of class pictures
            rows = batch.class_rows
            before = state.trainable.base(noisy[rows], batch.t[rows], batch.class_prompts)
            target = target.index_copy(0, rows, before.float())
    row_weight = place_weight = None
    if settings.snr_gamma is not None:
        row_weight = min_snr_weight(schedule.snr(batch.t), settings.snr_gamma, schedule.config.prediction)
    if batch.mask is not None:
        place_weight = mask_weight(batch.mask, settings.unmasked_weight)
    error = row_errors(prediction, target, row_weight, place_weight=place_weight, huber_c=settings.huber)  # (B,)
    run.subject_losses.add(batch, error)  # each subject's own, for metrics.jsonl
    return two_terms(error, batch.is_class, settings.prior_loss_weight)


def begin(
    run: Run, tuning: Callable[[StableDiffusion, Settings], Trainable]
) -> tuple[TrainingState, list[Subject], list[ClassPictures]]:
    """Loads the model and the photographs, and begins the run. Raises InputError for wrong input before it begins."""
    settings, world = run.settings, run.world
    with run.together():
        subjects, run.held_out = hold_out(settings, data.read_subjects(settings))
        sd = load(run)
        data.check_photographs(subjects, settings, sd)
    base = run.on_main(sd.source_fingerprint)
    with run.together():
        class_pictures = training.plan_class_pictures(run, sd, base, subjects)
        own = [images.read_picture(path) for pictures in class_pictures for path in pictures.own]
        generated = [path for pictures in class_pictures for path in pictures.paths if path.exists()]
        for picture in [*(example.picture for example in run.held_out), *generated]:
            images.load_picture(picture, settings.resolution)
    state = TrainingState(tuning(sd, settings), settings, run.precision, base)
    world.print_main(sd.summary)
    preflight.tell(run, tuning, state, subjects, class_pictures)  # a dry run ends here
    checkpoint = run.begin(state, subjects, own)
    if checkpoint is not None:
        world.print_main(f"resuming from {checkpoint}")
    elif settings.resume_from_checkpoint is not None:
        world.print_main(f"no checkpoint in {run.claim.checkpoints} yet: starting from the base model")
    return state, subjects, class_pictures


def load(run: Run) -> StableDiffusion:
    """The base model, on this process's device. Raises InputError for settings that do not suit it."""
    settings = run.settings
    sd = StableDiffusion.load(settings.model, run.world.device, **cli.source_options(settings), mapped=False)
    sd.prefer_device_layout()
    sd.check_size(settings.resolution, settings.resolution)
    sd.schedule.check_steps(settings.sample_steps)
    settings.check_schedule(sd.schedule)
    if run.world.main:
        sd.check_finite()
    return sd


def prepare(run: Run, state: TrainingState, subjects: list[Subject], class_pictures: list[ClassPictures]) -> Batches:
    """Encodes pictures and prompts once where possible, and casts frozen networks to the compute type."""
    settings, sd = run.settings, state.trainable.sd
    if settings.rescale_betas_zero_snr:  # only now: the base model's own pictures are made as it was trained
        sd.reschedule(zero_terminal_snr=True, spacing="trailing")
    with run.world.agreed():
        photographs = data.sort_photographs(subjects, settings, sd, run.identity.parts["global_batch"])
        rows = [data.make_rows(sd, settings, "instance", photographs, run.progress_bar)]
        if class_pictures:
            of_class = data.sort_class_pictures(photographs, training.read_class_pictures(run, class_pictures))
            rows.append(data.make_rows(sd, settings, "class", of_class, run.progress_bar))
    run.subject_losses = training.SubjectLosses([subject.name for subject in subjects], run.world.device)
    if settings.predicts_prior:
        prompts = tuple(subject.class_prompt for subject in subjects)
        state.trainable.keep_base(tuple(dict.fromkeys(prompts)), run.precision.dtype)
        rows.append(rows[0].of_class(prompts))  # the same noisy latents
    if settings.random_crop or sd.config.unet.paints_in:  # then every step encodes pictures
        sd.freeze(sd.vae, torch.float32)
    else:
        sd.forget_encoder()
        sd.freeze(sd.vae, run.precision.dtype)
    prompts = dict.fromkeys(prompt for part in rows for prompt in part.draws.distinct_prompts)
    state.trainable.prepare(tuple(prompts), run.precision.dtype)
    return Batches(rows, settings, run.world)


def finish(run: Run, state: TrainingState, subjects: list[Subject]) -> None:
    """Writes the result, and the sheets that show what the model has learned."""
    with state.averaged():
        path, left_out = run.world.on_main(lambda: state.save_result(run.folder))
        if left_out:
            run.world.print_main(f"not in the model: {abbreviate(left_out)}")
        training.make_sheet(run, state.trainable.sd, "after")
    photographs = [example.picture for subject in subjects for example in subject.examples]
    sheet = run.world.on_main(lambda: training.make_comparison(run, photographs))
    run.world.on_main(lambda: illustrate(path, sheet))
    run.world.print_main(f"model: {path}\nsheet: {sheet}")


if __name__ == "__main__":
    with cli.reported("train.py"):
        main()
