"""The full state of a training run on disk: whole or not there, and checked before it is trusted.

    checkpoint-000400/
        model.safetensors      the weights at that step, as the `Trainable` saves them. Of a full tuning it is a whole
                               model, an official single file: sample.py takes the folder as --model
        training.safetensors   the optimizer's moments, and the EMA's averages if there are any
        state.json             step, scaler, settings and everything else that is not a tensor
        metrics.jsonl          the run's metrics up to that step
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

from safetensors import SafetensorError

from ldm.errors import InputError, RunError
from ldm.formats import open_tensors, save_tensors
from ldm.training.state import TrainingState

TRAINING, STATE, METRICS, CHECKSUMS = "training.safetensors", "state.json", "metrics.jsonl", "SHA256SUMS"
NAME = re.compile(r"checkpoint-(\d{6,})")
TEMPORARY, REPLACED = ".tmp-", ".old-"


def save(folder: Path, state: TrainingState, config: dict[str, Any], metrics: str) -> None:
    """Writes checkpoint-STEP into the folder. config: what `continuity.changes` compares a resumed run with.

    Raises RunError, and leaves nothing of the checkpoint, if the disk refuses it.
    """
    final = folder / f"checkpoint-{state.step:06d}"
    temporary = folder / f"{TEMPORARY}{final.name}"
    files = (state.trainable.weights_file, TRAINING, STATE, METRICS)
    try:
        temporary.mkdir(parents=True)
        state.trainable.save(temporary / files[0], state.metadata())
        save_tensors(temporary / TRAINING, state.tensors(), {"format": "pt"})
        numbers = {**state.numbers(), "run": config}
        (temporary / STATE).write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
        (temporary / METRICS).write_text(metrics, encoding="utf-8")
        lines = [f"{sha256(temporary / name)}  {name}\n" for name in files]
        (temporary / CHECKSUMS).write_text("".join(lines), encoding="utf-8")
        for name in (*files, CHECKSUMS, "."):
            flush(temporary / name)
        if final.exists():  # damaged, or of a run that went back and has come here again
            final.rename(folder / f"{REPLACED}{final.name}")
        temporary.rename(final)
        flush(folder)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{final} can't be saved ({error}); older checkpoints are as they were") from None
    finally:
        clean(folder)


def all_in(folder: Path) -> list[Path]:
    """The checkpoints of a run by their names, oldest first."""
    found = {int(m[1]): path for path in folder.glob("checkpoint-*") if (m := NAME.fullmatch(path.name))}
    return [found[step] for step in sorted(found)]


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint; a warning names newer ones that are damaged. None if there is no checkpoint.

    Raises InputError if every checkpoint is damaged.
    """
    found = all_in(folder)
    for path in reversed(found):
        if (damage := damaged(path)) is None:
            return path
        warnings.warn(f"checkpoint {path} is damaged: {damage}; taking the one before it", stacklevel=2)
    if found:
        raise InputError(f"no checkpoint in {folder} is whole; begin again in a new --output-dir")
    return None


def damaged(path: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if every byte is as it was written."""
    try:
        lines = (path / CHECKSUMS).read_text(encoding="utf-8").splitlines()
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        for name in (TRAINING, STATE, METRICS, *sorted(sums.keys() - {TRAINING, STATE, METRICS})):
            expected = sums[name]
            if name not in (TRAINING, STATE, METRICS) and not (path / name).exists():
                return f"{CHECKSUMS} lists {name[:80]!r}, which is missing"
            if sha256(path / name) != expected:
                return f"{name} is not what was saved"
        if not {"step", "run"} <= load_state(path).keys():
            return f"{STATE} does not name its run"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, AttributeError) as error:
        return f"{CHECKSUMS} can't be read: {error!r}"
    return None


def check_whole(path: Path) -> None:
    """Raises InputError unless the path is a whole checkpoint."""
    if not path.is_dir():
        raise InputError(f"--resume-from-checkpoint {path} is no checkpoint folder")
    if (damage := damaged(path)) is not None:
        raise InputError(f"--resume-from-checkpoint {path} is damaged: {damage}; take an older one, or latest")


def restore(path: Path, state: TrainingState) -> None:
    """Puts the state of a whole checkpoint back, bit for bit."""
    state.restore(path / state.trainable.weights_file, open_tensors(path / TRAINING)[0], load_state(path))


def load_state(path: Path) -> dict[str, Any]:
    return json.loads((path / STATE).read_text(encoding="utf-8"))


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
    """Bytes that the folder's disk has left."""
    return shutil.disk_usage(folder).free


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
