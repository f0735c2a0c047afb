"""Files and folders that are written whole or not at all."""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ldm.errors import InputError, RunError


def check_writable(folder: Path, flag: str) -> None:
    """Raises InputError, which names the flag, unless this user can write in the folder or create it."""
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise InputError(f"{flag} {folder} is a file; give a folder")
    existing = folder.absolute()
    while not os.path.exists(existing):  # Path.exists raises if this user may not list a parent
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{flag} {folder} can't be written: {existing} is not a folder that this user may write in")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`; it replaces `path` when the block ends, and is removed if the block raises.

    An older file or model folder at `path` stays until then, also for a process that has it memory-mapped.
    Raises InputError if `path` is a folder that holds anything but a model.
    """
    if path.is_dir() and any(path.iterdir()) and not (path / "model_index.json").exists():
        raise InputError(f"{path} is a folder with other things in it; give a new name to save a model to")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        temporary = Path(scratch, "new")
        yield temporary
        if path.is_dir():
            os.replace(path, Path(scratch, "old"))
        os.replace(temporary, path)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside, this process alone holds the folder's lock; waits for it first."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Wraps writing: turns an error of the disk into a RunError, which names the path."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} can't be written: {error}") from None
