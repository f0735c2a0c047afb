"""The metrics of a run: a line of metrics.jsonl for each step, and the tracker's curves."""

import json
import time
import warnings
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ldm.runtime import dropped_output, replacing, written
from ldm.training.numbers import Numbers
from ldm.training.pace import Pace
from ldm.training.state import Metrics, check_finite
from ldm.training.tracking import tracker


class MetricsLog:
    """Adds lines to a file. `text` holds all lines, so that a checkpoint has every one even if the disk is full.

    text: the lines of the run that this one resumes. If a tracker is named, it gets the metrics too. A tracker that
    fails is dropped with a warning.
    """

    def __init__(self, path: Path, text: str, report_to: str, config: dict[str, Any]):
        self.path, self.text, self._noted = path, text, 0
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        self._track = tracker(report_to, path.parent, config)

    def add(self, metrics: Metrics) -> None:
        """Adds a line; its `not_shown` lists output that was dropped. Raises RunError if it can't be written."""
        if notes := dropped_output[self._noted :]:
            metrics = metrics | {"not_shown": notes}
            self._noted += len(notes)
        line = json.dumps(metrics) + "\n"
        self.text += line
        try:
            self._track(metrics["step"], {k: v for k, v in metrics.items() if isinstance(v, float)})
        except Exception as error:  # a tracker can raise anything
            warnings.warn(f"the tracker gets no more metrics: {error}", stacklevel=2)
            self._track = lambda step, metrics: None
        with written(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(line)


class Reporter:
    """Shows and logs each step once, when its numbers have arrived from the device.

    bar: moves with each update. log: None in all processes but the main one. stopped: whether a signal has come to any
    process, as of the last step that was reported.
    """

    def __init__(self, bar: tqdm, log: MetricsLog | None):
        self.bar, self.log, self.stopped = bar, log, False
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
        began, self._last = max(metrics["seconds"], self._last), time.perf_counter()
        if self.log is not None:
            self.log.add({"step": step} | read | metrics | {"seconds": round(self._last - began, 4)})
            if left := self._pace.after(step):
                self.bar.write(left)
