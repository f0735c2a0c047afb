"""Which step of a run to take, from what its validations measured."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

Line = dict[str, Any]  # of validation.jsonl

MUCH = 0.3  # harm to the class that the advice warns of; without held-out losses, the most that it accepts


class Advice(NamedTuple):
    """step: the one to take; None if no step was validated. reason: one line."""

    step: int | None
    reason: str


def advise(lines: Sequence[Line]) -> Advice:
    """The step whose model is likely the best, and why.

    lines: of validation.jsonl, in any order; step 0 is the base model. Numbers that are missing or not finite count as
    not measured. Two things are weighed, each from 0 to 1:

        gain    how much of the held-out loss's fall, from the base to its lowest, the step has reached
        harm    the larger of drift and lost diversity: 1 if the class's pictures all show the subject

    The step with the largest gain - harm is taken; an earlier one of two that are equal. Without held-out losses more
    training counts as gain: the last step whose harm is at most 0.3 is taken, else the one with the least harm.
    """
    base = next((line for line in lines if line["step"] == 0), {})
    steps = sorted((line for line in lines if line["step"] > 0), key=lambda line: line["step"])
    if not steps:
        return Advice(None, "no step was validated")
    losses = {line["step"]: loss for line in steps if (loss := number(line, "validation_loss")) is not None}
    if not losses:
        return without_losses(steps)
    lowest = min(losses, key=losses.get)
    first = number(base, "validation_loss")
    first = max(losses.values()) if first is None else first
    fall = first - losses[lowest]
    if fall <= 0:
        return Advice(lowest, f"no step has a lower held-out loss than the base model; {said(base, lowest, losses)}")
    measured = [line for line in steps if line["step"] in losses]
    best = max(measured, key=lambda line: (first - losses[line["step"]]) / fall - (harm(line) or 0.0))
    return Advice(best["step"], reason(best, measured, losses, first))


def reason(best: Line, measured: Sequence[Line], losses: dict[int, float], first: float) -> str:
    """Why the step is taken, beside the one with the lowest held-out loss and the last one."""
    step, lowest, last = best["step"], min(losses, key=losses.get), measured[-1]
    change = losses[step] / first - 1
    text = f"held-out loss {losses[step]:.4f}, {change:+.0%} from the base model's" if first else "held-out loss"
    text += " and the lowest" if step == lowest else f" (lowest at step {lowest}: {losses[lowest]:.4f})"
    text += f"; {of_class(best)}" if harm(best) is not None else "; language drift was not measured"
    if last["step"] != step:
        after = [f"held-out loss {losses[last['step']]:.4f}"] if losses[last["step"]] > losses[step] else []
        after += [of_class(last)] if harm(last) is not None and harm(last) > (harm(best) or 0.0) else []
        text += f"; at the last step, {last['step']}: {', '.join(after)}" if after else ""
    return text


def without_losses(steps: Sequence[Line]) -> Advice:
    """The advice without held-out pictures. steps: lines after step 0, in order."""
    known = [(line, found) for line in steps if (found := harm(line)) is not None]
    if not known:
        return Advice(steps[-1]["step"], "the last one: neither held-out loss nor language drift was measured")
    mild = [line for line, found in known if found <= MUCH]
    if mild:
        which = "the last step" if mild[-1] is known[-1][0] else "the last step before the class suffers"
        return Advice(mild[-1]["step"], f"{which}; {of_class(mild[-1])}; there are no held-out pictures")
    least = min(known, key=lambda pair: pair[1])[0]
    return Advice(least["step"], f"the class suffers at every step, here least; {of_class(least)}")


def said(base: Line, step: int, losses: dict[int, float]) -> str:
    first = number(base, "validation_loss")
    return f"step {step} comes closest: {losses[step]:.4f}" + (f", and the base {first:.4f}" if first else "")


def harm(line: Line) -> float | None:
    """From 0, the base model, to 1, where all of the class's pictures show the subject; None if not measured."""
    drift, diversity = number(line, "drift"), number(line, "diversity")
    parts = [*([drift] if drift is not None else []), *([1.0 - diversity] if diversity is not None else [])]
    return min(max(*parts, 0.0), 1.0) if parts else None


def of_class(line: Line) -> str:
    """Drift and diversity, in words."""
    drift, diversity = number(line, "drift"), number(line, "diversity")
    parts = [f"drift {drift:.0%}"] if drift is not None else []
    parts += [f"diversity {diversity:.0%}"] if diversity is not None else []
    return "class pictures: " + ", ".join(parts)


def number(line: Line, name: str) -> float | None:
    """A number of a line; None if it is missing or not finite."""
    value = line.get(name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None
