"""Files and folders that are written whole or not at all."""

import fcntl
import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

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
def replacing(path: Path, own: Collection[str] = ()) -> Iterator[Path]:
    """Gives a temporary path beside `path`; it replaces `path` when the block ends, and is removed if the block raises.

    An older file or folder at `path` stays until then, also for a process that has it memory-mapped.
    own: the files in an older folder that may be replaced, by their paths in it. Raises InputError if it holds others.
    """
    if path.is_dir() and (others := [name for name in _files_in(path) if name not in own]):
        raise InputError(
            f"{path} is a folder with other things in it, {min(others)} for one; give a new name to save a model to"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        temporary = Path(scratch, "new")
        yield temporary
        if path.is_dir():
            os.replace(path, Path(scratch, "old"))
        os.replace(temporary, path)


def _files_in(folder: Path) -> list[str]:
    """All files below a folder, and its empty folders. Raises InputError if one can't be listed."""

    def refuse(error: OSError) -> NoReturn:
        raise InputError(f"{error.filename} can't be listed: {error.strerror}") from None

    found = []
    for root, folders, files in os.walk(folder, onerror=refuse):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        found += [os.path.relpath(os.path.join(root, name), folder) for name in files + links]
        if not folders and not files and root != str(folder):
            found.append(os.path.relpath(root, folder))
    return found


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
    except OSError as error:
        raise RunError(f"{path} can't be written: {error}") from None
