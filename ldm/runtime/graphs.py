"""Records the kernels that a function starts on a CUDA device once, and replays them: the same bits, in one launch.

A UNet starts about a thousand small kernels. For few pictures at once Python needs longer to start them than the GPU
to run them, and a CUDA graph starts them all in one call.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def captured(function: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    """The same function of tensors, recorded at its second call and replayed from then on; unchanged without CUDA.

    The function must not read values from the device, and all that it uses besides its arguments must stay where it is:
    it is called for the same shapes with the same weights. The memory of the recording is freed with the result.
    """
    return Captured(function, device) if device.type == "cuda" else function


class Captured:
    """A function, recorded for the shapes of its second call. Calls with other shapes, or gradients, run plainly."""

    def __init__(self, function: Callable[..., Tensor], device: torch.device):
        self.function, self.device = function, device
        self.stream = torch.cuda.Stream(device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.shapes: list[tuple[torch.Size, torch.dtype]] | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        shapes = [(tensor.shape, tensor.dtype) for tensor in inputs]
        if torch.is_grad_enabled() or (self.shapes is not None and shapes != self.shapes):
            return self.function(*inputs)
        if self.shapes is None:
            self.shapes = shapes
            with torch.cuda.device(self.device), self._without_cache():
                return self._warm_up(*inputs)
        if self.graph is None:
            with torch.cuda.device(self.device), self._without_cache():
                self._record(*inputs)
        for static, tensor in zip(self.inputs, inputs, strict=True):
            static.copy_(tensor)
        self.graph.replay()
        return self.output.clone()  # the next replay overwrites the output

    def _warm_up(self, *inputs: Tensor) -> Tensor:
        """Runs plainly, but on the stream of the recording, where the libraries set up what must exist before it."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            output = self.function(*inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        output.record_stream(torch.cuda.current_stream())
        return output

    def _record(self, *inputs: Tensor) -> None:
        self.inputs = [tensor.clone() for tensor in inputs]
        self.graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile.
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            self.output = self.function(*self.inputs)

    def _without_cache(self) -> AbstractContextManager:
        """Inside, autocast keeps no casts of weights beyond the recording.

        The warm-up runs in it as well: a compiled function would be compiled again for a change of this setting.
        """
        kind = self.device.type
        return torch.autocast(
            kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False
        )
