"""Sends the metrics of metrics.jsonl to TensorBoard or Weights & Biases."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ldm.errors import InputError

TRACKERS = ("none", "tensorboard", "wandb")

Track = Callable[[int, dict[str, float]], Any]


def check_installed(name: str) -> None:
    """Raises InputError if the tracker's package is not installed."""
    if name != "none" and find_spec(name) is None:
        raise InputError(f'--report-to {name} needs the tracking extra: pip install -e ".[tracking]"')


def tracker(name: str, folder: Path, config: dict[str, Any]) -> Track:
    """A function of (step, metrics) that reports them to the tracker of this name."""
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"))
        return lambda step, metrics: [writer.add_scalar(key, value, step) for key, value in metrics.items()]
    if name == "wandb":
        import wandb

        run = wandb.init(project="dreambooth", name=folder.name, dir=str(folder), config=config)
        return lambda step, metrics: run.log(metrics, step=step)
    return lambda step, metrics: None
