"""An exponential moving average of the weights, which is often better than the last weights (Karras et al. 2024)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """fp32 averages of named parameters, with the warm-up of the original's LitEma.

    `updates` and `averages` are the whole state.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float):
        self.parameters, self.decay, self.updates = parameters, decay, 0
        self.averages: dict[str, Tensor] = {name: p.detach().float().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Moves the averages toward the weights, faster at first. Call it after each step of the optimizer."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages, weights = [self.averages[name] for name in self.parameters], list(self.parameters.values())
        if all(weight.dtype == torch.float32 for weight in weights):
            torch._foreach_lerp_(averages, weights, 1.0 - decay)
            return
        for average, weight in zip(averages, weights, strict=True):  # one fp32 copy at a time
            average.lerp_(weight.float(), 1.0 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model's weights are the averages. Afterwards weights and averages have their bits back."""
        last = {name: self._put(name) for name in self.parameters}
        try:
            yield
        finally:
            for name in self.parameters:
                self._put_back(name, last.pop(name))

    @torch.no_grad()
    def _put(self, name: str) -> Tensor | None:
        """Puts the average in the place of the weight. An fp32 weight goes to the average's place, others are returned.

        The average does not fit in a bf16 weight's place without rounding, so it stays.
        """
        parameter, average = self.parameters[name], self.averages[name]
        last = parameter.clone()
        parameter.copy_(average)
        if parameter.dtype != average.dtype:
            return last
        average.copy_(last)
        return None

    @torch.no_grad()
    def _put_back(self, name: str, last: Tensor | None) -> None:
        if last is None:
            self._put(name)  # the two change places once more
        else:
            self.parameters[name].copy_(last)
