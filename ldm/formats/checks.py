"""What is wrong with a model's tensors, in words."""

from collections.abc import Sequence

import torch

from ldm.formats.names import EMA_PREFIX
from ldm.formats.tensors import Tensors

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def differences(tensors: Tensors, expected: Tensors) -> list[str]:
    """What keeps `tensors` from being loaded where `expected` are, one phrase each; nothing if they fit.

    Loading is strict: a missing or unknown tensor is wrong, and one of another shape, or of a type that no weight has.
    """
    problems = [f"missing tensor {name}" for name in sorted(expected.keys() - tensors.keys())]
    problems += [f"unknown tensor {name}" for name in sorted(tensors.keys() - expected.keys())]
    for name in sorted(expected.keys() & tensors.keys()):
        found, shape = tensors[name], expected[name].shape
        if found.shape != shape:
            problems.append(f"{name} is {tuple(found.shape)}, and should be {tuple(shape)}")
        elif found.dtype not in WEIGHT_DTYPES:
            problems.append(f"{name} holds {found.dtype}, and should hold fp32, fp16 or bf16 numbers")
    return problems


def not_finite(tensors: Tensors) -> list[str]:
    """The names of the tensors that hold NaN or infinity. Reads all of them."""
    return sorted(name for name, tensor in tensors.items() if not _is_finite(tensor))


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers are finite. A finite sum, which is quick, proves it; an infinite one may be an overflow."""
    if not tensor.is_floating_point():
        return True  # no weight; `differences` names it
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())


def abbreviate(tensor_names: Sequence[str], max_count: int = 3) -> str:
    """Tensor names as one phrase: counts the EMA tensors, names up to `max_count` of the others, counts the rest."""
    others = [name for name in tensor_names if not name.startswith(EMA_PREFIX)]
    words = [f"{count} EMA tensors"] if (count := len(tensor_names) - len(others)) else []
    rest = f" and {len(others) - max_count} more" if len(others) > max_count else ""
    return ", ".join(words + others[:max_count]) + rest
