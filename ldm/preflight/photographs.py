"""Notes on the photographs: their sizes, how much is cut away, and which ones look alike."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from ldm import images
from ldm.data import Size, cut_away
from ldm.images import Picture
from ldm.preflight.note import Note, counted, listed

ALIKE = 8  # of 64 bits: photographs that differ in at most so many look alike
MUCH = 0.4  # of a photograph; a square cut removes 0.25 of 4:3, 0.33 of 3:2 and 0.44 of 16:9


@dataclass(frozen=True)
class Look:
    """A photograph in a few numbers. own, cut: its width and height, and those that it is resized and cut to.

    bits: (64,) bool, see `fingerprint`.
    """

    name: str
    own: Size
    cut: Size
    bits: np.ndarray

    @property
    def size(self) -> str:
        return "{} x {}".format(*self.own)

    @property
    def removed(self) -> float:
        """The share of its area that is cut away."""
        return cut_away(self.own, self.cut)

    @property
    def is_enlarged(self) -> bool:
        return self.own[0] < self.cut[0] or self.own[1] < self.cut[1]


def fingerprint(picture: Picture) -> np.ndarray:
    """Says for 8 x 8 places whether a photograph grows brighter to the right there: the difference hash, (64,) bool.

    Scale, brightness and compression hardly change it.
    """
    with images.open_picture(io.BytesIO(picture.content)) as image:
        image.draft("L", (64, 64))  # a JPEG file is then decoded small
        ImageOps.exif_transpose(image, in_place=True)
        grey = np.asarray(images.to_rgb(image).convert("L").resize((9, 8), Image.Resampling.BOX), dtype=int)
    return (grey[:, 1:] > grey[:, :-1]).flatten()


def photograph_notes(photographs: Sequence[Picture], sizes: Sequence[Size]) -> list[Note]:
    """sizes: width and height that each photograph is resized and cut to."""
    looks = [
        Look(picture.path.name, images.upright_size(picture), size, fingerprint(picture))
        for picture, size in zip(photographs, sizes, strict=True)
    ]
    return [_of_sizes(looks), *_of_small(looks), *_of_cut(looks), *_of_alike(looks)]


def _of_sizes(looks: list[Look]) -> Note:
    small, large = (choose(looks, key=lambda look: (look.own[0] * look.own[1], look.own)) for choose in (min, max))
    sizes = f"of {small.size}" if len({look.own for look in looks}) == 1 else f"from {small.size} to {large.size}"
    least, most = (round(100 * choose(look.removed for look in looks)) for choose in (min, max))
    share = f"{least} %" if least == most else f"{least} to {most} %"
    removes = f"removes {share} of each" if most else "removes nothing"
    shapes = {look.cut for look in looks}
    cut = "cutting them square" if all(w == h for w, h in shapes) else f"cutting them to {counted(len(shapes), 'size')}"
    return Note("photographs", f"{counted(len(looks), 'photograph')} {sizes} pixels; {cut} {removes}.")


def _of_small(looks: list[Look]) -> list[Note]:
    small = [look for look in looks if look.is_enlarged]
    if not small:
        return []
    names = listed(f"{look.name} ({look.size})" for look in small)
    text = f"Too small, so enlarged and blurred: {names}. Take larger ones, or a lower --resolution."
    return [Note("photographs", text, warning=True)]


def _of_cut(looks: list[Look]) -> list[Note]:
    much = sorted((look for look in looks if look.removed >= MUCH), key=lambda look: -look.removed)
    if not much:
        return []
    names = listed(f"{look.name} ({100 * look.removed:.0f} %)" for look in much)
    buckets = ", or give --aspect-ratio-buckets" if all(w == h for w, h in (look.cut for look in much)) else ""
    text = f"The cut removes much of {names}. Cut them around the subject yourself{buckets}."
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
