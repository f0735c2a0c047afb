"""Polygons as arrays of points (n, 2). x points right, y points down."""

import numpy as np


def oval(x, y, rx, ry=None, n=36):
    t = np.linspace(0, 2 * np.pi, n, endpoint=False)
    return np.stack([x + rx * np.cos(t), y + (rx if ry is None else ry) * np.sin(t)], 1)


def box(x0, y0, x1, y1, r=0.1):
    """A rectangle with rounded corners."""
    t = np.linspace(0, np.pi / 2, 8)
    corners = [(x1 - r, y1 - r, 0), (x0 + r, y1 - r, 1), (x0 + r, y0 + r, 2), (x1 - r, y0 + r, 3)]
    arcs = [np.stack([x + r * np.cos(t + k * np.pi / 2), y + r * np.sin(t + k * np.pi / 2)], 1) for x, y, k in corners]
    return np.concatenate(arcs)


def poly(*points):
    return np.array(points, dtype=float)


def arc(x, y, rx, ry, start, stop, n=14):
    t = np.linspace(start, stop, n)
    return np.stack([x + rx * np.cos(t), y + ry * np.sin(t)], 1)


def band(points, width):
    """The polygon that covers a line of this width."""
    step = np.gradient(points, axis=0)
    normal = np.stack([-step[:, 1], step[:, 0]], 1) / np.linalg.norm(step, axis=1, keepdims=True) * width / 2
    return np.concatenate([points + normal, (points - normal)[::-1]])


def grow(points, by):
    """Moves every edge of a polygon outwards by `by`. Outlines are drawn with the result."""
    edge = np.roll(points, -1, 0) - points
    normal = np.stack([edge[:, 1], -edge[:, 0]], 1) / (np.linalg.norm(edge, axis=1, keepdims=True) + 1e-9)
    if (points[:, 0] * np.roll(points[:, 1], -1) - np.roll(points[:, 0], -1) * points[:, 1]).sum() < 0:
        normal = -normal
    corner = normal + np.roll(normal, 1, 0)
    return points + by * corner * np.minimum(2 / ((corner**2).sum(1, keepdims=True) + 1e-9), 1.5)
