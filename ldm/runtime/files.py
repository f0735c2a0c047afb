"""Replacing a file or folder in one step."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ldm.errors import InputError, RunError


def check_writable(folder: Path, flag: str) -> None:
    """Raises InputError, which names the flag, if nothing could be written in this folder, there already or not."""
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise InputError(f"{flag} {folder} is a file; give a folder")
    there = folder.absolute()
    while not os.path.exists(there):  # unlike Path's, it is no error where this user may not look
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{flag} {folder} can't be written: {there} is no folder that this user may write in")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place when the block ends well, and is removed when it does not.

    An older file or model folder of that name stays whole until then, also for whoever has it mapped; a folder that
    holds anything else is refused.
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
def written(path: Path) -> Iterator[None]:
    """Around writing: a disk that won't take it is a RunError that names the path."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} can't be written: {error}") from None
