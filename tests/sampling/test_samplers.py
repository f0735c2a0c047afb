"""The samplers compared with diffusers, with the published equations, and with each other."""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm import samplers
from ldm.config import ScheduleConfig
from ldm.errors import InputError
from ldm.samplers import SAMPLERS
from ldm.schedule import Schedule

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers and numpy 2

SHAPE = (2, 4, 6, 6)
# Stable Diffusion's scheduler_config.json, with the spacing set for all of diffusers' schedulers
SD = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
EXACT = ("ddpm", "ddim", "plms")  # we can give these schedulers of diffusers a table in float64


def model(x: Tensor, t: float) -> Tensor:
    """A stand-in for the UNet: smooth, nonlinear, and different at every position and step."""
    return torch.tanh(x * (0.5 + t / 1500)) + 0.3 * torch.sin(3 * x.flip(-1) + t / 100)


def denoiser(schedule: Schedule, calls: list[float] | None = None) -> samplers.Denoise:
    def denoise(x: Tensor, t: float) -> Tensor:
        if calls is not None:
            calls.append(t)
        return schedule.eps(model(x, round(t)), x, t)

    return denoise


def normal(seed: int, shape=SHAPE) -> Callable[[], Tensor]:
    """A function that draws standard normal noise from a generator with this seed."""
    return partial(torch.randn, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sample(name: str, schedule: Schedule, steps: int, calls: list[float] | None = None, **options) -> Tensor:
    return SAMPLERS[name](denoiser(schedule, calls), normal(0)(), schedule, steps, noise=normal(1), **options)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


# Compared with diffusers


@pytest.fixture
def set_up(scheduler_of_diffusers):
    """set_up(sampler, schedule, steps, settings...) returns diffusers' scheduler with our table, ready to step."""

    def make(name: str, schedule: Schedule, steps: int, **settings):
        # diffusers' PNDM combines predictions of v; the official code and ours combine those of eps
        v = schedule.config.prediction == "v" and name != "plms"
        settings = SD | {"prediction_type": "v_prediction" if v else "epsilon"} | settings
        scheduler = scheduler_of_diffusers(name, settings)
        if name in EXACT:
            scheduler.alphas_cumprod = schedule.alphas_cumprod
            scheduler.final_alpha_cumprod = schedule.alphas_cumprod[0]
        if name == "heun" and schedule.config.zero_terminal_snr:  # diffusers' Heun has no rescale_betas_zero_snr
            scheduler.alphas_cumprod = schedule.alphas_cumprod.float()
        scheduler.set_timesteps(steps)
        return scheduler

    return make


def sample_with_diffusers(name: str, scheduler, schedule: Schedule, **options) -> Tensor:
    x, generator = normal(0)() * scheduler.init_noise_sigma, torch.Generator().manual_seed(1)
    if name in ("ddpm", "ddim", "euler_a"):
        options["generator"] = generator
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        prediction = model(scaled, t.item())
        if name == "plms":
            prediction = schedule.eps(prediction, scaled, t.item())
        x = scheduler.step(prediction, t, x, **options).prev_sample
    return x


@pytest.mark.parametrize("steps", [10, 20, 47, 50])
@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_equals_diffusers(name, prediction, steps, set_up):
    schedule, calls = Schedule(ScheduleConfig(prediction=prediction)), []
    scheduler = set_up(name, schedule, steps)
    ours = sample(name, schedule, steps, calls)
    theirs = sample_with_diffusers(name, scheduler, schedule)
    assert [round(t) for t in calls] == scheduler.timesteps.tolist()
    assert difference(ours, theirs) <= (1e-9 if name in EXACT else 2e-6)  # usually 4e-7


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_with_noise_equals_diffusers(eta, set_up):
    schedule = Schedule(ScheduleConfig())
    scheduler = set_up("ddim", schedule, 20)
    theirs = sample_with_diffusers("ddim", scheduler, schedule, eta=eta)
    assert difference(sample("ddim", schedule, 20, eta=eta), theirs) <= 1e-9


@pytest.mark.parametrize("name", SAMPLERS)
def test_zero_terminal_snr_with_trailing_steps_equals_diffusers(name, set_up):
    schedule = Schedule(ScheduleConfig(prediction="v", zero_terminal_snr=True, spacing="trailing"))
    settings = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    scheduler = set_up(name, schedule, 20, **settings)
    ours, theirs = sample(name, schedule, 20), sample_with_diffusers(name, scheduler, schedule)
    # float32 loses more digits from a sigma of 4096
    assert difference(ours, theirs) <= (1e-9 if name in EXACT else 2e-5)


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_the_floor_under_alpha_bar_does_not_change_the_result(name, set_up):
    """diffusers' DDPM and DDIM compute x_0 from v, so that abar can be 0 there; ours ends on 2**-24."""
    schedule = Schedule(ScheduleConfig(prediction="v", zero_terminal_snr=True, spacing="trailing"))
    settings = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    scheduler = set_up(name, schedule, 20, **settings)
    scheduler.alphas_cumprod = torch.cumprod(1.0 - schedule.betas, dim=0)
    assert scheduler.alphas_cumprod[-1] == 0.0
    theirs = sample_with_diffusers(name, scheduler, schedule)
    assert difference(sample(name, schedule, 20), theirs) <= 2 * 2**-12

    draw = normal(1)
    x = normal(0)().float()
    in_float32 = SAMPLERS[name](denoiser(schedule), x, schedule, 20, noise=lambda: draw().float())
    assert difference(in_float32.double(), theirs) <= 2 * 2**-12


# Against the published equations, in float64. D(x; sigma) is x without its noise.


def published(schedule: Schedule, t: list[float]):
    """sigma_i and D(x; sigma_i) for x of variance 1 + sigma^2: Karras et al. 2022, table 1, the VP column."""
    abar = np.array([schedule.alpha_bar(step) for step in t])
    sigma = [*np.sqrt(1 / abar - 1), 0.0]
    denoise = denoiser(schedule)

    def D(x: Tensor, i: int) -> Tensor:
        return x - sigma[i] * denoise(x / math.sqrt(sigma[i] ** 2 + 1), t[i])

    return sigma, D


def karras_algorithm_1(schedule: Schedule, t: list[float], x: Tensor, second_order: bool) -> Tensor:
    sigma, D = published(schedule, t)
    x = x * math.sqrt(sigma[0] ** 2 + 1)
    for i in range(len(t)):
        d = (x - D(x, i)) / sigma[i]
        x_next = x + (sigma[i + 1] - sigma[i]) * d
        if sigma[i + 1] != 0 and second_order:
            d_next = (x_next - D(x_next, i + 1)) / sigma[i + 1]
            x_next = x + (sigma[i + 1] - sigma[i]) * (d / 2 + d_next / 2)
        x = x_next
    return x


def smld_ancestral(schedule: Schedule, t: list[float], x: Tensor) -> Tensor:
    """Song et al. 2021 (score SDE), appendix F, with score = (D - x) / sigma^2."""
    sigma, D = published(schedule, t)
    x, z = x * math.sqrt(sigma[0] ** 2 + 1), normal(1)
    for i, (now, after) in enumerate(pairwise(sigma)):
        score = (D(x, i) - x) / now**2
        x = x + (now**2 - after**2) * score + math.sqrt(after**2 * (now**2 - after**2) / now**2) * z()
    return x


def dpm_solver_pp_algorithm_2(schedule: Schedule, t: list[float], x: Tensor) -> Tensor:
    """Lu et al. 2022, with alpha, sigma and lambda of x itself. The step to lambda = infinity has first order."""
    alpha = [math.sqrt(schedule.alpha_bar(step)) for step in t] + [1.0]
    sigma = [math.sqrt(1.0 - a * a) for a in alpha]
    lam = [math.log(a / s) if s else math.inf for a, s in zip(alpha, sigma, strict=True)]
    denoise, Q = denoiser(schedule), []
    for i in range(1, len(alpha)):
        Q.append((x - sigma[i - 1] * denoise(x, t[i - 1])) / alpha[i - 1])
        h, D = lam[i] - lam[i - 1], Q[-1]
        if 1 < i < len(alpha) - 1:
            r = (lam[i - 1] - lam[i - 2]) / h
            D = (1 + 1 / (2 * r)) * Q[-1] - 1 / (2 * r) * Q[-2]
        x = sigma[i] / sigma[i - 1] * x - alpha[i] * (math.exp(-h) - 1) * D
    return x


def karras_steps(schedule: Schedule, steps: int) -> list[float]:
    """The steps at which log sigma, interpolated linearly, has the values of Karras et al. 2022, eq. 5."""
    sigma = np.sqrt(1 / schedule.alphas_cumprod.numpy() - 1)
    rho, i = 7, np.arange(steps)
    wanted = (sigma[-1] ** (1 / rho) + i / (steps - 1) * (sigma[0] ** (1 / rho) - sigma[-1] ** (1 / rho))) ** rho
    return np.interp(np.log(wanted), np.log(sigma), np.arange(len(sigma))).tolist()


PUBLISHED = {
    "euler": partial(karras_algorithm_1, second_order=False),
    "heun": partial(karras_algorithm_1, second_order=True),
    "euler_a": smld_ancestral,
    "dpmpp_2m": dpm_solver_pp_algorithm_2,
    "dpmpp_2m_karras": dpm_solver_pp_algorithm_2,
}


@pytest.mark.parametrize("steps", [10, 20, 47, 50])
@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_equals_the_published_equations(name, prediction, steps):
    schedule = Schedule(ScheduleConfig(prediction=prediction))
    t = [1 + i * (1000 // steps) for i in range(steps)][::-1]
    if name == "dpmpp_2m":
        t = [1 + i * (1000 // (steps + 1)) for i in range(1, steps + 1)][::-1]
    if name == "dpmpp_2m_karras":
        t = karras_steps(schedule, steps)
    assert difference(sample(name, schedule, steps), PUBLISHED[name](schedule, t, normal(0)())) <= 1e-9


# Compared with each other


def test_ddim_at_eta_1_is_ddpm():
    """Both take steps of the same mean and variance, except the last: it ends on abar[0] or on 1."""
    schedule = Schedule(ScheduleConfig())

    def seen_by_the_denoiser(name: str) -> list[Tensor]:
        xs, denoise = [], denoiser(schedule)
        options = {"eta": 1.0, "noise": normal(1)}
        SAMPLERS[name](lambda x, t: xs.append(x) or denoise(x, t), normal(0)(), schedule, 50, **options)
        return xs

    for a, b in zip(seen_by_the_denoiser("ddim"), seen_by_the_denoiser("ddpm"), strict=True):
        assert difference(a, b) <= 1e-12


def test_euler_ancestral_is_ddpm_written_in_sigma():
    schedule = Schedule(ScheduleConfig())
    assert difference(sample("euler_a", schedule, 50), sample("ddpm", schedule, 50)) <= 1e-12


# The number of steps


@pytest.mark.parametrize("name", SAMPLERS)
def test_takes_exactly_the_steps_asked_for(name):
    for config in (ScheduleConfig(), ScheduleConfig(prediction="v", zero_terminal_snr=True, spacing="trailing")):
        schedule = Schedule(config)
        for steps in (1, 2, 3, 47, 999):
            calls: list[float] = []
            x = sample(name, schedule, steps, calls)
            t = SAMPLERS[name].times(schedule, steps)
            assert len(t) == len(set(t)) == steps and sorted(set(calls), reverse=True) == t
            assert len(calls) == SAMPLERS[name].evaluations(steps)
            assert x.isfinite().all()


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [-3, 0, 1000])
def test_refuses_other_numbers_of_steps(name, steps):
    with pytest.raises(InputError, match="1 to 999"):
        sample(name, Schedule(ScheduleConfig()), steps)


@pytest.mark.parametrize("name", SAMPLERS)
def test_starts_from_any_of_its_steps(name):
    schedule = Schedule(ScheduleConfig())
    sampler = SAMPLERS[name]
    t = sampler.times(schedule, 20)
    for start in (5, 19, 20):
        calls: list[float] = []
        x = sampler.loop(denoiser(schedule, calls), normal(0)(), schedule, t[start:], noise=normal(1))
        assert sorted(set(calls), reverse=True) == t[start:]
        assert len(calls) == sampler.evaluations(20 - start)
        if start == 20:
            assert torch.equal(x, normal(0)())


@pytest.mark.parametrize("name", SAMPLERS)
def test_computes_in_the_type_of_x(name):
    schedule = Schedule(ScheduleConfig())
    x = torch.randn(SHAPE)
    assert SAMPLERS[name](denoiser(schedule), x, schedule, 5, noise=lambda: torch.randn(SHAPE)).dtype == torch.float32
    assert SAMPLERS[name](denoiser(schedule), x, schedule, 5).isfinite().all()  # draws its own noise


def test_the_listing_has_a_line_for_each_sampler():
    lines = samplers.listing().splitlines()
    assert [line.split()[0] for line in lines] == list(SAMPLERS)
    assert all(len(line) <= 110 and line.endswith(".") for line in lines)


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match="dpmpp_2m_karras"):
        samplers.find("k_lms")


@pytest.mark.parametrize("strength", [-0.1, 1.01, math.nan])
def test_strength_is_between_0_and_1(strength):
    assert [samplers.steps_for_strength(50, s) for s in (0.0, 0.019, 0.5, 0.8, 1.0)] == [0, 0, 25, 40, 50]
    with pytest.raises(InputError, match="between 0"):
        samplers.steps_for_strength(50, strength)
