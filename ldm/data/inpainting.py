"""Training a model for painting in: it sees a random mask, and the latents of the picture with a hole there.

The official models were trained this way from ordinary ones: "5 additional input channels (4 for the encoded
masked-image and 1 for the mask itself) whose weights were zero-initialized", with "synthetic masks and in 25% mask
everything" (model card of stable-diffusion-inpainting).
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm import rng
from ldm.data.buckets import Size
from ldm.data.examples import Example
from ldm.data.latents import Encode, centre_of, load_image
from ldm.errors import InputError
from ldm.guidance import masked_columns
from ldm.model import StableDiffusion

WHOLE = 0.25  # share of rows whose mask is the whole picture


def widen(sd: StableDiffusion) -> None:
    """Adds the input channels of a model for painting in, with weights of 0: it predicts as before until they train.

    Raises InputError if the model has them already.
    """
    if sd.config.unet.paints_in:
        raise InputError(f"the model's UNet has {sd.config.unet.in_channels} input channels, for painting in, already")
    sd.config = sd.config.for_painting_in()
    first, sd.unet.config = sd.unet.input_blocks[0][0], sd.config.unet
    added = sd.config.unet.in_channels - first.in_channels
    first.weight = nn.Parameter(F.pad(first.weight.detach(), (0, 0, 0, 0, 0, added)))
    first.in_channels = sd.config.unet.in_channels


def draw_mask(generator: torch.Generator, height: int, width: int) -> Tensor:
    """A random mask, (1, H, W) bool, True where the picture is painted: all of it, or a rectangle or an ellipse in it.

    The sides of a shape are drawn from 0 to the picture's, and then its place, as in diffusers' dreambooth_inpaint.
    """
    whole, ellipse, *drawn = torch.rand(6, generator=generator).tolist()
    if whole < WHOLE:
        return torch.ones(1, height, width, dtype=torch.bool)
    places = []
    for length, size, place in zip((height, width), drawn[:2], drawn[2:], strict=True):
        middle = length * (size / 2 + place * (1 - size))
        places.append((torch.arange(length) + 0.5 - middle) / (max(length * size, 1) / 2))  # -1 to 1 inside
    y, x = places[0][:, None], places[1][None]
    inside = y**2 + x**2 <= 1 if ellipse < 0.5 else (y.abs() <= 1) & (x.abs() <= 1)
    return inside[None]


def keep_images(examples: Sequence[Example], size: Size, flip: bool) -> Tensor:
    """The pixels of pictures, in which rows make holes: (N, views, 3, H, W) uint8, cut as by `encode_pictures`.

    size: width and height.
    """
    images = torch.stack([load_image(example, size, centre_of(example, size)) for example in examples])
    images = ((images + 1.0) * 127.5).round().to(torch.uint8)
    return torch.stack([images, images.flip(3)] if flip else [images], 1)


def draw_hole(key: tuple[int, str, int], size: Size, shape: tuple[int, int, int]) -> dict[str, Tensor]:
    """The random columns of one row: "hole", (1, H, W) bool, and "hole_spread", (C, h, w) standard normal.

    key: seed, kind and index of the row. size: width and height of its picture; shape: (C, h, w) of its latents.
    """
    seed, kind, index = key
    generator = rng.generator(seed, kind, "mask", index)
    return {"hole": draw_mask(generator, size[1], size[0]), "hole_spread": torch.randn(shape, generator=generator)}


def columns_beside(encode: Encode, drawn: Mapping[str, Tensor]) -> Tensor:
    """What the UNet sees beside the noisy latents of B rows: (B, C + 1, h, w), the mask and the picture with a hole.

    drawn: "image", (B, 3, H, W) in [-1, 1], and the columns of `draw_hole`. The mask is new in every row, so that its
    picture is encoded in every step.
    """
    mean, std = encode(drawn["image"].masked_fill(drawn["hole"], 0.0))
    mask = F.interpolate(drawn["hole"].to(mean), size=mean.shape[2:])
    return masked_columns(mask, mean + std * drawn["hole_spread"])
