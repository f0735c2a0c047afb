"""Reports out of memory in one line that says what helps."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ldm.errors import RunError

# Messages of torch's CPU allocator and oneDNN, which have no exception class for it.
MESSAGES = ("can't allocate memory", "could not create a primitive")


@contextmanager
def out_of_memory_named(device: torch.device, doing: str, advice: str) -> Iterator[None]:
    """Turns running out of memory into a RunError: "DEVICE ran out of memory DOING; ADVICE"."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and not any(message in str(error) for message in MESSAGES):
            raise
        raise RunError(f"{device} ran out of memory {doing}; {advice}") from None
