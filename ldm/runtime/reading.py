"""Reading what a stranger may have made: regular files, folders that can be listed, text and JSON within limits.

A path can also lead to a pipe, which blocks whoever opens it, or to a device without an end. A JSON file can hold more
than the memory does, or be nested so deeply that Python gives up. Each of these is an InputError here.
"""

import json
import os
import stat
import tomllib
from pathlib import Path
from typing import Any

from ldm.errors import InputError

MAX_TEXT = 8 << 20  # bytes of a text file; CLIP's vocab.json has 1 MB
MAX_TOML = 1 << 18
MAX_DEPTH = 32  # JSON values within values
MAX_NAME, MAX_PATH = 255, 4095  # bytes, on Linux


def check_path(path: str | Path, flag: str) -> None:
    """Raises InputError, which names the flag, for a path that no disk can hold."""
    encoded = os.fsencode(path)
    if b"\0" in encoded or len(encoded) > MAX_PATH or any(len(name) > MAX_NAME for name in encoded.split(b"/")):
        raise InputError(f"{flag} {path} can't be the name of a file or folder; a name has at most {MAX_NAME} bytes")


def exists(path: str | Path) -> bool:
    """Whether there is such a file or folder. Raises InputError if this user may not look there."""
    try:
        os.stat(path)
    except PermissionError as error:
        raise InputError(f"{path} can't be read: {reason(error)}") from None
    except (OSError, ValueError):  # also for a name that no disk can hold
        return False
    return True


def check_file(path: str | Path) -> None:
    """Raises InputError unless this is a file that this user may read. Does not open it."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read: {reason(error)}") from None
    if stat.S_ISDIR(mode):
        raise InputError(f"{path} can't be read: it is a folder, and should be a file")
    if not stat.S_ISREG(mode):
        raise InputError(f"{path} can't be read: it is a pipe, socket or device, and should be a file")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path} is not for this user to read; chmod gives the permission")


def list_folder(folder: str | Path) -> list[Path]:
    """The paths in a folder, sorted by name. Raises InputError if it is no folder that this user may list."""
    try:
        return sorted(Path(folder).iterdir())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} can't be listed: {reason(error)}") from None


def read_text(path: str | Path, limit: int = MAX_TEXT) -> str:
    """The UTF-8 text of a file of at most `limit` bytes, without a byte order mark. Raises InputError for any other."""
    check_file(path)
    try:
        with open(path, "rb") as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise InputError(f"{path} is too large: it should have at most {limit} bytes")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} can't be read: it is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise InputError(f"{path} can't be read: {reason(error)}") from None


def read_json(path: str | Path, limit: int = MAX_TEXT) -> Any:
    """The value in a JSON file. Raises InputError as `read_text` and `parse_json` do."""
    return parse_json(read_text(path, limit), str(path))


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text. where: what the text is, for messages.

    Raises InputError if it is damaged or too large, is nested over MAX_DEPTH deep, or has a name twice in one object.
    """
    if len(text) > MAX_TEXT:
        raise InputError(f"{where} is too large: it should have at most {MAX_TEXT} letters")
    try:
        tree = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        what = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise InputError(f"{where} is damaged: {what}") from None
    _check_depth(tree, where)
    return tree


def read_toml(path: str | Path, limit: int = MAX_TOML) -> dict[str, Any]:
    """The table in a TOML file. Raises InputError if it is damaged or too large, or nested over MAX_DEPTH deep."""
    text = read_text(path, limit)
    try:
        tree = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also for a number of over 4,300 digits
        what = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise InputError(f"{path} is not TOML: {what}") from None
    _check_depth(tree, str(path))
    return tree


def _check_depth(tree: Any, where: str) -> None:
    level = [tree]
    for _ in range(MAX_DEPTH + 1):
        level = [item for box in level if isinstance(box, dict | list) for item in _items(box)]
    if level:
        raise InputError(f"{where} is damaged: it is nested over {MAX_DEPTH} deep")


def _items(box: dict | list) -> list:
    return list(box.values()) if isinstance(box, dict) else box


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError if it has a name twice."""
    tree = dict(pairs)
    if len(tree) < len(pairs):
        seen = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{twice[:80]!r} is in it twice")
    return tree


def reason(error: Exception) -> str:
    """Why the system refused a file, in its words."""
    return getattr(error, "strerror", None) or str(error)
