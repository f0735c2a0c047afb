"""HTML from Python values. Every text and attribute is escaped here, so that nothing in a folder becomes markup."""

import html

from ldm.errors import one_line

VOID = {"input", "img", "meta", "br"}  # elements without an end tag


class Html(str):
    """Text that is markup already, and is not escaped again."""


def el(tag: str, /, *children: object, **attributes: object) -> Html:
    """One element. el("p", "1 < 2", class_="note", hidden=True) is <p class="note" hidden>1 &lt; 2</p>.

    children: texts and `Html`; lists of them are joined, and None is left out. attributes: an underscore stands for a
    hyphen and one at the end is dropped; True is an attribute without a value, None and False leave it out.
    """
    parts = [tag]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            parts.append(key)
        elif value is not None and value is not False:
            parts.append(f'{key}="{escape(value)}"')
    start = f"<{' '.join(parts)}>"
    return Html(start if tag in VOID else f"{start}{join(*children)}</{tag}>")


def join(*children: object) -> Html:
    """Texts, which are escaped, and `Html` one after another; see `el`."""
    texts = []
    for child in children:
        if isinstance(child, list | tuple):
            texts.append(join(*child))
        elif isinstance(child, Html):
            texts.append(child)
        elif child is not None:
            texts.append(escape(child))
    return Html("".join(texts))


def escape(text: object) -> str:
    """A text without markup. What is not printable, such as marks that turn the direction of text, is spelled out."""
    lines = (one_line(line, len(line) * 10 + 10) for line in str(text).split("\n"))
    return html.escape("\n".join(lines))


def broken(name: str) -> Html:
    """A setting's name, whose line can break after each underscore."""
    return Html(escape(name).replace("_", "_<wbr>"))
