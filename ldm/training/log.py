"""The metrics of a run: a line of metrics.jsonl for each step, and the tracker's curves."""

import json
import warnings
from pathlib import Path
from typing import Any

from ldm.runtime import dropped_output, replacing, written
from ldm.training.state import Metrics
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
