"""A page with two or more runs side by side: what differs, the curves in one chart, sheets beside each other."""

from collections.abc import Sequence
from dataclasses import fields

from ldm.report import chart
from ldm.report.chart import Series
from ldm.report.document import document
from ldm.report.markup import Html, broken, el, join
from ldm.report.numbers import points, smooth, thin
from ldm.report.page import MAX_FRAMES, picture, problem_list, slider, value_text
from ldm.report.pictures import Album
from ldm.report.record import Record
from ldm.report.story import key_numbers
from ldm.settings import Settings

# (caption, file, name of the number): what is drawn, one chart each.
CURVES = (
    ("Subject loss of each training step", "metrics", "subject_loss"),
    ("Class loss of each training step", "metrics", "prior_loss"),
    ("Held-out loss on fixed noise and timesteps", "validations", "validation_loss"),
    ("Loss of the training photographs there", "validations", "training_loss"),
    ("Language drift", "validations", "drift"),
    ("Diversity of the class", "validations", "diversity"),
)


def page(records: Sequence[Record]) -> str:
    """The whole page, as text. records: at least two."""
    names = _names(records)
    album = Album()
    problems = [text for record in records for text in record.problems]
    sections = [
        ("The runs", _runs(records, names)),
        ("Pictures", _pictures(records, names, album)),
        ("Curves", _curves(records, names)),
        ("Settings that differ", _settings(records, names)),
        ("Problems", problem_list([*problems, *album.problems])),
    ]
    header = el("header", el("p", "DreamBooth runs", class_="kicker"), el("h1", f"Comparison of {len(records)} runs"))
    return document(f"Comparison of {len(records)} runs – DreamBooth", header, sections)


def _names(records: Sequence[Record]) -> list[str]:
    """A short name for each run: its folder's, with the folder above where two are the same."""
    paths = [record.folder.absolute() for record in records]
    names = [path.name for path in paths]
    return [path.name if names.count(path.name) == 1 else "/".join(path.parts[-2:]) for path in paths]


def _runs(records: Sequence[Record], names: Sequence[str]) -> Html:
    """A table with a row for each run: its key numbers."""
    found = [dict(key_numbers(record)) for record in records]
    columns = list(dict.fromkeys(name for pairs in found for name in pairs))
    head = el("tr", [el("th", text, scope="col") for text in ("run", *columns, "result")])
    rows = []
    for i, record in enumerate(records):
        cells = [found[i].get(name, "–") for name in columns]
        cells.append(record.result.name if record.result else "not finished")
        first = el("th", chart.swatch(i), names[i], scope="row")
        rows.append(el("tr", first, [el("td", cell) for cell in cells]))
    notes = []
    for name, record in zip(names, records, strict=True):
        if record.advised is not None:
            text = f" Take step {record.advised:,}: {record.advice.reason}."
            notes.append(el("p", el("strong", name, "."), text))
    table = el("table", el("thead", head), el("tbody", rows), class_="compared")
    return join(el("div", table, class_="scroll", tabindex=0, role="region", aria_label="The runs"), notes)


def _pictures(records: Sequence[Record], names: Sequence[str], album: Album) -> Html | None:
    """The sheets of all runs beside each other, with one slider over the steps that any of them has."""
    steps = sorted({step for record in records for step in record.sheets})
    most = max(1, MAX_FRAMES // len(records))
    steps = [int(step) for step, _ in thin([(float(step), 0.0) for step in steps], max(2, most))]
    if not steps:
        return None
    contents = []
    for step in steps:
        cells = [_sheet(record, name, step, album) for name, record in zip(names, records, strict=True)]
        contents.append(el("div", cells, class_="beside"))
    return slider(steps, contents)


def _sheet(record: Record, name: str, step: int, album: Album) -> Html:
    """A run's newest sheet at this step."""
    found = max((one for one in record.sheets if one <= step), default=None)
    if found is None:
        return el("figure", el("figcaption", name), el("p", "No sheet yet.", class_="missing"))
    alt = f"{name}, step {found}. Rows: {'; '.join(record.prompts)}."
    return el("figure", el("figcaption", f"{name}, step {found:,}"), picture(album.show(record.sheets[found]), alt))


def _curves(records: Sequence[Record], names: Sequence[str]) -> Html | None:
    found = []
    for caption, file, name in CURVES:
        curves = [points(getattr(record, file), name) for record in records]
        if file == "metrics":
            curves = [thin(smooth(curve)) for curve in curves]
        curves = [curve if any(value for _, value in curve) else [] for curve in curves]  # 0: it had no such loss
        if any(curves):
            series = [Series(names[i], curve, i) for i, curve in enumerate(curves)]
            found.append(chart.figure(caption, caption, series, name.endswith("loss")))
    return el("div", found, class_="charts") if found else None


def _settings(records: Sequence[Record], names: Sequence[str]) -> Html | None:
    """The settings whose values are not the same in all runs. One that a run does not know has its default there."""
    defaults = {f.name: f.default for f in fields(Settings)}
    known = list(dict.fromkeys(name for record in records for name in record.settings))
    rows = []
    for name in known:
        values = [value_text(name, record.settings.get(name, defaults.get(name))) for record in records]
        if len(set(values)) > 1:
            rows.append(el("tr", el("th", broken(name), scope="row"), [el("td", value) for value in values]))
    if not rows:
        return el("p", "All settings are the same.")
    head = el("tr", [el("th", text, scope="col") for text in ("setting", *names)])
    table = el("table", el("thead", head), el("tbody", rows), class_="compared equal")
    return el("div", table, class_="scroll", tabindex=0, role="region", aria_label="Settings that differ")
