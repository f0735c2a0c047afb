"""The full state of a training run on disk: whole or not there, checked before it is trusted.

    checkpoint-000400/
        model.safetensors      the model at that step, an official single file: sample.py takes the folder as --model
        training.safetensors   the optimizer's moments, and the EMA's averages if there are any
        state.json             step, scaler, settings and all else that is no tensor
        metrics.jsonl          the run's metrics up to that step
        SHA256SUMS             of the four, as `sha256sum -c` reads them

A checkpoint is written under a temporary name, flushed to disk, and renamed when all of it is there.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ldm.errors import InputError, RunError
from ldm.formats import CHECKPOINT_MODEL, Tensors, open_tensors, read, save_tensors

MODEL, TRAINING, STATE, METRICS = CHECKPOINT_MODEL, "training.safetensors", "state.json", "metrics.jsonl"
FILES, SUMS = (MODEL, TRAINING, STATE, METRICS), "SHA256SUMS"
NAME = re.compile(r"checkpoint-(\d{6,})")
TEMPORARY, REPLACED = ".tmp-", ".old-"


def save(
    folder: Path, step: int, save_model: Callable[[Path], Any], training: Tensors, state: dict[str, Any], metrics: str
) -> None:
    """Writes checkpoint-STEP into the folder. Raises RunError, and leaves nothing of it, if the disk won't take it."""
    final = folder / f"checkpoint-{step:06d}"
    temporary = folder / f"{TEMPORARY}{final.name}"
    try:
        temporary.mkdir(parents=True)
        save_model(temporary / MODEL)
        save_tensors(temporary / TRAINING, training, {"format": "pt"})
        (temporary / STATE).write_text(json.dumps({"step": step, **state}, indent=1) + "\n", encoding="utf-8")
        (temporary / METRICS).write_text(metrics, encoding="utf-8")
        lines = [f"{sha256(temporary / name)}  {name}\n" for name in FILES]
        (temporary / SUMS).write_text("".join(lines), encoding="utf-8")
        for name in (*FILES, SUMS, "."):
            flush(temporary / name)
        if final.exists():  # damaged, or of a run that has gone back and comes here again
            final.rename(folder / f"{REPLACED}{final.name}")
        temporary.rename(final)
        flush(folder)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{final} can't be saved ({error}); older checkpoints are as they were") from None
    finally:
        clean(folder)


def listed(folder: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first, by their names."""
    found = {int(m[1]): path for path in folder.glob("checkpoint-*") if (m := NAME.fullmatch(path.name))}
    return [found[step] for step in sorted(found)]


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; damaged newer ones are named in a warning. None if there is none.

    Raises InputError if all that there are are damaged.
    """
    found = listed(folder)
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
        lines = (path / SUMS).read_text(encoding="utf-8").splitlines()
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        for name in FILES:
            if sha256(path / name) != sums[name]:
                return f"{name} is not what was saved"
        if not {"step", "run"} <= load_state(path).keys():
            return f"{STATE} does not say what run it is of"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, AttributeError) as error:
        return f"{SUMS} can't be read: {error!r}"
    return None


def check_whole(path: Path) -> None:
    """Raises InputError if at the path is no checkpoint, or a damaged one."""
    if not path.is_dir():
        raise InputError(f"--resume-from-checkpoint {path} is no checkpoint folder")
    if (damage := damaged(path)) is not None:
        raise InputError(f"--resume-from-checkpoint {path} is damaged: {damage}; take an older one, or latest")


def load(path: Path) -> tuple[Tensors, Tensors, dict[str, Any]]:
    """The model's tensors under their official names, the training tensors and the state of a whole checkpoint."""
    return read(path / MODEL).tensors, open_tensors(path / TRAINING)[0], load_state(path)


def load_state(path: Path) -> dict[str, Any]:
    return json.loads((path / STATE).read_text(encoding="utf-8"))


def prune(folder: Path, limit: int | None, step: int) -> None:
    """Deletes the oldest checkpoints until `limit` are left. Called when that of `step`, the last one made, is safe.

    Later ones, which a run that went back has left ahead of it, do not count and are left alone.
    """
    made = [path for path in listed(folder) if int(NAME.fullmatch(path.name)[1]) <= step]
    for path in made[: -limit if limit is not None else 0]:
        path.rename(folder / f"{TEMPORARY}{path.name}")  # a half-deleted one never has a checkpoint's name
    clean(folder)


def clean(folder: Path) -> None:
    """Puts right what a killed run may have left half-written, half-deleted or half-replaced."""
    for path in folder.glob(f"{REPLACED}*"):
        final = folder / path.name.removeprefix(REPLACED)
        remove(path) if final.exists() else path.rename(final)
    for path in folder.glob(f"{TEMPORARY}*"):
        remove(path)


def check_space(folder: Path, needed: int) -> None:
    """Raises RunError unless the disk has `needed` bytes left for the folder."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RunError(f"{folder} needs {needed / 1e6:.0f} MB for a save, and its disk has {free / 1e6:.0f} MB left")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Has the system write a file or folder through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
