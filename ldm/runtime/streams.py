"""Output streams that never raise.

A full disk under a log, a closed terminal, `| head -1` and `2>&-` make print and progress bars raise OSError. Here such
output is dropped, and the program goes on.
"""

import os
import sys
from typing import TextIO

dropped: list[str] = []  # the stream and the reason: "stdout: No space left on device"


class Stream:
    """A text stream that never raises: it escapes text that it can't encode, and drops text that it can't write."""

    def __init__(self, stream: TextIO, name: str):
        self._stream, self._name = stream, name
        stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def _attempt(self, action) -> None:
        try:
            action()
        except (OSError, ValueError) as error:
            dropped.append(f"{self._name}: {getattr(error, 'strerror', None) or error}")
            silence(self._stream.fileno())  # also for text that is still in its buffer


def silence(descriptor: int) -> None:
    """Points a file descriptor at /dev/null."""
    null = os.open(os.devnull, os.O_RDWR)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)


def protect() -> None:
    """Makes stdout and stderr never raise. A closed one becomes /dev/null, so that no file gets its number."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            silence(descriptor)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            dropped.append(f"{name}: it is closed")
            stream = open(descriptor, "w", encoding="utf-8", closefd=False)
        elif stream is not getattr(sys, f"__{name}__"):
            continue  # other code has replaced it already
        setattr(sys, name, Stream(stream, name))
