"""Keeps the best model of a run, in best/: what the run would have written at that step, and best.json."""

import json
from collections.abc import Sequence
from pathlib import Path

from ldm.errors import InputError
from ldm.runtime import read_json, written
from ldm.training import checkpoint
from ldm.training.advice import Line, number
from ldm.training.run import Run
from ldm.training.settings import Settings
from ldm.training.state import TrainingState

FOLDER, FILE = "best", "best.json"


def value(line: Line, settings: Settings) -> float | None:
    """The --best-metric of a validation; None if it was not measured."""
    loss, of_class = number(line, "validation_loss"), number(line, "class_loss")
    if settings.best_metric == "validation_loss" or loss is None:
        return loss
    return None if of_class is None else loss + settings.prior_loss_weight * of_class


def is_best(lines: Sequence[Line], settings: Settings) -> bool:
    """Whether the last validation is better than all before it; the base model, at step 0, does not count."""
    values = [found for line in lines if line["step"] > 0 and (found := value(line, settings)) is not None]
    last = value(lines[-1], settings)
    return lines[-1]["step"] > 0 and last is not None and all(last < other for other in values[:-1])


def keep(run: Run, state: TrainingState, line: Line) -> None:
    """Writes best/ with the model as it is now, whole or not at all: an older one stays until then.

    Raises RunError if the disk refuses it.
    """
    about = {"step": state.step, "metric": run.settings.best_metric, "value": value(line, run.settings)}

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
