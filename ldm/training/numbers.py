"""The losses and the norm of one step, on their way from the device to the host."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.dreambooth import Batch, Losses
from ldm.runtime import World


class SubjectLosses:
    """The losses of several subjects, each summed over the batches of a step on the device. Nothing for one subject."""

    def __init__(self, names: Sequence[str], device: torch.device):
        self.names = tuple(names) if len(names) > 1 else ()
        self._none = self._sums = torch.zeros(2, len(self.names), device=device)

    @torch.no_grad()
    def add(self, batch: Batch, error: Tensor) -> None:
        """error: (B,), of the batch's rows."""
        found = []
        for i in range(len(self.names)):
            own = (batch.subject == i) & ~batch.is_class
            found.append(torch.stack([error.masked_fill(~own, 0.0).sum(), own.sum()]))
        if found:
            self._sums = self._sums + torch.stack(found, dim=1)

    def take(self) -> Tensor:
        """(2, subjects): the sum of the loss and the number of rows of each subject since the last call."""
        sums, self._sums = self._sums, self._none
        return sums


class Numbers:
    """What people read of a step: its losses, the norm of its gradients, and whether a signal has come.

    The device works on while they are copied. `read` waits for the copy alone; on a GPU it is called while the next
    step runs. `found_inf` stays on the device, where fused AdamW leaves out the update without asking the host.
    """

    def __init__(self, world: World, losses: Sequence[Losses], subjects: SubjectLosses, norm: Tensor, has_signal: bool):
        """losses: of this process's batches. norm: a scalar, the same in all processes."""
        signal = torch.full((1,), float(has_signal), device=norm.device)
        parts = [*map(torch.stack, zip(*losses, strict=True)), *subjects.take(), norm[None], signal]
        self._subjects, self._sizes = subjects.names, [len(part) for part in parts]
        values = world.gather(torch.cat(parts))  # (processes, n)
        self.found_inf = values.isfinite().all().logical_not().float()  # (), 1 if one of them is not finite
        self._copy = to_host(values)
        self._copied = torch.cuda.Event() if values.is_cuda else None
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(values.device))

    def read(self) -> dict[str, float]:
        """loss, subject_loss, prior_loss: means over processes and batches; grad_norm; signals: how many have come.

        subject_loss/NAME: the mean over the subject's rows, if the step has any.
        """
        if self._copied is not None:
            self._copied.synchronize()
        parts = [part.T.tolist() for part in self._copy.split(self._sizes, dim=1)]  # [number][process] each
        total, subject, prior, sums, counts, (norms,), (signals,) = parts
        found = {"loss": mean(total), "subject_loss": mean(subject), "prior_loss": mean(prior)}
        for name, summed, count in zip(self._subjects, map(math.fsum, sums), map(math.fsum, counts), strict=True):
            if count:
                found[f"subject_loss/{name}"] = summed / count
        return found | {"grad_norm": norms[0], "signals": sum(signals)}

    @property
    def are_finite(self) -> bool:
        """Waits for the copy."""
        return all(map(math.isfinite, self.read().values()))


def mean(rows: Sequence[Sequence[float]]) -> float:
    """The mean of all numbers, whose sum is rounded once: the order of processes and batches does not change it."""
    values = list(itertools.chain.from_iterable(rows))
    return math.fsum(values) / len(values)


def to_host(values: Tensor) -> Tensor:
    """Begins to copy from the device. The copy of a GPU's tensor lies in pinned memory and is not complete yet."""
    return values.to("cpu", non_blocking=values.is_cuda)
