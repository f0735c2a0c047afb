"""Mixed precision (Micikevicius et al. 2018): what trains is fp32, autocast multiplies matrices in fewer bits."""

import math
import os
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

    def step(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], max_norm: float) -> float:
        """Clips the gradients to the norm and updates. Returns their norm before.

        If that is not finite there is no update, and where fp16 overflowed the loss is scaled less from now on.
        """
        self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, max_norm).item()
        if math.isfinite(norm):
            self.scaler.step(optimizer)
        self.scaler.update()
        return norm


def set_exactness(allow_tf32: bool, deterministic: bool) -> None:
    """TF32 for fp32 matrix products on NVIDIA GPUs; algorithms that give the same bits each time, or an error."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allow_tf32
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses
