"""One setting of a run, and a group of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


def setting(
    default: Any,
    text: str,
    *,
    flags: tuple[str, ...] = (),
    path: bool = False,
    may_change: bool | Callable[[Any], bool] = False,
    in_file_only: bool = False,
    **options: Any,
) -> Any:
    """A field with metadata for the command line and for resumed runs.

    flags: other names. path: whether it is a path, which in a TOML file is relative to that file's folder. may_change:
    whether a resumed run may have another value than before; a function of the settings where that depends on others.
    in_file_only: whether it has no flag, and is given in a TOML file. options: for argparse.
    """
    known = {"help": text, "flags": flags, "path": path, "may_change": may_change}
    known |= {"in_file_only": in_file_only, "options": options}
    return field(default=default, metadata=known)


@dataclass(frozen=True)
class Group:
    """Settings that belong together. A subclass's docstring is the group's title in --help.

    `Settings` inherits from all groups, so that each group sees all settings.
    """

    def problem(self) -> str | None:
        """The first problem of the group's settings, as one line; None if there is none."""
        return None


def flag(name: str) -> str:
    """The flag of a setting: learning_rate -> --learning-rate."""
    return "--" + name.replace("_", "-")


def not_positive(settings: Any, *names: str) -> str | None:
    """Says which of these settings is not above 0 and finite. One that is not given is no problem."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not 0 < value < float("inf"):
            return f"{flag(name)} {value} is not a positive number"
    return None


def not_a_number(settings: Any, *names: str) -> str | None:
    """Says which of these guidance scales is not finite. One that is not given is no problem."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not math.isfinite(value):
            return f"{flag(name)} {value} is not a number; 7.5 is usual"
    return None
