"""Several processes as one: a few plain words over torch.distributed.

One process is a world of size 1, and the program reads the same. torchrun says who we are in the environment.
"""

import gc
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ldm.errors import InputError, RunError
from ldm.runtime import cli

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

    def any(self, so: bool) -> bool:
        """Whether it is so in any process."""
        return bool(self.sum([float(so)])[0])

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
        """Parts from the others. All but the main process end here, with status 0.

        Python's own way out ends once in some hundred times with torch's threads aborting the process, after all work
        is done; torchrun then takes the whole run for failed. The main process has what wants closing at the exit.
        """
        if self.size == 1:
            return
        gc.collect()  # what is wrapped may still hold the group
        dist.destroy_process_group()
        if not self.main:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)


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
    rank, backend = int(os.environ["RANK"]), "nccl" if chosen.type == "cuda" else "gloo"
    store = meet(rank) if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else None
    whose = {"store": store, "rank": rank, "world_size": size} if store is not None else {}
    dist.init_process_group(backend, timeout=PATIENCE, **whose)
    return World(rank, size, chosen)


def meet(rank: int) -> dist.Store:
    """Where the processes tell each other their addresses; empty at each start.

    torchrun's own store is not: after a restart gloo and NCCL find the addresses of the lost processes in it, and wait
    for them forever or fail (pytorch/pytorch#135712). It only tells where the main process has opened a new one.
    """
    host, key = os.environ["MASTER_ADDR"], "port of the main process"
    board = dist.TCPStore(host, int(os.environ["MASTER_PORT"]), is_master=False, timeout=PATIENCE)
    if rank == 0:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=PATIENCE)
        board.set(key, str(store.port))
        return store
    while True:
        port = int(board.get(key))
        try:
            socket.create_connection((host, port), timeout=5.0).close()
            return dist.TCPStore(host, port, is_master=False, timeout=PATIENCE)
        except OSError:  # the port of a main process that was lost; the new one will say its own
            time.sleep(0.1)


def restarted() -> bool:
    """Whether torchrun has started this process again after a worker was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def launch() -> str | None:
    """What all starts of this process under one torchrun have in common, and with no other; None without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"{socket.gethostname()}:{os.getppid()}" if name == "none" else name
