"""Stopping well when asked: a signal is noted, the work at hand is finished, and the state is saved."""

import signal

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopped(Exception):
    """Raised by `Stop.check` to leave work that has nothing to save, such as the sampling of a picture."""


class Stop:
    """Inside, SIGTERM, SIGINT and SIGUSR1 set `asked` and do nothing else. A second SIGINT ends the process at once."""

    asked = False

    def __enter__(self) -> "Stop":
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raises Stopped if a signal has come."""
        if self.asked:
            raise Stopped

    def _note(self, number: int, frame: object) -> None:
        self.asked = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
