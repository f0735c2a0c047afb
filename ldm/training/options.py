"""Reads `Settings` from the command line and TOML files."""

import argparse
import os
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ldm.errors import InputError
from ldm.runtime import check_path, cli, read_toml
from ldm.training.setting import flag
from ldm.training.settings import Settings
from ldm.training.settings_training import LORA_RATE, LOW_LORA_RATE


def parse(argv: Sequence[str] | None, tiny: Path) -> Settings:
    """The settings of a command line: defaults, overridden by `tiny` if no model is given, by --config, and by flags.

    tiny: TOML file with the settings of the embedded model. Raises InputError for unknown flags and keys, values of the
    wrong type, and settings that do not go together.
    """
    given = vars(_parser().parse_args(argv))
    config = given.pop("config", None)
    from_file = _read_toml(Path(config)) if config else {}
    is_tiny = "model" not in given and "model" not in from_file
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    defaults = _read_toml(tiny) if is_tiny else {}
    if "instance_prompt" in from_file | given:
        defaults.pop("validation_prompt", None)  # it names the embedded subject
    settings = Settings(**defaults | from_file | given)
    for f in fields(Settings):
        if f.metadata["path"] and (path := getattr(settings, f.name)) is not None:
            check_path(path, flag(f.name))
    if problem := settings.problems():
        raise InputError(problem)
    if settings.lora_rank and settings.learning_rate < LOW_LORA_RATE:
        said = f"--learning-rate {settings.learning_rate:g} is low for a LoRA; {LORA_RATE:g} is usual"
        warnings.warn(said, stacklevel=2)
    if settings.train == "token" and "learning_rate" in from_file | given:
        warnings.warn("--learning-rate has no effect with --train token; --token-learning-rate does", stacklevel=2)
    return settings


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="train.py",
        description="DreamBooth: teaches a Stable Diffusion one subject from a few photographs.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE.toml", help="settings by their names below; flags override them")
    for group, settings in Settings.groups():
        section = parser.add_argument_group(group.__doc__)
        for f in settings:
            meta, options = f.metadata, dict(f.metadata["options"])
            if isinstance(f.default, bool):
                options["action"] = argparse.BooleanOptionalAction
            elif "type" not in options and isinstance(f.default, int | float):
                options["type"] = type(f.default)
            shown = "" if f.default in (None, ()) else f" (default: {f.default})"
            section.add_argument(flag(f.name), *meta["flags"], dest=f.name, help=meta["help"] + shown, **options)
    return parser


TYPES = {cli.positive: int, float: float}  # argparse type -> type of a setting without a default


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        tree = read_toml(path)
    except InputError as error:
        raise InputError(f"--config {error}") from None
    known = {f.name: f for f in fields(Settings)}
    known |= {_key(flag): f for f in fields(Settings) for flag in f.metadata["flags"]}
    settings: dict[str, Any] = {}
    for key, value in tree.items():
        if (f := known.get(_key(key))) is None:
            raise InputError(f"--config {path}: there is no setting {key!r}; train.py --help lists them")
        settings[f.name] = _checked(f"--config {path}: {key}", f, value, path.parent)
    return settings


def _key(name: str) -> str:
    return name.lstrip("-").replace("-", "_")


def _checked(where: str, f: Any, value: Any, folder: Path) -> Any:
    """The value of one key, which must have the type of the setting's default. folder: of the TOML file."""
    kind = TYPES.get(f.metadata["options"].get("type"), str) if f.default is None else type(f.default)
    if kind is tuple:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise InputError(f"{where} is not a list of strings")
        return tuple(value)
    if kind is float and type(value) is int and abs(value) <= cli.MAX_COUNT:
        value = float(value)
    if type(value) is not kind:
        raise InputError(f"{where} is {value!r}, and should be a {kind.__name__}")
    options = f.metadata["options"]
    if options.get("type") is cli.positive and not 1 <= value <= cli.MAX_COUNT:
        raise InputError(f"{where} is {value}, and should be from 1 to {cli.MAX_COUNT}")
    if "choices" in options and value not in options["choices"]:
        raise InputError(f"{where} is {value!r}; there are {', '.join(options['choices'])}")
    may_be_a_name = f.name in ("model", "resume_from_checkpoint")  # "latest", or a name on a hub
    if f.metadata["path"] and (not may_be_a_name or os.path.exists(folder / value)):
        return str(folder / value)
    return value
