"""A signal sets a flag; the program finishes the current step, saves and ends."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Stopped(BaseException):  # and no Exception: readers of damaged files catch those
    """Raised by a signal in work that has nothing to save, such as loading a model or making a picture."""


class Stop:
    """Inside, SIGTERM, SIGINT, SIGUSR1 and SIGHUP set `asked`.

    A second SIGINT ends the process at once. A signal that the process ignores, as SIGHUP under nohup, stays ignored.
    """

    def __init__(self):
        self.asked = False
        self._leave = False

    def __enter__(self) -> "Stop":
        heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in heeded}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():  # signals must not interrupt the end of a stopped program
            signal.signal(number, signal.SIG_IGN if self.asked else handler)

    def check(self) -> None:
        """Raises Stopped if a signal has come."""
        if self.asked:
            raise Stopped

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal raises Stopped in the main thread at once. For work that leaves nothing half-written."""
        self.check()
        self._leave = True
        try:
            yield
        finally:
            self._leave = False

    def _note(self, number: int, frame: object) -> None:
        repeated, self.asked = self.asked, True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self._leave and not repeated:
            raise Stopped
