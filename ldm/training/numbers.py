"""The losses and the norm of one step, on their way from the device to the host."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.dreambooth import Batch


class Numbers:
    """What people read of a step: its losses, the norm of its gradients, and whether a signal has come.

    The device works on while they are copied. `read` waits for the copy alone; on a GPU it is called while the next
    step runs. `found_inf` stays on the device, where fused AdamW leaves out the update without asking the host.
    """

    def __init__(self, values: Tensor, subjects: Sequence[str] = ()):
        """values: (processes, n): a process's row has total, subject and prior loss of each part; the sum of the loss
        and the number of rows of each subject; the norm; the signal. subjects: their names.
        """
        self._subjects = subjects
        self.found_inf = values.isfinite().all().logical_not().float()  # (), 1 if one of them is not finite
        self._copy = to_host(values)
        self._copied = torch.cuda.Event() if values.is_cuda else None
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(values.device))

    def read(self) -> dict[str, float]:
        """loss, subject_loss, prior_loss: means over processes and parts; grad_norm; signals: how many have come.

        subject_loss/NAME: the mean over the subject's rows, if the step has any.
        """
        if self._copied is not None:
            self._copied.synchronize()
        rows = self._copy.tolist()
        end = len(rows[0]) - 2 - 2 * len(self._subjects)
        losses = ([value for row in rows for value in row[kind:end:3]] for kind in range(3))
        total, subject, prior = (math.fsum(values) / len(values) for values in losses)
        named = {"loss": total, "subject_loss": subject, "prior_loss": prior}
        for i, name in enumerate(self._subjects):
            summed, count = (math.fsum(row[end + 2 * i + k] for row in rows) for k in range(2))
            if count:
                named[f"subject_loss/{name}"] = summed / count
        return named | {"grad_norm": rows[0][-2], "signals": sum(row[-1] for row in rows)}

    @property
    def are_finite(self) -> bool:
        """Waits for the copy."""
        return all(map(math.isfinite, self.read().values()))


class SubjectLosses:
    """The losses of several subjects, each summed over the batches of a step on the device. Nothing for one subject."""

    def __init__(self, names: Sequence[str], device: torch.device):
        self.names = tuple(names) if len(names) > 1 else ()
        self._none = self._sums = torch.zeros(len(self.names), 2, device=device)

    @torch.no_grad()
    def add(self, batch: Batch, error: Tensor) -> None:
        """error: (B,), of the batch's rows."""
        found = []
        for i in range(len(self.names)):
            own = (batch.subject == i) & ~batch.is_class
            found.append(torch.stack([error.masked_fill(~own, 0.0).sum(), own.sum()]))
        if found:
            self._sums = self._sums + torch.stack(found)

    def take(self) -> Tensor:
        """(2 * subjects,): the sum of the loss and the number of rows of each subject since the last call."""
        sums, self._sums = self._sums, self._none
        return sums.flatten()


def to_host(values: Tensor) -> Tensor:
    """Begins to copy from the device. The copy of a GPU's tensor lies in pinned memory and is not complete yet."""
    return values.to("cpu", non_blocking=values.is_cuda)
