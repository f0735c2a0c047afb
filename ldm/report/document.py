"""The frame of a page: head, style, script, contents. A page needs nothing but itself: no network, no other file."""

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources

from ldm.report.markup import Html, el

GENERATOR = "dreambooth-ldm report"  # by which a file is known to be ours, and is replaced


def document(title: str, header: Html, sections: Sequence[tuple[str, Html | None]]) -> str:
    """A page with these sections, by their titles; one without content is left out."""
    style, script = (resources.files("ldm.report").joinpath(name).read_text() for name in ("style.css", "report.js"))
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}"
    found = [(name, f"s{i}", content) for i, (name, content) in enumerate(sections) if content]
    links = [el("li", el("a", name, href=f"#{id}")) for name, id, _ in found]
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="generator", content=GENERATOR),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="referrer", content="no-referrer"),
        el("title", title),
        el("style", Html(style)),
    )
    theme = el("button", "Dark", type="button", id="theme", aria_label="Switch between light and dark")
    body = el(
        "body",
        el("nav", el("ul", links), theme, aria_label="Sections"),
        el("main", header, [el("section", el("h2", name), content, id=id) for name, id, content in found]),
        el("script", Html(script)),
    )
    return f"<!doctype html>\n{el('html', head, body, lang='en')}\n"


def _hash(text: str) -> str:
    """A text's source expression in a Content-Security-Policy: the browser runs no other script and style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def key_numbers(pairs: Sequence[tuple[str, str]]) -> Html:
    """Names and values in large type."""
    return el("dl", [el("div", el("dt", name), el("dd", value)) for name, value in pairs], class_="key")
