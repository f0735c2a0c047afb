"""Checks that a resumed run has the same settings, base model and photographs."""

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ldm.data import Example, Subject
from ldm.dreambooth import Trainable
from ldm.errors import InputError
from ldm.images import Picture
from ldm.runtime import World, read_json
from ldm.settings import FOLDERS, Settings
from ldm.training.checkpoint import load_state

CONFIG = "config.json"  # in a run's folder
# What is recorded of each file, by the file's name: compared one by one. The words name a difference.
FILES = {
    "class_pictures": "class picture",
    "class_captions": "caption of class picture",
    "photographs": "photograph",
    "captions": "caption of",
    "masks": "mask of",
    "focus": "focal point of",
    "held_out": "held-out picture",
}
IDENTITY_PARTS = ("global_batch", "base", "pictures", "tuning", "program", "launch", *FILES)  # see `Identity`


def read_config(folder: Path) -> dict[str, Any] | None:
    """The config.json of a run's folder; None if there is none. Raises InputError if it is damaged."""
    path = folder / CONFIG
    if not os.path.lexists(path):
        return None
    try:
        tree = read_json(path)
    except InputError as error:
        raise InputError(f"{error}; give another --output-dir") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path} is damaged: it does not hold a JSON object; give another --output-dir")
    return tree


class Identity:
    """What identifies a run: its settings, and the IDENTITY_PARTS, which the run adds one after another.

    global_batch                                rows of photographs in a step, in all processes
    base                                        the base model's fingerprint
    pictures                                    a digest of the photographs and the user's own class pictures
    photographs, captions, masks, focus         see `what_is_taught`
    class_pictures, held_out                    the SHA-256 of each by its name
    class_captions                              see `captions`
    tuning, program                             see `what_trains`
    launch                                      the torchrun that it belongs to
    """

    def __init__(self, settings: Settings, **parts: Any):
        self.settings, self.parts = settings, parts

    @property
    def config(self) -> dict[str, Any]:
        """The settings and the parts known so far, ready for JSON."""
        return json.loads(json.dumps({**dataclasses.asdict(self.settings), **self.parts}))

    def check(self, path: Path, before: dict[str, Any] | None) -> None:
        """Raises InputError, which names every difference, if the run at `path` was a different one.

        before: its config, None if it has none. A setting that is not in `before` is newer than that run and counts as
        its default.
        """
        if before is None:
            return
        defaults = {f.name: f.default for f in dataclasses.fields(Settings)} | {"tuning": "FullTuning", "subjects": []}
        changes = []
        for name, value in self.config.items():
            was = before.get(name, defaults.get(name))
            if name in FILES or (name == "pictures" and "photographs" in before):
                pass  # compared one by one
            elif name == "subjects":
                changes += different_subjects(was, value)
            elif was != value and not self.settings.may_change(name):
                changes.append(f"{name} was {was!r} and is {value!r}")
        changes += different_files(before, self.config)
        if changes:
            raise InputError(f"{path} belongs to another run: {'; '.join(changes)}")

    def check_everywhere(self, world: World) -> None:
        """Raises InputError if processes have other settings or photographs than the main one."""
        mine = {name: value for name, value in self.config.items() if not self.settings.may_change(name)}
        theirs = world.share(mine)
        with world.agreed():
            if different := [name for name in mine if mine[name] != theirs[name]]:
                raise InputError(f"{different[0]} is not as in the main process; give all processes the same input")

    def check_checkpoint(self, path: Path) -> None:
        """Raises InputError if the checkpoint belongs to another run, or is beyond the last step of this one."""
        state = load_state(path)
        self.check(path, state["run"])
        if state["step"] > self.settings.max_train_steps:
            raise InputError(f"{path} is beyond --max-train-steps {self.settings.max_train_steps}")


def different_subjects(before: Any, now: list[dict[str, Any]]) -> list[str]:
    """The differences between the [[subjects]] of two runs, in words. Their folders may have moved."""
    was = [item for item in before if isinstance(item, dict)] if isinstance(before, list) else []
    names = [[item.get("name") for item in subjects] for subjects in (was, now)]
    if names[0] != names[1]:
        return [f"the subjects were {names[0]} and are {names[1]}"]
    return [
        f"{key} of subject {new['name']} was {old.get(key)!r} and is {value!r}"
        for old, new in zip(was, now, strict=True)
        for key, value in new.items()
        if key not in FOLDERS and old.get(key) != value
    ]


def different_files(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The differences between the files of two runs, in words. What an older run has not recorded counts as equal."""
    changes = []
    for name, words in FILES.items():
        was, value = before.get(name), now.get(name)
        was = was if isinstance(was, dict | None) else {}
        if was is not None and value is not None and list(was.values()) != list(value.values()):
            changes.append(f"{words} {first_difference(was, value)}")
            if name == "photographs":  # what is recorded of them differs too, then
                break
    return changes


def first_difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The first difference between two lists of files (name -> SHA-256 or what else is recorded), in words."""
    for old, new in zip_longest(before.items(), now.items()):
        if old is None:
            return f"{new[0]} is new"
        if new is None or (new[0] != old[0] and old[0] not in now):
            return f"{old[0]} is missing"
        if old[1] != new[1]:
            return f"{new[0]} has changed" if new[0] in before else f"{new[0]} is new"
    return "are in another order"


def what_trains(trainable: Trainable) -> dict[str, str]:
    """The parts of an `Identity` that name the `Trainable` and its program.

    program: train.py, or the script that was started if the `Trainable` is the user's own.
    """
    kind, program = type(trainable), os.path.basename(sys.argv[0])
    is_own = not kind.__module__.startswith("ldm.") and program.endswith(".py")
    return {"tuning": kind.__name__, "program": program if is_own else "train.py"}


def what_is_taught(subjects: Sequence[Subject]) -> dict[str, dict[str, Any]]:
    """The parts of an `Identity` that say what is trained on.

    photographs and masks: the SHA-256 of each photograph and of its mask, by the photograph's name, in their order.
    captions: its prompt, if it isn't its subject's. focus: its focal point. None for what it lacks.
    """
    found = [(example, subject.prompt) for subject in subjects for example in subject.examples]
    examples = [example for example, _ in found]
    table = dict(zip(names_of([example.picture.path for example in examples]), examples, strict=True))
    return {
        "photographs": {name: sha256(example.picture) for name, example in table.items()},
        "captions": captions(found),
        "masks": {name: sha256(example.mask) if example.mask else None for name, example in table.items()},
        "focus": {name: example.focus for name, example in table.items()},
    }


def captions(found: Sequence[tuple[Example, str]]) -> dict[str, str | None]:
    """The prompt of each picture, by the picture's name; None if it is the usual one, which `found` has beside it."""
    names = names_of([example.picture.path for example, _ in found])
    prompts = [example.prompt if example.prompt != usual else None for example, usual in found]
    return dict(zip(names, prompts, strict=True))


def digest(pictures: Iterable[Picture]) -> str:
    """SHA-256 over the contents of files, in their order."""
    return hashlib.sha256("".join(sha256(picture) for picture in pictures).encode()).hexdigest()


def sums(pictures: Iterable[Picture]) -> dict[str, str]:
    """The SHA-256 of each file's content, in their order, by its name."""
    pictures = list(pictures)
    return dict(zip(names_of([picture.path for picture in pictures]), map(sha256, pictures), strict=True))


def names_of(paths: Sequence[Path]) -> list[str]:
    """The path of each file from the folder that all of them are in."""
    absolute = [os.path.abspath(path) for path in paths]
    common = os.path.commonpath(map(os.path.dirname, absolute)) if absolute else ""
    return [os.path.relpath(path, common) for path in absolute]


def sha256(picture: Picture) -> str:
    return hashlib.sha256(picture.content).hexdigest()
