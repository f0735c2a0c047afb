"""Our samplers give the published numbers of the full-loop tests in diffusers' own test suite.

Each entry has a schedule that contains only the steps it takes: `alphas_cumprod` holds the abar at which the loop ends,
then the abar of its steps, rising. So our step i is the entry's i-th step from the end, and the table contains its
spacing, offset, noise levels and final abar. The denoiser does everything else that an entry asks for.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm import samplers
from ldm.config import ScheduleConfig
from ldm.schedule import Schedule

LOOPS = json.loads(Path(__file__).parent.parent.joinpath("facts", "schedulers.json").read_text())["loops"]
X = (torch.arange(768, dtype=torch.float64) / 768).reshape(3, 8, 8, 4).permute(3, 0, 1, 2)
NOISE = (torch.arange(767, -1, -1, dtype=torch.float64) / 768).reshape(3, 8, 8, 4).permute(3, 0, 1, 2)


def schedule_of(abar: np.ndarray, prediction: str) -> Schedule:
    schedule = Schedule(ScheduleConfig(timesteps=len(abar), prediction=prediction))
    schedule.alphas_cumprod = torch.tensor(abar, dtype=torch.float64)
    return schedule


def table(kind: str, count: int, first: float, last: float) -> np.ndarray:
    """abar of the entry's betas, rounded to float32 like the published numbers."""
    power = {"linear": 1.0, "scaled_linear": 0.5}[kind]
    betas = torch.linspace(first**power, last**power, count) ** (1 / power)
    return torch.cumprod(1.0 - betas, dim=0).double().numpy()


def in_sigma(abar):
    return np.sqrt((1.0 - abar) / abar)


def karras(low: float, high: float, count: int) -> np.ndarray:
    """Karras et al. 2022, eq. 5, rising."""
    return np.linspace(low ** (1 / 7), high ** (1 / 7), count) ** 7


def model(x: Tensor, t: float) -> Tensor:
    return x * t / (t + 1)


def denoiser(entry: dict, schedule: Schedule, times: list[float]) -> samplers.Denoise:
    """A denoiser that calls the model with times[i] at step i. Clips x_0 where the entry asks for it."""

    def denoise(x: Tensor, i: float) -> Tensor:
        eps = schedule.eps(model(x, times[round(i)]), x, i)
        x0 = schedule.x0(eps, x, i)
        if entry.get("clip") and entry["sampler"] == "ddim":
            assert x0.abs().max() < 1.0  # diffusers' DDIM keeps eps when it clips; here nothing is clipped
        elif entry.get("clip"):
            x0 = x0.clamp(-1.0, 1.0)
        elif "threshold" in entry:  # dynamic thresholding, Saharia et al. 2022, section 2.3
            ratio, largest = entry["threshold"]
            s = x0.abs().flatten(1).quantile(ratio, dim=1).clamp(1.0, None).clamp(None, largest).view(-1, 1, 1, 1)
            x0 = x0.clamp(-s, s) / s
        else:
            return eps
        abar = schedule.alpha_bar(i)
        return (x - abar**0.5 * x0) / (1.0 - abar) ** 0.5

    return denoise


class FromScaled:
    """A denoiser for tests of diffusers that step from the sample scaled for the model instead of the sample itself.

    Our samplers step from the sample y along a slope. This denoiser adds the difference to the slope, so that both
    steps end at the same point. In Heun's second half it adds the difference that the first half left out.
    """

    def __init__(self, entry: dict, sigmas: list[float]):
        self.entry, self.sigmas, self.owed = entry, sigmas, None

    def __call__(self, x: Tensor, i: float) -> Tensor:
        sigma, after = self.sigmas[i], self.sigmas[i - 1] if i > 1 else 0.0
        prediction = model(x, self.entry["times"][i])
        slope = prediction
        if self.entry.get("prediction") == "v":
            x0 = x / (sigma**2 + 1) - prediction * sigma / (sigma**2 + 1) ** 0.5
            slope = (x - x0) / sigma
        if self.owed is not None:
            slope, self.owed = slope + self.owed, None
            return slope
        down = after**2 / sigma if self.entry["sampler"] == "euler_a" else after
        owed = (x - x * (sigma**2 + 1) ** 0.5) / (down - sigma)
        if self.entry["sampler"] == "heun" and after > 0.0:
            self.owed = owed
        return slope + owed


def run(entry: dict) -> Tensor:
    sampler, steps, start = entry["sampler"], entry["steps"], entry.get("start", 0)
    prediction = entry.get("prediction", "eps")
    abar = table(*entry["betas"])
    generator = torch.Generator().manual_seed(0)

    def noise() -> Tensor:
        return torch.randn(X.shape, generator=generator).double()

    if sampler in ("ddpm", "ddim", "plms"):
        times = np.arange(steps) * (len(abar) // steps) + entry.get("offset", 0)
        end = abar[0] if entry.get("end") == "first" else 1.0
        schedule, times = schedule_of(np.array([end, *abar[times]]), prediction), [None, *map(float, times)]
        x = schedule.add_noise(X, NOISE, steps - start) if start else X
        return loop(sampler, denoiser(entry, schedule, times), x, schedule, steps, noise, start)

    if sampler in ("euler", "euler_a", "heun"):
        if entry.get("karras"):
            times = np.array(sorted(set(entry["timesteps"])))
            sigmas = karras(*in_sigma(abar[[0, -1]]), steps)
        else:
            times = np.linspace(0, len(abar) - 1, steps, dtype=np.float32)
            sigmas = np.interp(times, np.arange(len(abar)), in_sigma(abar))
        schedule = schedule_of(np.array([1.0, *1.0 / (1.0 + sigmas**2)]), prediction)
        y = X * sigmas[-1]
        if start:
            y = y + NOISE * sigmas[steps - start - 1]
        x = y / (1.0 + sigmas[steps - start - 1] ** 2) ** 0.5
        entry = entry | {"times": [None, *map(float, times)]}
        return loop(sampler, FromScaled(entry, [None, *sigmas]), x, schedule, steps, noise, start)

    # These loops end at the smallest sigma; ours go on to 0. The input of our last evaluation is their result.
    if sampler == "dpmpp_2m":
        times = np.linspace(0, len(abar) - 1, steps + 1).round().astype(int)
        schedule, times, steps = schedule_of(np.array([1.0, *abar[times]]), prediction), [None, *times], steps + 1
        x = schedule.add_noise(X, NOISE, steps - start) if start else X
    else:
        schedule, times, x = schedule_of(abar, prediction), list(range(len(abar))), X
        assert [round(t) for t in samplers.find(sampler).times(schedule, steps)] == entry["timesteps"]
    seen = []
    denoise = denoiser(entry, schedule, times)
    loop(sampler, lambda x, t: seen.append(x) or denoise(x, t), x, schedule, steps, noise, start)
    return seen[-1]


def loop(sampler: str, denoise: Callable, x: Tensor, schedule: Schedule, steps: int, noise: Callable, start: int):
    found = samplers.find(sampler)
    return found.loop(denoise, x, schedule, found.times(schedule, steps)[start:], noise=noise)


@pytest.mark.parametrize("entry", LOOPS, ids=[entry["name"] for entry in LOOPS])
def test_a_loop_gives_the_published_numbers(entry):
    if "skip" in entry:
        pytest.skip(entry["skip"])
    x = run(entry)
    if "published" in entry:
        total, mean, total_tolerance, mean_tolerance = entry["published"]
        assert total is None or x.abs().sum().item() == pytest.approx(total, abs=total_tolerance, rel=1e-4)
        assert x.abs().mean().item() == pytest.approx(mean, abs=mean_tolerance)
    found = [x.abs().sum().item(), *x.flatten()[:4].tolist(), *x.flatten()[-4:].tolist()]
    # The tolerance is relative because some results are almost 0. diffusers computes in float32, in which DDPM's beta,
    # 1 - abar_t / abar_{t-1}, keeps three digits near t = 0. In float64 diffusers gives our numbers, too.
    assert found == pytest.approx(entry["measured"], rel=1e-4 if entry["sampler"] == "ddpm" else 5e-5, abs=0.0)
