"""Code that the training scripts share: flags, a time budget with its learning rate, checkpoints."""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch

from ldm import InputError
from ldm.runtime import files
from ldm.runtime.cli import Parser


def flags(description, minutes=None):
    """A parser with the flags that the scripts share. minutes: default of --minutes; None leaves the flag out."""
    parser = Parser(description=description)
    about = "folder of the drawings and of everything trained on them"
    parser.add_argument("--work-dir", type=Path, default=Path("runs/tiny"), help=about)
    if minutes is not None:
        parser.add_argument("--minutes", type=duration, default=minutes, help="training time in minutes")
    return parser


def duration(text):
    """An argparse type: minutes, more than 0."""
    minutes = float(text)
    if not minutes > 0:
        raise argparse.ArgumentTypeError(f"must be more than 0, not {text}")
    return minutes


def need(path, script):
    """Returns the path of an earlier script's output. Raises InputError if it does not exist."""
    if not path.exists():
        raise InputError(f"{path} is missing; first run weights/tiny/{script} with the same --work-dir")
    return path


class Budget:
    """A training time in minutes. The learning rate is a function of time, so that it decays fully on any machine.

    spent: seconds of training before a resume.
    """

    def __init__(self, minutes, spent=0.0):
        self.seconds, self.spent, self.started = minutes * 60, spent, time.time()

    @property
    def elapsed(self):
        return self.spent + time.time() - self.started

    @property
    def fraction(self):
        return min(1.0, self.elapsed / self.seconds)

    def learning_rate(self, peak, warmup=0.02):
        """Linear warm-up, then half a cosine down to 2 % of the peak."""
        fraction = self.fraction
        if fraction < warmup:
            return peak * max(fraction / warmup, 0.01)
        return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (fraction - warmup) / (1 - warmup))))


def set_rate(optimizer, rate):
    for group in optimizer.param_groups:
        group["lr"] = rate


def save(path, state):
    """Writes a checkpoint. The file at `path` is replaced only when the new one is complete."""
    with files.replacing(path) as partial:
        torch.save(state, partial)


def to_tensor(images):
    """(B, 64, 64, 3) uint8 array -> (B, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
