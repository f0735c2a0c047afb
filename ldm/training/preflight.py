"""Says what a run will do before it does anything slow, and what looks wrong. Errors are those of the settings."""

import dataclasses
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

from ldm.images import Picture
from ldm.runtime import Stopped
from ldm.training.class_pictures import ClassPictures
from ldm.training.memory import Tuning, gigabytes, memory_notes
from ldm.training.note import Note, counted
from ldm.training.note_photographs import photograph_notes
from ldm.training.note_prompts import prompt_notes
from ldm.training.run import Run
from ldm.training.settings import Settings
from ldm.training.state import TrainingState


def tell_preflight(
    run: Run,
    tuning: Tuning,
    state: TrainingState,
    photographs: Sequence[Picture],
    class_pictures: ClassPictures | None,
) -> None:
    """Prints the notes, a line or two each, and keeps them for RUN/preflight.json. Raises Stopped in a dry run."""
    settings, sd = run.settings, state.trainable.sd

    def tell() -> None:
        notes = [
            *prompt_notes(settings, sd.tokenizer),
            *photograph_notes(settings, photographs),
            *resolution_notes(settings, sd.config.resolution),
            class_note(settings, class_pictures),
            steps_note(settings, len(photographs), run.world.size),
            *disk_notes(run, state, class_pictures),
            *memory_notes(run, sd, tuning),
        ]
        for note in notes:
            print(note)
        run.notes = [dataclasses.asdict(note) for note in notes]

    run.on_main(tell)
    if settings.dry_run:
        raise Stopped


def resolution_notes(settings: Settings, own: int) -> list[Note]:
    """A warning if the model was trained on pictures of another size. own: that size in pixels."""
    if settings.resolution == own:
        return []
    text = f"The model was trained at {own} pixels; this run has {settings.resolution}. --resolution {own} suits it."
    return [Note("resolution", text, warning=True)]


def class_note(settings: Settings, class_pictures: ClassPictures | None) -> Note:
    """How many class pictures are still to be made. How long that takes is unknown before the first ones."""
    topic = "class pictures"
    if settings.predicts_prior:
        return Note(topic, "None are made: the base model's own prediction takes their place.")
    if class_pictures is None:
        return Note(topic, "None are made: the run has no prior term.")
    missing, number = len(class_pictures.missing()), len(class_pictures.paths)
    if not missing:
        return Note(topic, f"All {number:,} are there.")
    text = f"{missing:,} of {number:,} are still to make, in {settings.sample_steps} sampling steps each."
    return Note(topic, f"{text} The first ones will tell how long it takes.")


def steps_note(settings: Settings, photographs: int, processes: int) -> Note:
    """How often the run sees each photograph, and the effective batch."""
    parts = settings.train_batch_size, settings.gradient_accumulation_steps, processes
    batch, steps = math.prod(parts), settings.max_train_steps
    passes = steps * batch / photographs
    many = f"{passes:.2g}" if passes < 10 else f"{passes:,.0f}"
    text = f"{counted(steps, 'step')} = {many} passes over the {counted(photographs, 'photograph')}."
    text += f" A step takes {batch:,} of them"
    if settings.with_prior_preservation and not settings.predicts_prior:
        text += " and as many class pictures"
    if batch > settings.train_batch_size:
        text += " (batch of {} x {} accumulated x {} processes)".format(*parts)
    return Note("steps", f"{text}.")


def disk_notes(run: Run, state: TrainingState, class_pictures: ClassPictures | None) -> list[Note]:
    """How much of the disk the run fills at most, and a warning if it has less."""
    settings = run.settings
    saves = -(-settings.max_train_steps // settings.checkpointing_steps)
    kept = min(saves, settings.checkpoints_total_limit or saves)
    at_once = kept + (kept < saves)  # an old checkpoint goes when the new one is there
    checkpoints = at_once * state.bytes_saved
    pictures = len(class_pictures.missing()) * 3 * settings.resolution**2 if class_pictures else 0
    needed, free = checkpoints + state.trainable.bytes_saved() + pictures, free_space(run.folder)
    most, part = f"at most {gigabytes(needed)} GB", f"{gigabytes(checkpoints)} of it with"
    text = f"The run fills {most}, {part} {counted(at_once, 'checkpoint')}; {gigabytes(free)} GB are free."
    notes = [Note("disk", text)]
    if free < needed:
        text = "The run may fill the disk; --checkpoints-total-limit 1 keeps the last checkpoint alone."
        notes.append(Note("disk", text, warning=True))
    return notes


def free_space(folder: Path) -> int:
    """Bytes that are left on the disk that will hold the folder."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free
