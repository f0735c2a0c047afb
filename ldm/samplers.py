"""From noise to latents. Each sampler is a loop over a denoiser, and nothing else: no network, no device, no files.

    sampler(denoise, x, schedule, steps, *, eta=0.0, noise=None, start=0) -> x0

denoise(x, t) returns the noise that it sees in x (B, C, h, w) at step t: whole steps, fractional ones in Karras'
spacing. Where x goes into a sampler or a denoiser it is the variance-preserving x_t of DDPM: standard normal noise
at first, or what `Schedule.add_noise` makes of a picture at `times(...)[start]`, where the first `start` steps are
skipped. noise() returns fresh standard normal noise shaped like x; eta is DDIM's. All arithmetic is in x's type, all
coefficients are Python floats of the float64 table.

They are what diffusers makes `from_config` of Stable Diffusion's scheduler_config.json: steps_offset 1,
set_alpha_to_one false, clip_sample false, skip_prk_steps true, and timestep_spacing "leading", which has to be said
where a file does not, since half of its classes assume another. The schedule's `spacing` and `zero_terminal_snr` are
timestep_spacing and rescale_betas_zero_snr there (which PNDM and Heun lack).

    ddpm      DDPMScheduler                      heun             HeunDiscreteScheduler
    ddim      DDIMScheduler                      dpmpp_2m         DPMSolverMultistepScheduler
    plms      PNDMScheduler                      dpmpp_2m_karras  the same with use_karras_sigmas=True
    euler     EulerDiscreteScheduler
    euler_a   EulerAncestralDiscreteScheduler

with three differences: plms combines predictions of eps, also where the model's are of v; trailing steps that do not
divide T lead from each to the next; with trailing steps the Euler family begins at variance 1, not at 1 - abar.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from ldm.errors import InputError
from ldm.schedule import Schedule

Denoise = Callable[[Tensor, float], Tensor]
Noise = Callable[[], Tensor]


def ddpm(denoise: Denoise, x: Tensor, schedule: Schedule, steps: int, *, eta=0.0, noise=None, start=0) -> Tensor:
    """Ancestral sampling as DDPM was published: fresh noise at every step, many steps.

    DDPM, algorithm 2; with fewer steps, beta is what the longer stride adds up to.
    """
    t = schedule.spaced(steps)[start:]
    abar = [*map(schedule.alpha_bar, t), 1.0]
    for i, (here, after) in enumerate(pairwise(abar)):
        alpha = here / after
        x0 = (x - (1.0 - here) ** 0.5 * denoise(x, t[i])) / here**0.5
        # mean and variance of q(x_after | x_t, x_0), DDPM eq. 7
        x = (after**0.5 * (1.0 - alpha) * x0 + alpha**0.5 * (1.0 - after) * x) / (1.0 - here)
        if after < 1.0:
            x = x + ((1.0 - after) / (1.0 - here) * (1.0 - alpha)) ** 0.5 * _fresh(noise, x)
    return x


def ddim(denoise: Denoise, x: Tensor, schedule: Schedule, steps: int, *, eta=0.0, noise=None, start=0) -> Tensor:
    """DDIM: no noise but the first at eta 0, as noisy as ddpm at eta 1.

    DDIM, eq. 12 with sigma from eq. 16. The last step lands on abar[0], not on 1.
    """
    t = schedule.spaced(steps)[start:]
    abar = [*map(schedule.alpha_bar, t), schedule.alpha_bar(0)]
    for i, (here, after) in enumerate(pairwise(abar)):
        sigma = eta * ((1.0 - after) / (1.0 - here) * (1.0 - here / after)) ** 0.5
        x = _ddim_step(x, denoise(x, t[i]), here, after, sigma)
        if sigma > 0.0:
            x = x + sigma * _fresh(noise, x)
    return x


def plms(denoise: Denoise, x: Tensor, schedule: Schedule, steps: int, *, eta=0.0, noise=None, start=0) -> Tensor:
    """Pseudo linear multistep: DDIM's step along a mean of the last four predictions.

    Liu et al. 2022 (PNDM); that mean is Adams and Bashforth's. The first step, which has no past, is an improved Euler:
    it looks ahead and takes the mean of here and there, one evaluation more.
    """
    t = schedule.spaced(steps)[start:]
    abar = [*map(schedule.alpha_bar, t), schedule.alpha_bar(0)]
    past: list[Tensor] = []  # newest first
    for i, (here, after) in enumerate(pairwise(abar)):
        eps = denoise(x, t[i])
        past = [eps, *past[:3]]
        if len(past) > 1:
            eps = sum(weight * one for weight, one in zip(ADAMS_BASHFORTH[len(past)], past, strict=True))
        elif i + 1 < len(t):
            eps = (eps + denoise(_ddim_step(x, eps, here, after), t[i + 1])) / 2
        x = _ddim_step(x, eps, here, after)
    return x


ADAMS_BASHFORTH = {
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def _ddim_step(x: Tensor, eps: Tensor, here: float, after: float, sigma: float = 0.0) -> Tensor:
    # DDIM, eq. 12 without its random term; at sigma 0 it is also PNDM's transfer, eq. 9
    x0 = (x - (1.0 - here) ** 0.5 * eps) / here**0.5
    return after**0.5 * x0 + (1.0 - after - sigma**2) ** 0.5 * eps


# The samplers below work on y = x / sqrt(abar) = x_0 + sigma eps with sigma = sqrt((1 - abar) / abar), for which the
# probability-flow ODE is dy / dsigma = eps (DDIM, eq. 14; Karras et al. 2022, eq. 1), and end on sigma 0.


def euler(denoise: Denoise, x: Tensor, schedule: Schedule, steps: int, *, eta=0.0, noise=None, start=0) -> Tensor:
    """Euler's method along the probability-flow ODE: plain and dependable.

    Karras et al. 2022, algorithm 2 with S_churn = 0 and without its second-order correction.
    """
    t = schedule.spaced(steps)[start:]
    sigmas = _sigmas(schedule, t)
    y = x * _scale(sigmas[0])
    for i, (sigma, after) in enumerate(pairwise(sigmas)):
        y = y + (after - sigma) * denoise(y / _scale(sigma), t[i])
    return y


def euler_a(denoise: Denoise, x: Tensor, schedule: Schedule, steps: int, *, eta=0.0, noise=None, start=0) -> Tensor:
    """Euler ancestral: each step goes further down than asked and comes back with fresh noise.

    The ancestral sampling of SMLD in Song et al. 2021 (score SDE), appendix F. It is ddpm, written in sigma: the two
    make the same picture of the same noise.
    """
    t = schedule.spaced(steps)[start:]
    sigmas = _sigmas(schedule, t)
    y = x * _scale(sigmas[0])
    for i, (sigma, after) in enumerate(pairwise(sigmas)):
        down = after**2 / sigma
        y = y + (down - sigma) * denoise(y / _scale(sigma), t[i])
        if after > 0.0:
            y = y + (after**2 - down**2) ** 0.5 * _fresh(noise, x)
    return y


def heun(denoise: Denoise, x: Tensor, schedule: Schedule, steps: int, *, eta=0.0, noise=None, start=0) -> Tensor:
    """Heun's second-order method: two predictions a step, but the last.

    Karras et al. 2022, algorithm 1 (algorithm 2 with S_churn = 0).
    """
    t = schedule.spaced(steps)[start:]
    sigmas = _sigmas(schedule, t)
    y = x * _scale(sigmas[0])
    for i, (sigma, after) in enumerate(pairwise(sigmas)):
        slope = denoise(y / _scale(sigma), t[i])
        ahead = y + (after - sigma) * slope
        if after > 0.0:
            slope = (slope + denoise(ahead / _scale(after), t[i + 1])) / 2
            ahead = y + (after - sigma) * slope
        y = ahead
    return y


def dpmpp_2m(denoise: Denoise, x: Tensor, schedule: Schedule, steps: int, *, eta=0.0, noise=None, start=0) -> Tensor:
    """DPM-Solver++ (2M), second-order multistep: good pictures in 20 to 30 steps.

    Lu et al. 2022 (DPM-Solver++), algorithm 2 divided by alpha, with sigma = exp(-lambda). The first step has no past,
    and the last one goes to lambda = infinity: both are of first order.
    """
    return _dpmpp_2m(denoise, x, schedule, _open_times(schedule, steps)[start:])


def dpmpp_2m_karras(
    denoise: Denoise, x: Tensor, schedule: Schedule, steps: int, *, eta=0.0, noise=None, start=0
) -> Tensor:
    """DPM-Solver++ (2M) at Karras' noise levels, which lie closer together near the end."""
    return _dpmpp_2m(denoise, x, schedule, _karras_times(schedule, steps)[start:])


def _dpmpp_2m(denoise: Denoise, x: Tensor, schedule: Schedule, t: list[float]) -> Tensor:
    sigmas = _sigmas(schedule, t)
    y = x * _scale(sigmas[0])
    before = None
    for i, (sigma, after) in enumerate(pairwise(sigmas)):
        x0 = y - sigma * denoise(y / _scale(sigma), t[i])
        mean = x0
        if before is not None and after > 0.0:
            h, h_before = math.log(sigma / after), math.log(sigmas[i - 1] / sigma)
            mean = x0 + h / (2 * h_before) * (x0 - before)
        y = after / sigma * y + (1.0 - after / sigma) * mean
        before = x0
    return y


def _sigmas(schedule: Schedule, t: list[float]) -> list[float]:
    """sigma at steps t, and 0 after them."""
    abar = map(schedule.alpha_bar, t)
    return [*(((1.0 - here) / here) ** 0.5 for here in abar), 0.0]


def _scale(sigma: float) -> float:
    """y / x = 1 / sqrt(abar)."""
    return (1.0 + sigma**2) ** 0.5


def _open_times(schedule: Schedule, steps: int) -> list[int]:
    # diffusers' leading spacing for this solver counts its end as a step: one more of them, and the last not taken
    times = schedule.spaced(steps)
    if schedule.config.spacing == "leading" and steps + 1 < schedule.timesteps:
        times = schedule.spaced(steps + 1)[:-1]
    return times


def _karras_times(schedule: Schedule, steps: int) -> list[float]:
    # Karras et al. 2022, eq. 5 with rho = 7, from the schedule's largest sigma to its smallest
    schedule.spaced(steps)  # complains where it should
    low, high = (sigma ** (1 / 7) for sigma in _sigmas(schedule, [0, schedule.timesteps - 1])[:2])
    ramp = [i / max(steps - 1, 1) for i in range(steps)]
    return [schedule.step_at((high + part * (low - high)) ** 7) for part in ramp]


def _fresh(noise: Noise | None, like: Tensor) -> Tensor:
    return noise() if noise is not None else torch.randn_like(like)


SAMPLERS = {
    sampler.__name__: sampler for sampler in (ddpm, ddim, plms, euler, euler_a, heun, dpmpp_2m, dpmpp_2m_karras)
}


def find(name: str) -> Callable[..., Tensor]:
    """The sampler of this name. Raises InputError with the names that there are."""
    if name not in SAMPLERS:
        raise InputError(f"unknown sampler {name!r}; there are {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def listing() -> str:
    """A line for each sampler: its name, and the first line of its docstring."""
    return "\n".join(f"{name:<17}{sampler.__doc__.splitlines()[0]}" for name, sampler in SAMPLERS.items())


def times(name: str, schedule: Schedule, steps: int) -> list[float]:
    """The steps t that a sampler takes, noisiest first. Raises InputError for steps that there are not."""
    return {"dpmpp_2m": _open_times, "dpmpp_2m_karras": _karras_times}.get(name, Schedule.spaced)(schedule, steps)


def evaluations(name: str, steps: int) -> int:
    """How often a sampler calls its denoiser for so many steps."""
    return {"plms": steps + (steps > 1), "heun": max(2 * steps - 1, 0)}.get(name, steps)


def taken(steps: int, strength: float) -> int:
    """How many of `steps`, the last ones, are left to take from a picture that is noised by `strength`, 0 to 1.

    Raises InputError for another strength.
    """
    if not 0.0 <= strength <= 1.0:
        raise InputError(f"strength {strength} is not between 0, the picture as it is, and 1, nothing of it")
    return int(steps * strength)
