"""The seven scenes: a sky, a ground, and two or three details that identify each scene."""

import math

import numpy as np
from PIL import Image, ImageDraw

CANVAS = 256  # pictures are drawn at four times their final size
WHITE = (252, 252, 252)

# sky from top to horizon and ground from horizon to bottom, each (upper colour, lower colour)
SKIES = {
    "on the grass": (((110, 190, 250), (200, 232, 252)), ((160, 214, 84), (118, 186, 60))),
    "on the beach": (((150, 214, 250), (224, 242, 252)), ((252, 232, 176), (236, 204, 134))),
    "at night": (((18, 18, 58), (44, 40, 100)), ((36, 44, 72), (22, 28, 50))),
    "in the snow": (((168, 184, 208), (208, 218, 232)), ((250, 252, 255), (222, 232, 246))),
    "in the desert": (((250, 170, 96), (255, 222, 160)), ((216, 140, 80), (184, 106, 58))),
    "under water": (((24, 150, 168), (14, 106, 136)), ((196, 186, 136), (150, 146, 112))),
    "in a room": (((222, 206, 188), (210, 192, 172)), ((150, 92, 54), (118, 70, 42))),
}


def gradient(top, bottom, height):
    t = np.linspace(0, 1, height)[:, None, None]
    column = np.array(top) * (1 - t) + np.array(bottom) * t
    return Image.fromarray(np.repeat(column, CANVAS, 1).astype(np.uint8))


def dots(pen, rng, n, low, high, radius, colour):
    for _ in range(n):
        x, y, r = rng.uniform(0, CANVAS), rng.uniform(low, high) * CANVAS, rng.uniform(*radius)
        pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)


def scene(name, rng):
    """Draws the scene of this name without a thing in it, as a PIL image."""
    horizon = int(CANVAS * rng.uniform(0.56, 0.66))
    sky, ground = SKIES[name]
    canvas = gradient(*sky, CANVAS)
    canvas.paste(gradient(*ground, CANVAS - horizon), (0, horizon))
    pen = ImageDraw.Draw(canvas)

    def spot(low, high, y_low, y_high):
        return rng.uniform(low, high) * CANVAS, rng.uniform(y_low, y_high) * CANVAS

    def disc(x, y, rx, colour, ry=None):
        pen.ellipse((x - rx, y - (ry or rx), x + rx, y + (ry or rx)), fill=colour)

    if name == "on the grass":
        for x, y in (spot(0.08, 0.4, 0.1, 0.2), spot(0.6, 0.92, 0.1, 0.2)):
            for dx, r in ((-20, 13), (0, 18), (20, 13)):
                disc(x + dx, y - r / 3, r * 1.2, WHITE, r)
    elif name == "on the beach":
        pen.rectangle((0, horizon - 34, CANVAS, horizon), fill=(30, 120, 200))
        disc(*spot(0.1, 0.9, 0.12, 0.18), 22, (255, 222, 60))
    elif name == "at night":
        dots(pen, rng, 14, 0, 0.55, (2.5, 4.5), (250, 246, 205))
        x, y = spot(0.1, 0.9, 0.12, 0.18)
        disc(x, y, 23, (250, 242, 190))
        disc(x + 10, y - 6, 19, (24, 25, 70))
    elif name == "in the snow":
        dots(pen, rng, 26, 0, 1, (3, 5.5), (255, 255, 255))
    elif name == "in the desert":
        for x in (spot(0.06, 0.2, 0, 0)[0], spot(0.8, 0.94, 0, 0)[0]):
            cactus = (60, 110, 60)
            pen.rounded_rectangle((x - 8, horizon - 62, x + 8, horizon + 12), 8, fill=cactus)
            pen.rounded_rectangle((x - 24, horizon - 44, x - 14, horizon - 16), 5, fill=cactus)
            pen.rectangle((x - 20, horizon - 26, x, horizon - 16), fill=cactus)
    elif name == "under water":
        dots(pen, rng, 9, 0, 0.6, (4, 8), (150, 226, 226))
        for x in (spot(0.04, 0.22, 0, 0)[0], spot(0.78, 0.96, 0, 0)[0]):
            wave = [(x + 7 * math.sin(i * 1.1), horizon + 20 - i * 12) for i in range(9)]
            pen.line(wave, fill=(20, 130, 70), width=11)
    elif name == "in a room":
        x = rng.uniform(0.06, 0.62) * CANVAS
        pen.rectangle((x, 22, x + 76, 86), fill=(255, 250, 240))
        for left, upper in ((6, 28), (41, 28), (6, 57), (41, 57)):
            pen.rectangle((x + left, upper, x + left + 28, upper + 23), fill=(150, 210, 250))
        pen.rectangle((0, horizon - 6, CANVAS, horizon), fill=(255, 250, 240))
    return canvas
