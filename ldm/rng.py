"""Randomness as a pure function of (seed, purpose, step, index).

There is no stream with a position that would have to be saved. A run draws the same numbers however it is cut into
batches and processes, and after it was stopped and resumed.
"""

import hashlib

import torch


def number(seed: int, *key: str | int) -> int:
    """A whole number from 0 to 2**63 - 1 for this key, by SHA-256; other keys give unrelated numbers."""
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, *key: str | int) -> torch.Generator:
    """A CPU generator of its own for this key, seeded with its number."""
    return torch.Generator().manual_seed(number(seed, *key))


def pick(seed: int, purpose: str, index: int, count: int) -> int:
    """Which of `count` things has this index: each epoch takes all of them once, in a shuffled order of its own."""
    epoch, position = divmod(index, count)
    return int(torch.randperm(count, generator=generator(seed, purpose, "order", epoch))[position])
