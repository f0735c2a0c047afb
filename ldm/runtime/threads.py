"""Computes independent pieces of work side by side, each on one core: all cores, same bits for any number of them.

On a CPU the last bit of a sum depends on how many threads share the sum. A result of one core does not depend on the
number of cores or processes, or on the pieces that are computed at the same time.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item, Result = TypeVar("Item"), TypeVar("Result")


def at_once(device: torch.device) -> int:
    """How many pieces of work `side_by_side` computes at the same time: torch's threads on a CPU, 1 elsewhere."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def side_by_side(work: Callable[[Item], Result], items: Iterable[Item], device: torch.device) -> list[Result]:
    """[work(item) for item in items]; on a CPU each call has its own thread and core.

    Autocast and `no_grad` belong to a thread: `work` must enter them itself. If calls raise, the error of the first
    such item is raised when all calls have ended.
    """
    if device.type != "cpu":
        return [work(item) for item in items]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # new threads begin with this number; the initializer sets it for other libraries
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, items))
    finally:
        torch.set_num_threads(threads)
