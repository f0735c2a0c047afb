"""Which step to take: hand-made curves, whose best step is plain to see."""

import math

import pytest

from ldm.training.log import read_lines
from ldm.validation import advise


def curve(steps: tuple = (0, 100, 200, 300), **columns: tuple) -> list[dict]:
    return [{"step": step} | {name: column[i] for name, column in columns.items()} for i, step in enumerate(steps)]


LEARNS = (0.4, 0.3, 0.25, 0.2)
OVERFITS = (0.4, 0.2, 0.3, 0.5)
MILD, HARSH = (0.0, 0.02, 0.03, 0.05), (0.0, 0.1, 0.8, 1.0)
VARIED, ALIKE = (1.0, 1.0, 0.98, 0.97), (1.0, 0.9, 0.3, 0.1)


@pytest.mark.parametrize(
    ("columns", "step"),
    [
        ({"validation_loss": LEARNS}, 300),
        ({"validation_loss": OVERFITS}, 100),
        ({"validation_loss": LEARNS, "drift": MILD, "diversity": VARIED}, 300),
        ({"validation_loss": OVERFITS, "drift": MILD, "diversity": VARIED}, 100),
        ({"validation_loss": LEARNS, "drift": HARSH, "diversity": ALIKE}, 100),  # half of the gain, a tenth of the harm
        ({"validation_loss": LEARNS, "drift": HARSH}, 100),
        ({"validation_loss": LEARNS, "diversity": ALIKE}, 100),
        ({"drift": HARSH, "diversity": ALIKE}, 100),
        ({"drift": MILD}, 300),
        ({"drift": (0.0, 0.9, 0.8, 0.95)}, 200),  # harm everywhere
        ({}, 300),
        ({"validation_loss": (0.2, 0.4, 0.3, 0.5)}, 200),  # worse than the base throughout
        ({"validation_loss": (None, 0.4, 0.3, 0.5)}, 200),
        ({"validation_loss": (0.4, math.nan, 0.3, math.inf), "drift": (0.0, "x", 0.1, None)}, 200),
        ({"validation_loss": (0.4, 0.3, 0.3, 0.3)}, 100),  # the earlier of equal ones
        ({"validation_loss": (0.0, 0.1, 0.1, 0.1)}, 100),
    ],
)
def test_the_step_to_take(columns, step):
    lines = curve(**columns)
    advice = advise(lines)
    assert advice.step == step and advice.reason and "\n" not in advice.reason and "nan" not in advice.reason
    assert advise(lines[::-1]) == advice


def test_the_reason_says_what_was_measured_there_and_at_the_end():
    reason = advise(curve(validation_loss=OVERFITS, drift=HARSH, diversity=ALIKE)).reason
    assert "learned 50%, over-fitted 0%, harmed the class 10%" in reason
    assert "the last step, 300: learned -25%, over-fitted 25%, harmed the class 100%" in reason


def test_more_training_is_better_while_the_class_and_held_out_pictures_do_not_suffer():
    """The numbers of `python train.py`, of which effect.py's judge finds the last step the best."""
    lines = curve(
        (0, 100, 200, 300, 400, 500),
        training_loss=(0.477, 0.309, 0.274, 0.239, 0.212, 0.206),
        validation_loss=(0.364, 0.314, 0.323, 0.334, 0.344, 0.363),
        drift=(0.0, 0.68, 0.41, 0.55, 0.36, -0.10),
        diversity=(1.0, 0.82, 0.82, 0.73, 0.82, 0.88),
    )
    assert advise(lines).step == 500
    assert advise([line | {"drift": 0.9} if line["step"] == 500 else line for line in lines]).step == 400
    over = [line | {"validation_loss": 0.9} if line["step"] == 500 else line for line in lines]
    assert advise(over).step == 400


@pytest.mark.parametrize("lines", [[], [{"step": 0, "validation_loss": 0.3}]])
def test_without_a_step_there_is_no_advice(lines):
    assert advise(lines) == (None, "no step was validated")


def test_damaged_lines_are_left_out():
    text = '{"step": 1}\n{"step": "2"}\n[3]\n{"step": 4\n\n{"step": true}\n{"step": 5, "drift": NaN}\n' + "[" * 9999
    assert [line["step"] for line in read_lines(text)] == [1, 5]
