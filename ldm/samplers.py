"""From noise to latents. Each sampler is only a loop over a denoiser: no network, no device, no files.

    SAMPLERS[name](denoise, x, schedule, steps, *, eta=0.0, noise=None) -> x0 latents

denoise(x, t) returns the noise in x (B, C, h, w) at step t. Steps are whole numbers, fractional in Karras' spacing.
x is always the variance-preserving x_t of DDPM: standard normal noise at first, or a picture after
`Schedule.add_noise`. noise() returns fresh standard normal noise shaped like x; eta is DDIM's. A sampler is a loop and
its times: the steps t that the loop takes, noisiest first. All arithmetic is in x's type; all coefficients are Python
floats of the float64 table. In the loops t is a step and s the next one, which is less noisy.

They compute what diffusers computes `from_config` of Stable Diffusion's scheduler_config.json: steps_offset 1,
set_alpha_to_one false, clip_sample false, skip_prk_steps true, and timestep_spacing "leading". Where a file leaves out
timestep_spacing, half of diffusers' classes assume another one. The schedule's `spacing` and `zero_terminal_snr` are
timestep_spacing and rescale_betas_zero_snr there; PNDM and Heun lack the second.

    ddpm      DDPMScheduler                      heun             HeunDiscreteScheduler
    ddim      DDIMScheduler                      dpmpp_2m         DPMSolverMultistepScheduler
    plms      PNDMScheduler                      dpmpp_2m_karras  the same with use_karras_sigmas=True
    euler     EulerDiscreteScheduler
    euler_a   EulerAncestralDiscreteScheduler

There are three differences: plms combines predictions of eps, also if the model predicts v; trailing steps that do not
divide T go to the next step in the list; with trailing steps the Euler family begins at variance 1, not 1 - abar.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ldm.errors import InputError
from ldm.schedule import Schedule

Denoise = Callable[[Tensor, float], Tensor]
FreshNoise = Callable[[], Tensor]
Times = Sequence[float]


def ddpm(denoise: Denoise, x: Tensor, schedule: Schedule, times: Times, *, eta=0.0, noise=None) -> Tensor:
    """DDPM's ancestral sampling, as published: fresh noise at every step. It needs many steps.

    DDPM, algorithm 2; with fewer steps, beta is that of the whole stride, 1 - abar_t / abar_s.
    """
    abar = [*map(schedule.alpha_bar, times), 1.0]
    for t, (abar_t, abar_s) in zip(times, pairwise(abar), strict=True):
        alpha = abar_t / abar_s
        x0 = (x - (1.0 - abar_t) ** 0.5 * denoise(x, t)) / abar_t**0.5
        # mean and variance of q(x_s | x_t, x_0), DDPM eq. 7
        x = (abar_s**0.5 * (1.0 - alpha) * x0 + alpha**0.5 * (1.0 - abar_s) * x) / (1.0 - abar_t)
        if abar_s < 1.0:
            x = x + ((1.0 - abar_s) / (1.0 - abar_t) * (1.0 - alpha)) ** 0.5 * _fresh(noise, x)
    return x


def ddim(denoise: Denoise, x: Tensor, schedule: Schedule, times: Times, *, eta=0.0, noise=None) -> Tensor:
    """DDIM: no fresh noise at eta 0, as noisy as ddpm at eta 1.

    DDIM, eq. 12 with sigma from eq. 16. The last step lands on abar[0], not on 1.
    """
    abar = [*map(schedule.alpha_bar, times), schedule.alpha_bar(0)]
    for t, (abar_t, abar_s) in zip(times, pairwise(abar), strict=True):
        sigma = eta * ((1.0 - abar_s) / (1.0 - abar_t) * (1.0 - abar_t / abar_s)) ** 0.5
        x = _ddim_step(x, denoise(x, t), abar_t, abar_s, sigma)
        if sigma > 0.0:
            x = x + sigma * _fresh(noise, x)
    return x


def plms(denoise: Denoise, x: Tensor, schedule: Schedule, times: Times, *, eta=0.0, noise=None) -> Tensor:
    """Pseudo linear multistep: DDIM's step along a mean of the last four predictions.

    Liu et al. 2022 (PNDM), with the weights of Adams and Bashforth. The first step has no past and is improved Euler:
    the mean of the predictions at its two ends, which costs one evaluation more.
    """
    abar = [*map(schedule.alpha_bar, times), schedule.alpha_bar(0)]
    past: list[Tensor] = []  # newest first
    for i, (abar_t, abar_s) in enumerate(pairwise(abar)):
        eps = denoise(x, times[i])
        past = [eps, *past[:3]]
        if len(past) > 1:
            eps = sum(weight * one for weight, one in zip(ADAMS_BASHFORTH[len(past)], past, strict=True))
        elif i + 1 < len(times):
            eps = (eps + denoise(_ddim_step(x, eps, abar_t, abar_s), times[i + 1])) / 2
        x = _ddim_step(x, eps, abar_t, abar_s)
    return x


ADAMS_BASHFORTH = {
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def _ddim_step(x: Tensor, eps: Tensor, abar_t: float, abar_s: float, sigma: float = 0.0) -> Tensor:
    # DDIM, eq. 12 without its random term; at sigma 0 it is also PNDM's transfer, eq. 9
    x0 = (x - (1.0 - abar_t) ** 0.5 * eps) / abar_t**0.5
    return abar_s**0.5 * x0 + (1.0 - abar_s - sigma**2) ** 0.5 * eps


# The samplers below work on y = x / sqrt(abar) = x_0 + sigma eps with sigma = sqrt((1 - abar) / abar), for which the
# probability-flow ODE is dy / dsigma = eps (DDIM, eq. 14; Karras et al. 2022, eq. 1), and end on sigma 0.


def euler(denoise: Denoise, x: Tensor, schedule: Schedule, times: Times, *, eta=0.0, noise=None) -> Tensor:
    """Euler's method along the probability-flow ODE: simple and reliable.

    Karras et al. 2022, algorithm 2 with S_churn = 0 and without its second-order correction.
    """
    sigmas = _sigmas(schedule, times)
    y = x * _scale(sigmas[0])
    for t, (sigma_t, sigma_s) in zip(times, pairwise(sigmas), strict=True):
        y = y + (sigma_s - sigma_t) * denoise(y / _scale(sigma_t), t)
    return y


def euler_a(denoise: Denoise, x: Tensor, schedule: Schedule, times: Times, *, eta=0.0, noise=None) -> Tensor:
    """Euler ancestral: each step goes below its target and adds fresh noise to come back.

    The ancestral sampling of SMLD in Song et al. 2021 (score SDE), appendix F. It is ddpm written in sigma: both make
    the same picture of the same noise.
    """
    sigmas = _sigmas(schedule, times)
    y = x * _scale(sigmas[0])
    for t, (sigma_t, sigma_s) in zip(times, pairwise(sigmas), strict=True):
        down = sigma_s**2 / sigma_t
        y = y + (down - sigma_t) * denoise(y / _scale(sigma_t), t)
        if sigma_s > 0.0:
            y = y + (sigma_s**2 - down**2) ** 0.5 * _fresh(noise, x)
    return y


def heun(denoise: Denoise, x: Tensor, schedule: Schedule, times: Times, *, eta=0.0, noise=None) -> Tensor:
    """Heun's second-order method: two predictions in each step but the last.

    Karras et al. 2022, algorithm 1 (algorithm 2 with S_churn = 0).
    """
    sigmas = _sigmas(schedule, times)
    y = x * _scale(sigmas[0])
    for i, (sigma_t, sigma_s) in enumerate(pairwise(sigmas)):
        slope = denoise(y / _scale(sigma_t), times[i])
        ahead = y + (sigma_s - sigma_t) * slope
        if sigma_s > 0.0:
            slope = (slope + denoise(ahead / _scale(sigma_s), times[i + 1])) / 2
            ahead = y + (sigma_s - sigma_t) * slope
        y = ahead
    return y


def dpmpp_2m(denoise: Denoise, x: Tensor, schedule: Schedule, times: Times, *, eta=0.0, noise=None) -> Tensor:
    """DPM-Solver++ (2M), second-order multistep: good pictures in 20 to 30 steps.

    Lu et al. 2022 (DPM-Solver++), algorithm 2 divided by alpha, with sigma = exp(-lambda). The first step has no past,
    and the last one goes to lambda = infinity: both are of first order.
    """
    sigmas = _sigmas(schedule, times)
    y = x * _scale(sigmas[0])
    x0_before = None
    for i, (sigma_t, sigma_s) in enumerate(pairwise(sigmas)):
        x0 = y - sigma_t * denoise(y / _scale(sigma_t), times[i])
        mean = x0
        if x0_before is not None and sigma_s > 0.0:
            h, h_before = math.log(sigma_t / sigma_s), math.log(sigmas[i - 1] / sigma_t)
            mean = x0 + h / (2 * h_before) * (x0 - x0_before)
        y = sigma_s / sigma_t * y + (1.0 - sigma_s / sigma_t) * mean
        x0_before = x0
    return y


def _sigmas(schedule: Schedule, times: Times) -> list[float]:
    """sigma at each of the times, and 0 after them."""
    return [*(((1.0 - abar) / abar) ** 0.5 for abar in map(schedule.alpha_bar, times)), 0.0]


def _scale(sigma: float) -> float:
    """y / x = 1 / sqrt(abar)."""
    return (1.0 + sigma**2) ** 0.5


def _fresh(noise: FreshNoise | None, like: Tensor) -> Tensor:
    return noise() if noise is not None else torch.randn_like(like)


# Times


def solver_times(schedule: Schedule, steps: int) -> list[int]:
    """The times of DPM-Solver++: diffusers' leading spacing for it counts the solver's end as one step more."""
    return schedule.spaced(steps, with_end=True)


def karras_times(schedule: Schedule, steps: int) -> list[float]:
    """Times whose sigmas lie closer together near the end.

    Karras et al. 2022, eq. 5 with rho = 7, from the schedule's largest sigma to its smallest.
    """
    schedule.check_steps(steps)
    low, high = (sigma ** (1 / 7) for sigma in _sigmas(schedule, [0, schedule.timesteps - 1])[:2])
    ramp = [i / max(steps - 1, 1) for i in range(steps)]
    return [schedule.step_at((high + part * (low - high)) ** 7) for part in ramp]


@dataclass(frozen=True)
class Sampler:
    """A loop over a denoiser, and the times that the loop takes.

    loop: (denoise, x, schedule, times, *, eta, noise) -> x0; times: (schedule, steps) -> steps t, noisiest first.
    """

    loop: Callable[..., Tensor]
    times: Callable[[Schedule, int], Times] = Schedule.spaced
    evaluations: Callable[[int], int] = lambda steps: steps  # steps -> calls of the denoiser
    summary: str = ""

    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        schedule: Schedule,
        steps: int,
        *,
        eta: float = 0.0,
        noise: FreshNoise | None = None,
    ) -> Tensor:
        """Runs the loop from noise x (B, C, h, w) to x0 latents. Raises InputError unless 1 <= steps < T."""
        return self.loop(denoise, x, schedule, self.times(schedule, steps), eta=eta, noise=noise)


SAMPLERS = {
    "ddpm": Sampler(ddpm),
    "ddim": Sampler(ddim),
    "plms": Sampler(plms, evaluations=lambda steps: steps + (steps > 1)),
    "euler": Sampler(euler),
    "euler_a": Sampler(euler_a),
    "heun": Sampler(heun, evaluations=lambda steps: max(2 * steps - 1, 0)),
    "dpmpp_2m": Sampler(dpmpp_2m, solver_times),
    "dpmpp_2m_karras": Sampler(dpmpp_2m, karras_times, summary="DPM-Solver++ (2M) at Karras' noise levels."),
}


def find(name: str) -> Sampler:
    """The sampler of this name. Raises InputError, which lists the names."""
    if name not in SAMPLERS:
        raise InputError(f"unknown sampler {name!r}; there are {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def listing() -> str:
    """One line on each sampler: its name and what it is."""
    first_lines = {name: s.summary or s.loop.__doc__.splitlines()[0] for name, s in SAMPLERS.items()}
    return "\n".join(f"{name:<17}{line}" for name, line in first_lines.items())


def steps_for_strength(steps: int, strength: float) -> int:
    """The number of steps, the last ones of `steps`, to run on a picture.

    strength: fraction of the sampling steps to run: 0 returns the picture, 1 ignores it (SDEdit, Meng et al. 2022).
    Raises InputError unless 0 <= strength <= 1.
    """
    if not 0.0 <= strength <= 1.0:
        raise InputError(f"strength {strength} is not between 0, the picture as it is, and 1, a new picture")
    return int(steps * strength)
