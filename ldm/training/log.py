"""The lines of a run: metrics.jsonl, one for each step, and validation.jsonl, one for each validation."""

import json
import resource
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from ldm.runtime import dropped_output, replacing, written
from ldm.training.checkpoint import METRICS, VALIDATION
from ldm.training.numbers import Numbers
from ldm.training.pace import Pace
from ldm.training.state import Metrics, check_finite
from ldm.training.tracking import Tracker


class Log:
    """Adds lines to the two files of a run's folder, and reports them to the tracker.

    metrics, validation: all lines of the files, so that a checkpoint has every one even if the disk is full. They begin
    with those of the run that this one resumes.
    """

    def __init__(self, folder: Path, metrics: str, validation: str, tracker: Tracker):
        self.folder, self.metrics, self.validation, self.tracker = folder, metrics, validation, tracker
        self._noted = 0
        with replacing(folder / METRICS) as temporary:
            temporary.write_text(metrics, encoding="utf-8")
        (folder / VALIDATION).unlink(missing_ok=True)  # of a run that went back to before its first validation
        if validation:
            self._replace(validation)

    def add(self, metrics: Metrics) -> None:
        """Adds a step; its `not_shown` lists output that was dropped. Raises RunError if it can't be written."""
        if notes := dropped_output[self._noted :]:
            metrics = metrics | {"not_shown": notes}
            self._noted += len(notes)
        line = json.dumps(metrics) + "\n"
        self.metrics += line
        self.tracker.numbers(metrics["step"], metrics)
        with written(self.folder / METRICS), (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(line)

    def add_validation(self, line: Metrics) -> None:
        """Adds a validation. Raises RunError if it can't be written."""
        self.validation += json.dumps(line) + "\n"
        own = {"seconds": "validation_seconds"}  # the step itself has reported its seconds
        self.tracker.numbers(line["step"], {own.get(name, name): value for name, value in line.items()})
        self._replace(self.validation)

    def _replace(self, text: str) -> None:
        path = self.folder / VALIDATION
        with written(path), replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    @property
    def validations(self) -> list[Metrics]:
        """The lines of validation.jsonl."""
        return read_lines(self.validation)


def read_lines(text: str) -> list[Metrics]:
    """The JSON objects that have a whole step, one a line. Other lines are left out."""
    found = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) and type(value.get("step")) is int:
            found.append(value)
    return found


class Reporter:
    """Shows and logs each step once, when its numbers have arrived from the device.

    bar: moves with each update. log: None in all processes but the main one. pictures: of a step, in all processes.
    stopped: whether a signal has come to any process, as of the last step that was reported.
    """

    def __init__(self, bar: tqdm, log: Log | None, pictures: int):
        self.bar, self.log, self.pictures, self.stopped = bar, log, pictures, False
        self._arriving: tuple[Numbers, Metrics] | None = None
        self._pace = Pace(bar.total or 0)
        self._last = 0.0  # when a step was reported last

    def add(self, numbers: Numbers, metrics: Metrics) -> None:
        """Reports the step before, and keeps this one. Raises as `finish`."""
        self.finish()
        self._arriving = numbers, metrics

    def finish(self) -> None:
        """Waits for the numbers of the step that is kept, and reports it.

        Raises Diverged if a loss or the norm of the gradients is not finite, unless fp16 skipped the update.
        """
        if self._arriving is None:
            return
        (numbers, metrics), self._arriving = self._arriving, None
        read, step = numbers.read(), metrics["step"]
        self.stopped = read.pop("signals") > 0
        check_finite("loss", read["loss"], step)
        if not metrics.get("skipped"):
            check_finite("norm of the gradients", read["grad_norm"], step)
            shown = {name.removesuffix("_loss"): f"{read[name]:.4f}" for name in read if name.endswith("loss")}
            self.bar.update()
            self.bar.set_postfix(shown, refresh=False)
        began, self._last = max(metrics.pop("began"), self._last), time.perf_counter()
        if self.log is not None:
            self.log.add({"step": step} | read | metrics | self._speed(seconds := self._last - began))
            if left := self._pace.after(step, seconds):
                self.bar.write(left)

    def _speed(self, seconds: float) -> Metrics:
        """memory_gb: the most that this process has used so far, on its GPU if it has one."""
        per_second = self.pictures / max(seconds, 1e-9)
        memory = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else max_resident()
        return {
            "seconds": round(seconds, 4),
            "pictures_per_second": float(f"{per_second:.4g}"),
            "memory_gb": round(memory / 1e9, 3),
        }


def max_resident() -> int:
    """The most bytes that this process has had in memory."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
