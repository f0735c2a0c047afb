"""Randomness as a pure function of (seed, purpose, step, index): rule 4.

Nothing here is a stream whose position would have to be saved. A run cut into other batches, over other numbers of
processes, or stopped and resumed draws the same numbers.
"""

import hashlib

import torch


def number(seed: int, *key: str | int) -> int:
    """A whole number below 2**63 for this key, as good as independent of all other keys' numbers."""
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, *key: str | int) -> torch.Generator:
    """A generator on the CPU that stands at the beginning of this key's own stream."""
    return torch.Generator().manual_seed(number(seed, *key))


def pick(seed: int, purpose: str, index: int, count: int) -> int:
    """Which of `count` things is the index-th ever taken: all of them once, shuffled, then all again in a new order."""
    epoch, position = divmod(index, count)
    return int(torch.randperm(count, generator=generator(seed, purpose, "order", epoch))[position])
