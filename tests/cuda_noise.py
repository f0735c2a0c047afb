"""The numbers that torch.randn draws on a CUDA device right after `manual_seed`, computed on the CPU.

CUDA's generator is a function of (seed, thread, call): Philox 4x32 with ten rounds (Salmon et al. 2011, "Parallel
random numbers: as easy as 1, 2, 3"). Its four words become four normal numbers by Box and Muller's method
(curand_normal4). torch gives these four numbers to elements that lie a whole grid of threads apart; the next call
serves the elements after them. The grid grows with the tensor, up to the number of threads that the card holds at once,
256 * `blocks`. The numbers of a tensor with at most so many elements do not depend on the card.
"""

import numpy as np

MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
WEYL = 0x9E3779B9, 0xBB67AE85  # added to the key in each round
LOW, HALF = np.uint64(0xFFFFFFFF), np.uint64(32)

# blocks of 256 threads that a card holds at once: multiprocessors x blocks on each
CARDS = {"T4": 160, "TITAN RTX": 288, "A10G": 480, "V100": 640, "A100": 864, "H100": 1056}


def cuda_randn(shape: tuple[int, ...], seed: int, blocks: int | None = None) -> np.ndarray:
    """Standard normal float32 numbers of this shape. blocks: the card's number in CARDS; no limit if None."""
    count = int(np.prod(shape))
    grid = min(-(-count // 256), blocks or count)
    threads = 256 * grid
    calls = -(-count // (4 * threads))
    thread, call = np.meshgrid(np.arange(threads, dtype=np.uint64), np.arange(calls, dtype=np.uint64))
    zero = np.zeros_like(call)
    a, b, c, d = philox((call, zero, thread, zero), (seed & 0xFFFFFFFF, seed >> 32))  # each (calls, threads)
    normal = np.stack([*box_muller(a, b), *box_muller(c, d)], axis=1)  # (calls, 4, threads)
    return normal.reshape(-1)[:count].reshape(shape)


def philox(counter: tuple[np.ndarray, ...], key: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """A counter of four 32-bit words and a key of two -> four 32-bit words, stored as uint64."""
    a, b, c, d = counter
    for _ in range(10):
        first, second = MULTIPLIERS[0] * a, MULTIPLIERS[1] * c
        a, b = second >> HALF ^ b ^ np.uint64(key[0]), second & LOW
        c, d = first >> HALF ^ d ^ np.uint64(key[1]), first & LOW
        key = tuple(word + step & 0xFFFFFFFF for word, step in zip(key, WEYL, strict=True))
    return a, b, c, d


def box_muller(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two uniform 32-bit words -> two normal numbers, computed in float32 as on the card."""
    unit = np.float32(2.0**-32)
    turn = np.float32(2.0**-32 * 6.2831855)
    u = x.astype(np.float32) * unit + unit / 2
    angle = y.astype(np.float32) * turn + turn / 2
    radius = np.sqrt(np.float32(-2.0) * np.log(u))
    return radius * np.sin(angle), radius * np.cos(angle)
