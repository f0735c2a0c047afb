"""The folder of a training run: its settings, its metrics, its sheets and the final model."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from ldm import files
from ldm.errors import InputError

DEFAULT = Path("runs", "dreambooth")


class Run:
    """A folder that is new or empty, and not made before `start`. Raises InputError if it holds something."""

    def __init__(self, folder: str | None):
        self.folder = Path(folder) if folder is not None else _untaken(DEFAULT)
        files.insist_writable(self.folder, "--output-dir")
        if self.folder.is_dir() and any(self.folder.iterdir()):
            raise InputError(f"--output-dir {self.folder} is not empty; give a new folder")

    def start(self, settings: Any) -> None:
        """Makes the folder and writes config.json: the settings, a dataclass, as they were."""
        try:
            (self.folder / "sheets").mkdir(parents=True)
        except OSError as error:
            raise InputError(f"--output-dir {self.folder} can't be made: {error.strerror}") from None
        config = json.dumps(dataclasses.asdict(settings), indent=2)
        (self.folder / "config.json").write_text(config + "\n", encoding="utf-8")

    def log(self, **metrics: float) -> None:
        """One line of metrics.jsonl."""
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")

    def model_path(self, layout: str) -> Path:
        return self.folder / ("model.safetensors" if layout == "official" else "model")


def _untaken(path: Path) -> Path:
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free
