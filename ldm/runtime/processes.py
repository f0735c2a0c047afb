"""A small interface to torch.distributed.

A single process is a world of size 1 and runs the same code. torchrun gives each process its rank and the size of the
world in the environment.
"""

import atexit
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
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ldm.errors import InputError, RunError
from ldm.runtime import cli
from ldm.runtime.signals import Stopped

TIMEOUT = timedelta(hours=4)  # longest wait while the main process samples a sheet or saves to a slow disk


@dataclass(frozen=True)
class World:
    """This process and its place among all processes of one run.

    rank: 0 to size - 1; rank 0 is the main process. device: where this process computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    @property
    def is_asynchronous(self) -> bool:
        """Whether the device works on while the host does other things."""
        return self.device.type == "cuda"

    def print_main(self, text: str) -> None:
        """Prints a line, in the main process alone."""
        if self.main:
            print(text)

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module; with several processes every backward pass averages its gradients over them."""
        if self.size == 1:
            return module
        ids = [self.device.index] if self.device.type == "cuda" else None
        # Looking for unused parameters keeps the buckets of the first step. DDP rebuilds them after it otherwise, and a
        # resumed run would sum the gradients of its first step in another order than the run that never stopped.
        options = {"gradient_as_bucket_view": True, "find_unused_parameters": True}
        return DistributedDataParallel(module, device_ids=ids, **options)

    def averaging(self, module: nn.Module, now: bool) -> AbstractContextManager:
        """Wraps a backward pass. now: average the gradients over all processes; else only add them to this one's."""
        return nullcontext() if now or self.size == 1 else module.no_sync()

    def gather(self, values: Tensor) -> Tensor:
        """The values (n,) of every process, (size, n), in all processes. The host does not wait for a GPU."""
        if self.size == 1:
            return values[None]
        rows = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(rows, values)
        return torch.stack(rows)

    def share(self, value: Any) -> Any:
        """The main process's value, in all processes."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Wraps work without collectives: InputError, RunError and Stopped in any process are raised in all of them."""
        errors: list[Exception | None] = [None] * self.size
        try:
            yield
        except (InputError, RunError, Stopped) as error:
            errors[self.rank] = error
        if self.size > 1:
            dist.all_gather_object(errors, errors[self.rank])
        for rank, error in enumerate(errors):
            if error is not None:
                raise error if rank == 0 else type(error)(f"process {rank}: {error}")

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Calls `work` in the main process alone; its result, or its error, reaches all processes."""
        result = None
        with self.agreed():
            if self.main:
                result = work()
        return self.share(result)

    def close(self) -> None:
        """Leaves the group of processes. If there are several, this process ends here, with status 0.

        It skips the end of Python's interpreter: in about one of several hundred runs a thread of gloo wants the
        interpreter just then and aborts the process, after all work is done, and torchrun reports that the run failed
        (pytorch/pytorch#190489). What waits for Python's exit, such as a tracker, is called before.
        """
        if self.size == 1:
            return
        gc.collect()  # a wrapped module may still hold the group
        dist.destroy_process_group()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def start(device: str | None) -> World:
    """Joins the world and returns it. device: as in `cli.device`; with CUDA each process takes its own GPU."""
    size = _number("WORLD_SIZE", 1)
    if size > 1 and torch.cuda.is_available():  # before the choice is tried out: not all of them on the first GPU
        torch.cuda.set_device(_number("LOCAL_RANK", 0) % torch.cuda.device_count())
    chosen = cli.device(device)
    if chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)  # streams, events and recordings belong to the current one
    if size == 1:
        return World(0, 1, chosen)
    if absent := [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise InputError(f"WORLD_SIZE is {size}, and {absent[0]} is not set: start with torchrun, or unset WORLD_SIZE")
    if chosen.type == "cuda":
        processes, gpus = _number("LOCAL_WORLD_SIZE", size), torch.cuda.device_count()
        if processes > gpus:
            raise InputError(f"{processes} processes can't share {gpus} GPUs; give torchrun --nproc-per-node {gpus}")
        chosen = torch.device("cuda", _number("LOCAL_RANK", 0))
        torch.cuda.set_device(chosen)
    rank, backend = _number("RANK", 0), "nccl" if chosen.type == "cuda" else "gloo"
    store = meet(rank) if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else None
    whose = {"store": store, "rank": rank, "world_size": size} if store is not None else {}
    dist.init_process_group(backend, timeout=TIMEOUT, **whose)
    return World(rank, size, chosen)


def _number(name: str, default: int) -> int:
    """An environment variable as a whole number."""
    text = os.environ.get(name, "")
    if text and not text.isdecimal():
        raise InputError(f"the environment variable {name} is {text[:80]!r}, and should be a number; torchrun sets it")
    return int(text) if text else default


def meet(rank: int) -> dist.Store:
    """A store where the processes exchange their addresses, empty at each start.

    torchrun's own store is not empty after a restart: gloo and NCCL find the addresses of the lost processes in it and
    wait for them forever, or fail (pytorch/pytorch#135712). It serves only to publish the new store's port.
    """
    host, key = os.environ["MASTER_ADDR"], "port of the main process"
    board = dist.TCPStore(host, int(os.environ["MASTER_PORT"]), is_master=False, timeout=TIMEOUT)
    if rank == 0:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        board.set(key, str(store.port))
        return store
    while True:
        port = int(board.get(key))
        try:
            socket.create_connection((host, port), timeout=5.0).close()
            return dist.TCPStore(host, port, is_master=False, timeout=TIMEOUT)
        except OSError:  # the port of a lost main process; the new one publishes its own
            time.sleep(0.1)


def restarted() -> bool:
    """Whether torchrun has started this process again after a worker was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def launch() -> str | None:
    """A name for this torchrun, the same after each of its restarts; None without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"{socket.gethostname()}:{os.getppid()}" if name == "none" else name
