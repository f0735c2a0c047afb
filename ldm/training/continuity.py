"""Whether a run that resumes is the run that it resumes: the same settings, base model and photographs."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ldm.errors import InputError
from ldm.runtime import read_json
from ldm.training.checkpoint import sha256
from ldm.training.settings import Settings

CONFIG = "config.json"  # in a run's folder


def config(settings: Settings, identity: dict[str, Any]) -> dict[str, Any]:
    """What a run is, ready for JSON.

    identity: what makes it this run beside its settings: global_batch; base, the base model's fingerprint; pictures, a
    digest of the photographs; tuning, the name of its `Trainable`; launch, the torchrun that it belongs to.
    """
    return json.loads(json.dumps({**dataclasses.asdict(settings), **identity}))


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


def check_same_run(path: Path, before: dict[str, Any] | None, now: dict[str, Any], settings: Settings) -> None:
    """Raises InputError, which names every difference, if the run at `path` was another one.

    before: its config, None if it has none. now: the config of the run that resumes it, as far as it is known.
    A setting that `before` does not have is newer than that run, which had its default.
    """
    if before is None:
        return
    defaults = {field.name: field.default for field in dataclasses.fields(Settings)} | {"tuning": "FullTuning"}
    changes = [
        f"{name} was {was!r} and is {value!r}"
        for name, value in now.items()
        if not settings.may_change(name) and (was := before.get(name, defaults.get(name))) != value
    ]
    if changes:
        raise InputError(f"{path} belongs to another run: {'; '.join(changes)}")


def digest(paths: Iterable[Path]) -> str:
    """SHA-256 over the contents of files, in their order."""
    return hashlib.sha256("".join(sha256(path) for path in paths).encode()).hexdigest()
