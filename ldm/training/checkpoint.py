"""The full state of a training run on disk: whole or not there, and checked before it is trusted.

    checkpoint-000400/
        model.safetensors      the weights at that step, as the `Trainable` saves them. Of a full tuning it is a whole
                               model, an official single file: sample.py takes the folder as --model
        training.safetensors   the optimizer's moments, and the EMA's averages if there are any
        state.json             step, scaler, settings and everything else that is not a tensor
        metrics.jsonl          the run's metrics up to that step
        validation.jsonl       its validations up to that step, if there were any
        SHA256SUMS             of these files, as `sha256sum -c` reads them

A checkpoint is written under a temporary name, flushed to disk, and renamed when all of it is there.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

from ldm.errors import InputError, RunError, one_line
from ldm.formats import open_tensors, save_tensors
from ldm.runtime import check_file, list_folder, read_json, read_text
from ldm.training.content import check_content
from ldm.training.state import TrainingState

TRAINING, STATE, CHECKSUMS = "training.safetensors", "state.json", "SHA256SUMS"
METRICS, VALIDATION = "metrics.jsonl", "validation.jsonl"
NAME = re.compile(r"checkpoint-(\d{6,})")
TEMPORARY, REPLACED = ".tmp-", ".old-"
MAX_CHECKSUMS, MAX_METRICS = 1 << 12, 1 << 30  # bytes: five lines, some millions of steps


def save(folder: Path, state: TrainingState, config: dict[str, Any], metrics: str, validation: str = "") -> None:
    """Writes checkpoint-STEP into the folder. config: what `Identity.check` compares a resumed run with.

    metrics, validation: the lines of the run so far.

    Raises RunError, and leaves nothing of the checkpoint, if the disk refuses it.
    """
    final = path_of(folder, state.step)
    temporary = folder / f"{TEMPORARY}{final.name}"
    files = [state.trainable.weights_file, TRAINING, STATE, METRICS]
    try:
        temporary.mkdir(parents=True)
        state.trainable.save(temporary / files[0], state.metadata())
        save_tensors(temporary / TRAINING, state.tensors(), {"format": "pt"})
        numbers = {**state.numbers(), "run": config}
        (temporary / STATE).write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
        (temporary / METRICS).write_text(metrics, encoding="utf-8")
        if validation:
            (temporary / VALIDATION).write_text(validation, encoding="utf-8")
            files.append(VALIDATION)
        lines = [f"{sha256(temporary / name)}  {name}\n" for name in files]
        (temporary / CHECKSUMS).write_text("".join(lines), encoding="utf-8")
        for name in (*files, CHECKSUMS, "."):
            flush(temporary / name)
        put_in_place(temporary, final)
    except OSError as error:
        raise RunError(f"{final} can't be saved ({error}); older checkpoints are as they were") from None
    finally:
        clean(folder)


def path_of(folder: Path, step: int) -> Path:
    """The path of a step's checkpoint in the folder of checkpoints."""
    return folder / f"checkpoint-{step:06d}"


def put_in_place(temporary: Path, final: Path) -> None:
    """Renames a folder that is on the disk. `clean` removes the older one, or puts it back after a kill in between."""
    if final.exists():  # damaged, or of a run that went back and has come here again
        final.rename(final.with_name(f"{REPLACED}{final.name}"))
    temporary.rename(final)
    flush(final.parent)


def all_in(folder: Path) -> list[Path]:
    """The checkpoints of a run by their names, oldest first."""
    paths = list_folder(folder) if os.path.exists(folder) else []
    found = {int(m[1]): path for path in paths if (m := NAME.fullmatch(path.name))}
    return [found[step] for step in sorted(found)]


def newest(folder: Path, state: TrainingState) -> Path | None:
    """The newest whole checkpoint; a warning names newer ones that are damaged. None if there is no checkpoint.

    state: of the run that resumes. Raises InputError if every checkpoint is damaged.
    """
    found = all_in(folder)
    for path in reversed(found):
        if (damage := damaged(path) or misfit(path, state)) is None:
            return path
        said = f"checkpoint {path} is damaged: {damage}; taking the one before it"
        warnings.warn(one_line(said), stacklevel=2)
    if found:
        raise InputError(f"no checkpoint in {folder} is whole; begin again in a new --output-dir")
    return None


def damaged(path: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if every byte is as it was written."""
    try:
        lines = read_text(path / CHECKSUMS, MAX_CHECKSUMS).splitlines()
        sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        others = sums.keys() - {TRAINING, STATE, METRICS, VALIDATION}  # the weights
        if len(others) != 1 or not {TRAINING, STATE, METRICS} <= sums.keys() or any("/" in name for name in sums):
            return f"{CHECKSUMS} does not name the four files of a checkpoint"
        for name, digest in sums.items():
            if not os.path.lexists(path / name):
                return f"{name} is missing"
            check_file(path / name)
            if sha256(path / name) != digest:
                return f"{name} is not what was saved"
        numbers = load_state(path)
        if type(numbers.get("step")) is not int or not isinstance(numbers.get("run"), dict):
            return f"{STATE} does not name its step and its run"
        lines_of(path)
    except InputError as error:
        return str(error).removeprefix(f"{path}/")
    except OSError as error:
        return f"{error.filename} can't be read: {error.strerror}"
    return None


def lines_of(path: Path) -> tuple[str, str]:
    """The lines of metrics.jsonl and validation.jsonl in a checkpoint. Raises InputError if they can't be read."""
    validated = os.path.lexists(path / VALIDATION)
    return read_text(path / METRICS, MAX_METRICS), read_text(path / VALIDATION, MAX_METRICS) if validated else ""


def misfit(path: Path, state: TrainingState) -> str | None:
    """What keeps the state of a whole checkpoint from being restored, in words; None if nothing does."""
    try:
        training = open_tensors(path / TRAINING)[0]
        check_content(state, path / state.trainable.weights_file, training, load_state(path))
    except InputError as error:
        return str(error).removeprefix(f"{path}/")
    return None


def check_whole(path: Path) -> None:
    """Raises InputError unless the path is a whole checkpoint."""
    if not os.path.isdir(path):
        others = all_in(path.parent) if os.path.isdir(path.parent) else []
        newest = f"; the newest is {others[-1].name}" if others else ""
        raise InputError(f"--resume-from-checkpoint {path} is no checkpoint folder{newest}")
    _refuse(path, damaged(path))


def check_fits(path: Path, state: TrainingState) -> None:
    """Raises InputError unless the state of a whole checkpoint can be restored."""
    _refuse(path, misfit(path, state))


def _refuse(path: Path, damage: str | None) -> None:
    if damage is not None:
        raise InputError(f"--resume-from-checkpoint {path} is damaged: {damage}; take an older one, or latest")


def restore(path: Path, state: TrainingState) -> None:
    """Puts the state of a checkpoint back, bit for bit. It is whole, and fits."""
    state.restore(path / state.trainable.weights_file, open_tensors(path / TRAINING)[0], load_state(path))


def load_state(path: Path) -> dict[str, Any]:
    """What state.json says. Raises InputError if it is damaged."""
    tree = read_json(path / STATE)
    if not isinstance(tree, dict):
        raise InputError(f"{path / STATE} is damaged: it does not hold a JSON object")
    return tree


def prune(folder: Path, limit: int | None, step: int) -> None:
    """Deletes the oldest checkpoints until `limit` are left. Called when the checkpoint of `step` is safe.

    Later checkpoints, which a run that went back has ahead of it, do not count and stay.
    """
    made = [path for path in all_in(folder) if int(NAME.fullmatch(path.name)[1]) <= step]
    for path in made[: -limit if limit is not None else 0]:
        path.rename(folder / f"{TEMPORARY}{path.name}")  # half-deleted, it no longer has a checkpoint's name
    clean(folder)


def clean(folder: Path) -> None:
    """Repairs what a killed run has left half-written, half-deleted or half-replaced."""
    for path in folder.glob(f"{REPLACED}*"):
        final = folder / path.name.removeprefix(REPLACED)
        remove(path) if final.exists() else path.rename(final)
    for path in folder.glob(f"{TEMPORARY}*"):
        remove(path)


def check_space(folder: Path, needed: int) -> None:
    """Raises RunError if the folder's disk has less than `needed` bytes left."""
    if (free := free_space(folder)) < needed:
        raise RunError(f"{folder} needs {needed / 1e6:.0f} MB for a save, and its disk has {free / 1e6:.0f} MB left")


def free_space(folder: Path) -> int:
    """Bytes that are left on the disk that holds the folder, or will hold it."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Makes the system write a file or folder to the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Removes a file or folder, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
