"""Pictures inside the page: small JPEGs as data URIs, of a limited size in all."""

import base64
import io
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ldm import images
from ldm.errors import InputError, one_line

BUDGET = 3_200_000  # bytes of all pictures of a page; as text they take a third more
MOST = 110_000  # bytes of one picture
WIDTH = 1100  # pixels
MAX_PIXELS = 50_000_000  # of a sheet that is read: 150 MB of memory


class Thumbnail(NamedTuple):
    """A picture ready for <img src=...>, and its size in pixels."""

    uri: str
    width: int
    height: int


@dataclass
class Album:
    """Makes thumbnails until the page is full. problems: the pictures that it could not show, one line each."""

    left: int = BUDGET
    problems: list[str] = field(default_factory=list)

    def show(self, path: Path) -> Thumbnail | None:
        """A PNG file as a thumbnail; None, with a problem noted, if it can't be read or the page is full."""
        try:
            status = path.stat()
            found = _thumbnail(path, (status.st_mtime_ns, status.st_size))
        except (InputError, OSError) as error:
            self.problems.append(one_line(error))
            return None
        if len(found.uri) > 4 / 3 * self.left:
            self.problems.append(one_line(f"{path} is not shown: the page would be too large"))
            return None
        self.left -= len(found.uri) * 3 // 4
        return found


@lru_cache(maxsize=64)  # while a run goes on its report is rewritten, and most sheets are the same
def _thumbnail(path: Path, version: tuple[int, int]) -> Thumbnail:
    """version: differs where the file does."""
    picture = open_sheet(path)
    picture.thumbnail((WIDTH, 2 * WIDTH), Image.Resampling.LANCZOS)
    content = _jpeg(picture, 85)
    for quality in (75, 60, 45):
        if len(content) > MOST:
            content = _jpeg(picture, quality)
    while len(content) > MOST:
        picture.thumbnail((picture.width * 3 // 4, picture.height), Image.Resampling.LANCZOS)
        content = _jpeg(picture, 60)
    return Thumbnail("data:image/jpeg;base64," + base64.b64encode(content).decode(), *picture.size)


def open_sheet(path: Path) -> Image.Image:
    """A PNG file as 8-bit RGB. Raises InputError if it is damaged, of another kind, or has over MAX_PIXELS."""
    content = images.read_picture(path).content
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"{picture.width} x {picture.height} pixels are more than {MAX_PIXELS}")
            return images.to_rgb(picture)
    except Exception as error:  # Pillow can raise anything on a damaged picture
        raise InputError(f"{path} can't be shown: {error}") from None


def _jpeg(picture: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality, optimize=True)
    return file.getvalue()
