"""The prompts of single pictures: a text file beside each, or one list for a folder.

    dog/1.jpg  dog/1.txt        a caption in the first line; also 1.caption, 1.jpg.txt, 1.jpg.caption (kohya)
    dog/metadata.jsonl          {"file_name": "1.jpg", "text": "a photo of {token} {class} on a chair"} (imagefolder)
    dog/metadata.csv            the same as a table

{token} and {class} in a caption become the words that name the subject and its class.
"""

import csv
import io
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ldm.errors import InputError
from ldm.runtime import exists, parse_json, read_text
from ldm.tokenizer import check_prompt

ENDINGS = (".txt", ".caption")  # the first is taken where a picture has both
LISTS = ("metadata.jsonl", "metadata.csv")
TEXTS = ("text", "prompt", "caption")  # the keys that a list may have its captions under
MAX_CAPTION = 1 << 16  # bytes of a caption's file

NAME = re.compile(r"\{(\w+)\}")
ARTICLES = ("a", "an", "the")
# Words of a prompt that do not say what the subject is.
FILLERS = {*ARTICLES, *"of in on at with and photo photograph picture image portrait painting drawing style".split()}

Words = Mapping[str, str | None]


def identifier(prompt: str, class_prompt: str) -> list[str]:
    """The words of a prompt that name its subject: those that the class prompt lacks, without fillers and {names}."""
    plain = [word.lower() for word in words(class_prompt)]
    named = [word for word in words(prompt) if word.lower() not in plain]
    return [word for word in named if word.lower() not in FILLERS and not NAME.search(word)]


def words(prompt: str) -> list[str]:
    """The words of a prompt, without punctuation around them."""
    return [word for part in prompt.split() if (word := part.strip(",.;:!?\"'()"))]


def words_of(prompt: str, class_prompt: str | None, token: str | None = None, kind: str | None = None) -> Words:
    """What {token} and {class} stand for; None for one that the prompts do not say.

    {token}: `token`, if given; else the identifier, "sks" for "a photo of sks dog" and "a photo of a dog". {class}: the
    words that both prompts end with, "dog"; else those of the class prompt after the prompts' common beginning; `kind`
    if there is no class prompt.
    """
    if token is None and class_prompt:
        token = " ".join(identifier(prompt, class_prompt)) or None
    named, plain = words(prompt), words(class_prompt or "")
    start = len(plain) - _common(named[::-1], plain[::-1])
    if start == len(plain):
        start = _common(named, plain)
    rest = [word for word in plain[start:] if not NAME.search(word)]
    while rest and rest[0].lower() in ARTICLES:
        rest = rest[1:]
    return {"token": token, "class": " ".join(rest) or kind}


def _common(a: list[str], b: list[str]) -> int:
    """The number of words that two lists begin with in common, in small letters or large."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x.lower() != y.lower()), min(len(a), len(b)))


def fill(text: str, words: Words, where: object) -> str:
    """Puts words in the place of {token} and {class}. Raises InputError, which says where, for any other {name}."""

    def word(match: re.Match[str]) -> str:
        if match[1] not in words:
            known = " and ".join(f"{{{name}}}" for name in words)
            raise InputError(f"{where} holds {match[0]}, which stands for nothing; there are {known or 'none here'}")
        if words[match[1]] is None:
            raise InputError(
                f"{where} holds {match[0]}, and the prompts do not say what it is; those of the subject and its class "
                'do so, "a photo of sks dog" and "a photo of a dog"'
            )
        return words[match[1]]

    return NAME.sub(word, text)


def read_lines(path: Path) -> list[str]:
    """The lines of a caption's file that are not blank, at least one; the first is the caption.

    Raises InputError, which names the file, if it is empty, too large or no UTF-8 text.
    """
    try:
        text = read_text(path, MAX_CAPTION)
    except InputError as error:
        raise InputError(f"{error}; save the caption as UTF-8 text, or take the file away") from None
    lines = [checked(line, path) for line in text.split("\n") if line.strip()]
    if not lines:
        raise InputError(f"{path} is empty; write the caption into it, or take it away for the usual prompt")
    return lines


def checked(text: str, where: object) -> str:
    """A caption with single spaces. Raises InputError if it holds control characters or is too long."""
    text = " ".join(text.split())
    if any(unicodedata.category(letter) == "Cc" for letter in text):
        raise InputError(f"{where} holds control characters, and should be plain text")
    try:
        check_prompt(text)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return text


def read_list(folder: Path) -> dict[str, str | None]:
    """The pictures in a folder's list, by their path in the folder, and their captions; None for one without.

    Empty if there is no list. Raises InputError, which names the list and the line, for a picture that is not there, is
    outside the folder or is named twice, and for a damaged list.
    """
    found = [folder / name for name in LISTS if os.path.lexists(folder / name)]
    if len(found) > 1:
        raise InputError(f"{folder} holds {' and '.join(LISTS)}; take one of them away")
    captions: dict[str, str | None] = {}
    for path in found:
        for number, row in _json_lines(path) if path.name == LISTS[0] else _table(path):
            where = f"{path}, line {number}"
            name = _file_name(folder, row, where)
            if name in captions:
                raise InputError(f"{where} names {name} again; take one of the lines away")
            text = next((row[key] for key in TEXTS if row.get(key) is not None), None)
            if text is not None and not isinstance(text, str):
                raise InputError(f"{where}: the caption is {text!r}, and should be text")
            captions[name] = checked(text, where) if text and text.strip() else None
    return captions


def _file_name(folder: Path, row: Any, where: str) -> str:
    name = row.get("file_name") if isinstance(row, dict) else None
    if not isinstance(name, str) or not name:
        raise InputError(f'{where} has no "file_name", which says the picture that it is about')
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise InputError(f"{where}: {name} is outside the folder; name a picture in it")
    if not exists(folder / path):
        raise InputError(f"{where} names {name}, and {folder} holds no such picture; correct the name")
    return str(path)


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield number, parse_json(line, f"{path}, line {number}")


def _table(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    rows = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        for row in rows:
            yield rows.line_num, row
    except csv.Error as error:
        raise InputError(f"{path}, line {rows.line_num + 1} is damaged: {error}") from None
