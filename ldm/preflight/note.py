"""What a run says about itself before it begins: notes and warnings of one or two sentences."""

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass

from ldm.errors import one_line

WIDTH, INDENT = 120, 16  # letters in a line, and before the text


@dataclass(frozen=True)
class Note:
    """topic: what it is about, in one or two words."""

    topic: str
    text: str
    warning: bool = False

    def __post_init__(self):
        object.__setattr__(self, "text", one_line(self.text))  # it quotes prompts and the names of files

    def __str__(self) -> str:
        line = f"{self.topic:{INDENT}}{'warning: ' if self.warning else ''}{self.text}"
        return textwrap.fill(line, WIDTH, subsequent_indent=" " * INDENT, break_long_words=False)


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 photograph", "200 photographs"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def amount(size: int, whole: int | None = None) -> str:
    """Bytes in GB, or in MB below 0.1 GB: "16.7 GB", "0.25 GB", "34.0 MB".

    whole: what it is a part of; the part is in the same unit, which is then left out.
    """
    scale, unit = (1e9, "GB") if (size if whole is None else whole) >= 1e8 else (1e6, "MB")
    number = f"{size / scale:.{2 if size < scale else 1}f}"
    return f"{number} {unit}" if whole is None else number


def listed(items: Iterable[str], most: int = 3) -> str:
    """Some items in words: "a, b and c", "a, b, c and 5 more"."""
    items = list(items)
    if len(items) > most + 1:
        items = [*items[:most], f"{len(items) - most} more"]
    return " and ".join(filter(None, (", ".join(items[:-1]), *items[-1:])))
