"""The tensors of the official single files, read from tests/facts."""

from functools import cache
from pathlib import Path

import torch

Shapes = dict[str, tuple[int, ...]]
FACTS = Path(__file__).parent / "facts"


@cache
def published(family: str) -> Shapes:
    """The name and shape of every tensor in the published single files of a family."""
    lines = (FACTS / f"{family}_tensors.txt").read_text().splitlines()
    rows = [line.split() for line in lines if not line.startswith("#")]
    return {name: () if shape == "scalar" else tuple(map(int, shape.split("x"))) for name, shape, *_ in rows}


def published_rows(family: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of each tensor of the published files, without the two remaining tensors of the EMA."""
    lines = (FACTS / f"{family}_tensors.txt").read_text().splitlines()
    types = {line.split()[0]: (line.split() + ["float32"])[2] for line in lines if not line.startswith("#")}
    kept = {name: shape for name, shape in published(family).items() if not name.startswith("model_ema.")}
    return {name: (shape, getattr(torch, types[name])) for name, shape in kept.items()}
