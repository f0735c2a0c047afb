"""Photographs -> the batches of a run. Every row is a function of (seed, kind, index) alone.

A run has the same rows with any split into batches and processes, and after a resume. torch's loader draws the random
part of each row on the CPU. All rows of a batch are moved to the device and turned into latents at once.
"""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ldm import rng
from ldm.dreambooth import Batch
from ldm.errors import InputError
from ldm.images import Picture, load_picture
from ldm.model import StableDiffusion
from ldm.runtime import World, progress_bar
from ldm.training.inpainting import columns_beside, draw_hole, keep_images
from ldm.training.latents import Encode, Latents, encode, encode_pictures
from ldm.training.run import Run
from ldm.training.settings import Settings

Columns = dict[str, Tensor]  # of several rows


@dataclass(frozen=True)
class Draws(Dataset):
    """The random part of the rows of one kind: draws[index] has the picture's number, t, noise and spread.

    noise, spread: (C, h, w) standard normal; the row's latents are mean + std * spread.
    """

    seed: int
    kind: str  # "instance" or "class"
    count: int  # pictures; each epoch takes every picture once, newly shuffled
    shape: tuple[int, int, int]  # (C, h, w) of the latents
    timesteps: int
    # whether rows also have their picture, and a random hole in it: for painting in
    holes: bool = field(default=False, kw_only=True)

    def __getitem__(self, index: int) -> Columns | InputError:
        generator = rng.generator(self.seed, self.kind, "noise", index)
        spread, noise = torch.randn((2, *self.shape), generator=generator)
        t = torch.randint(self.timesteps, (), generator=generator)
        k = rng.pick(self.seed, self.kind, index, self.count)
        try:
            row = {"spread": spread, "noise": noise, "t": t, **self.view(k, generator)}
        except InputError as error:  # a loader's process can't raise it in one line, so it is returned as a row
            return error
        if self.holes:
            row |= draw_hole((self.seed, self.kind, index), row["image"].shape[1:], self.shape)
        return row

    def view(self, k: int, generator: torch.Generator) -> Columns:
        """The columns that say which picture and view the row has, or hold its pixels."""
        raise NotImplementedError


@dataclass(frozen=True)
class LatentDraws(Draws):
    """Draws for pictures whose latents are kept. views: 2 if each is also kept mirrored. images: see `keep_images`."""

    views: int = 1
    images: Tensor | None = None

    def view(self, k: int, generator: torch.Generator) -> Columns:
        view = torch.randint(self.views, (), generator=generator) if self.views > 1 else torch.tensor(0)
        columns = {"picture": torch.tensor(k), "view": view}
        return columns | ({"image": self.images[k, view] / 127.5 - 1.0} if self.holes else {})


@dataclass(frozen=True)
class CropDraws(Draws):
    """Draws for pictures that are cut at a random place each time, and mirrored half of the time if `flip`."""

    pictures: Sequence[Picture] = ()
    resolution: int = 0
    flip: bool = False

    def view(self, k: int, generator: torch.Generator) -> Columns:
        x, y, mirrored = torch.rand(3, generator=generator).tolist()
        image = load_picture(self.pictures[k], self.resolution, (x, y))
        return {"image": image.flip(2) if self.flip and mirrored < 0.5 else image}


@dataclass(frozen=True)
class Rows:
    """Rows of one prompt. latents: the pictures' latents if they are kept; else `encode` makes them from each image."""

    prompt: str
    draws: Draws
    device: torch.device
    latents: Latents | None = None
    encode: Encode | None = None
    is_class: bool = False

    def sample(self, columns: Columns) -> tuple[Tensor, Tensor, Tensor]:
        """Columns of B rows -> latents and noise, (B, C, h, w), and t, (B,), on the device."""
        drawn = {name: column.to(self.device, non_blocking=True) for name, column in columns.items()}
        if self.latents is not None:
            mean, std = (part[drawn["picture"], drawn["view"]] for part in self.latents)
        else:
            mean, std = self.encode(drawn["image"])
        return mean + std * drawn["spread"], drawn["noise"], drawn["t"]

    def beside(self, columns: Columns) -> Tensor | None:
        """What a model for painting in sees beside the noisy latents of these rows, (B, C + 1, h, w); else None."""
        if not self.draws.holes:
            return None
        names = ("image", "hole", "hole_spread")
        return columns_beside(self.encode, {n: columns[n].to(self.device, non_blocking=True) for n in names})


def make_rows(run: Run, sd: StableDiffusion, kind: str, prompt: str, pictures: Sequence[Picture]) -> Rows:
    """The rows of one kind, "instance" or "class"; encodes the pictures once, unless `random_crop` is set."""
    settings, device = run.settings, run.world.device
    shape = sd.latent_shape(settings.resolution, settings.resolution)
    common = (settings.seed, kind, len(pictures), shape, sd.schedule.timesteps)
    holes, given = sd.config.unet.paints_in, {"encode": partial(encode, sd), "is_class": kind == "class"}
    if settings.random_crop:
        draws = CropDraws(*common, tuple(pictures), settings.resolution, settings.random_flip, holes=holes)
        return Rows(prompt, draws, device, **given)
    title = f"encoding {kind} pictures"
    with progress_bar(run.stop, title, len(pictures), "picture", show=run.world.main) as progress:
        latents = encode_pictures(sd, pictures, settings.resolution, settings.random_flip, progress)
    images = keep_images(pictures, settings.resolution, settings.random_flip) if holes else None
    draws = LatentDraws(*common, views=latents.mean.shape[1], images=images, holes=holes)
    return Rows(prompt, draws, device, latents, **given)


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
        self.prompts = tuple(part.prompt for part in rows for _ in range(self.size))
        self._next: int | None = None

    def take(self, taken: int) -> Iterator[Batch]:
        """The batches of one step. taken: how often `take` was called before in this run, also before a resume."""
        if taken != self._next:
            self._columns = zip(*(iter(self._loader(rows.draws, taken)) for rows in self.rows), strict=True)
        self._next = taken + 1
        for part in range(self.parts):
            drawn = list(zip(self.rows, next(self._columns), strict=True))
            sampled = [self._sample(rows, columns) for rows, columns in drawn]
            latents, noise, t = (torch.cat(column) for column in zip(*sampled, strict=True))
            last, beside = part == self.parts - 1, [rows.beside(columns) for rows, columns in drawn]
            extra = None if beside[0] is None else torch.cat(beside)
            yield Batch(latents, noise, t, self.prompts, self.is_class, self.class_rows, last, extra=extra)

    def _sample(self, rows: Rows, columns: Columns | InputError) -> tuple[Tensor, Tensor, Tensor]:
        if isinstance(columns, InputError):
            raise columns
        return rows.sample(columns)

    def _loader(self, draws: Draws, start: int) -> DataLoader:
        return DataLoader(
            draws,
            batch_sampler=_Indices(start, self.parts, self.world, self.size),
            collate_fn=_collate,
            num_workers=self.workers,
            worker_init_fn=_ignore_signals,
            pin_memory=self.world.device.type == "cuda",
        )


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
