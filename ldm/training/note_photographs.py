"""Notes on the photographs: their sizes, what the square cut removes, and which ones look alike."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, ImageOps

from ldm import images
from ldm.images import Picture
from ldm.training.note import Note, counted, listed
from ldm.training.settings import Settings

ALIKE = 8  # of 64 bits: photographs that differ in at most so many look alike
MUCH = 0.4  # of a photograph; a square cut removes 0.25 of 4:3, 0.33 of 3:2 and 0.44 of 16:9


@dataclass(frozen=True)
class Look:
    """What a photograph looks like in a few numbers. bits: (64,) bool, see `look`."""

    name: str
    width: int
    height: int
    bits: np.ndarray

    @property
    def size(self) -> str:
        return f"{self.width} x {self.height}"

    @property
    def removed(self) -> float:
        """The share that the largest square leaves out."""
        return 1 - min(self.width, self.height) / max(self.width, self.height)


def look(picture: Picture) -> Look:
    """Size and fingerprint of a photograph, upright.

    The fingerprint says for 8 x 8 places whether it grows brighter to the right there (the difference hash). Scale,
    brightness and compression hardly change it.
    """
    with images.open_picture(io.BytesIO(picture.content)) as image:
        width, height = image.size
        if image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8):  # lies on its side
            width, height = height, width
        image.draft("L", (64, 64))  # a JPEG file is then decoded small
        ImageOps.exif_transpose(image, in_place=True)
        grey = np.asarray(images.to_rgb(image).convert("L").resize((9, 8), Image.Resampling.BOX), dtype=int)
    return Look(picture.path.name, width, height, (grey[:, 1:] > grey[:, :-1]).flatten())


def photograph_notes(settings: Settings, photographs: Sequence[Picture]) -> list[Note]:
    looks = [look(picture) for picture in photographs]
    return [_of_sizes(looks), *_of_small(looks, settings.resolution), *_of_cut(looks), *_of_alike(looks)]


def _of_sizes(looks: list[Look]) -> Note:
    small, large = (choose(looks, key=lambda look: look.width * look.height) for choose in (min, max))
    sizes = f"of {small.size}" if len({look.size for look in looks}) == 1 else f"from {small.size} to {large.size}"
    least, most = (round(100 * choose(look.removed for look in looks)) for choose in (min, max))
    share = f"{least} %" if least == most else f"{least} to {most} %"
    cut = f"removes {share} of each" if most else "removes nothing"
    return Note("photographs", f"{counted(len(looks), 'photograph')} {sizes} pixels; cutting them square {cut}.")


def _of_small(looks: list[Look], resolution: int) -> list[Note]:
    small = [look for look in looks if min(look.width, look.height) < resolution]
    if not small:
        return []
    names = listed(f"{look.name} ({look.size})" for look in small)
    text = (
        f"Smaller than {resolution} pixels, so enlarged and blurred: {names}. Take larger ones, or a lower resolution."
    )
    return [Note("photographs", text, warning=True)]


def _of_cut(looks: list[Look]) -> list[Note]:
    much = sorted((look for look in looks if look.removed >= MUCH), key=lambda look: -look.removed)
    if not much:
        return []
    names = listed(f"{look.name} ({100 * look.removed:.0f} %)" for look in much)
    text = f"The square cut removes much of {names}. Cut them around the subject yourself."
    return [Note("photographs", text, warning=True)]


def _of_alike(looks: list[Look]) -> list[Note]:
    bits = np.stack([look.bits for look in looks]).astype(np.float32)
    differ = bits @ (1 - bits).T
    differ += differ.T  # (N, N): number of bits that differ
    pairs = np.argwhere(np.triu(differ <= ALIKE, k=1))
    if not len(pairs):
        return []
    names = listed((f"{looks[a].name} = {looks[b].name}" for a, b in pairs.tolist()), 2)
    text = f"Nearly the same picture twice: {names}. Leave one out, or the run sees it twice as often."
    return [Note("photographs", text, warning=True)]
