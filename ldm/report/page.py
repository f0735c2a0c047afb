"""The report of one run: a page that tells its story."""

import os
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from ldm.errors import one_line
from ldm.report import chart, commands, story
from ldm.report.chart import Mark, Series
from ldm.report.document import document, key_numbers
from ldm.report.markup import Html, broken, el, join
from ldm.report.numbers import Line, Points, points, thin
from ldm.report.pictures import Album, Thumbnail
from ldm.report.record import MAX_TEXT, Record
from ldm.report.scale import short
from ldm.settings import Settings

MAX_FRAMES = 24  # sheets behind the slider
MAX_SUBJECTS = 4  # with curves of their own
MAX_ROWS = 60  # of a table
UNITS = "mean squared error"
PATHS = {f.name for f in fields(Settings) if f.metadata["path"]}


def page(record: Record) -> str:
    """The whole page, as text."""
    album = Album()
    sections = [
        ("Pictures", _pictures(record, album)),
        ("Curves", _curves(record)),
        ("Before training", _preflight(record)),
        ("What to do next", _commands(record)),
        ("Settings", _settings(record)),
    ]
    problems = [text.replace(f"{record.folder}/", "") for text in (*record.problems, *album.problems)]
    sections.append(("Problems", problem_list(problems)))
    header = el(
        "header",
        el("p", "DreamBooth run ", el("span", one_line(record.folder.absolute().name, MAX_TEXT)), class_="kicker"),
        el("h1", record.title),
        el("p", " ".join(story.story(record)), class_="lede"),
        key_numbers(story.key_numbers(record)),
        _advice(record),
    )
    return document(f"{record.title} – DreamBooth", header, sections)


def _advice(record: Record) -> Html | None:
    """The step to take, and the one in best/."""
    if not record.validations:
        return None
    advice = record.advice
    parts = [el("strong", f"Take step {advice.step:,}." if advice.step is not None else "No step stands out.")]
    parts.append(f" {advice.reason[:1].upper()}{advice.reason[1:]}.")
    if record.best:
        parts.append(f" The folder best/ holds step {record.best['step']:,}.")
    return el("p", parts, class_="advice")


def picture(thumbnail: Thumbnail | None, alt: str) -> Html:
    """An <img>, or a sentence where there is no picture to show."""
    if thumbnail is None:
        return el("p", "This picture can't be shown; see Problems.", class_="missing")
    return el("img", src=thumbnail.uri, width=thumbnail.width, height=thumbnail.height, alt=alt)


def _pictures(record: Record, album: Album) -> Html | None:
    """Base beside tuned with a slider over the steps, then photographs and class pictures."""
    rows = "; ".join(record.prompts) or "unknown prompts"
    parts = []
    if steps := frames(record):
        base = None
        if steps[0] == 0:
            shown = picture(album.show(record.sheets[0]), f"Pictures by the base model. Rows: {rows}.")
            base = el("figure", el("figcaption", "Base model"), shown)
            steps = steps[1:]
        shown = [
            picture(album.show(record.sheets[step]), f"Pictures after step {step}. Rows: {rows}.") for step in steps
        ]
        tuned = slider(steps, shown) if steps else None
        parts.append(el("div", base, tuned, class_="beside" if base and tuned else None))
    if record.all_steps:
        shown = picture(
            album.show(record.all_steps), f"The first picture of each prompt at each step. Columns: {rows}."
        )
        parts.append(el("details", el("summary", "All steps at once"), el("figure", shown, class_="narrow")))
    small = []
    for path, caption in (
        (record.photographs, f"Photographs of {story.quoted(record, 'instance_prompt')}"),
        (record.class_pictures, f"Class pictures of {story.quoted(record, 'class_prompt')}"),
    ):
        if path:
            small.append(el("figure", el("figcaption", caption), picture(album.show(path), caption)))
    parts.append(el("div", small, class_="beside") if small else None)
    return join(parts) if any(parts) else None


def frames(record: Record) -> list[int]:
    """The steps whose sheets are shown: the first, the last, the one to take, and others at equal distances."""
    steps = sorted(record.sheets)
    chosen = {int(step) for step, _ in thin([(float(step), 0.0) for step in steps], MAX_FRAMES)}
    return sorted(chosen | ({record.advised} & set(steps)))


def slider(steps: Sequence[int], contents: Sequence[Html]) -> Html:
    """One content for each step, of which a slider shows one; the last at first."""
    last = len(steps) - 1
    shown = [el("div", content, hidden=i < last, class_="frame") for i, content in enumerate(contents)]
    control = None
    if last:
        control = el(
            "input",
            type="range",
            min=0,
            max=last,
            value=last,
            aria_label="Step of the pictures",
            aria_valuetext=f"step {steps[last]}",
            data_steps=" ".join(map(str, steps)),
        )
    caption = el("figcaption", "After step ", el("output", f"{steps[last]:,}"), control)
    return el("figure", caption, shown, class_="slider")


def marks(record: Record) -> list[Mark]:
    return [Mark(record.advised, "step to take")] if record.advised else []


def _curves(record: Record) -> Html | None:
    """Losses of the training steps and on a fixed grid of noise and timesteps, drift and diversity, learning rate."""
    metrics, validations, marked = record.metrics, record.validations, marks(record)
    steps = [
        Series.smoothed(name, curve, style)
        for style, (name, curve) in zip((0, 2, 3, 4), _subjects(metrics).items(), strict=False)
    ]
    prior = points(metrics, "prior_loss")
    if any(value for _, value in prior):  # it is 0 without prior preservation
        steps.insert(1, Series.smoothed("class", prior, 1))
    held_out = points(validations, "validation_loss")
    grid = [
        Series("held-out photographs", held_out, 2),
        Series("training photographs", points(validations, "training_loss"), 0),
        Series("class", points(validations, "class_loss"), 1),
    ]
    drift = [
        Series("drift", points(validations, "drift"), 3),
        Series("diversity", points(validations, "diversity"), 4),
    ]
    rate = [Series("learning rate", thin(points(metrics, "lr")), 5)]
    found = [
        chart.figure("Loss of each training step", UNITS, steps, True, marked),
        chart.figure("Loss on fixed noise and timesteps", UNITS, grid, True, marked),
        chart.figure("Pictures of the class prompt", "share", drift, False, marked),
        chart.figure("Learning rate", "learning rate", rate),
    ]
    if not any(found):
        return None
    text = ["A step's loss depends on its noise and timesteps; the line is the mean over neighbouring steps."]
    if held_out:
        text.append("The gap between held-out and training photographs is over-fitting.")
    if found[2]:
        text.append("Drift is 0 for the base model, and 1 where the class's pictures look like the photographs.")
        text.append("Diversity is 1 for the base model, and 0 where the class's pictures are all the same.")
    table = _validations(validations) if any(found[1:3]) else None
    return join(el("p", " ".join(text)), el("div", found, class_="charts"), table)


def _subjects(metrics: Sequence[Line]) -> dict[str, Points]:
    """The loss of each subject by its name; "subject" if there is only one."""
    names = {name for line in metrics for name in line if name.startswith("subject_loss/")}
    if not names:
        return {"subject": points(metrics, "subject_loss")}
    return {one_line(name.partition("/")[2], 60): points(metrics, name) for name in sorted(names)[:MAX_SUBJECTS]}


def _validations(lines: Sequence[Line]) -> Html:
    """The lines of validation.jsonl as a table."""
    names = ["validation_loss", "training_loss", "class_loss", "drift", "diversity"]
    columns = [(name, dict(points(lines, name))) for name in names]
    columns = [(name, values) for name, values in columns if values]
    steps = [step for step, _ in thin([(float(line["step"]), 0.0) for line in lines], MAX_ROWS)]
    head = el("tr", [el("th", text.replace("_", " "), scope="col") for text in ("step", *(n for n, _ in columns))])
    rows = []
    for step in steps:
        cells = [short(values[step]) if step in values else "–" for _, values in columns]
        rows.append(el("tr", el("th", f"{step:,.0f}", scope="row"), [el("td", cell) for cell in cells]))
    table = el("table", el("caption", "Validations"), el("thead", head), el("tbody", rows), class_="numbers")
    return el("div", table, class_="scroll", tabindex=0, role="region", aria_label="Validations")


def _preflight(record: Record) -> Html | None:
    if not record.preflight:
        return None
    rows = []
    for note in record.preflight:
        mark = el("strong", "Warning: ") if note["warning"] else None
        rows.append(
            el("div", el("dt", note["topic"]), el("dd", mark, note["text"]), class_=note["warning"] and "warning")
        )
    return el("dl", rows, class_="notes")


def _commands(record: Record) -> Html | None:
    found = []
    for what, code in commands.commands(record):
        found.append(el("p", what + (":" if code else "")))
        found.append(el("pre", el("code", code), tabindex=0) if code else None)
    return join(found) if found else None


def _settings(record: Record) -> Html | None:
    """All settings in the groups of --help; those that differ from their defaults are marked."""
    if not record.settings:
        return None
    left, parts = dict(record.settings), []
    for group, settings in Settings.groups():
        rows = []
        for f in settings:
            if f.name in left:
                value = left.pop(f.name)
                default = list(f.default) if isinstance(f.default, tuple) else f.default
                rows.append(_setting(f.name, value, f.metadata["help"], value != default))
        parts.append(_group(group.__doc__ or "", rows))
    parts.append(_group("Unknown to this version", [_setting(name, value, "", True) for name, value in left.items()]))
    return join(
        el("p", "Settings in bold differ from their defaults."),
        el("div", parts, class_="groups"),
    )


def _group(title: str, rows: list[Html]) -> Html | None:
    return el("table", el("caption", title), el("tbody", rows), class_="settings") if rows else None


def _setting(name: str, value: Any, text: str, is_changed: bool) -> Html:
    shown = value_text(name, value)
    return el(
        "tr",
        el("th", broken(name), scope="row", title=text or None),
        el("td", shown),
        class_="changed" if is_changed else None,
    )


def value_text(name: str, value: Any) -> str:
    """A setting's value in one line. name: of the setting, or of a key in it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple) and len(value) < 100:
        return one_line(" | ".join(value_text(name, item) for item in value), MAX_TEXT) or "–"
    if isinstance(value, dict) and len(value) < 100:  # one of the [[subjects]]
        parts = [f"{key}: {value_text(key, item)}" for key, item in value.items() if item is not None]
        return one_line(", ".join(parts), MAX_TEXT)
    text = str(value)[: 10 * MAX_TEXT]
    return one_line(path_text(text) if name in PATHS else text, MAX_TEXT)


def path_text(path: str) -> str:
    """A path as people read it: as seen from here, or from the home folder if it lies below that."""
    text, home = commands.shown(path), os.path.join(os.path.expanduser("~"), "")
    return f"~/{text.removeprefix(home)}" if text.startswith(home) else text


def problem_list(problems: Sequence[str]) -> Html | None:
    return el("ul", [el("li", one_line(text, MAX_TEXT)) for text in problems[:MAX_ROWS]]) if problems else None
