"""The samplers on a known distribution: every number of a picture is N(mean, std^2)."""

import pytest
import torch
from torch import Tensor

from ldm.config import ScheduleConfig
from ldm.samplers import SAMPLERS
from ldm.schedule import Schedule

MEAN, STD = 0.7, 0.4


def moments(name: str, steps: int) -> tuple[float, float]:
    """Mean and standard deviation of the sampler's result, computed exactly, without random draws.

    The expected noise in x_t ~ N(sqrt(abar) mean, abar std^2 + 1 - abar) is linear in x_t. So x is represented by its
    coefficients: those of 1, of the first noise, and of each later draw.
    """
    schedule, units = Schedule(ScheduleConfig()), iter(torch.eye(steps + 2, dtype=torch.float64))
    one = next(units)

    def spread(abar: float) -> float:
        return abar * STD**2 + 1 - abar

    def denoise(x: Tensor, t: float) -> Tensor:
        abar = schedule.alpha_bar(t)
        return (1 - abar) ** 0.5 * (x - abar**0.5 * MEAN * one) / spread(abar)

    abar = schedule.alpha_bar(SAMPLERS[name].times(schedule, steps)[0])
    begin = abar**0.5 * MEAN * one + spread(abar) ** 0.5 * next(units)
    x = SAMPLERS[name](denoise, begin, schedule, steps, noise=lambda: next(units))
    return x[0].item(), x[1:].norm().item()


def arrived_at(name: str, last: float) -> tuple[float, float]:
    """Mean and standard deviation of the result of a sampler that is exact until its last step."""
    schedule = Schedule(ScheduleConfig())
    if name in ("ddim", "plms"):  # these end at abar[0]
        abar = schedule.alpha_bar(0)
        return abar**0.5 * MEAN, (abar * STD**2 + 1 - abar) ** 0.5
    abar = schedule.alpha_bar(last)  # the others end at the x_0 expected at the last step
    return MEAN, STD**2 / (STD**2 + (1 - abar) / abar) ** 0.5


@pytest.mark.filterwarnings("ignore:64. leading steps begin at")
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_converges_to_the_distribution(name):
    errors = {}
    for steps in (20, 80, 160, 640):
        last = SAMPLERS[name].times(Schedule(ScheduleConfig()), steps)[-1]
        found, expected = moments(name, steps), arrived_at(name, last)
        assert found[0] == pytest.approx(expected[0], abs=1e-12)
        errors[steps] = found[1] - expected[1]
    if name in ("ddpm", "ddim", "euler", "euler_a"):  # first order
        assert abs(errors[20]) > 2.5 * abs(errors[80]) and abs(errors[640]) <= 4e-3
    else:
        assert abs(errors[640]) <= 1e-4
    if name in ("heun", "dpmpp_2m_karras"):  # second order, visible with many evenly spaced steps
        assert 3.5 <= errors[80] / errors[160] <= 4.5
