"""Mixed precision (Micikevicius et al. 2018): what trains is fp32, autocast multiplies matrices in fewer bits."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Precision:
    """name: "no", "fp16" or "bf16". fp16 alone needs its loss scaled up, lest small gradients vanish."""

    def __init__(self, name: str, device: torch.device):
        self.dtype, self.device = DTYPES[name], device
        self.scaler = GradScaler(device.type, enabled=name == "fp16")

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], max_norm: float) -> float | None:
        """Clips the gradients to the norm and updates. Returns their norm before, or None if the update was skipped.

        Skipped means that fp16 overflowed: the scale goes down, nothing else changes. A norm that is not finite
        without fp16 is returned as it is, without an update.
        """
        self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, max_norm).item()
        finite = torch.isfinite(torch.tensor(norm))
        if self.scaler.is_enabled():
            self.scaler.step(optimizer)
            self.scaler.update()
            return norm if finite else None
        if finite:
            optimizer.step()
        return norm
