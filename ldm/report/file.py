"""Writes the report of a run, or of several runs, to an HTML file."""

import os
from collections.abc import Sequence
from pathlib import Path

from ldm.errors import InputError
from ldm.report import compare, page, record
from ldm.report.document import GENERATOR
from ldm.runtime import check_path, check_writable, replacing, written

REPORT, COMPARISON = "report.html", "comparison.html"


def write(folders: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Writes the report of a run, or the comparison of several, and returns its path.

    output: the file; if not given, report.html in the run's folder, or comparison.html beside the first run. Raises
    InputError if a folder holds no run or if `output` is a file of another kind, and RunError if it can't be written.
    """
    for folder in folders:
        check_path(folder, "run")
    records = [record.read(folder) for folder in folders]
    first = Path(folders[0])
    default = first / REPORT if len(records) == 1 else first.absolute().parent / COMPARISON
    path = Path(output) if output is not None else default
    _check_output(path)
    text = page.page(records[0]) if len(records) == 1 else compare.page(records)
    with written(path), replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _check_output(path: Path) -> None:
    """Raises InputError unless a report can be written there: a new file, or one that is a report already."""
    check_path(path, "output")
    check_writable(path.parent, "output")
    if os.path.lexists(path) and not _is_report(path):
        raise InputError(f"{path} is there already, and is no report; give a new name with --output")


def _is_report(path: Path) -> bool:
    """Whether this is a file that `write` has written."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return GENERATOR.encode() in file.read(1000)
    except OSError:
        return False
