"""Sends the numbers and the sheets of a run to TensorBoard or Weights & Biases."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ldm import images


class Tracker:
    """Reports to the tracker of this name; "none" reports nothing. A tracker that fails is dropped with a warning."""

    def __init__(self, name: str, folder: Path, config: dict[str, Any]):
        """folder: the run's. config: its settings, which Weights & Biases shows."""
        self.name = name
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"))
        elif name == "wandb":
            import wandb

            self._wandb, self._writer = (
                wandb,
                wandb.init(project="dreambooth", name=folder.name, dir=str(folder), config=config),
            )

    def numbers(self, step: int, line: dict[str, Any]) -> None:
        """Reports the fractional numbers of a line of metrics.jsonl or validation.jsonl."""
        values = {name: value for name, value in line.items() if isinstance(value, float)}
        if self.name == "tensorboard":
            self._try(lambda: [self._writer.add_scalar(name, value, step) for name, value in values.items()])
        elif self.name == "wandb":
            self._try(lambda: self._writer.log(values, step=step))

    def picture(self, step: int, name: str, path: Path) -> None:
        """Reports a picture file, such as a sheet."""
        if self.name == "tensorboard":
            self._try(lambda: self._writer.add_image(name, pixels(path), step, dataformats="HWC"))
        elif self.name == "wandb":
            self._try(lambda: self._writer.log({name: self._wandb.Image(str(path))}, step=step))

    def _try(self, report: Callable[[], Any]) -> None:
        try:
            report()
        except Exception as error:  # a tracker can raise anything
            warnings.warn(f"the tracker gets no more metrics: {error}", stacklevel=2)
            self.name = "none"


def pixels(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 of a picture file."""
    with images.open_picture(path) as picture:
        return np.asarray(images.to_rgb(picture))
