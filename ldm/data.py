"""Photographs as people have them -> square pictures in [-1, 1] -> training rows."""

import warnings
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ldm import draws
from ldm.errors import InputError

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]


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
    """The picture files in a folder, by name. What is no picture is skipped, with a warning.

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
            warnings.warn(f"skipped {path}: not a picture of a kind that can be read here", stacklevel=2)
    return pictures


def load_picture(path: str | Path, resolution: int, centre: tuple[float, float] = (0.5, 0.5)) -> Tensor:
    """One picture as (3, R, R) float32 in [-1, 1]; see `square`."""
    return to_tensor(square(path, resolution, centre))


def to_tensor(picture: Image.Image) -> Tensor:
    """8-bit RGB -> (3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1.0


def square(path: str | Path, resolution: int, centre: tuple[float, float] = (0.5, 0.5)) -> Image.Image:
    """One picture as 8-bit RGB: upright, short side resized to `resolution`, cut to a square; see `fit`."""
    return fit(path, resolution, resolution, centre)


def fit(path: str | Path, width: int, height: int, centre: tuple[float, float] = (0.5, 0.5)) -> Image.Image:
    """One picture as 8-bit RGB: upright, resized until it covers `width` x `height`, and cut to that.

    centre: where it is cut, from (0, 0), left and top, to (1, 1).

    Raises InputError, which names the file, if it can't be read.
    """
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            return ImageOps.fit(to_rgb(upright), (width, height), Image.Resampling.LANCZOS, centering=centre)
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


class Rows:
    """Training rows of one kind. Row `index` of a run is a function of (seed, kind, index) alone (rule 4)."""

    def __init__(self, kind: str, count: int, shape: tuple[int, int, int], timesteps: int, device: torch.device):
        """count: pictures; shape: (C, h, w) of their latents."""
        self.kind, self.count, self.shape, self.timesteps, self.device = kind, count, shape, timesteps, device

    def moments(self, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of picture k's latents, (C, h, w) each, of one view drawn from the generator."""
        raise NotImplementedError

    def draw(self, seed: int, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows first ... first + count - 1: latents sampled anew and noise, (count, C, h, w), and steps t, (count,)."""
        latents, noises, steps = [], [], []
        for index in range(first, first + count):
            generator = draws.generator(seed, self.kind, "noise", index)
            spread, noise = torch.randn((2, *self.shape), generator=generator).to(self.device)
            steps.append(torch.randint(self.timesteps, (), generator=generator))
            mean, std = self.moments(draws.pick(seed, self.kind, index, self.count), generator)
            latents.append(mean + std * spread)
            noises.append(noise)
        return torch.stack(latents), torch.stack(noises), torch.stack(steps).to(self.device)


class LatentRows(Rows):
    """Rows of pictures that were encoded once: mean and std are (N, views, C, h, w), views 2 where one is mirrored."""

    def __init__(self, kind: str, mean: Tensor, std: Tensor, timesteps: int):
        super().__init__(kind, len(mean), tuple(mean.shape[2:]), timesteps, mean.device)
        self.mean, self.std = mean, std

    def moments(self, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        views = self.mean.shape[1]
        view = int(torch.randint(views, (), generator=generator)) if views > 1 else 0
        return self.mean[k, view], self.std[k, view]


class CroppedRows(Rows):
    """Rows of pictures that are cut anew, and mirrored half of the time if `flip`, and so encoded each time."""

    def __init__(self, kind: str, paths: list[Path], resolution: int, flip: bool, encode: Encode, rows: dict[str, Any]):
        """encode: (B, 3, R, R) in [-1, 1] -> mean and std of the latents; rows: shape, timesteps and device."""
        super().__init__(kind, len(paths), **rows)
        self.paths, self.resolution, self.flip, self.encode = paths, resolution, flip, encode

    def moments(self, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x, y, mirrored = torch.rand(3, generator=generator).tolist()
        image = load_picture(self.paths[k], self.resolution, (x, y))[None].to(self.device)
        mean, std = self.encode(image.flip(3) if self.flip and mirrored < 0.5 else image)
        return mean[0], std[0]
