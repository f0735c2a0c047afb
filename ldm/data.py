"""Photographs as people have them -> square pictures in [-1, 1] -> training rows."""

import sys
from collections.abc import Container
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ldm import draws
from ldm.errors import InputError


def find_pictures(folder: str | Path, flag: str) -> list[Path]:
    """The picture files in a folder, by name; see `list_pictures`. flag: the folder's at the command line, to say so.

    Raises InputError if there is no such folder, or no picture in it.
    """
    if not Path(folder).is_dir():
        raise InputError(f"{flag}: {folder} is not a folder; give one with the pictures in it")
    if pictures := list_pictures(folder):
        return pictures
    raise InputError(f"{flag}: {folder} holds no picture; put the photographs (.jpg, .png, ...) there")


def list_pictures(folder: str | Path, ours: Container[str] = ()) -> list[Path]:
    """The picture files in a folder, by name. What is no picture is skipped, with a word on standard error.

    ours: names to pass over without a word.
    """
    formats = Image.registered_extensions()  # loads Pillow's plugins; some of them, such as PDF's, can only write
    known = {extension for extension, format in formats.items() if format in Image.OPEN}
    pictures = []
    for path in sorted(Path(folder).iterdir()):
        if path.name in ours:
            continue
        if path.is_file() and path.suffix.lower() in known and not path.name.startswith("."):
            pictures.append(path)
        else:
            print(f"skipped {path}: not a picture", file=sys.stderr)
    return pictures


def load_picture(path: str | Path, resolution: int) -> Tensor:
    """One picture as (3, R, R) float32 in [-1, 1]; see `square`."""
    pixels = torch.from_numpy(np.array(square(path, resolution)))  # (R, R, 3), 0 to 255
    return pixels.permute(2, 0, 1).float() / 127.5 - 1.0


def square(path: str | Path, resolution: int) -> Image.Image:
    """One picture as 8-bit RGB: upright, short side resized to `resolution`, cut to the middle square.

    Raises InputError, which names the file, if it can't be read.
    """
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            return ImageOps.fit(to_rgb(upright), (resolution, resolution), Image.Resampling.LANCZOS)
    except Exception as error:  # a damaged picture can make Pillow's plugins raise anything
        raise InputError(f"{path} can't be read as a picture ({error}); repair it or take it away") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes -> 8-bit RGB: sixteen bits are scaled, not clipped; what is transparent becomes white.

    Raises ValueError for floating-point pictures: nothing says which number is white.
    """
    if image.mode == "F":
        raise ValueError("it holds floating-point numbers; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.float64) / 257.0).clip(0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


class LatentRows:
    """Training rows of one kind, drawn from pictures that were encoded once: mean and std are (N, C, h, w) latents.

    Row `index` of a run is a function of (seed, kind, index) alone (rule 4).
    """

    def __init__(self, kind: str, mean: Tensor, std: Tensor, timesteps: int):
        self.kind, self.mean, self.std, self.timesteps = kind, mean, std, timesteps

    def draw(self, seed: int, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows first ... first + count - 1: latents sampled anew and noise, (count, C, h, w), and steps t, (count,)."""
        latents, noises, steps = [], [], []
        for index in range(first, first + count):
            k = draws.pick(seed, self.kind, index, len(self.mean))
            generator = draws.generator(seed, self.kind, "noise", index)
            spread, noise = torch.randn((2, *self.mean.shape[1:]), generator=generator).to(self.mean.device)
            latents.append(self.mean[k] + self.std[k] * spread)
            noises.append(noise)
            steps.append(torch.randint(self.timesteps, (), generator=generator))
        return torch.stack(latents), torch.stack(noises), torch.stack(steps).to(self.mean.device)
