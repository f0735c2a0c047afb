"""Counts the bytes that a computation needs, on torch's meta device: tensors have shapes and types, but no numbers.

`Ledger` sees every operation. `Kernels` makes the meta device keep what a GPU or a CPU would keep: it casts as autocast
does, and its attention never holds the N x N matrix, as the fused kernels.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Ledger(TorchDispatchMode):
    """Adds the bytes of each storage when an operation makes it, and subtracts them when the last tensor on it dies.

    known: tensors that exist already, and do not count. now, peak: bytes alive, and the most so far. gradients: those
    of them in the `.grad` of what trains; gradients_at_peak: their part of the peak.
    """

    def __init__(self, known: Sequence[Tensor], trained: Sequence[nn.Parameter] = ()):
        super().__init__()
        self.now = self.peak = self.gradients = self.gradients_at_peak = 0
        self._known = [tensor.untyped_storage() for tensor in known]
        self._alive: dict[int, Any] = {id(storage): storage for storage in self._known}
        self._in_grad: set[int] = set()
        self._hooks = [parameter.register_post_accumulate_grad_hook(self.note_gradient) for parameter in trained]

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = RESULTS.get(func, func)(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._alive:
            return

        def died(_: object) -> None:
            self.now -= size
            del self._alive[key]
            if key in self._in_grad:
                self._in_grad.remove(key)
                self.gradients -= size

        self._alive[key] = weakref.ref(storage, died)
        self.now += size
        if self.now > self.peak:
            self.peak, self.gradients_at_peak = self.now, self.gradients

    def note_gradient(self, parameter: nn.Parameter) -> None:
        """Called when the `.grad` of a parameter that trains is there."""
        storage = parameter.grad.untyped_storage()
        if id(storage) not in self._in_grad:
            self._in_grad.add(id(storage))
            self.gradients += storage.nbytes()


# Results of operations whose shapes torch works out slowly, in Python.


def _group_norm(x: Tensor, weight: Tensor, bias: Tensor, n: int, c: int, hw: int, groups: int, eps: float) -> Any:
    return torch.empty_like(x), x.new_empty(n, groups), x.new_empty(n, groups)  # result, mean, 1 / std


def _layer_norm(x: Tensor, shape: Sequence[int], weight: Tensor, bias: Tensor, eps: float) -> Any:
    rows = (*x.shape[: -len(shape)], *[1] * len(shape))
    return torch.empty_like(x), x.new_empty(rows), x.new_empty(rows)


def _group_norm_backward(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, *rest: Any) -> Any:
    return _wanted((x, weight, weight), rest[-1])


def _layer_norm_backward(dy: Tensor, x: Tensor, shape: Any, mean: Tensor, rstd: Tensor, *rest: Any) -> Any:
    return _wanted((x, rest[0], rest[0]), rest[-1])


def _wanted(tensors: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    return tuple(torch.empty_like(tensor) if want else None for tensor, want in zip(tensors, wanted, strict=True))


def _add(x: Tensor, y: Any, **options: Any) -> Tensor:
    if isinstance(y, Tensor) and (x.shape, x.dtype) == (y.shape, y.dtype):
        return torch.empty_like(x)
    return aten.add.Tensor(x, y, **options)


def _addmm(bias: Tensor, a: Tensor, b: Tensor, **options: Any) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


aten = torch.ops.aten
RESULTS: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: _add,
    aten.addmm.default: _addmm,
    aten.native_group_norm.default: _group_norm,
    aten.native_group_norm_backward.default: _group_norm_backward,
    aten.native_layer_norm.default: _layer_norm,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
}


class Kernels(TorchFunctionMode):
    """Makes the meta device compute as `device` does under autocast to `dtype`; fp32 is without autocast.

    upcast: whether attention in fp16 is computed in fp32, as SD2 needs.
    """

    # The operations of our networks that autocast knows.
    TO_DTYPE = {F.linear, F.conv2d, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch.mm}
    TO_FP32_ON_CUDA = {F.group_norm, F.layer_norm}  # a CPU normalises in the type of the input

    def __init__(self, dtype: torch.dtype, device: torch.device, upcast: bool = False):
        super().__init__()
        self.dtype, self.upcast = dtype, upcast and dtype == torch.float16
        self.to_fp32 = self.TO_FP32_ON_CUDA if device.type == "cuda" and dtype != torch.float32 else set()
        self._copies: dict[int, Tensor] | None = None  # of weights, by id

    @property
    def copied(self) -> int:
        """Bytes of the copies that autocast keeps."""
        return sum(copy.nbytes for copy in (self._copies or {}).values())

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Inside, the copy of a weight that trains is made once and kept, as autocast does until it ends."""
        self._copies = {}
        try:
            yield
        finally:
            self._copies = None

    def backward(self, loss: Tensor) -> None:
        """loss.backward(). That itself would leave this mode, and checkpointing computes stages again inside."""
        engine, gradient = torch.autograd.Variable._execution_engine, torch.ones_like(loss)
        engine.run_backward((loss,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._attention(*args)
        if func in self.to_fp32:
            args = tuple(self._cast(value, torch.float32) for value in args)
            kwargs = {name: self._cast(value, torch.float32) for name, value in (kwargs or {}).items()}
        elif self.dtype != torch.float32 and func in self.TO_DTYPE:
            args = tuple(self._cast(value, self.dtype) for value in args)
        return func(*args, **(kwargs or {}))

    def _attention(self, *qkv: Tensor) -> Tensor:
        if self.upcast:
            return Attention.apply(*(tensor.float() for tensor in qkv)).to(self.dtype)
        return Attention.apply(*(self._cast(tensor, self.dtype) for tensor in qkv))

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or value.dtype == dtype:
            return value
        if self._copies is None or not (value.is_leaf and value.requires_grad):
            return value.to(dtype)
        if id(value) not in self._copies:
            self._copies[id(value)] = value.to(dtype)
        return self._copies[id(value)]


class Attention(torch.autograd.Function):
    """Fused attention keeps its inputs, its result and one number a query: the logarithm of the softmax's sum."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v: (B, heads, N, d)."""
        batch, heads, n, _ = q.shape
        out = q.new_empty(batch, n, heads, v.shape[3]).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty((batch, heads, n), dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])
