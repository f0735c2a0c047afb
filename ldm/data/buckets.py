"""Buckets: the sizes that photographs of any shape are cut to, all of about the same area.

A batch holds pictures of one size. A photograph that is not square loses much when a square is cut out of it. With
buckets it is cut to the size whose shape is the nearest to its own (NovelAI, "Improvements on Stable Diffusion", 2022).
"""

from ldm.errors import InputError

Size = tuple[int, int]  # width and height in pixels

LONGEST = 4  # times the other side
LEAST_AREA = 0.8  # of the square's


def bucket_sizes(resolution: int, step: int) -> list[Size]:
    """The sizes with sides that are multiples of `step`, and 80 to 100 % of the area of the square of `resolution`."""
    area, sides = resolution**2, range(step, 2 * resolution + 1, step)
    sizes = [(w, h) for w in sides for h in sides if LEAST_AREA * area <= w * h <= area]
    return [(w, h) for w, h in sizes if max(w, h) <= LONGEST * min(w, h)]


def bucket_step(factor: int, levels: int, resolution: int) -> int:
    """What the sides of buckets are multiples of: 64 pixels for Stable Diffusion at 512, 8 for the embedded model.

    factor: pixels along a latent. Latents halve evenly at all levels of the UNet, unless the pictures are too small for
    that: then the step is about an eighth of the resolution.
    """
    return max(factor, min(factor * 2 ** (levels - 1), resolution // 8 // factor * factor))


def bucket_of(picture: Size, sizes: list[Size], step: int, upscale: bool = True) -> Size:
    """The size that a picture is cut to: of the nearest shape, and of those the largest.

    upscale: whether the picture may be enlarged; if not, a small one gets a bucket of its own size, rounded down.
    Raises InputError if it is smaller than `step` then.
    """
    nearest = min(sizes, key=lambda size: (round(cut_away(picture, size), 9), -size[0] * size[1]))
    if upscale:
        return nearest
    if min(picture) < step:
        raise InputError(f"{picture[0]} x {picture[1]} pixels are too few: no side should be below {step}")
    return tuple(min(side, own // step * step) for side, own in zip(nearest, picture, strict=True))


def cut_away(picture: Size, bucket: Size) -> float:
    """The fraction of a picture's area that is lost when it is resized until it covers the bucket, and cut to that."""
    shapes = [width / height for width, height in (picture, bucket)]
    return 1 - min(shapes) / max(shapes)


def cut_around(
    focus: tuple[float, float], picture: Size, bucket: Size, where: tuple[float, float] | None
) -> tuple[float, float]:
    """Where to cut the bucket out of a picture, from (0, 0), left and top, to (1, 1), so that the cut holds the focus.

    focus: from (0, 0) to (1, 1). where: the place among all such cuts, drawn from 0 to 1; None for focus in the middle.
    """
    scale = max(side / own for side, own in zip(bucket, picture, strict=True))
    found = []
    for i, (side, own) in enumerate(zip(bucket, picture, strict=True)):
        spare = own * scale - side  # pixels that are cut away along this side
        first, middle, last = (min(max(focus[i] * own * scale - before, 0.0), spare) for before in (side, side / 2, 0))
        cut = middle if where is None else first + where[i] * (last - first)
        found.append(cut / spare if spare > 1e-6 else 0.5)
    return found[0], found[1]
