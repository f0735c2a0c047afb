"""Sorts the pictures of all subjects by the size that they are cut to, and says how often rows have each size.

Without --aspect-ratio-buckets there is one bucket, the square. A class picture is in one of the buckets that its
subject's photographs are in, and in each of them lies the share of class pictures that its rows have. So each class
picture is encoded once, and the latents take as much memory as those of squares.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ldm.data.buckets import Size, bucket_of, bucket_sizes, bucket_step
from ldm.data.examples import Example
from ldm.data.mixture import Mixture, turn_of
from ldm.data.subjects import Subject
from ldm.errors import InputError
from ldm.images import upright_size
from ldm.model import StableDiffusion
from ldm.settings import Settings


@dataclass(frozen=True)
class Bucket:
    """Pictures of one kind that are cut to one size. shape: (C, h, w) of their latents.

    decks: for each subject the places of its pictures in `examples`, each as often as it repeats; an epoch of the
    subject's rows takes every card of its deck once.
    """

    size: Size
    shape: tuple[int, int, int]
    examples: tuple[Example, ...]
    decks: tuple[tuple[int, ...], ...]


class Collection(NamedTuple):
    """All pictures of one kind, and the bucket and subject of each row."""

    buckets: tuple[Bucket, ...]
    mixture: Mixture


def sort_photographs(subjects: Sequence[Subject], settings: Settings, sd: StableDiffusion, rows: int) -> Collection:
    """The photographs of all subjects. rows: those of a step, over all processes and accumulated batches.

    Raises InputError, which names the photograph, for one that is too small.
    """
    size_of = sizes_of_photographs(settings, sd)
    pairs = [[(size_of(example), example) for example in subject.examples] for subject in subjects]
    sizes = sorted({size for pictures in pairs for size, _ in pictures})
    shapes = [sd.latent_shape(height, width) for width, height in sizes]
    buckets = tuple(_bucket(size, shape, pairs) for size, shape in zip(sizes, shapes, strict=True))
    weights = [subject.weight / sum(example.repeats for example in subject.examples) for subject in subjects]
    shares = [tuple(w * len(deck) for w, deck in zip(weights, b.decks, strict=True)) for b in buckets]
    return Collection(buckets, Mixture(tuple(shares), rows))


def sort_class_pictures(photographs: Collection, class_pictures: Sequence[Sequence[Example]]) -> Collection:
    """The class pictures of each subject, dealt out to the buckets that its photographs are in.

    A row of the class has the bucket and the subject of the photographs' row with the same index.
    """
    pairs = []
    for subject, examples in enumerate(class_pictures):
        shares = [share[subject] for share in photographs.mixture.shares]
        sizes = [bucket.size for bucket in photographs.buckets]
        pairs.append(_deal(examples, dict(zip(sizes, shares, strict=True))))
    buckets = tuple(_bucket(b.size, b.shape, pairs) for b in photographs.buckets)
    return Collection(buckets, photographs.mixture)


def _deal(examples: Sequence[Example], shares: dict[Size, float]) -> list[tuple[Size, Example]]:
    """Gives each size its share of the examples, and at least one, which is in several buckets if there are too few."""
    sizes = [size for size, share in shares.items() if share]
    weights = [shares[size] for size in sizes]
    dealt = [(sizes[turn_of(weights, i)[0]], example) for i, example in enumerate(examples)]
    empty = [size for size in sizes if size not in {found for found, _ in dealt}]
    return dealt + [(size, examples[i % len(examples)]) for i, size in enumerate(empty)]


def _bucket(size: Size, shape: tuple[int, int, int], pairs: Sequence[Sequence[tuple[Size, Example]]]) -> Bucket:
    """pairs: for each subject, the sizes that its pictures are cut to, and the pictures."""
    examples, decks = [], []
    for pictures in pairs:
        own = [example for found, example in pictures if found == size]
        decks.append(tuple(len(examples) + i for i, example in enumerate(own) for _ in range(example.repeats)))
        examples += own
    return Bucket(size, shape, tuple(examples), tuple(decks))


def sizes_of_photographs(settings: Settings, sd: StableDiffusion) -> Callable[[Example], Size]:
    """A function that gives the size that a photograph is cut to: that of its bucket, or the square."""
    if not settings.aspect_ratio_buckets:
        return lambda example: (settings.resolution, settings.resolution)
    step = bucket_step(sd.config.vae.factor, len(sd.config.unet.channels), settings.resolution)
    sizes = bucket_sizes(settings.resolution, step)

    def size_of(example: Example) -> Size:
        try:
            return bucket_of(upright_size(example.picture), sizes, step, settings.upscale)
        except InputError as error:
            raise InputError(f"{example.picture.path}: {error}") from None

    return size_of
