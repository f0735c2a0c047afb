"""Keeps the best model of a run, in best/: what the run would have written at that step, and best.json."""

import json
from collections.abc import Sequence
from pathlib import Path

from ldm.errors import InputError
from ldm.runtime import read_json, written
from ldm.settings import Settings
from ldm.training import Run, TrainingState, checkpoint
from ldm.validation.advice import Line, number, score

FOLDER, FILE = "best", "best.json"


def value(line: Line, lines: Sequence[Line], settings: Settings) -> float | None:
    """The --best-metric of a validation; None if it was not measured. lines: all of the run."""
    if settings.best_metric == "validation_loss":
        return number(line, "validation_loss")
    found = score(line, lines)
    return None if found is None else found.total


def is_best(lines: Sequence[Line], settings: Settings) -> bool:
    """Whether the last validation is better than all before it; the base model, at step 0, does not count."""
    sign = -1.0 if settings.best_metric == "validation_loss" else 1.0
    values = [value(line, lines, settings) for line in lines if line["step"] > 0]
    known = [sign * found for found in values if found is not None]
    return bool(known) and values[-1] is not None and all(known[-1] > other for other in known[:-1])


def keep(run: Run, state: TrainingState, lines: Sequence[Line]) -> None:
    """Writes best/ with the model as it is now, whole or not at all: an older one stays until then.

    Raises RunError if the disk refuses it.
    """
    line = lines[-1]
    about = {"step": state.step, "metric": run.settings.best_metric, "value": value(line, lines, run.settings)}

    def work() -> None:
        final = run.folder / FOLDER
        temporary = run.folder / f"{checkpoint.TEMPORARY}{FOLDER}" / FOLDER  # a LoRA says its folder's name
        with written(final):
            try:
                temporary.mkdir(parents=True)
                state.save_result(temporary)
                (temporary / FILE).write_text(json.dumps(about) + "\n", encoding="utf-8")
                for path in (*sorted(temporary.rglob("*")), temporary):
                    checkpoint.flush(path)
                checkpoint.put_in_place(temporary, final)
            finally:
                checkpoint.clean(run.folder)

    run.world.on_main(lambda: run.saver.write_best(work))


def kept_step(folder: Path) -> int | None:
    """The step of the model in best/ of a run's folder; None if there is none that can be read."""
    path = folder / FOLDER / FILE
    try:
        return read_json(path)["step"] if path.exists() else None
    except (InputError, KeyError, TypeError):
        return None
