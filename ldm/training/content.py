"""Whether a checkpoint holds a state that this run can resume: every tensor and number, of the right kind.

Checksums say that the bytes are those that were written. They do not say that the bytes are a state: a script or a
stranger may have changed both. Everything is checked before anything is restored.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.errors import InputError
from ldm.formats import Tensors, differences, not_finite
from ldm.runtime import cli
from ldm.training.state import MAX_OVERFLOWS, TrainingState


def check_content(state: TrainingState, weights: Path, training: Tensors, numbers: dict[str, Any]) -> None:
    """Raises InputError, which names the first thing that is wrong, unless `state.restore` can take these."""
    _check_numbers(state, numbers)
    expected, counts = _expected(state, numbers["step"])
    _check_tensors(training, expected)
    _check_values(training, numbers["step"])
    if numbers["optimizer"].keys() != counts.keys():
        name = min(numbers["optimizer"].keys() ^ counts.keys())
        raise InputError(f"the numbers of the optimizer for {name} are {'missing' if name in counts else 'unknown'}")
    for name, said in numbers["optimizer"].items():
        if not isinstance(said, dict) or said.keys() != counts[name].keys():
            raise InputError(f"the numbers of the optimizer for {name} are not {', '.join(counts[name])}")
        for key, value in said.items():
            _check_whole(f"{key} of {name}", value, 1, numbers["step"])
    saved = state.trainable.read(weights)
    if problems := differences(saved, state.trainable.expected()):
        raise InputError(problems[0])
    trained = {name: saved[name] for name in state.parameters}
    _check_tensors(trained, state.parameters)
    _check_finite(trained)


def _check_numbers(state: TrainingState, numbers: dict[str, Any]) -> None:
    """Checks what state.json says: step, draws, scaler and EMA's updates."""
    if missing := [name for name in (*state.numbers(), "run") if name not in numbers]:
        raise InputError(f"{missing[0]} is missing")
    step = _check_whole("step", numbers["step"], 0, cli.MAX_COUNT)
    _check_whole("draws", numbers["draws"], step, step + MAX_OVERFLOWS * (step + 1))
    _check_whole("ema_updates", numbers["ema_updates"], 0, step)
    for name in ("scaler", "optimizer", "run"):
        if not isinstance(numbers[name], dict):
            raise InputError(f"{name} is {numbers[name]!r}, and should be a JSON object")
    said, own = numbers["scaler"], state.precision.scaler.state_dict()  # empty if there is no fp16
    if said.keys() != own.keys():
        raise InputError(f"scaler has {', '.join(said) or 'nothing'}, and should have {', '.join(own) or 'nothing'}")
    for name, value in said.items():
        if name == "_growth_tracker":
            _check_whole(name, value, 0, cli.MAX_COUNT)
        elif name == "scale":
            if type(value) not in (int, float) or not 0 < value < torch.finfo(torch.float32).max:
                raise InputError(f"scale is {value!r}, and should be a positive number")
        elif value != own[name]:
            raise InputError(f"{name} is {value!r}, and should be {own[name]!r}")


def _expected(state: TrainingState, step: int) -> tuple[Tensors, dict[str, dict[str, int]]]:
    """Meta tensors for training.safetensors, and the numbers that the optimizer keeps, by parameter."""
    tensors, counts = {}, {}
    if step > 0:
        for name, parameter in state.parameters.items():
            kept = state.kept_of(parameter)
            tensors |= {f"optimizer.{key}.{name}": value for key, value in kept.items() if isinstance(value, Tensor)}
            if numbers := {key: value for key, value in kept.items() if not isinstance(value, Tensor)}:
                counts[name] = numbers
    if state.ema is not None:
        tensors |= {f"ema.{name}": average.to("meta") for name, average in state.ema.averages.items()}
    return tensors, counts


def _check_tensors(tensors: Tensors, expected: Tensors) -> None:
    """Checks names, shapes and types."""
    for what, names in ("missing", expected.keys() - tensors.keys()), ("unknown", tensors.keys() - expected.keys()):
        if names:
            raise InputError(f"{what} tensor {min(names)}")
    for name, tensor in tensors.items():
        found, due = (f"{tuple(t.shape)} {t.dtype}" for t in (tensor, expected[name]))
        if found != due:
            raise InputError(f"{name} is {found}, and should be {due}")


def _check_values(training: Tensors, step: int) -> None:
    """Checks that all numbers are finite, that squares are not negative and that no step is beyond the last one."""
    _check_finite(training)
    for name, tensor in training.items():
        if name.startswith("optimizer.exp_avg_sq.") and tensor.numel() and tensor.min() < 0:
            raise InputError(f"{name} holds a negative number")
        if name.startswith("optimizer.step.") and not 1 <= tensor.item() <= step:
            raise InputError(f"{name} is {tensor.item()}, and should be from 1 to {step}")


def _check_finite(tensors: Tensors) -> None:
    if bad := not_finite(tensors):
        raise InputError(f"{bad[0]} holds NaN or infinity")


def _check_whole(name: str, value: Any, least: int, most: int) -> int:
    """The value. Raises InputError unless it is a whole number from `least` to `most`."""
    if type(value) is not int or not least <= value <= most:
        raise InputError(f"{name} is {value!r}, and should be a whole number from {least} to {most}")
    return value
