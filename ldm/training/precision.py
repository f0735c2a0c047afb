"""Mixed precision (Micikevicius et al. 2018): trained weights are fp32, autocast multiplies matrices in 16 bits."""

import os
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.amp import GradScaler

COMPUTE_TYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Precision:
    """name: "no", "fp16" or "bf16". Only fp16 scales the loss up, so that small gradients do not vanish.

    train_dtype: "fp32" or "bf16", the type of the weights that train. dtype: the type that matrices are multiplied in.
    """

    def __init__(self, name: str, device: torch.device, train_dtype: str = "fp32"):
        self.dtype, self.device = COMPUTE_TYPES["bf16" if train_dtype == "bf16" else name], device
        self.scaler = GradScaler(device.type, enabled=name == "fp16")
        self._casts = train_dtype == "fp32" and self.dtype != torch.float32

    def autocast(self) -> AbstractContextManager:
        """Wraps the forward pass in training. Weights in bf16 need no casts."""
        return torch.autocast(self.device.type, self.dtype, enabled=self._casts)

    def sampling(self) -> AbstractContextManager:
        """Wraps sampling, before and after training, when some networks may still be in fp32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of the loss, scaled in fp16, to `.grad`."""
        self.scaler.scale(loss).backward()


def set_exactness(allow_tf32: bool, deterministic: bool) -> None:
    """allow_tf32: TF32 for fp32 matrix products on NVIDIA GPUs. deterministic: the same bits each time, or an error."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allow_tf32
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS raises an error
