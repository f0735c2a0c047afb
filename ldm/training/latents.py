"""Pictures -> the latents that training samples from: mean and standard deviation, scaled."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.errors import InputError
from ldm.images import Picture, load_picture
from ldm.model import StableDiffusion
from ldm.runtime import side_by_side

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]


class Latents(NamedTuple):
    """mean, std: (N, views, C, h, w) for N pictures; two views if each is also mirrored, else one."""

    mean: Tensor
    std: Tensor


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


def encode_pictures(
    sd: StableDiffusion, pictures: Sequence[Picture], resolution: int, flip: bool, progress: Callable[[], object]
) -> Latents:
    """The latents of pictures, each encoded once, and once more mirrored if `flip`.

    progress: called after each picture, in any thread. Raises InputError for a picture that can't be read, and for
    latents that are NaN or infinity.
    """

    def work(picture: Picture) -> tuple[Tensor, Tensor]:
        image = load_picture(picture, resolution).to(sd.device)
        views = [image, image.flip(2)] if flip else [image]
        mean, std = (torch.cat(part) for part in zip(*(_encode(sd, view[None]) for view in views), strict=True))
        if not (mean.isfinite().all() and std.isfinite().all()):
            raise InputError(
                f"the model's autoencoder makes NaN or infinity of {picture.path}; its weights are damaged"
            )
        progress()
        return mean, std  # (views, 4, h, w) each

    parts = side_by_side(work, pictures, sd.device)
    return Latents(*(torch.stack(part) for part in zip(*parts, strict=True)))
