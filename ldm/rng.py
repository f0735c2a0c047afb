"""Randomness as a pure function of (seed, purpose, step, index).

A run draws the same numbers with any split into batches and processes, and after a resume. No generator state is saved.
"""

import hashlib

import torch


def number(seed: int, *key: str | int) -> int:
    """A whole number from 0 to 2**63 - 1 for this key, by SHA-256; different keys give unrelated numbers."""
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, *key: str | int) -> torch.Generator:
    """A new CPU generator, seeded with the number of this key."""
    return torch.Generator().manual_seed(number(seed, *key))


def pick(seed: int, purpose: str, index: int, count: int) -> int:
    """The item, 0 to count - 1, that this index takes; each epoch takes every item once, newly shuffled."""
    epoch, position = divmod(index, count)
    return int(torch.randperm(count, generator=generator(seed, purpose, "order", epoch))[position])
