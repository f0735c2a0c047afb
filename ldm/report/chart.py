"""Line charts as SVG: curves over steps become paths, on axes with round ticks.

A chart is a figure with a caption, a legend, the drawing, and a table of the same numbers for those who can't see it.
The page's script reads the numbers from the figure's `data-chart`, and shows those below the pointer in the legend.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from ldm.report.markup import Html, el
from ldm.report.numbers import Points, envelope, smooth, thin
from ldm.report.scale import Scale, name, short

WIDTH, HEIGHT = 520, 300  # of the drawing, in units; style.css makes text larger where the page is narrow
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 10, 34  # margins
STYLES = 6  # colours and dashes in style.css
ROWS = 12  # of the table


@dataclass(frozen=True)
class Series:
    """A curve. raw: what it is the mean of, drawn faintly behind it. style: from 0, its colour and dashes."""

    name: str
    points: Points
    style: int = 0
    raw: Points | None = None

    @classmethod
    def smoothed(cls, name: str, points: Points, style: int = 0) -> "Series":
        return cls(name, thin(smooth(points)), style, envelope(points))

    @property
    def is_sparse(self) -> bool:
        """Whether each point is drawn as a dot too."""
        return self.raw is None and len(self.points) <= 60


@dataclass(frozen=True)
class Mark:
    """A step to mark in every chart, with its label."""

    step: int
    label: str


def figure(
    caption: str, unit: str, series: Sequence[Series], log: bool = False, marks: Sequence[Mark] = ()
) -> Html | None:
    """A chart of these curves; None if there is nothing to draw.

    caption: what it shows. unit: of the numbers, for the vertical axis. log: whether a reader can choose between a
    logarithmic axis, shown first, and an even one.
    """
    series = [one for one in series if one.points]
    if not series:
        return None
    values = [value for one in series for _, value in (*one.points, *(one.raw or ()))]
    log = log and any(value > 0 for value in values)
    across = Scale(0.0, max(1.0, *(one.points[-1][0] for one in series)))
    scales = [Scale.around(values, True), Scale.around(values)] if log else [Scale.around(values)]
    drawings = [_drawing(unit, series, across, scale, marks) for scale in scales]
    switch = el("label", el("input", type="checkbox", class_="log", checked=True), " log scale", class_="switch")
    data = {
        "x": [across.low, across.high],
        "box": [LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM],
        "y": [[scale.low, scale.high, int(scale.log)] for scale in scales],
        "series": [[[step, float(f"{value:.4g}")] for step, value in one.points] for one in series],
    }
    plot = el(
        "div",
        drawings,
        class_="plot",
        tabindex=0,
        role="group",
        aria_label=f"{caption}: chart. The left and right arrow keys read its numbers.",
    )
    return el(
        "figure",
        el("figcaption", el("span", caption), switch if log else None),
        _legend(series),
        plot,
        _table(series),
        class_="chart",
        data_chart=json.dumps(data, separators=(",", ":")),
    )


def _legend(series: Sequence[Series]) -> Html:
    """The names of the curves, each with its last value; the script replaces them by those below the pointer."""
    ends = {one.points[-1][0] for one in series}
    items = [el("li", "step ", el("b", f"{max(ends):,.0f}" if len(ends) == 1 else "last"), class_="at")]
    for one in series:
        items.append(el("li", swatch(one.style), el("span", one.name), " ", el("b", short(one.points[-1][1]))))
    return el("ul", items, class_="legend", aria_live="polite")


def swatch(style: int) -> Html:
    """A short piece of a curve's line."""
    line = el("path", d="M0 5H22", class_=f"curve s{style % STYLES}")
    return el("svg", line, viewBox="0 0 22 10", width=22, height=10, aria_hidden="true")


def _drawing(unit: str, series: Sequence[Series], across: Scale, up: Scale, marks: Sequence[Mark]) -> Html:
    """One <svg>: axes, marks, then the curves."""

    def x(step: float) -> float:
        return round(LEFT + across.place(step) * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - up.place(value) * (HEIGHT - TOP - BOTTOM), 1)

    parts = []
    for value in up.ticks():
        parts.append(el("path", d=f"M{LEFT} {y(value)}H{WIDTH - RIGHT}", class_="grid"))
        parts.append(el("text", name(value), x=LEFT - 8, y=y(value), class_="tick y"))
    for value in across.ticks(5):
        parts.append(el("path", d=f"M{x(value)} {HEIGHT - BOTTOM}v4", class_="axis"))
        parts.append(el("text", name(value), x=x(value), y=HEIGHT - BOTTOM + 8, class_="tick x"))
    parts.append(el("path", d=f"M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}", class_="axis"))
    for mark in marks:
        if across.low <= mark.step <= across.high:
            parts.append(el("path", d=f"M{x(mark.step)} {TOP}V{HEIGHT - BOTTOM}", class_="mark"))
            side = "end" if across.place(mark.step) > 0.5 else "start"
            offset = -5 if side == "end" else 5
            parts.append(el("text", mark.label, x=x(mark.step) + offset, y=TOP + 4, class_=f"tick label {side}"))
    for one in series:
        if one.raw:
            parts.append(el("path", d=_path(one.raw, x, y, up), class_=f"raw s{one.style % STYLES}"))
    for one in series:
        parts.append(el("path", d=_path(one.points, x, y, up), class_=f"curve s{one.style % STYLES}"))
        if one.is_sparse:
            dots = [el("circle", cx=x(s), cy=y(v), r=3) for s, v in one.points if v > 0 or not up.log]
            parts.append(el("g", dots, class_=f"dots s{one.style % STYLES}"))
    parts.append(el("g", class_="cursor"))
    return el(
        "svg",
        parts,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        class_="log" if up.log else "even",
        role="img",
        aria_label=f"{unit} over steps. " + " ".join(_summary(one) for one in series),
    )


def _path(points: Points, x: object, y: object, up: Scale) -> str:
    """A path through the points. A value that is not positive has no place on a log scale: the line has a gap there."""
    parts, pen = [], "M"
    for step, value in points:
        if up.log and value <= 0:
            pen = "M"
            continue
        parts.append(f"{pen}{x(step):g} {y(value):g}")
        pen = "L"
    return "".join(parts)


def _summary(one: Series) -> str:
    """A curve in words."""
    (first, start), (last, end) = one.points[0], one.points[-1]
    lowest, least = min(one.points, key=lambda point: point[1])
    return (
        f"{one.name}: {short(start)} at step {first:.0f}, {short(end)} at step {last:.0f}, "
        f"lowest {short(least)} at step {lowest:.0f}."
    )


def _table(series: Sequence[Series]) -> Html:
    """The same numbers as a table of at most ROWS rows, closed at first."""
    steps = sorted({step for one in series for step, _ in one.points})
    if any(one.raw for one in series):  # dense curves: the steps of the longest are enough
        steps = [step for step, _ in thin(max((one.points for one in series), key=len), ROWS)]
    steps = [step for step, _ in thin([(step, 0.0) for step in steps], ROWS)]
    known = [dict(one.points) for one in series]
    head = el("tr", [el("th", text, scope="col") for text in ("step", *(one.name for one in series))])
    rows = []
    for step in steps:
        cells = [short(values[step]) if step in values else "–" for values in known]
        rows.append(el("tr", el("th", f"{step:,.0f}", scope="row"), [el("td", cell) for cell in cells]))
    table = el("table", el("thead", head), el("tbody", rows), class_="numbers")
    return el(
        "details",
        el("summary", "Numbers"),
        el("div", table, class_="scroll", tabindex=0, role="region", aria_label="Numbers"),
    )
