"""The rows of a run. Every row is a function of (seed, kind, index) alone.

A run has the same rows with any split into batches and processes, and after a resume. `Draws` makes the random part of
each row on the CPU. All rows of a batch are moved to the device and turned into latents at once.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm import rng
from ldm.data.buckets import Size
from ldm.data.inpainting import columns_beside, draw_hole, keep_images
from ldm.data.latents import Encode, Latents, centre_of, encode, encode_masks, encode_pictures, load_image
from ldm.data.masks import load_mask
from ldm.data.sorting import Bucket, Collection
from ldm.data.variation import variation
from ldm.errors import InputError
from ldm.model import StableDiffusion
from ldm.settings import Settings

Columns = dict[str, Any]  # of several rows: tensors, and a list of prompts
Vary = Callable[[str, torch.Generator], str]
ProgressBar = Callable[[str, int, str], AbstractContextManager[Callable[[], None]]]  # of title, total and unit


@dataclass(frozen=True)
class Draws(Dataset):
    """The random part of the rows of one kind: draws[index] has the picture's number, t, noise, spread and the prompt.

    noise, spread: (C, h, w) standard normal; the row's latents are mean + std * spread.
    """

    seed: int
    kind: str  # "instance" or "class"
    pictures: Collection
    timesteps: range  # those that t is drawn from
    noise_offset: float = 0.0  # standard deviation of a shift of each of the noise's channels
    vary: Vary | None = None  # changes the prompt of a row: drops captions, shuffles tags
    prompts: tuple[str, ...] | None = None  # one a subject, instead of the pictures' own
    holes: bool = field(default=False, kw_only=True)  # whether rows have their picture and a hole in it, to paint in

    def __getitem__(self, index: int) -> Columns | InputError:
        place = self.pictures.mixture.at(index)
        bucket = self.pictures.buckets[place.bucket]
        deck = bucket.decks[place.subject]
        generator = rng.generator(self.seed, self.kind, "noise", index)
        spread, noise = torch.randn((2, *bucket.shape), generator=generator)
        t = torch.randint(self.timesteps.start, self.timesteps.stop, (), generator=generator)
        k = deck[rng.pick(self.seed, self.kind, place.turn, len(deck))]
        row = {"spread": spread, "noise": noise, "t": t, "bucket": place.bucket, "subject": place.subject}
        row["prompt"] = self.prompts[place.subject] if self.prompts else bucket.examples[k].prompt
        if self.vary is not None:
            row["prompt"] = self.vary(row["prompt"], rng.generator(self.seed, self.kind, "prompt", index))
        try:
            row |= self.view(bucket, k, generator)
        except InputError as error:  # a loader's process can't raise it in one line, so it is returned as a row
            return error
        if self.holes:
            row |= draw_hole((self.seed, self.kind, index), bucket.size, bucket.shape)
        if self.noise_offset:  # Guttenberg 2023; drawn last, so that all else is drawn as without it
            row["noise"] = noise + self.noise_offset * torch.randn(len(noise), 1, 1, generator=generator)
        return row

    def view(self, bucket: Bucket, k: int, generator: torch.Generator) -> Columns:
        """The columns that say which picture and view the row has, or hold its pixels. k: the picture's place."""
        raise NotImplementedError

    @property
    def distinct_prompts(self) -> tuple[str, ...]:
        """The prompts that rows have, each once, as far as they are known before the rows are drawn."""
        examples = [example for bucket in self.pictures.buckets for example in bucket.examples]
        dropped = [] if self.vary is None else [""]
        return tuple(dict.fromkeys([*(self.prompts or [example.prompt for example in examples]), *dropped]))


@dataclass(frozen=True)
class LatentDraws(Draws):
    """Draws for pictures whose latents are kept. views: 2 if each is also kept mirrored.

    images: for rows with holes, the pictures of each bucket by its size; see `keep_images`.
    """

    views: int = 1
    images: Mapping[Size, Tensor] = field(default_factory=dict)

    def view(self, bucket: Bucket, k: int, generator: torch.Generator) -> Columns:
        view = torch.randint(self.views, (), generator=generator) if self.views > 1 else torch.tensor(0)
        columns = {"picture": torch.tensor(k), "view": view}
        if self.holes:
            columns["image"] = self.images[bucket.size][k, view] / 127.5 - 1.0
        return columns


@dataclass(frozen=True)
class CropDraws(Draws):
    """Draws for pictures that are cut at a random place each time, and mirrored half of the time if `flip`.

    masked: whether rows have masks, which are cut and mirrored as the pictures are.
    """

    flip: bool = False
    masked: bool = False

    def view(self, bucket: Bucket, k: int, generator: torch.Generator) -> Columns:
        x, y, mirrored = torch.rand(3, generator=generator).tolist()
        example = bucket.examples[k]
        centre = centre_of(example, bucket.size, (x, y))
        columns = {"image": load_image(example, bucket.size, centre)}
        if self.masked:
            columns["mask"] = load_mask(example, bucket.size, centre, bucket.shape)
        return {name: c.flip(2) if self.flip and mirrored < 0.5 else c for name, c in columns.items()}


class Sample(NamedTuple):
    """Rows of one kind, on the device: latents, noise (B, C, h, w); t, subject (B,); mask (B, 1, h, w) or None.

    extra: (B, C + 1, h, w), what a model for painting in sees beside the noisy latents; None for others.
    """

    latents: Tensor
    noise: Tensor
    t: Tensor
    subject: Tensor
    mask: Tensor | None
    prompts: tuple[str, ...]
    extra: Tensor | None = None


@dataclass(frozen=True)
class Rows:
    """Rows of one kind. latents: the pictures' latents by bucket if they are kept; else `encode` makes them."""

    draws: Draws
    device: torch.device
    latents: tuple[Latents, ...] | None = None
    encode: Encode | None = None
    is_class: bool = False

    def sample(self, columns: Columns) -> Sample:
        """Columns of rows, which share a bucket -> those rows on the device."""
        bucket = int(columns["bucket"][0])  # a tensor of the host
        names = columns.keys() - {"bucket", "prompt"}
        drawn = {name: columns[name].to(self.device, non_blocking=True) for name in names}
        if self.latents is not None:
            at = drawn["picture"], drawn["view"]
            mean, std, mask = (None if part is None else part[at] for part in self.latents[bucket])
        else:
            (mean, std), mask = self.encode(drawn["image"]), drawn.get("mask")
        if self.is_class:  # also where it has the photographs' latents
            mask = None
        latents = mean + std * drawn["spread"]
        extra = columns_beside(self.encode, drawn) if self.draws.holes else None
        return Sample(latents, drawn["noise"], drawn["t"], drawn["subject"], mask, tuple(columns["prompt"]), extra)

    def of_class(self, prompts: tuple[str, ...]) -> "Rows":
        """Rows with the same noisy latents, and these prompts of the class, one a subject."""
        return replace(self, draws=replace(self.draws, prompts=prompts, vary=None), is_class=True)


def make_rows(
    sd: StableDiffusion, settings: Settings, kind: str, pictures: Collection, progress_bar: ProgressBar
) -> Rows:
    """The rows of one kind, "instance" or "class"; encodes the pictures once, unless `random_crop` is set.

    progress_bar: makes the bar that shows how many are encoded; see `ldm.runtime.progress_bar`.
    """
    device, is_class = sd.device, kind == "class"
    common = (
        settings.seed,
        kind,
        pictures,
        settings.timesteps(sd.schedule),
        settings.noise_offset,
        variation(settings),
    )
    examples = [example for bucket in pictures.buckets for example in bucket.examples]
    masked = any(example.mask is not None for example in examples)
    holes, given = sd.config.unet.paints_in, {"encode": partial(encode, sd), "is_class": is_class}
    if settings.random_crop:
        return Rows(CropDraws(*common, flip=settings.random_flip, masked=masked, holes=holes), device, **given)
    title, flip, latents = f"encoding {kind} pictures", settings.random_flip, []
    with progress_bar(title, len(examples), "picture") as progress:
        for bucket in pictures.buckets:
            made = encode_pictures(sd, bucket.examples, bucket.size, flip, progress)
            if masked:
                made = made._replace(mask=encode_masks(bucket.examples, bucket.size, bucket.shape, flip).to(device))
            latents.append(made)
    images = {b.size: keep_images(b.examples, b.size, flip) for b in pictures.buckets} if holes else {}
    return Rows(LatentDraws(*common, views=1 + flip, images=images, holes=holes), device, tuple(latents), **given)
