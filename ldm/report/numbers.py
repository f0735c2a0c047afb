"""The numbers of a run's curves: read within limits, smoothed, and reduced to as many as a chart can show."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm.errors import InputError
from ldm.runtime import check_file, parse_json

Line = dict[str, Any]
Points = list[tuple[float, float]]  # (step, value), in the order of steps

MAX_LINES = 20_000  # of a file that are read; of a longer file, lines at equal distances
MAX_LINE = 1 << 16  # bytes of a line
MAX_FILE = 1 << 30  # bytes of a file that are read
MAX_STEP, MAX_VALUE = 2**31, 1e30
BINS = 240  # a chart is about 400 pixels wide


def read_lines(path: Path) -> tuple[list[Line], str | None]:
    """The objects in a file of JSON lines that have a step, in the order of steps; the last one of each step.

    Also a note on what was not read, if anything. Raises InputError if the file can't be read.
    """
    check_file(path)
    found: dict[int, Line] = {}
    damaged = 0
    try:
        with path.open("rb") as file:
            stride, is_cut = _stride(file)
            text = file.readline(MAX_LINE)
            for i in range(MAX_LINES * stride):
                after = file.readline(MAX_LINE)
                if text and (i % stride == 0 or not after):
                    line = _parse(text)
                    if line is not None:
                        found[line["step"]] = line
                    elif text.endswith(b"\n"):  # else a kill has cut the last line
                        damaged += 1
                if not (text := after):
                    break
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}") from None
    notes = [f"every {stride}th line is read"] if stride > 1 else []
    notes += [f"only its first {MAX_FILE >> 20} MiB are read"] if is_cut else []
    notes += [f"{damaged} of its lines {'is' if damaged == 1 else 'are'} no JSON object with a step"] if damaged else []
    return [found[step] for step in sorted(found)], "; ".join(notes) or None


def _stride(file: Any) -> tuple[int, bool]:
    """The distance of the lines to read, and whether the file is too long to be read to its end. Rewinds the file."""
    size = count = 0
    while size < MAX_FILE and (chunk := file.read(1 << 20)):
        size += len(chunk)
        count += chunk.count(b"\n")
    is_cut = bool(file.read(1))
    file.seek(0)
    return max(1, -(-count // MAX_LINES)), is_cut


def _parse(text: bytes) -> Line | None:
    """One line; None if it is no JSON object with a step."""
    try:
        line = parse_json(text.decode(), "line")
    except (InputError, UnicodeDecodeError):
        return None
    step = line.get("step") if isinstance(line, dict) else None
    return line if type(step) is int and 0 <= step <= MAX_STEP else None


def number(line: Line, name: str) -> float | None:
    """The number of this name; None for anything else, NaN, infinity, and absurd ones."""
    value = line.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not abs(value) <= MAX_VALUE:  # also true for NaN
        return None
    return float(value) if abs(value) >= 1 / MAX_VALUE else 0.0


def points(lines: Sequence[Line], name: str) -> Points:
    """The values of this name that are numbers, with their steps."""
    return [(float(line["step"]), value) for line in lines if (value := number(line, name)) is not None]


def smooth(curve: Points, share: float = 0.05) -> Points:
    """The mean over the neighbours on both sides, taken twice. share: of all points that one mean covers, about."""
    if len(curve) < 3:
        return curve
    values = np.array([value for _, value in curve])
    half = max(1, round(len(values) * share / 2))
    index = np.arange(len(values))
    first, end = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))  # fewer at the ends
    for _ in range(2):
        sums = np.concatenate([[0.0], np.cumsum(values)])
        values = (sums[end] - sums[first]) / (end - first)
    return [(step, float(value)) for (step, _), value in zip(curve, values, strict=True)]


def thin(curve: Points, count: int = BINS) -> Points:
    """At most `count` points at equal distances, with the first and the last."""
    if len(curve) <= count:
        return curve
    return [curve[round(i * (len(curve) - 1) / (count - 1))] for i in range(count)]


def envelope(curve: Points, count: int = BINS) -> Points:
    """At most 2 * `count` points with the same outline: the lowest and the highest of each part of the curve."""
    if len(curve) <= 2 * count:
        return curve
    size = math.ceil(len(curve) / count)
    parts = (curve[i : i + size] for i in range(0, len(curve), size))
    return [point for part in parts for point in (min(part, key=_value), max(part, key=_value))]


def _value(point: tuple[float, float]) -> float:
    return point[1]
