"""What the training scripts share: a budget of minutes, the learning rate over it, a checkpoint."""

import math
import os
import time

import numpy as np
import torch


class Budget:
    """Minutes to train for. Machines differ; a schedule over time ends well on each. Resumes where it stopped."""

    def __init__(self, minutes):
        self.seconds, self.spent, self.started = minutes * 60, 0.0, time.time()

    @property
    def elapsed(self):
        return self.spent + time.time() - self.started

    @property
    def fraction(self):
        return min(1.0, self.elapsed / self.seconds)

    def learning_rate(self, peak, warmup=0.02):
        """Linear warm-up, then a half cosine down to 2 % of the peak."""
        if self.fraction < warmup:
            return peak * max(self.fraction / warmup, 0.01)
        return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (self.fraction - warmup) / (1 - warmup))))


def set_rate(optimizer, rate):
    for group in optimizer.param_groups:
        group["lr"] = rate


def save(path, state):
    """Whole or not at all."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def to_tensor(images):
    """(B, 64, 64, 3) uint8 array -> (B, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
