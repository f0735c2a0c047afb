"""AdamW over groups of parameters, and its learning rate over the steps."""

from collections.abc import Iterable
from typing import Any

import torch

from ldm.errors import InputError
from ldm.settings import LR_SCHEDULES


def adamw(groups: Iterable[dict[str, Any]], eight_bit: bool) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) with the betas and the weight decay of the official release's training.

    groups: dictionaries with `params`, `lr` and `stop`, the last step that updates the group, or None.
    eight_bit: moments in 8 bits (Dettmers et al. 2022), by bitsandbytes.
    """
    groups = [{**group, "initial_lr": group["lr"]} for group in groups]
    options: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
    if not eight_bit:
        return torch.optim.AdamW(groups, **options, fused=True)  # fused: no temporaries as large as the model
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise InputError('--use-8bit-adam needs bitsandbytes: pip install -e ".[bitsandbytes]"') from None
    return AdamW8bit(groups, **options)


def kept_of(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> dict[str, Any]:
    """What the optimizer keeps of a parameter that has trained: name -> a meta tensor of its shape and type, or 0.

    The optimizer itself has not begun yet.
    """
    if isinstance(optimizer, torch.optim.AdamW):
        moment = torch.zeros_like(parameter, device="meta")
        return {"step": torch.zeros((), device="meta"), "exp_avg": moment, "exp_avg_sq": moment}
    for g, group in enumerate(optimizer.param_groups):
        for p, member in enumerate(group["params"]):
            if member is parameter:
                optimizer.init_state(group, parameter, g, p)  # of bitsandbytes
    kept = optimizer.state.pop(parameter)
    return {key: value.to("meta") if isinstance(value, torch.Tensor) else 0 for key, value in kept.items()}


def lr_factor(kind: str, step: int, warmup: int, total: int) -> float:
    """The factor on the learning rate. step: counted from 1. It rises to 1 at step `warmup`, then follows `kind`."""
    if step <= warmup:
        return step / warmup
    return LR_SCHEDULES[kind]((step - 1 - warmup) / max(1, total - warmup))  # 0 at the first step after the warm-up


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets each group's learning rate to its initial one times the factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def freeze_stopped(optimizer: torch.optim.Optimizer, step: int) -> bool:
    """Freezes the groups whose last step lies before `step`: no gradient, so no update and no decay.

    Returns True if one of them still trained.
    """
    found = False
    for group in optimizer.param_groups:
        if group["stop"] is not None and step > group["stop"] and group["params"][0].requires_grad:
            found = True
            for parameter in group["params"]:
                parameter.requires_grad_(False).grad = None
    return found
