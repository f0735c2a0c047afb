"""Says what a run will do before it does anything slow, and what looks wrong. Errors are those of the settings."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.data import Subject, sizes_of_photographs
from ldm.model import StableDiffusion
from ldm.preflight.memory import Tuning, memory_notes
from ldm.preflight.note import Note, amount, counted, listed
from ldm.preflight.photographs import photograph_notes
from ldm.preflight.prompts import prompt_notes
from ldm.runtime import Stopped
from ldm.settings import Settings
from ldm.training import ClassPictures, Run, TrainingState, distinct_class_pictures, free_space

NAMES = {"unet": "UNet", "text encoder": "text encoder", "token": "new token"}  # of groups of parameters


def tell(
    run: Run,
    tuning: Tuning,
    state: TrainingState,
    subjects: Sequence[Subject],
    class_pictures: Sequence[ClassPictures],
) -> None:
    """Prints the notes, a line or two each, and keeps them for RUN/preflight.json. Raises Stopped in a dry run."""
    settings, sd = run.settings, state.trainable.sd
    class_pictures = distinct_class_pictures(class_pictures)  # subjects of one class share theirs

    def work() -> None:
        notes = [note for subject in subjects for note in subject_notes(subject, settings, sd, len(subjects) > 1)]
        notes += resolution_notes(settings, sd.config.resolution)
        notes.append(trains_note(settings, state.trainable.parameter_groups(settings)))
        notes += [class_note(settings, class_pictures), steps_note(settings, subjects, run.world.size)]
        notes += held_out_notes(settings, len(run.held_out))
        notes += disk_notes(run, state, class_pictures)
        notes += memory_notes(run, sd, tuning)
        for note in notes:
            print(note)
        run.notes = [dataclasses.asdict(note) for note in notes]

    run.on_main(work)
    if settings.dry_run:
        raise Stopped


def subject_notes(subject: Subject, settings: Settings, sd: StableDiffusion, is_named: bool) -> list[Note]:
    """The notes on the prompts and photographs of one subject. is_named: whether each begins with its name."""
    size_of = sizes_of_photographs(settings, sd)
    notes = prompt_notes(subject, settings, sd.tokenizer)
    notes += photograph_notes([e.picture for e in subject.examples], [size_of(e) for e in subject.examples])
    return [dataclasses.replace(note, text=f"{subject.name}: {note.text}") for note in notes] if is_named else notes


def resolution_notes(settings: Settings, own: int) -> list[Note]:
    """A warning if the model was trained on pictures of another size. own: that size in pixels."""
    if settings.resolution == own:
        return []
    text = f"The model was trained at {own} pixels; this run has {settings.resolution}. --resolution {own} suits it."
    return [Note("resolution", text, warning=True)]


def trains_note(settings: Settings, groups: Sequence[dict[str, Any]]) -> Note:
    """What trains: how many numbers of each network, and how fast. groups: see `Trainable.parameter_groups`."""
    parts = []
    for group in groups:
        count = sum(parameter.numel() for parameter in group["params"])
        name = NAMES.get(group["name"], group["name"])
        parts.append(f"{name}: {count:,} numbers at a learning rate of {group['lr']:g}")
    lora = ""
    if settings.lora_rank:
        lora = f"LoRA of rank {settings.lora_rank}"
        lora += f", {settings.lora_conv_rank} in 3x3 convolutions. " if settings.lora_conv_rank else ". "
    return Note("trains", f"{lora}{'; '.join(parts)}.")


def class_note(settings: Settings, class_pictures: Sequence[ClassPictures]) -> Note:
    """How many class pictures are still to be made. How long that takes is unknown before the first ones."""
    topic = "class pictures"
    if settings.predicts_prior:
        return Note(topic, "None are made: the base model's own prediction takes their place.")
    if not class_pictures:
        return Note(topic, "None are made: the run has no prior term.")
    missing = sum(len(pictures.missing()) for pictures in class_pictures)
    number = sum(len(pictures.paths) for pictures in class_pictures)
    if not missing:
        return Note(topic, f"All {number:,} are there.")
    text = f"{missing:,} of {number:,} are still to make, in {settings.sample_steps} sampling steps each."
    return Note(topic, f"{text} The first ones will tell how long it takes.")


def steps_note(settings: Settings, subjects: Sequence[Subject], processes: int) -> Note:
    """How often the run sees each photograph, and the effective batch."""
    parts = settings.train_batch_size, settings.gradient_accumulation_steps, processes
    batch, weights = math.prod(parts), sum(subject.weight for subject in subjects)
    passes = []
    for subject in subjects:
        share = subject.weight / weights
        number = settings.max_train_steps * batch * share / sum(example.repeats for example in subject.examples)
        many = f"{number:.2g}" if number < 10 else f"{number:,.0f}"
        whose = f" of {subject.name}" if len(subjects) > 1 else ""
        passes.append(f"{many} passes over the {counted(len(subject.examples), 'photograph')}{whose}")
    text = f"{counted(settings.max_train_steps, 'step')} = {listed(passes)}. A step takes {batch:,} of them"
    if settings.uses_class_pictures:
        text += " and as many class pictures"
    if batch > settings.train_batch_size:
        text += " (batch of {} x {} accumulated x {} processes)".format(*parts)
    return Note("steps", f"{text}.")


def held_out_notes(settings: Settings, number: int) -> list[Note]:
    """Where the held-out pictures are from; nothing without them."""
    if not number:
        return []
    folder = settings.validation_data_dir
    place = "/".join(Path(folder).parts[-2:]) if folder else "the photographs"
    return [Note("validation", f"{counted(number, 'held-out picture')} from {place}.")]


def disk_notes(run: Run, state: TrainingState, class_pictures: Sequence[ClassPictures]) -> list[Note]:
    """How much of the disk the run fills at most, and a warning if it has less."""
    settings = run.settings
    saves = -(-settings.max_train_steps // settings.checkpointing_steps)
    kept = min(saves, settings.checkpoints_total_limit or saves)
    at_once = kept + (kept < saves)  # an old checkpoint goes when the new one is there
    checkpoints = at_once * state.bytes_saved
    pictures = sum(len(pictures.missing()) for pictures in class_pictures) * 3 * settings.resolution**2
    results = (1 + settings.keeps_best) * state.trainable.bytes_saved()
    needed, free = checkpoints + results + pictures, free_space(run.folder)
    most, part = f"at most {amount(needed)}", f"{amount(checkpoints, needed)} of it with"
    text = f"The run fills {most}, {part} {counted(at_once, 'checkpoint')}; {amount(free)} are free."
    notes = [Note("disk", text)]
    if free < needed:
        text = "The run may fill the disk; --checkpoints-total-limit 1 keeps the last checkpoint alone."
        notes.append(Note("disk", text, warning=True))
    return notes
