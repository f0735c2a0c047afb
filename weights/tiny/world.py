"""The drawn world: captioned 64 x 64 pictures that a program draws, in place of LAION's five billion.

A picture shows one thing in one scene. A `Picture` describes it, `draw` draws it, and `caption` puts it into words:

    rng = random.Random(0)
    picture = sample(rng, kind="cat")      # Picture(kind="cat", colour="red", pattern="striped", scene="at night", ...)
    image = draw(picture, rng)             # (64, 64, 3) uint8
    words = caption(picture, rng)          # "a photo of a red striped cat at night"

Captions leave attributes out at random, as people do, so that "a photo of a monster" means any monster. Everything is
drawn as polygons on a canvas four times as wide, which is then averaged down.

    python weights/tiny/world.py sheet.png     # draws a sheet of 64 pictures
    python weights/tiny/world.py weights/tiny/validation --held-out baron      # as shipped
"""

import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw
from scenes import CANVAS, scene
from shapes import grow
from things import FLOOR, INK, THINGS, WHITE

from ldm.runtime import cli

SIZE = 64

KINDS = ("ball", "star", "heart", "cup", "car", "fish", "cat", "monster")
COLOURS = {
    "red": (222, 38, 44),
    "yellow": (253, 212, 38),
    "green": (36, 160, 70),
    "blue": (42, 104, 236),
    "purple": (136, 62, 196),
    "pink": (255, 138, 190),
}
PATTERNS = ("plain", "striped", "spotted")  # the second colour is white, and covers less than half
SCENES = ("on the grass", "on the beach", "at night", "in the snow", "in the desert", "under water", "in a room")
SIZES = {"small": (0.235, 0.26), "": (0.28, 0.32), "big": (0.345, 0.38)}  # half the thing's height / picture's height

# A monster's build, which varies freely. No caption mentions it.
SHAPES = ("round", "tall", "wide", "bell")
EYES = (1, 2, 3)
CROWNS = ("horns", "antennae", "tuft", "bald")
MOUTHS = ("smile", "open", "teeth")

# These crowns, and any second colour except white, are in no picture that the UNet is trained on.
RARE_CROWNS = ("hat", "leaf")
RARE_SECONDS = {"yellow": (255, 216, 40), "orange": (248, 130, 24), "green": (70, 190, 80), "black": (44, 40, 56)}

# Two monsters for DreamBooth. The settings were chosen on "pip"; the shipped photographs and results are of "baron".
SUBJECTS = {
    "baron": dict(colour="blue", second="yellow", pattern="striped", shape="round", eyes=1, crown="hat", mouth="teeth"),
    "pip": dict(colour="pink", second="green", pattern="striped", shape="tall", eyes=2, crown="leaf", mouth="smile"),
}


@dataclass(frozen=True)
class Picture:
    kind: str
    colour: str
    pattern: str
    scene: str
    size: str
    scale: float  # half the height of the thing; this and the next two are fractions of the picture's size
    x: float  # the thing's centre, from the left
    bottom: float  # where the thing touches the ground, from the top
    flip: bool
    shape: str
    eyes: int
    crown: str
    mouth: str
    second: str = "white"


def sample(rng, **fixed):
    """A random Picture with the attributes in `fixed`."""
    size = fixed.get("size", rng.choice(tuple(SIZES)))
    scale = rng.uniform(*SIZES[size])
    picture = Picture(
        kind=rng.choice((*KINDS, "monster")),  # monsters are twice as frequent, because they vary most
        colour=rng.choice(tuple(COLOURS)),
        pattern=rng.choice(PATTERNS),
        scene=rng.choice(SCENES),
        size=size,
        scale=scale,
        x=rng.uniform(min(0.36, 1.1 * scale + 0.02), max(0.64, 0.98 - 1.1 * scale))
        if scale < 0.33
        else rng.uniform(0.42, 0.58),
        bottom=rng.uniform(0.84, 0.93),
        flip=rng.random() < 0.5,
        shape=rng.choice(SHAPES),
        eyes=rng.choice(EYES),
        crown=rng.choice(CROWNS),
        mouth=rng.choice(MOUTHS),
    )
    return replace(picture, **fixed)


def subject(name, rng, **fixed):
    """A random Picture of the subject of this name, with the attributes in `fixed`."""
    return sample(rng, kind="monster", **SUBJECTS[name], **fixed)


def caption(picture, rng):
    """A caption of a picture. Leaves attributes out at random, and sometimes adds an invented word."""
    words = []
    if picture.size and rng.random() < 0.5:
        words.append(picture.size)
    if rng.random() < 0.75:
        words.append(picture.colour)
    if rng.random() < (0.3 if picture.pattern == "plain" else 0.7):
        words.append(picture.pattern)
    words.append(picture.kind)
    article = "a "
    if rng.random() < 0.06:  # so that the model has met unknown words like DreamBooth's "sks"
        words.insert(len(words) - 1, "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 4))))
        article = rng.choice(("a ", ""))
    text = rng.choice(("a photo of ",) * 8 + ("a picture of ", "")) + article + " ".join(words)
    return f"{text} {picture.scene}" if rng.random() < 0.75 else text


def texture(picture, centre, s, main, second):
    """A canvas filled with the main colour and the stripes or spots. draw pastes it through the body's mask."""
    sheet = Image.new("RGB", (CANVAS, CANVAS), main)
    pen = ImageDraw.Draw(sheet)
    (cx, cy), upright = centre, picture.kind in ("fish", "car")
    if picture.pattern == "striped":
        for i in range(-4, 5):
            at, half = (cx if upright else cy) + (i + 0.1) * 0.5 * s, 0.095 * s
            pen.rectangle(
                (at - half, 0, at + half, CANVAS) if upright else (0, at - half, CANVAS, at + half), fill=second
            )
    elif picture.pattern == "spotted":
        for row in range(-3, 4):
            for column in range(-3, 4):
                x, y, r = cx + (column + row % 2 * 0.5) * 0.56 * s, cy + (row + 0.3) * 0.46 * s, 0.14 * s
                pen.ellipse((x - r, y - r, x + r, y + r), fill=second)
    return sheet


def draw(picture, rng, canvas=None):
    """Draws a Picture as (64, 64, 3) uint8. rng places clouds and stars and varies the colours a little.

    canvas: a PIL image to draw the thing on instead of the picture's scene; it is changed.
    """
    canvas = scene(picture.scene, rng) if canvas is None else canvas
    s = picture.scale * CANVAS
    cx, cy = picture.x * CANVAS, picture.bottom * CANVAS - FLOOR[picture.kind] * s
    seconds = {"white": WHITE, **RARE_SECONDS}
    colours = {
        "main": jitter(COLOURS[picture.colour], rng),
        "second": jitter(seconds[picture.second], rng),
    }

    def place(points):
        return points * ((-s if picture.flip else s), s) + (cx, cy)

    def paint(pen, points, colour):
        pen.polygon(
            [tuple(xy) for xy in points.tolist()],
            fill=colours.get(colour, colour) if isinstance(colour, str) else colour,
        )

    behind, body, front = THINGS[picture.kind](picture)
    behind = [(place(points), colour) for points, colour in behind]
    body = [place(points) for points in body]

    shade(canvas, ellipse_mask((cx, picture.bottom * CANVAS, 0.9 * s, 0.13 * s)), 80)
    pen = ImageDraw.Draw(canvas)
    for points in [points for points, _ in behind] + body:
        paint(pen, grow(points, 4.5), INK)
    for points, colour in behind:
        paint(pen, points, colour)

    mask = Image.new("L", (CANVAS, CANVAS))
    for points in body:
        ImageDraw.Draw(mask).polygon([tuple(xy) for xy in points.tolist()], fill=255)
    canvas.paste(texture(picture, (cx, cy), s, colours["main"], colours["second"]), (0, 0), mask)
    dx, dy = int(-0.09 * s), int(-0.13 * s)  # the light comes from the upper left: the lower right rim is darker
    shade(canvas, ImageChops.subtract(mask, ImageChops.offset(mask, dx, dy)), 48)
    for points, colour in front:
        paint(pen, place(points), colour)
    return np.asarray(canvas.resize((SIZE, SIZE), Image.BOX))


def ellipse_mask(where):
    x, y, rx, ry = where
    mask = Image.new("L", (CANVAS, CANVAS))
    ImageDraw.Draw(mask).ellipse((x - rx, y - ry, x + rx, y + ry), fill=255)
    return mask


def shade(canvas, mask, strength):
    canvas.paste((20, 16, 40), (0, 0), mask.point([v * strength // 255 for v in range(256)]))


def jitter(colour, rng, by=6):
    return tuple(int(min(255, max(0, v + rng.uniform(-by, by)))) for v in colour)


def sheet(images, columns=8, scale=2, gap=2):
    """Arranges pictures (64, 64, 3) in rows on one PIL image."""
    tile = SIZE * scale + gap
    out = Image.new("RGB", (columns * tile + gap, -(-len(images) // columns) * tile + gap), (30, 30, 30))
    for i, image in enumerate(images):
        big = Image.fromarray(np.asarray(image)).resize((SIZE * scale, SIZE * scale), Image.LANCZOS)
        out.paste(big, (gap + i % columns * tile, gap + i // columns * tile))
    return out


VIEWS = (
    ("on the grass", "", 0.5),
    ("in the snow", "big", 0.46),
    ("on the beach", "small", 0.38),
    ("in a room", "", 0.6),
)


def write_subject(name, folder):
    """Writes four photographs of a subject, each in another scene, size and place. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i}.png" for i in range(len(VIEWS))]
    for path, (where, size, x) in zip(paths, VIEWS, strict=True):
        rng = random.Random(f"{name} {path.stem}")
        Image.fromarray(draw(subject(name, rng, scene=where, size=size, x=x, flip=False), rng)).save(path)
    return paths


def write_held_out(name, folder, count=4):
    """Writes pictures of a subject that are none of its photographs, at random places, for train.py's validation.

    Captions name the scenes: a loss that asks for an unnamed scene would measure how well the model guesses it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        rng = random.Random(f"{name} held out {i}")
        picture = subject(name, rng)
        Image.fromarray(draw(picture, rng)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a photo of {{token}} {{class}} {picture.scene}\n", encoding="utf-8")


def main():
    parser = cli.Parser(description="Draw 64 pictures of the drawn world, or pictures of a subject.")
    parser.add_argument("path", type=Path, help="picture file to write; with --held-out a folder")
    parser.add_argument("--held-out", choices=SUBJECTS, help="draw four pictures of this subject for validation")
    args = parser.parse_args()
    if args.held_out:
        write_held_out(args.held_out, args.path)
        return
    rng = random.Random(0)
    sheet([draw(sample(rng), rng) for _ in range(64)]).save(args.path)


if __name__ == "__main__":
    with cli.reported("world.py"):
        main()
