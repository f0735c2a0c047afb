"""Which step of a run to take, from what its validations measured."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

Line = dict[str, Any]  # of validation.jsonl

MAX_HARM = 0.3  # without losses, the most harm to the class that the advice accepts


class Advice(NamedTuple):
    """step: the one to take; None if no step was validated. reason: one line."""

    step: int | None
    reason: str


class Score(NamedTuple):
    """What speaks for a step and against it, as shares of what the base model has."""

    learned: float  # how far the loss of the training photographs has fallen; of the held-out pictures if not measured
    overfit: float  # how far the loss of the held-out pictures has risen, 0 if it has fallen or was not measured
    harm: float  # see `harm`, 0 if it was not measured

    @property
    def total(self) -> float:
        return self.learned - self.overfit - self.harm


def advise(lines: Sequence[Line]) -> Advice:
    """The step whose model is likely the best, and why.

    lines: of validation.jsonl, in any order; step 0 is the base model. Numbers that are missing or not finite count as
    not measured. The step with the highest score is taken: what it has learned, less over-fitting, less harm to the
    class; an earlier one of two that are equal. Held-out loss alone would be lowest long before the model shows all of
    the subject (weights/tiny/README.md). Without any loss, more training counts as learning: the last step whose harm
    is at most 0.3 is taken, else the one with the least harm.
    """
    steps = sorted((line for line in lines if line["step"] > 0), key=lambda line: line["step"])
    if not steps:
        return Advice(None, "no step was validated")
    scored = [(line, found) for line in steps if (found := score(line, lines)) is not None]
    if not scored:
        return without_losses(steps)
    best, last = max(scored, key=lambda pair: pair[1].total), scored[-1]
    text = f"it has the highest score: {said(*best)}"
    if last[0] is not best[0]:
        text += f"; the last step, {last[0]['step']}: {said(*last)}"
    return Advice(best[0]["step"], text)


def score(line: Line, lines: Sequence[Line]) -> Score | None:
    """The score of one validation; None if no loss was measured. It depends on the base model's line alone, if given.

    lines: all of the run. Where the base model's loss was not measured, the highest one of the run takes its place.
    """
    falls = [fall(line, lines, name) for name in ("training_loss", "validation_loss")]
    known = [found for found in falls if found is not None]
    if not known:
        return None
    return Score(known[0], max(-(falls[1] or 0.0), 0.0), harm(line) or 0.0)


def fall(line: Line, lines: Sequence[Line], name: str) -> float | None:
    """How far a loss has fallen from the base model's, as a share of it; None if it was not measured."""
    loss = number(line, name)
    if loss is None:
        return None
    base = [number(other, name) for other in lines if other["step"] == 0]
    first = next((found for found in base if found is not None), None)
    if first is None:
        first = max(found for other in lines if (found := number(other, name)) is not None)
    return (first - loss) / max(first, 1e-12)


def said(line: Line, found: Score) -> str:
    """A score in words."""
    parts = [f"learned {found.learned:.0%}", f"over-fitted {found.overfit:.0%}"]
    harmed = f"harmed the class {found.harm:.0%}" if harm(line) is not None else "language drift was not measured"
    return ", ".join([*parts, harmed])


def without_losses(steps: Sequence[Line]) -> Advice:
    """The advice without held-out pictures. steps: lines after step 0, in order."""
    known = [(line, found) for line in steps if (found := harm(line)) is not None]
    if not known:
        return Advice(steps[-1]["step"], "the last one: neither held-out loss nor language drift was measured")
    mild = [line for line, found in known if found <= MAX_HARM]
    if mild:
        which = "the last step" if mild[-1] is known[-1][0] else "the last step before the class suffers"
        return Advice(mild[-1]["step"], f"{which}; {of_class(mild[-1])}; there are no held-out pictures")
    least = min(known, key=lambda pair: pair[1])[0]
    return Advice(least["step"], f"the class suffers at every step, here least; {of_class(least)}")


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
