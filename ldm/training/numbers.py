"""The losses and the norm of one step, on their way from the device to the host."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.dreambooth import Losses
from ldm.runtime import World


class Numbers:
    """What people read of a step: its losses, the norm of its gradients, and whether a signal has come.

    The device works on while they are copied. `read` waits for the copy alone; on a GPU it is called while the next
    step runs. `found_inf` stays on the device, where fused AdamW leaves out the update without asking the host.
    """

    def __init__(self, values: Tensor):
        """values: (processes, 3 * parts + 2): total, subject and prior loss of each part; then norm and signal."""
        self.found_inf = values.isfinite().all().logical_not().float()  # (), 1 if one of them is not finite
        self._copy = to_host(values)
        self._copied = torch.cuda.Event() if values.is_cuda else None
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(values.device))

    @classmethod
    def gathered(cls, world: World, losses: Sequence[Losses], norm: Tensor, has_signal: bool) -> "Numbers":
        """Those of all processes. losses: of this one's batches; has_signal: whether a signal has come to it."""
        signal = torch.full((1,), float(has_signal), device=norm.device)
        values = torch.cat([torch.stack([*map(torch.stack, losses)]).flatten(), norm[None], signal])
        return cls(world.gather(values))

    def read(self) -> dict[str, float]:
        """loss, subject_loss, prior_loss: means over processes and parts; grad_norm; signals: how many have come."""
        if self._copied is not None:
            self._copied.synchronize()
        rows = self._copy.tolist()
        losses = ([value for row in rows for value in row[kind:-2:3]] for kind in range(3))
        total, subject, prior = (math.fsum(values) / len(values) for values in losses)
        named = {"loss": total, "subject_loss": subject, "prior_loss": prior, "grad_norm": rows[0][-2]}
        return named | {"signals": sum(row[-1] for row in rows)}

    @property
    def are_finite(self) -> bool:
        """Waits for the copy."""
        return all(map(math.isfinite, self.read().values()))


def to_host(values: Tensor) -> Tensor:
    """Begins to copy from the device. The copy of a GPU's tensor lies in pinned memory and is not complete yet."""
    return values.to("cpu", non_blocking=values.is_cuda)
