"""Several processes as one: a few plain words over torch.distributed.

One process is a world of size 1, and the program reads the same. torchrun says who we are in the environment.
"""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ldm import cli
from ldm.errors import InputError, RunError

PATIENCE = timedelta(hours=4)  # while the main process alone samples a sheet or saves to a slow disk


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and talks."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with its gradients averaged over all processes at every backward pass."""
        if self.size == 1:
            return module
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)

    def averaging(self, module: nn.Module, now: bool) -> AbstractContextManager:
        """Around a backward pass: average the gradients now, or keep adding them up here until later."""
        return nullcontext() if now or self.size == 1 else module.no_sync()

    def sum(self, values: list[float]) -> list[float]:
        """Each value added up over all processes, in float64, the same sums everywhere."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def share(self, thing: Any) -> Any:
        """The main process's thing, on all processes."""
        if self.size == 1:
            return thing
        box = [thing]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Around work without talk between processes: an InputError or RunError in one of them is raised in all."""
        errors: list[Exception | None] = [None] * self.size
        try:
            yield
        except (InputError, RunError) as error:
            errors[self.rank] = error
        if self.size > 1:
            dist.all_gather_object(errors, errors[self.rank])
        for rank, error in enumerate(errors):
            if error is not None:
                raise error if rank == 0 else type(error)(f"process {rank}: {error}")

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Has the main process do something, and gives its result, or its error, to all."""
        result = None
        with self.agreed():
            if self.main:
                result = work()
        return self.share(result)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()


def start(device: str | None) -> World:
    """Finds out which of how many processes this is. device: as in `cli.device`; with CUDA each has one of its own."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    chosen = cli.device(device)
    if size == 1:
        return World(0, 1, chosen)
    if chosen.type == "cuda":
        processes, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if processes > gpus:
            raise InputError(f"{processes} processes can't share {gpus} GPUs; give torchrun --nproc-per-node {gpus}")
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=PATIENCE)
    return World(dist.get_rank(), size, chosen)


def restarted() -> bool:
    """Whether torchrun has started this process again after a worker was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def launch() -> str | None:
    """What all starts of this process under one torchrun have in common, and with no other; None without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"{socket.gethostname()}:{os.getppid()}" if name == "none" else name


@contextmanager
def one_thread() -> Iterator[None]:
    """On a CPU the last bit of a sum depends on how many threads shared it: inside, it is one, whatever the world."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
