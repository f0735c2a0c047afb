"""Masks: where in a photograph the loss counts.

    dog/1.jpg  dog/1-mask.png   white where it counts; any format of picture, also named 1-masklabel.png (OneTrainer)

With --alpha-masks, a photograph that has an alpha channel and no such file is its own mask.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ldm import images
from ldm.data.examples import Example
from ldm.data.focus import Point
from ldm.images import Picture

TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La")  # Pillow's modes with an alpha channel
DARK = 8  # of 255; a mask that is nowhere brighter is wrong, for example 0 and 1 where 0 and 255 were meant


def load_mask(example: Example, size: tuple[int, int], centre: Point, shape: tuple[int, int, int]) -> Tensor:
    """Where the loss counts, (1, h, w) from 0 to 1: the mean of the mask over each latent's pixels.

    size, centre: how the photograph is cut, width and height; see `images.fit`. shape: (C, h, w) of its latents. Ones
    for an example without a mask. Raises InputError, which names the file, if it can't be read or is black.
    """
    if example.mask is None:
        return torch.ones(1, *shape[1:])
    convert = alpha if example.mask is example.picture else grey
    mask = images.fit(example.mask, *size, centre, convert)
    pixels = torch.from_numpy(np.array(mask, dtype=np.float32))[None] / 255  # (1, H, W)
    return adaptive_avg_pool2d(pixels, shape[1:])


def has_alpha(picture: Picture) -> bool:
    """Whether a picture has an alpha channel, or a colour that is transparent."""
    with images.opened(picture) as image:
        return image.mode in TRANSPARENT or "transparency" in image.info


def alpha(image: Image.Image) -> Image.Image:
    """The alpha channel, 8 bits."""
    return image.convert("RGBA").getchannel("A")


def grey(image: Image.Image) -> Image.Image:
    """A mask's file as 8-bit grey; where it is transparent, it is black. Raises ValueError if all of it is black."""
    if image.mode in TRANSPARENT or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    image = images.to_rgb(image).convert("L")
    if (brightest := image.getextrema()[1]) <= DARK:
        raise ValueError(f"a mask is white, 255, where the subject is, and its brightest pixel is {brightest}")
    return image
