"""Keeps the report of a run up to date while it trains. A failure is a warning, and never costs the run."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ldm import images
from ldm.data import Subject
from ldm.errors import one_line
from ldm.images import Picture
from ldm.report.file import REPORT, write
from ldm.runtime import replacing
from ldm.sampling import contact_sheet
from ldm.training import ClassPictures, Run, distinct_class_pictures

ROW, ROWS, KINDS = 6, 2, 8  # pictures in a row, rows of a prompt, prompts
SIDE = 256  # pixels along a picture at most


def begin(run: Run, subjects: Sequence[Subject], class_pictures: Sequence[ClassPictures]) -> None:
    """Puts small photographs and class pictures into the run's folder, where the report finds them, and writes it."""
    photographs = [(subject.prompt, [example.picture for example in subject.examples]) for subject in subjects]
    generated = [(pictures.recipe["prompt"], pictures.paths) for pictures in distinct_class_pictures(class_pictures)]

    def work() -> None:
        for name, kinds in (("photographs", photographs), ("class", generated)):
            if kinds:
                _save(run, name, kinds)

    run.world.on_main(lambda: _tried("pictures of the photographs", work))
    update(run)


def update(run: Run) -> None:
    """Writes the run's report again."""
    run.world.on_main(lambda: _tried("report", lambda: write([run.folder])))


def finish(run: Run) -> None:
    """Writes the run's report for the last time, and prints its path."""
    update(run)
    run.world.print_main(f"report: {run.folder / REPORT}")


def _save(run: Run, name: str, kinds: Sequence[tuple[str, Sequence[Picture | Path]]]) -> None:
    """Writes the first pictures of each kind, (prompt, pictures), as one sheet, sheets/NAME.png."""
    side = min(run.settings.resolution, SIDE)
    rows = []
    for prompt, pictures in kinds[:KINDS]:
        for first in range(0, min(len(pictures), ROW * ROWS), ROW):
            part = pictures[first : first + ROW]
            label = f"{prompt} ({first + 1} to {first + len(part)} of {len(pictures)})"
            rows.append((label, [images.square(picture, side) for picture in part]))
    path = run.folder / "sheets" / f"{name}.png"
    with replacing(path) as temporary:
        contact_sheet.grid(rows).save(temporary, format="PNG")


def _tried(what: str, work: Callable[[], Any]) -> None:
    try:
        work()
    except Exception as error:  # whatever it is, the run is worth more
        warnings.warn(one_line(f"no {what}: {error}"), stacklevel=2)
