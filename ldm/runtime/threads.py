"""All cores, and the same bits: independent pieces of work side by side, each computed on one core.

On a CPU the last bit of a sum depends on how many threads share the sum. What one core computes does not depend on
how many cores there are, how many processes run, or which pieces are computed at the same time.
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
    """[work(item) for item in items]; on a CPU each call has a thread and a core of its own.

    Autocast and `no_grad` belong to a thread: `work` has to enter them itself. If calls raise, the error of the first
    such item is raised when all calls have ended.
    """
    if device.type != "cpu":
        return [work(item) for item in items]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # new threads begin with this number; the initializer says it for libraries that ask
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, items))
    finally:
        torch.set_num_threads(threads)
