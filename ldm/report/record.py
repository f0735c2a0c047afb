"""What a run's folder says about the run. Any file of it may be missing, half-written, older, or made by a stranger."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.errors import InputError, one_line
from ldm.report.numbers import MAX_STEP, Line, read_lines
from ldm.runtime import exists, list_folder, read_json, read_toml
from ldm.settings import ONCE
from ldm.training import IDENTITY_PARTS, FullTuning, LoRATuning, TokenTuning
from ldm.validation import Advice, advise

MAX_TEXT = 400  # letters of a text that is shown
MAX_ENTRIES = 300  # settings, notes or results that are shown
RUNS = {"instance_prompt", "max_train_steps", "instance_data_dir", "train_batch_size"}  # settings that only a run has
RESULTS = (".safetensors",)  # a file of a run's folder that ends so is its result


@dataclass
class Record:
    """A run, as its folder tells it.

    settings: by name, with None for those that were not given. identity: what config.json says beside settings.
    preflight: {"topic", "text", "warning"}. metrics, validations: the lines of metrics.jsonl and validation.jsonl.
    sheets: the sheet of pictures of each step; step 0 is the base model. all_steps: one picture of each, in one sheet.
    results: model, adapter or token files. problems: what could not be read, one line each.
    """

    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)
    preflight: list[Line] = field(default_factory=list)
    metrics: list[Line] = field(default_factory=list)
    validations: list[Line] = field(default_factory=list)
    sheets: dict[int, Path] = field(default_factory=dict)
    photographs: Path | None = None
    class_pictures: Path | None = None
    all_steps: Path | None = None
    best: Line | None = None
    results: list[Path] = field(default_factory=list)
    checkpoints: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def text(self, name: str) -> str | None:
        """A setting that is a text and not empty."""
        value = self.settings.get(name)
        return one_line(value, MAX_TEXT) if isinstance(value, str) and value.strip() else None

    def count(self, name: str) -> int | None:
        """A setting that is a whole number from 0."""
        value = self.settings.get(name)
        return value if type(value) is int and 0 <= value <= MAX_STEP else None

    @property
    def own_tuning(self) -> str | None:
        """The name of the user's own `Trainable`; None for one of this package."""
        name = self.identity.get("tuning")
        return one_line(name, MAX_TEXT) if isinstance(name, str) and name.strip() and name not in TUNINGS else None

    @property
    def program(self) -> str:
        """The program that the run is repeated with."""
        name = self.identity.get("program")
        return one_line(name, MAX_TEXT) if isinstance(name, str) and name.strip() else "train.py"

    @property
    def steps(self) -> int:
        """The last step that is known."""
        return max([line["step"] for line in (*self.metrics[-1:], *self.validations[-1:])], default=0)

    @property
    def planned(self) -> int | None:
        return self.count("max_train_steps")

    @property
    def is_finished(self) -> bool:
        """Whether the run has written its result."""
        return bool(self.results)

    @property
    def result(self) -> Path | None:
        """The result that the run is for: a model, else a LoRA, else any other file."""
        order = {"model": 0, "model.safetensors": 1, "lora.safetensors": 2}
        return min(self.results, key=lambda path: (order.get(path.name, 3), path.name), default=None)

    @property
    def token(self) -> Path | None:
        """The file of the learned token."""
        name = f"{self.settings.get('placeholder_token')}.safetensors"
        return next((path for path in self.results if path.name == name), None)

    @property
    def prompts(self) -> list[str]:
        """The prompts of a sheet's rows."""
        given = self.settings.get("validation_prompt")
        if isinstance(given, list) and given and all(isinstance(text, str) for text in given):
            return [one_line(text, MAX_TEXT) for text in given[:MAX_ENTRIES]]
        return [*self.of_subjects("instance_prompt"), *self.of_subjects("class_prompt")]

    def of_subjects(self, name: str) -> list[str]:
        """A setting of each subject that is a text: that of the run, or those in its [[subjects]]."""
        if text := self.text(name):
            return [text]
        subjects = self.settings.get("subjects")
        subjects = subjects[:MAX_ENTRIES] if isinstance(subjects, list) else []
        found = [one.get(name) for one in subjects if isinstance(one, dict)]
        return list(dict.fromkeys(one_line(text, MAX_TEXT) for text in found if isinstance(text, str) and text.strip()))

    @property
    def advice(self) -> Advice:
        """The step to take, and why."""
        return advise(self.validations)

    @property
    def advised(self) -> int | None:
        """The step to take; None if nothing was validated."""
        return self.advice.step if self.validations else None

    @property
    def title(self) -> str:
        """The prompts of the subjects; the folder's name where they are unknown."""
        prompts = " · ".join(self.of_subjects("instance_prompt"))
        return one_line(prompts or self.folder.absolute().name, MAX_TEXT)


def read(folder: str | Path) -> Record:
    """Raises InputError if the folder can't be listed or holds no run, also for a run's checkpoint."""
    record = Record(Path(folder))
    if not exists(folder) or not os.path.isdir(folder):
        raise InputError(f"{folder} is no folder; give the folder of a run, where train.py writes")
    names = {path.name for path in list_folder(folder)}
    if {"state.json", "SHA256SUMS"} <= names:  # the sums are of all files in it: nothing may be added
        raise InputError(f"{folder} is a checkpoint; give the folder of its run")
    _read_settings(record, names)
    for name in ("metrics", "validations"):
        file = {"metrics": "metrics.jsonl", "validations": "validation.jsonl"}[name]
        if file in names and (found := _try(record, file, read_lines)) is not None:
            lines, note = found
            setattr(record, name, lines)
            if note:
                record.problems.append(f"{file}: {note}")
    if not record.settings and not record.metrics:
        raise InputError(f"{folder} holds no run: it has no config.toml, config.json or metrics.jsonl of train.py")
    if "preflight.json" in names:
        record.preflight = _notes(_try(record, "preflight.json", read_json))
    if "best" in names:
        best = _try(record, "best/best.json", read_json)
        record.best = best if isinstance(best, dict) and type(best.get("step")) is int else None
    _find_pictures(record)
    _find_results(record, names)
    return record


def _read_settings(record: Record, names: set[str]) -> None:
    tree = _try(record, "config.json", read_json) if "config.json" in names else None
    tree = tree if isinstance(tree, dict) and tree.keys() & RUNS else {}
    table = _try(record, "config.toml", read_toml) if "config.toml" in names else None
    table = table if isinstance(table, dict) and table.keys() & RUNS else {}
    both = dict(list({**tree, **table}.items())[:MAX_ENTRIES])
    record.identity = {name: value for name, value in tree.items() if name in IDENTITY_PARTS}
    record.settings = {name: value for name, value in both.items() if name not in (*IDENTITY_PARTS, *ONCE)}


TUNINGS = {tuning.__name__ for tuning in (FullTuning, LoRATuning, TokenTuning)}

# Sheets without a step.
OTHERS = {"photographs": "photographs.png", "class_pictures": "class.png", "all_steps": "steps.png"}


def _notes(tree: Any) -> list[Line]:
    """The entries of preflight.json that have a text."""
    entries = tree[:MAX_ENTRIES] if isinstance(tree, list) else []
    return [
        {name: one_line(entry.get(name) or "", MAX_TEXT) for name in ("topic", "text")}
        | {"warning": entry.get("warning") is True}
        for entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("text"), str)
    ]


def _find_pictures(record: Record) -> None:
    """Finds the sheets: before.png, step-000100.png and so on, after.png."""
    folder = record.folder / "sheets"
    if not folder.is_dir():
        return
    try:
        names = {path.name for path in list_folder(folder)}
    except InputError as error:
        record.problems.append(str(error))
        return
    found = {int(number[1]): name for name in names if (number := re.fullmatch(r"step-(\d{1,9})\.png", name))}
    if "before.png" in names:
        found[0] = "before.png"
    if "after.png" in names:
        found[max([record.steps, *found])] = "after.png"
    for step, name in sorted(found.items()):
        if path := _inside(record, f"sheets/{name}"):
            record.sheets[step] = path
    for name, file in OTHERS.items():
        if file in names:
            setattr(record, name, _inside(record, f"sheets/{file}"))


def _find_results(record: Record, names: set[str]) -> None:
    found = [name for name in sorted(names) if name.endswith(RESULTS) or name == "model"]
    found = [name for name in found if not name.startswith(".")][:MAX_ENTRIES]
    record.results = [path for name in found if (path := _inside(record, name))]
    folder = record.folder / "checkpoints"
    if folder.is_dir() and _inside(record, "checkpoints"):
        try:
            paths = [path for path in list_folder(folder) if path.is_dir() and not path.name.startswith(".")]
        except (InputError, OSError) as error:
            record.problems.append(one_line(error))
            return
        record.checkpoints = [one_line(path.name, MAX_TEXT) for path in paths][:MAX_ENTRIES]


def _try(record: Record, name: str, reader: Callable[[Path], Any]) -> Any:
    """What `reader` returns for a file of the run; None, with a problem noted, if it can't be read."""
    path = _inside(record, name)
    if path is None:
        return None
    try:
        return reader(path)
    except InputError as error:
        record.problems.append(str(error))
        return None


def _inside(record: Record, name: str) -> Path | None:
    """The path of a run's file; None, with a problem noted, if a link leads from there out of the run's folder."""
    path = record.folder / name
    try:
        if path.resolve().is_relative_to(record.folder.resolve()):
            return path
        record.problems.append(one_line(f"{path} leads out of the run's folder, and is not read"))
    except (OSError, RuntimeError) as error:  # a link to itself
        record.problems.append(one_line(f"{path} can't be read: {error}"))
    return None
