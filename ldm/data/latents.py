"""Pictures -> the latents that training samples from: mean and standard deviation, scaled."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.data.buckets import Size, cut_around
from ldm.data.examples import Example
from ldm.data.focus import Point
from ldm.data.masks import load_mask
from ldm.data.sorting import sort_photographs
from ldm.data.subjects import Subject
from ldm.errors import InputError
from ldm.images import fit, to_tensor, upright_size
from ldm.model import StableDiffusion
from ldm.runtime import side_by_side
from ldm.settings import Settings

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]


class Latents(NamedTuple):
    """mean, std: (N, views, C, h, w) for N pictures; two views if each is also mirrored, else one.

    mask: (N, views, 1, h, w) from 0 to 1, 1 where the loss counts; None without masks.
    """

    mean: Tensor
    std: Tensor
    mask: Tensor | None = None


def encode(sd: StableDiffusion, images: Tensor) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) in [-1, 1] -> mean and standard deviation of their scaled latents, (B, 4, h, w) each.

    On a CPU each image is encoded on its own core, so that its bits do not depend on the others in the batch.
    """
    batches = images.split(1) if images.device.type == "cpu" else [images]
    parts = side_by_side(lambda batch: _encode(sd, batch), batches, images.device)
    mean, std = (torch.cat(part) for part in zip(*parts, strict=True))
    return mean, std


@torch.no_grad()
def _encode(sd: StableDiffusion, images: Tensor) -> tuple[Tensor, Tensor]:
    posterior = sd.vae.encode(images)
    return posterior.mean * sd.config.vae.scale_factor, posterior.std * sd.config.vae.scale_factor


def centre_of(example: Example, size: Size, where: Point | None = None) -> Point:
    """Where a picture is cut to this size, from (0, 0), left and top, to (1, 1).

    where: a place drawn from 0 to 1; None for the middle. The cut of a picture with a focus always holds it.
    """
    if example.focus is None:
        return (0.5, 0.5) if where is None else where
    return cut_around(example.focus, upright_size(example.picture), size, where)


def load_image(example: Example, size: Size, centre: Point) -> Tensor:
    """A picture, resized and cut to this width and height, as (3, H, W) in [-1, 1]. Raises InputError as `fit`."""
    return to_tensor(fit(example.picture, *size, centre))


def encode_pictures(
    sd: StableDiffusion, examples: Sequence[Example], size: Size, flip: bool, progress: Callable[[], object]
) -> Latents:
    """The latents of pictures, cut to this width and height. Each is encoded once, and once more mirrored if `flip`.

    progress: called after each picture, in any thread. Raises InputError for a picture that can't be read, and for
    latents that are NaN or infinity.
    """

    def work(example: Example) -> tuple[Tensor, Tensor]:
        image = load_image(example, size, centre_of(example, size)).to(sd.device)
        views = [image, image.flip(2)] if flip else [image]
        mean, std = (torch.cat(part) for part in zip(*(_encode(sd, view[None]) for view in views), strict=True))
        if not (mean.isfinite().all() and std.isfinite().all()):
            raise InputError(
                f"the model's autoencoder makes NaN or infinity of {example.picture.path}; its weights are damaged"
            )
        progress()
        return mean, std  # (views, 4, h, w) each

    parts = side_by_side(work, examples, sd.device)
    return Latents(*(torch.stack(part) for part in zip(*parts, strict=True)))


def check_photographs(subjects: Sequence[Subject], settings: Settings, sd: StableDiffusion) -> None:
    """Cuts each photograph and its mask once, as training does. Raises InputError, which names one that is wrong."""
    for bucket in sort_photographs(subjects, settings, sd, rows=1).buckets:
        for example in bucket.examples:
            centre = centre_of(example, bucket.size)
            load_image(example, bucket.size, centre)
            load_mask(example, bucket.size, centre, bucket.shape)


def encode_masks(examples: Sequence[Example], size: Size, shape: tuple[int, int, int], flip: bool) -> Tensor:
    """The masks of pictures, cut as `encode_pictures` cuts them: (N, views, 1, h, w). shape: that of the latents."""
    masks = torch.stack([load_mask(example, size, centre_of(example, size), shape) for example in examples])
    return torch.stack([masks, masks.flip(3)] if flip else [masks], 1)
