"""What several tests stand on."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # train.py and sample.py are scripts at the top, not modules of the package

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture
def root() -> Path:
    """The top of the repository."""
    return ROOT


@pytest.fixture
def randomised():
    """A network with every parameter drawn anew: a zero-initialised layer would hide what lies behind it."""

    def draw(network: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in network.parameters():
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
                scale = fan_in**-0.5 if parameter.ndim > 1 else 0.1
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
                if parameter.ndim == 1:
                    parameter.add_(0.5)
        return network

    return draw
