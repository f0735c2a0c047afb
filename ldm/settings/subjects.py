"""Settings of several subjects in one run: the [[subjects]] of a TOML file."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ldm.errors import InputError
from ldm.runtime import check_path, cli
from ldm.tokenizer import check_prompt

MAX_SUBJECTS = 1000
MAX_NAME = 100  # letters
MOST = {"num_class_images": 100_000, "repeats": 100_000, "weight": 1_000_000}
FOLDERS = ("instance_data_dir", "class_data_dir")


@dataclass(frozen=True)
class SubjectSettings:
    """One folder of a subject. Folders of one name are one subject.

    weight: the subject's share of the rows, relative to the other subjects'. repeats: how often an epoch has each
    photograph. Without a weight it is 1, or photographs times repeats if repeats are given, as kohya's programs count.
    """

    name: str
    instance_data_dir: str
    instance_prompt: str
    class_prompt: str | None = None
    class_data_dir: str | None = None
    num_class_images: int | None = None
    weight: float | None = None
    repeats: int | None = None

    def given(self) -> dict[str, Any]:
        """The keys that have a value, as in a TOML file."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}


KINDS = {"num_class_images": int, "weight": float, "repeats": int}  # the others are text


def read_tables(where: str, tables: Any, folder: Path) -> tuple[SubjectSettings, ...]:
    """The [[subjects]] of a TOML file. where: the file, for messages. folder: the file's, for relative paths.

    Raises InputError for unknown, missing and wrong keys.
    """
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise InputError(f"{where}: subjects are tables; write each under a line [[subjects]]")
    if len(tables) > MAX_SUBJECTS:
        raise InputError(f"{where} has {len(tables)} subjects; there should be at most {MAX_SUBJECTS}")
    found = []
    for number, table in enumerate(tables, 1):
        given = _checked(f"{where}: [[subjects]] {number}", table)
        given |= {name: str(folder / given[name]) for name in FOLDERS if name in given}
        found.append(SubjectSettings(**{"name": Path(given["instance_data_dir"]).name} | given))
    named = [table.get("name") for table in tables]
    for i, subject in enumerate(found):
        if named[i] is None and subject.name in [other.name for other in found[:i]]:
            raise InputError(f'{where}: two of [[subjects]] are called {subject.name}; give each a name = "..."')
    return tuple(found)


def _checked(where: str, table: dict[str, Any]) -> dict[str, Any]:
    names = [f.name for f in fields(SubjectSettings)]
    given = {key.replace("-", "_"): value for key, value in table.items()}
    for name, value in given.items():
        if name not in names:
            raise InputError(f"{where} has the key {name!r}; there are {', '.join(names)}")
        kind = KINDS.get(name, str)
        if kind is float and type(value) is int and abs(value) <= cli.MAX_COUNT:
            given[name] = value = float(value)
        if type(value) is not kind:
            raise InputError(f"{where}: {name} is {value!r}, and should be a {kind.__name__}")
    for name in ("instance_data_dir", "instance_prompt"):
        if not given.get(name, "").strip():
            raise InputError(f"{where} has no {name}")
    return given


def problem_of(subjects: Sequence[SubjectSettings], needs_class: bool) -> str | None:
    """The first problem of several subjects, as one line; None if there is none.

    needs_class: whether there is a prior term. Class prompts and folders are those that count, defaults included.
    """
    for subject in subjects:
        where = f"subject {subject.name!r}"
        if not _can_be_a_name(subject.name):
            return f"{where} can't be the name of a folder; take one word, at most {MAX_NAME} letters"
        for name in FOLDERS:
            if (path := getattr(subject, name)) is not None:
                check_path(path, f"{where}: {name}")
        for prompt in filter(None, (subject.instance_prompt, subject.class_prompt)):
            check_prompt(prompt)
        if needs_class and not (subject.class_prompt or "").strip():
            return f'{where} has no class_prompt ("a photo of a dog"); or give --no-with-prior-preservation'
        for name, most in MOST.items():
            if (value := getattr(subject, name)) is not None and not 0 < value <= most:
                return f"{where}: {name} is {value}, and should be above 0 and at most {most}"
    return _problem_of_pairs(subjects)


def _can_be_a_name(name: str) -> bool:
    is_plain = name.isprintable() and not set(name) & set("/\\") and name.strip() == name
    return bool(name) and is_plain and len(name) <= MAX_NAME and name[0] not in ".-"


def _problem_of_pairs(subjects: Sequence[SubjectSettings]) -> str | None:
    folders = {}  # of photographs
    for subject in subjects:
        path = Path(subject.instance_data_dir).resolve()
        if path in folders:
            return f"subjects {folders[path]!r} and {subject.name!r} have the same folder, {subject.instance_data_dir}"
        folders[path] = subject.name
    prompts: dict[str, str] = {}
    classes: dict[Path, SubjectSettings] = {}
    for subject in subjects:
        if prompts.setdefault(subject.instance_prompt, subject.name) != subject.name:
            other = prompts[subject.instance_prompt]
            return (
                f"subjects {other!r} and {subject.name!r} have the same prompt, {subject.instance_prompt!r}, and would "
                "become one; give each its own rare word, or both the same name"
            )
        if subject.class_data_dir is None:
            continue
        path = Path(subject.class_data_dir).resolve()
        if path in folders:
            return f"{subject.class_data_dir} is both a class_data_dir and the photographs of {folders[path]!r}"
        if classes.setdefault(path, subject).class_prompt != subject.class_prompt:
            return f"subjects {classes[path].name!r} and {subject.name!r} share {path}, and their class prompts differ"
    return None
