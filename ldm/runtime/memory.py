"""Running out of memory, answered in one line that says what helps."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ldm.errors import RunError


@contextmanager
def out_of_memory_named(device: torch.device, doing: str, advice: str) -> Iterator[None]:
    """Turns running out of memory into a RunError: "DEVICE ran out of memory DOING; ADVICE"."""
    try:
        yield
    except MemoryError:
        raise RunError(f"{device} ran out of memory {doing}; {advice}") from None
    except RuntimeError as error:  # torch.OutOfMemoryError is one, too; the CPU's allocator has no class of its own
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise RunError(f"{device} ran out of memory {doing}; {advice}") from None
