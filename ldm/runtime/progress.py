"""A progress bar for work that a signal ends."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from ldm.runtime.signals import Stop


@contextmanager
def progress_bar(
    stop: Stop, description: str, total: int, unit: str = "step", show: bool = True
) -> Iterator[Callable[[], None]]:
    """Gives a function to call after each unit of work: it moves the bar, and raises Stopped if a signal has come."""
    with tqdm(total=total, desc=description, unit=unit, disable=not show) as bar:

        def progress() -> None:
            bar.update()
            stop.check()

        yield progress
