"""The command line that all programs share: flags, errors in one line, the choice of a device."""

import argparse
import difflib
import math
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch

from ldm.errors import InputError, RunError, one_line
from ldm.runtime import streams

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DTYPES |= {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}

MAX_COUNT = 2**31  # the largest number that a counting flag takes
MAX_SCALE = 100  # the largest scale of a LoRA


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of a flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, "", []) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose long flags may have underscores for hyphens, and whose errors are InputErrors."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=_Help, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace=None):
        args = [_hyphens(str(arg)) for arg in (sys.argv[1:] if args is None else args)]
        for arg in args:
            if any("\udc80" <= letter <= "\udcff" for letter in arg):
                raise InputError(f"{arg.encode(errors='backslashreplace').decode()} is not UTF-8 text")
        if self._subparsers is None:  # else the flags are those of the subcommand, whose parser comes next
            self._check_flags(args)
        return super().parse_known_args(args, namespace)

    def parse_args(self, args: Sequence[str] | None = None, namespace=None):
        known, rest = self.parse_known_args(args, namespace)
        if rest:
            raise InputError(f"{' '.join(rest)} belongs to no flag; --help lists them; text with spaces needs quotes")
        return known

    def _check_flags(self, args: Sequence[str]) -> None:
        """Raises InputError for an unknown flag, before any other error, and names the nearest one."""
        for arg in args:
            name = arg.partition("=")[0]
            if name == "--":
                return
            flags = self._option_string_actions
            is_flag = name.startswith("--") or (name.startswith("-") and f"-{name}" in flags)
            if is_flag and name not in flags and " " not in arg:
                raise InputError(f"{name}: {did_you_mean(name, flags) or 'there is no such flag; --help lists them'}")

    def error(self, message: str):
        raise InputError(f"{message}; --help lists the flags")


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """ "did you mean --learning-rate?" for --learnin-rate; None if no known name is like it.

    A known name is like it if it has these initials (lr), all of these words (batch-size), or nearly these letters.
    """
    bare = _bare(name)
    others = {_bare(other): other for other in known}
    if not bare.startswith("no-"):
        others = {key: other for key, other in others.items() if not key.startswith("no-")}
    words = {key: key.split("-") for key in others}
    found = [key for key in others if "".join(word[:1] for word in words[key]) == bare]
    found = found or [key for key in others if set(bare.split("-")) <= set(words[key])]
    found = found or difflib.get_close_matches(bare, others, 1, 0.7)
    return f"did you mean {' or '.join(others[key] for key in found[:3])}?" if found else None


def _bare(name: str) -> str:
    return name.lstrip("-").replace("_", "-").lower()


def add_source_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that choose what to load if a model file or folder holds more than one model."""
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="load the averaged UNet of a full training checkpoint instead of the last one",
    )
    parser.add_argument(
        "--prediction-type",
        help="what the model predicts, eps or v; overrides the file, and SD 2.x files often do not say",
    )
    parser.add_argument("--variant", help='load the files of this variant of a diffusers folder, for example "fp16"')


def source_options(given: Any) -> dict[str, Any]:
    """What these flags say, or the settings of the same names, as arguments of `StableDiffusion.load`."""
    return {"ema": given.ema, "prediction": given.prediction_type, "variant": given.variant}


@contextmanager
def reported(program: str) -> Iterator[None]:
    """Prints InputError, RunError and warnings as one line each on standard error; other errors keep their traceback.

    InputError ends the program with status 2, RunError with 1. The first process of each machine prints at once.
    The others wait five seconds and then print too: torchrun ends all processes as soon as one ends.
    """
    streams.protect()
    first = os.environ.get("LOCAL_RANK", "0") == "0"

    def say(text: object) -> None:
        print(f"{program}: {one_line(text)}", file=sys.stderr)

    def end(text: str, status: int) -> NoReturn:
        if not first:
            time.sleep(5)
        say(text)
        raise SystemExit(status)

    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *where: say(f"warning: {message}") if first else None
        try:
            yield
        except (InputError, RunError) as error:
            end(f"error: {error}", 2 if isinstance(error, InputError) else 1)
        except KeyboardInterrupt:
            end("interrupted", 130)


def device(name: str | None) -> torch.device:
    """The device of this name; if None, cuda if this machine has it, else cpu. Raises InputError if it is absent."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
        torch.zeros(1, device=found).item()
    except (RuntimeError, AssertionError, ImportError):
        raise InputError(f"--device {name}: there is no such device here; try --device cpu") from None
    return found


def positive(text: str) -> int:
    """An argparse type: whole numbers from 1 to MAX_COUNT."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number") from None
    if not 1 <= number <= MAX_COUNT:
        raise argparse.ArgumentTypeError(f"{text} is not {'1 or more' if number < 1 else f'{MAX_COUNT} or less'}")
    return number


def scaled_path(text: str) -> tuple[str, float]:
    """An argparse type: FILE, or FILE:SCALE -> the path, and the scale, 1 if there is none."""
    path, _, end = text.rpartition(":")
    if not text:
        raise argparse.ArgumentTypeError("the name of the file is empty")
    try:
        scale = float(end) if path and not os.path.exists(text) else None
    except ValueError:  # a colon in the path
        scale = math.nan if os.path.exists(path) else None
    if scale is not None and not abs(scale) <= MAX_SCALE:
        raise argparse.ArgumentTypeError(f"{text}: the scale {end} is not a number from -{MAX_SCALE} to {MAX_SCALE}")
    return (text, 1.0) if scale is None else (path, scale)


def _hyphens(arg: str) -> str:
    if not arg.startswith("--"):
        return arg
    flag, equals, value = arg.partition("=")
    return flag.replace("_", "-") + equals + value
