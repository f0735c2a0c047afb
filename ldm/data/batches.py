"""Rows -> the batches of each step, the same rows of a step for any number of processes and accumulated batches."""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from ldm.data.rows import Columns, Draws, Rows, Sample
from ldm.dreambooth import Batch
from ldm.errors import InputError
from ldm.runtime import World
from ldm.settings import Settings


class Batches:
    """All batches of a run: `take` gives those of one step, whose gradients are accumulated."""

    def __init__(self, rows: Sequence[Rows], settings: Settings, world: World):
        self.rows, self.world = rows, world
        self.size, self.parts = settings.train_batch_size, settings.gradient_accumulation_steps
        # Processes that decode pictures ahead; only random crops need them.
        self.workers = max(1, min(4, torch.get_num_threads() // len(rows))) if settings.random_crop else 0
        is_class = [part.is_class for part in rows for _ in range(self.size)]
        self.is_class = torch.tensor(is_class, device=world.device)
        self.class_rows = torch.tensor(
            [i for i, row in enumerate(is_class) if row], dtype=torch.long, device=world.device
        )
        self._next: int | None = None

    def take(self, taken: int) -> Iterator[Batch]:
        """The batches of one step. taken: how often `take` was called before in this run, also before a resume."""
        if taken != self._next:
            self._columns = zip(*(iter(self._loader(rows.draws, taken)) for rows in self.rows), strict=True)
        self._next = taken + 1
        for part in range(self.parts):
            samples = [
                self._sample(rows, columns) for rows, columns in zip(self.rows, next(self._columns), strict=True)
            ]
            yield self._batch(samples, last=part == self.parts - 1)

    def _sample(self, rows: Rows, columns: Columns | InputError) -> Sample:
        if isinstance(columns, InputError):
            raise columns
        return rows.sample(columns)

    def _batch(self, samples: Sequence[Sample], last: bool) -> Batch:
        latents, noise, t, subject = (torch.cat([sample[i] for sample in samples]) for i in range(4))
        prompts = tuple(prompt for sample in samples for prompt in sample.prompts)
        class_prompts = tuple(
            prompt
            for rows, sample in zip(self.rows, samples, strict=True)
            if rows.is_class
            for prompt in sample.prompts
        )
        mask = None
        if any(sample.mask is not None for sample in samples):
            mask = torch.cat([_full(s.latents) if s.mask is None else s.mask for s in samples])
        extra = None if samples[0].extra is None else torch.cat([sample.extra for sample in samples])
        return Batch(
            latents, noise, t, prompts, self.is_class, self.class_rows, class_prompts, last, mask, subject, extra
        )

    def _loader(self, draws: Draws, start: int) -> DataLoader:
        return DataLoader(
            draws,
            batch_sampler=_Indices(start, self.parts, self.world, self.size),
            collate_fn=_collate,
            num_workers=self.workers,
            worker_init_fn=_ignore_signals,
            pin_memory=self.world.device.type == "cuda",
        )


def _full(latents: Tensor) -> Tensor:
    """A mask that is 1 everywhere."""
    return torch.ones_like(latents[:, :1])


@dataclass(frozen=True)
class _Indices:
    """The rows of this process, batch by batch, without end.

    The rows of a step depend on how often batches were taken before, not on the number of processes or parts.
    """

    start: int
    parts: int
    world: World
    size: int

    def __iter__(self) -> Iterator[list[int]]:
        part = self.start * self.parts
        while True:
            first = (part * self.world.size + self.world.rank) * self.size
            yield list(range(first, first + self.size))
            part += 1


def _ignore_signals(worker: int) -> None:
    """Runs in a loader's process. A signal to all processes is for the main one, which finishes its step and ends.

    It ends its loaders, too, by SIGTERM if they do not end by themselves: they give it time for its step.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(20))


def _collate(rows: list[Columns | InputError]) -> Columns | InputError:
    return next((row for row in rows if isinstance(row, InputError)), None) or default_collate(rows)
