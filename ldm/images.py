"""Photographs -> square tensors in [-1, 1]; tensors -> pictures."""

import io
import os
import warnings
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ldm.errors import InputError, RunError, one_line
from ldm.runtime import check_file, exists, list_folder

# The formats that Pillow decodes itself, if it was built with them. Of the others, EPS starts Ghostscript, and MPEG,
# HDF5, GRIB and WMF need a program or a plugin.
FORMATS = """AVIF BMP DDS DIB GIF ICNS ICO JPEG JPEG2000 PCX PNG PPM PSD QOI SGI SUN TGA TIFF WEBP""".split()

MAX_SIDE = 8192  # pixels along a picture to make
MAX_PIXELS = 125_000_000  # of a picture to read, and of a contact sheet to write; Pillow takes 4 bytes for each
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # Pillow's own limit is lower
MAX_BYTES = 1 << 28  # of a picture's file
ORIENTATION = 274  # EXIF's tag
TILE = 1024  # pixels along a part that is converted at once


class Picture(NamedTuple):
    """A picture's file, read whole: what happens to the file afterwards does not matter."""

    path: Path
    content: bytes


def read_picture(path: Path) -> Picture:
    """Raises InputError, which names the file, if it can't be read."""
    check_file(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path} is too large for a picture: it should have at most {MAX_BYTES} bytes")
        return Picture(path, path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}); repair it or take it away") from None


def find_pictures(folder: str | Path, ours: Container[str] = ()) -> list[Path]:
    """The picture files in a folder, sorted by name; see `list_pictures`.

    Raises InputError if there is no such folder, or no picture in it.
    """
    check_folder(folder)
    if pictures := list_pictures(folder, ours):
        return pictures
    raise InputError(f"{folder} holds no picture; put the photographs (.jpg, .png, ...) there")


def check_folder(folder: str | Path) -> None:
    """Raises InputError if there is no such folder."""
    if not exists(folder) or not os.path.isdir(folder):
        raise InputError(f"{folder} is not a folder; give the folder of the photographs")


def list_pictures(folder: str | Path, ours: Container[str] = ()) -> list[Path]:
    """The picture files in a folder, sorted by name. Other files are skipped with a warning.

    ours: names of files to skip without a warning.
    """
    pictures = []
    for path in list_folder(folder):
        if path.name in ours:
            continue
        if is_picture(path):
            pictures.append(path)
        else:
            warnings.warn(one_line(f"skipped {path}: not a picture file that can be read"), stacklevel=2)
    return pictures


def is_picture(path: Path) -> bool:
    """Whether this is a file whose name ends as that of a picture of a known format, and that is not hidden."""
    return os.path.isfile(path) and path.suffix.lower() in _endings() and not path.name.startswith(".")


@cache
def _endings() -> frozenset[str]:
    known = readable_formats()
    return frozenset(ending for ending, format in Image.registered_extensions().items() if format in known)


def load_picture(path: str | Path | Picture, resolution: int, centre: tuple[float, float] = (0.5, 0.5)) -> Tensor:
    """One picture as (3, R, R) float32 in [-1, 1]; see `square`."""
    return to_tensor(square(path, resolution, centre))


def to_tensor(picture: Image.Image) -> Tensor:
    """8-bit RGB -> (3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1.0


def square(path: str | Path | Picture, resolution: int, centre: tuple[float, float] = (0.5, 0.5)) -> Image.Image:
    """One picture as 8-bit RGB: upright, short side resized to `resolution`, cut to a square; see `fit`."""
    return fit(path, resolution, resolution, centre)


def fit(
    path: str | Path | Picture,
    width: int,
    height: int,
    centre: tuple[float, float] = (0.5, 0.5),
    convert: Callable[[Image.Image], Image.Image] | None = None,
) -> Image.Image:
    """One picture as 8-bit RGB: upright, resized until it covers `width` x `height`, and cut to that.

    centre: where it is cut, from (0, 0), left and top, to (1, 1). convert: used in place of `to_rgb`. Raises
    InputError, which names the file, if it can't be read.
    """
    file: Path | io.BytesIO = path
    if isinstance(path, Picture):
        path, file = path.path, io.BytesIO(path.content)
    else:
        check_file(path)
    try:
        with open_picture(file) as image:
            ImageOps.exif_transpose(image, in_place=True)
            return ImageOps.fit((convert or to_rgb)(image), (width, height), Image.Resampling.LANCZOS, centering=centre)
    except Exception as error:  # Pillow's plugins can raise anything on a damaged picture
        raise InputError(f"{path} can't be read as a picture ({error}); repair it or take it away") from None


def load_mask(path: str | Path, of: tuple[int, int], width: int, height: int) -> Tensor:
    """Where a picture is painted anew: a mask, cut as `fit` cuts the picture. (1, H, W) bool, True where it is white.

    of: the picture's `upright_size`. Greys are white from half on. Raises InputError, which names the file, if it can't
    be read, is not as large as the picture, or has transparent parts: some programs paint those, and others the rest.
    """
    mask = read_picture(Path(path))
    if (size := upright_size(mask)) != of:
        sizes = "{} x {} pixels, and the picture has {} x {}".format(*size, *of)
        raise InputError(f"the mask {path} has {sizes}; save it as large as the picture")
    with opened(mask) as image:
        is_opaque = not image.has_transparency_data or image.convert("RGBA").getchannel("A").getextrema()[0] == 255
    if not is_opaque:
        how = "white where the picture is to be painted and black where it stays"
        raise InputError(f"the mask {path} has transparent parts; save it without transparency, {how}")
    grey = fit(mask, width, height, convert=lambda image: to_rgb(image).convert("L"))
    return torch.from_numpy(np.array(grey))[None] >= 128


def readable_formats() -> list[str]:
    """Those of `FORMATS` that this build of Pillow knows."""
    Image.init()  # loads Pillow's plugins
    return [format for format in FORMATS if format in Image.OPEN]


def open_picture(file: str | Path | io.BytesIO) -> Image.Image:
    """A picture whose pixels are not read yet. Raises ValueError if there are too many, and whatever Pillow raises.

    A small file can hold very many pixels. Pillow knows their number from the file's first bytes.
    """
    image = Image.open(file, formats=readable_formats())
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
    return image


@contextmanager
def opened(picture: Picture) -> Iterator[Image.Image]:
    """Opens a picture from its content. Turns whatever Pillow raises into an InputError, which names the file."""
    try:
        with open_picture(io.BytesIO(picture.content)) as image:
            yield image
    except Exception as error:  # Pillow's plugins can raise anything on a damaged picture
        raise InputError(f"{picture.path} can't be read as a picture ({error}); repair it or take it away") from None


def upright_size(picture: Picture) -> tuple[int, int]:
    """Width and height of a picture as it is seen, from the file's first bytes. Raises InputError as `fit`."""
    with opened(picture) as image:
        width, height = image.size
        is_turned = image.getexif().get(ORIENTATION) in (5, 6, 7, 8)  # by a quarter; EXIF 2.3
    return (height, width) if is_turned else (width, height)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes -> 8-bit RGB. Sixteen bits are scaled, not clipped; transparent parts become white.

    Raises ValueError for floating-point pictures, since the file does not say which number is white.
    """
    image.load()  # which can change the mode
    if image.mode == "F":
        raise ValueError("it holds floating-point numbers; save it with 8 or 16 bits")
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    rgb = Image.new("RGB", image.size)
    for top in range(0, image.height, TILE):  # in tiles, so that a large picture is not in memory four times
        for left in range(0, image.width, TILE):
            tile = image.crop((left, top, min(left + TILE, image.width), min(top + TILE, image.height)))
            rgb.paste(_tile_to_rgb(tile), (left, top))
    return rgb


def _tile_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.float64) / 257.0).clip(0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def to_pil(images: Tensor) -> list[Image.Image]:
    """Images (B, 3, H, W) in [-1, 1] -> 8-bit RGB pictures. Raises RunError for NaN and infinity."""
    if not images.isfinite().all():
        raise RunError(
            "a picture came out as NaN or infinity: fp16 is too narrow for the model (take bf16 or fp32), the guidance "
            "is too strong, or the model has diverged"
        )
    array = ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(image) for image in array.permute(0, 2, 3, 1).cpu().numpy()]
