"""train.py that gets a signal: python tests/training/stops.py WHEN FLAGS.

The last process gets SIGTERM in step 2: "before" its validation, which the signal ends, or "after" it, so that step 3
is the last one.
"""

import signal
import sys

import train
from ldm.runtime import cli

validate = train.validate


def stopping(when, run, state, validation):
    """train.validate, with the signal at step 2."""
    is_now = state.step == 2 and run.world.rank == run.world.size - 1
    if is_now and when == "before":
        signal.raise_signal(signal.SIGTERM)
    validate(run, state, validation)
    if is_now and when == "after":
        signal.raise_signal(signal.SIGTERM)


if __name__ == "__main__":
    train.validate = lambda *words: stopping(sys.argv[1], *words)
    with cli.reported("train.py"):
        train.main(sys.argv[2:])
