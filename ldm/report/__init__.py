"""The report of a run: one HTML file that tells its story, made from the run's folder alone.

markup       HTML from Python values, everything escaped
numbers      the numbers of curves: read, smoothed, thinned
scale        axes and their round ticks
chart        curves as SVG
pictures     thumbnails inside the page, up to a size
record       what a run's folder says; every file of it may be missing
story        what a run did, in sentences
commands     what to do next: sample, resume, open elsewhere
document     the frame of a page, with style.css and report.js
page         the report of one run
compare      two runs or more, side by side
"""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from ldm.errors import InputError, one_line
from ldm.report import compare, page, record
from ldm.report.document import GENERATOR
from ldm.runtime import check_path, check_writable, replacing, written

REPORT, COMPARISON = "report.html", "comparison.html"

__all__ = ["update", "write"]


def write(folders: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Writes the report of a run, or the comparison of several, and returns its path.

    output: the file; if not given, report.html in the run's folder, or comparison.html beside the first run. Raises
    InputError if a folder holds no run or if `output` is a file of another kind, and RunError if it can't be written.
    """
    records = [record.read(folder) for folder in folders]
    first = Path(folders[0])
    default = first / REPORT if len(records) == 1 else first.absolute().parent / COMPARISON
    path = Path(output) if output is not None else default
    _check_output(path)
    text = page.page(records[0]) if len(records) == 1 else compare.page(records)
    with written(path), replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def update(folder: Path) -> Path | None:
    """Writes a run's report again. A failure is a warning and costs the run nothing: None is returned."""
    try:
        return write([folder])
    except Exception as error:  # whatever it is, the run is worth more
        warnings.warn(one_line(f"no report: {error}"), stacklevel=2)
        return None


def _check_output(path: Path) -> None:
    """Raises InputError unless a report can be written there: a new file, or one that is a report already."""
    check_path(path, "output")
    check_writable(path.parent, "output")
    if os.path.lexists(path):
        try:
            with path.open("rb") as file:
                is_ours = GENERATOR.encode() in file.read(1000)
        except OSError:
            is_ours = False
        if not path.is_file() or not is_ours:
            raise InputError(f"{path} is there already, and is no report; give a new name with --output")
