"""Full fine-tuning on small GPUs: weights and gradients in bf16, and updates inside the backward pass.

Near a weight w, bf16's numbers lie about w / 128 apart. A step of fine-tuning is far smaller, and rounding to the
nearest number would lose it. Rounding up or down at random, in proportion to the distance, keeps it in the mean (Gupta
et al. 2015, section 3). AdamW then needs no fp32 copy of the weights.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ldm import rng
from ldm.training.optimizer import adamw, kept_of


class Piecewise(torch.optim.Optimizer):
    """AdamW that updates one parameter at a time, in fp32. Parameters in bf16 are rounded stochastically.

    groups, eight_bit: see `adamw`. The random numbers are a function of (seed, step, parameter). found_inf: as in
    torch's fused AdamW; set before `step`, leaves the parameters as they are if it is 1.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], eight_bit: bool, seed: int):
        super().__init__([{**group, "initial_lr": group["lr"]} for group in groups], {})
        self.eight_bit, self.seed = eight_bit, seed
        self.found_inf: Tensor | None = None
        self.begin(1)
        self._inner: dict[nn.Parameter, tuple[torch.optim.Optimizer, nn.Parameter]] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                in_fp32 = parameter.dtype == torch.float32
                master = parameter if in_fp32 else nn.Parameter(parameter.new_empty(0, dtype=torch.float32))
                inner = adamw([{**group, "params": [master]}], eight_bit)
                self._inner[parameter] = inner, master
                self.state[parameter] = inner.state[master]
        self._order = {parameter: i for i, parameter in enumerate(self._inner)}

    def begin(self, step: int) -> None:
        """Called before each step, counted from 1."""
        self._step, self._squares = step, []

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Updates the parameters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group["lr"])

    def _update(self, parameter: nn.Parameter, lr: float) -> None:
        inner, master = self._inner[parameter]
        inner.param_groups[0]["lr"], inner.found_inf = lr, self.found_inf
        if master is parameter:
            inner.step()
            return
        master.data, master.grad = parameter.detach().float(), parameter.grad.float()
        inner.step()
        generator = torch.Generator(parameter.device)
        generator.manual_seed(rng.number(self.seed, "rounding", self._step, self._order[parameter]))
        parameter.copy_(rounded(master.data, generator))
        master.data, master.grad = master.data.new_empty(0), None

    # Updates inside the backward pass

    def update_in_backward(self) -> None:
        """From now on the backward pass updates each parameter as soon as its gradient is complete, and frees that.

        The norm over all gradients is known only afterwards: see `norm`. A gradient that is not finite leaves its own
        parameter as it is, but not with 8-bit AdamW.
        """
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(lambda p, group=group: self._update_and_free(p, group))

    @torch.no_grad()
    def _update_and_free(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        square = parameter.grad.float().square().sum()
        self._squares.append(square)
        self.found_inf = square.isfinite().logical_not().float()
        self._update(parameter, group["lr"])
        parameter.grad = None

    @property
    def has_begun(self) -> bool:
        """Whether the backward pass of this step has updated a parameter."""
        return bool(self._squares)

    def norm(self) -> Tensor:
        """The norm of all gradients of this step, a scalar on the device."""
        return torch.stack(self._squares).sum().sqrt()

    def kept_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        """See `optimizer.kept_of`."""
        like = nn.Parameter(torch.zeros_like(parameter, dtype=torch.float32))
        return kept_of(adamw([{"params": [like], "lr": 0.0, "stop": None}], self.eight_bit), like)


def rounded(x: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 -> bf16, to one of the two nearest numbers, each with the probability that keeps the mean.

    bf16 is the upper half of fp32's bits, and the lower half is the distance to the number below.
    """
    bits = x.view(torch.int32)
    noise = torch.randint(1 << 16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    return (bits + noise).bitwise_and_(-(1 << 16)).view(torch.float32).to(torch.bfloat16)
