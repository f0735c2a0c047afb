"""The eight kinds of thing, as polygons in a square from -1 to 1.

Each function takes a world.Picture and returns (behind, body, front): parts behind the body, the body's polygons, which
show the pattern, and details in front of the body. A part is (points, colour); "main" is the thing's own colour.
"""

import numpy as np
from shapes import arc, band, box, grow, oval, poly

WHITE, INK, PUPIL = (252, 252, 252), (40, 34, 52), (30, 26, 38)


def ball(p):
    return [], [oval(0, 0.04, 0.95)], [(oval(-0.36, -0.36, 0.2, 0.14), WHITE)]


def star(p):
    t = -np.pi / 2 + np.arange(10) * np.pi / 5
    r = np.where(np.arange(10) % 2 == 0, 1.12, 0.54)
    return [], [np.stack([r * np.cos(t), 0.1 + r * np.sin(t)], 1)], []


def heart(p):
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    y = 0.8125 * np.cos(t) - 0.3125 * np.cos(2 * t) - 0.125 * np.cos(3 * t) - 0.0625 * np.cos(4 * t)
    return [], [np.stack([1.05 * np.sin(t) ** 3, -1.04 * y - 0.03], 1)], []


def cup(p):
    handle = band(arc(0.5, 0.05, 0.46, 0.42, -1.5, 1.5), 0.2)
    body = poly((-0.8, -0.8), (0.56, -0.8), (0.42, 0.96), (-0.66, 0.96))
    return (
        [(handle, "main")],
        [body],
        [(oval(-0.12, -0.8, 0.7, 0.2), INK), (oval(-0.12, -0.79, 0.6, 0.13), (120, 76, 48))],
    )


def car(p):
    roof = poly((-0.78, 0.1), (-0.46, -0.6), (0.42, -0.6), (0.82, 0.1))
    glass = (196, 232, 248)
    front = [(poly((-0.58, 0.04), (-0.36, -0.46), (-0.06, -0.46), (-0.06, 0.04)), glass)]
    front += [(poly((0.08, 0.04), (0.08, -0.46), (0.34, -0.46), (0.6, 0.04)), glass)]
    for x in (-0.6, 0.6):
        front += [(oval(x, 0.66, 0.34), INK), (oval(x, 0.66, 0.15), (215, 215, 222))]
    return [], [roof, box(-1.15, 0.02, 1.15, 0.68, 0.24)], [*front, (oval(1.0, 0.26, 0.1), (255, 242, 150))]


def fish(p):
    tail = poly((-0.45, 0.1), (-1.15, -0.45), (-0.95, 0.1), (-1.15, 0.65))
    fin = poly((-0.25, -0.4), (0.0, -0.92), (0.5, -0.35))
    front = [(oval(0.56, -0.06, 0.2), INK), (oval(0.56, -0.06, 0.16), WHITE), (oval(0.6, -0.05, 0.09), PUPIL)]
    front += [
        (band(arc(0.82, 0.2, 0.2, 0.14, 1.4, 3.0), 0.06), INK),
        (band(arc(0.1, 0.1, 0.22, 0.3, -1, 1), 0.05), INK),
    ]
    return [(fin, "main"), (tail, "main")], [oval(0.12, 0.1, 0.9, 0.66)], front


def cat(p):
    ears = [poly((k * 0.92, 0.1), (k * 0.84, -1.0), (k * 0.12, -0.5)) for k in (-1, 1)]
    front = [(poly((k * 0.74, -0.42), (k * 0.72, -0.74), (k * 0.44, -0.56)), (255, 178, 186)) for k in (-1, 1)]
    for x in (-0.38, 0.38):
        front += [
            (oval(x, 0.08, 0.22, 0.25), INK),
            (oval(x, 0.08, 0.18, 0.21), WHITE),
            (oval(x, 0.1, 0.08, 0.16), PUPIL),
        ]
    front += [(poly((-0.13, 0.4), (0.13, 0.4), (0, 0.55)), (240, 110, 130))]
    front += [(band(arc(k * 0.13, 0.58, 0.13, 0.12, 0, np.pi), 0.06), INK) for k in (-1, 1)]
    whiskers = [(k * 0.5, 0.5, k * 1.12, 0.38) for k in (-1, 1)] + [(k * 0.5, 0.62, k * 1.08, 0.68) for k in (-1, 1)]
    front += [(band(poly((a, b), (c, d)), 0.05), INK) for a, b, c, d in whiskers]
    return [], [oval(0, 0.2, 0.94, 0.78), *ears], front


def monster(p):
    """A monster: a body of one of four shapes with arms, legs, crown, eyes and mouth."""
    top, width, eye_y = {
        "round": (-0.62, 0.5, -0.1),
        "tall": (-0.72, 0.36, -0.26),
        "wide": (-0.36, 0.62, 0.08),
        "bell": (-0.68, 0.26, -0.02),
    }[p.shape]
    body = {
        "round": oval(0, 0.1, 0.8, 0.74),
        "tall": box(-0.56, -0.74, 0.56, 0.82, 0.5),
        "wide": box(-0.98, -0.4, 0.98, 0.8, 0.5),
        "bell": poly((-0.9, 0.8), (-0.66, 0.0), (-0.36, -0.58), (0, -0.74), (0.36, -0.58), (0.66, 0.0), (0.9, 0.8)),
    }[p.shape]
    step, reach = (0.5, 1.16) if p.shape == "wide" else (0.34, 0.84 if p.shape == "tall" else 1.04)
    legs = [box(k * step - 0.19, 0.6, k * step + 0.19, 1.0, 0.12) for k in (-1, 1)]
    behind = [(band(poly((k * 0.4, 0.2), (k * reach, 0.42)), 0.24), "main") for k in (-1, 1)]
    return behind + crown(p.crown, top, width), [body, *legs], crown_front(p.crown, top) + face(p, eye_y)


def crown(name, top, width):
    """The part of a monster's crown that is behind its head: horns, antennae or a tuft."""
    if name == "horns":
        inner, outer = width - 0.26, width + 0.24
        return [
            (poly((k * inner, top + 0.16), (k * outer, top + 0.26), (k * (width + 0.3), top - 0.38)), WHITE)
            for k in (-1, 1)
        ]
    if name == "antennae":
        stalks = [(band(poly((k * 0.16, top + 0.1), (k * 0.36, top - 0.28)), 0.1), INK) for k in (-1, 1)]
        return stalks + [(oval(k * 0.38, top - 0.3, 0.16), "main") for k in (-1, 1)]
    if name == "tuft":
        spikes = [poly((k - 0.15, top + 0.12), (k + 0.15, top + 0.12), (k * 1.7, top - 0.36)) for k in (-0.26, 0.26, 0)]
        return [(spike, "main") for spike in spikes]
    return []


def crown_front(name, top):
    """The part of a monster's crown that is in front of its head: a hat or a leaf."""
    if name == "hat":
        brim, tower = box(-0.6, top - 0.02, 0.6, top + 0.14, 0.06), box(-0.36, top - 0.4, 0.36, top + 0.06, 0.05)
        return [(brim, INK), (tower, INK), (box(-0.36, top - 0.16, 0.36, top, 0.01), (222, 38, 44))]
    if name == "leaf":
        stem, leaf = band(poly((0, top + 0.1), (0, top - 0.2)), 0.1), oval(0.26, top - 0.24, 0.32, 0.17)
        return [(stem, INK), (grow(leaf, 0.06), INK), (leaf, (70, 190, 80))]
    return []


def face(p, y):
    """A monster's eyes, centred at height y, and its mouth."""
    marks = []
    radius, places = {1: (0.34, [0]), 2: (0.25, [-0.3, 0.3]), 3: (0.2, [-0.4, 0, 0.4])}[p.eyes]
    if p.eyes == 3 and p.shape != "wide":
        places = [-0.36, 0, 0.36]
    for x in places:
        yy = y - 0.14 if p.eyes == 3 and x == 0 else y
        marks += [
            (oval(x, yy, radius + 0.06), INK),
            (oval(x, yy, radius), WHITE),
            (oval(x + 0.04, yy + 0.03, radius * 0.55), PUPIL),
        ]
        marks += [(oval(x - radius * 0.12, yy - radius * 0.22, radius * 0.2), WHITE)]
    y += 0.52
    if p.mouth == "smile":
        return [*marks, (band(arc(0, y - 0.2, 0.32, 0.26, 0.25, np.pi - 0.25), 0.1), INK)]
    if p.mouth == "open":
        return [*marks, (oval(0, y, 0.27, 0.2), INK), (oval(0, y + 0.06, 0.17, 0.1), (240, 90, 100))]
    return [*marks, (box(-0.38, y - 0.16, 0.38, y + 0.16, 0.1), INK)] + [
        (box(x - 0.14, y - 0.09, x + 0.14, y + 0.09, 0.03), WHITE) for x in (-0.17, 0.17)
    ]


THINGS = dict(ball=ball, star=star, heart=heart, cup=cup, car=car, fish=fish, cat=cat, monster=monster)
# the lowest point of each thing; it touches the ground
FLOOR = {"ball": 0.99, "star": 1.0, "heart": 1.0, "cup": 0.96, "car": 1.0, "fish": 0.78, "cat": 0.98, "monster": 1.0}
