"""A user's mistake is answered in one line; everything else is a bug and keeps its traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """What was given is at fault. The message says what is wrong, where, and what to do, on one line."""


@contextmanager
def reported(program: str) -> Iterator[None]:
    """Ends the program with status 2 and one line on standard error if an `InputError` comes up inside."""
    try:
        yield
    except InputError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
