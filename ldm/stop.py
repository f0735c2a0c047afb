"""Being asked to stop, and doing it well: a signal is noted, the step is finished, the state is saved."""

import signal


class Stop:
    """Notes SIGTERM, SIGINT and SIGUSR1 from now on. A second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.asked: str | None = None  # the signal's name
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(name, self._note)

    def _note(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self.asked == "SIGINT":
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name
