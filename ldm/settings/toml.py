"""Writes the settings of a run as TOML. `train.py --config RUN/config.toml` then repeats the run."""

import json
import os
import shlex
from dataclasses import Field
from pathlib import Path
from typing import Any

from ldm.errors import one_line
from ldm.runtime import MAX_PATH
from ldm.settings.settings import Settings
from ldm.settings.subjects import FOLDERS, SubjectSettings

SETTINGS = "config.toml"  # in a run's folder
ONCE = ("output_dir", "resume_from_checkpoint", "dry_run")  # belong to one start of train.py, not to the run

HEADER = """\
# All settings of this run. Those that end without a value were not given.
# Repeat it in a new folder:  {launcher} {program} --config {path}
# Resume it here:             {launcher} {program} --config {path} --resume-from-checkpoint latest
"""


def to_toml(settings: Settings, path: Path, processes: int, program: str = "train.py") -> str:
    """All settings but those of `ONCE`, in groups; paths are absolute.

    path: of the file that will hold the text. processes: of the run; with another number its batches differ. program:
    the script that trains.
    """
    launcher = "python" if processes == 1 else f"torchrun --nproc-per-node {processes}"
    names = {"launcher": launcher, "program": one_line(shlex.quote(program))}
    parts = [HEADER.format(**names, path=one_line(shlex.quote(str(path.absolute())), 2 * MAX_PATH))]
    for group, fields in Settings.groups():
        lines = [_line(f, getattr(settings, f.name)) for f in fields if f.name not in ONCE]
        if lines:
            parts.append("\n".join([f"# {group.__doc__}", *lines, ""]))
    return "\n".join(parts)


def run_of(config: Path) -> Path | None:
    """The folder of the run that wrote this settings file; None for a file of the user's own."""
    return config.parent if config.name == SETTINGS and (config.parent / "checkpoints").is_dir() else None


def _line(f: Field, value: Any) -> str:
    if value is None:
        return f"# {f.name} ="
    return f"{f.name} = {_value(os.path.abspath(value) if f.metadata['path'] else value)}"


def _value(value: Any) -> str:
    """A value in TOML."""
    if isinstance(value, SubjectSettings):
        folders = {name: os.path.abspath(path) for name in FOLDERS if (path := getattr(value, name)) is not None}
        given = value.given() | folders
        return "{ " + ", ".join(f"{name} = {_value(item)}" for name, item in given.items()) + " }"
    if isinstance(value, tuple | list):
        items = [_value(item) for item in value]
        return "[\n" + "".join(f"    {item},\n" for item in items) + "]" if len(items) > 1 else f"[{''.join(items)}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):  # a JSON string is a TOML string, but for one character
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
