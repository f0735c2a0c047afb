"""From noise to latents. Each sampler is a loop over a denoiser, and nothing else: no network, no device, no files.

    sampler(denoise, x, schedule, steps, *, eta=0.0, noise=None) -> x0

denoise(x, t) returns the noise that it sees in x (B, C, h, w) at the integer step t; x starts as standard normal
noise; noise() returns fresh standard normal noise shaped like x. All arithmetic is in x's type, all coefficients
are Python floats of the float64 table.
"""

from collections.abc import Callable

from torch import Tensor

from ldm.errors import InputError
from ldm.schedule import Schedule

Denoise = Callable[[Tensor, int], Tensor]
Noise = Callable[[], Tensor]


def ddpm(
    denoise: Denoise, x: Tensor, schedule: Schedule, steps: int, *, eta: float = 0.0, noise: Noise | None = None
) -> Tensor:
    """Ancestral sampling, DDPM algorithm 2; with fewer steps, beta is what the longer stride adds up to."""
    abar = schedule.alphas_cumprod.tolist()
    for t, after in schedule.leading(steps):
        abar_t, abar_after = abar[t], abar[after] if after >= 0 else 1.0
        alpha = abar_t / abar_after
        x0 = (x - (1.0 - abar_t) ** 0.5 * denoise(x, t)) / abar_t**0.5
        # mean and variance of q(x_after | x_t, x_0), DDPM eq. 7
        x = (abar_after**0.5 * (1.0 - alpha) * x0 + alpha**0.5 * (1.0 - abar_after) * x) / (1.0 - abar_t)
        if after >= 0:
            x = x + ((1.0 - abar_after) / (1.0 - abar_t) * (1.0 - alpha)) ** 0.5 * noise()
    return x


def ddim(
    denoise: Denoise, x: Tensor, schedule: Schedule, steps: int, *, eta: float = 0.0, noise: Noise | None = None
) -> Tensor:
    """DDIM, eq. 12 with sigma from eq. 16: deterministic at eta 0, as noisy as DDPM at eta 1."""
    abar = schedule.alphas_cumprod.tolist()
    for t, after in schedule.leading(steps):
        abar_t, abar_after = abar[t], abar[max(after, 0)]  # the last step lands on abar[0], not on 1
        eps = denoise(x, t)
        x0 = (x - (1.0 - abar_t) ** 0.5 * eps) / abar_t**0.5
        sigma = eta * ((1.0 - abar_after) / (1.0 - abar_t) * (1.0 - abar_t / abar_after)) ** 0.5
        x = abar_after**0.5 * x0 + (1.0 - abar_after - sigma**2) ** 0.5 * eps
        if sigma > 0.0:
            x = x + sigma * noise()
    return x


SAMPLERS = {"ddim": ddim, "ddpm": ddpm}


def find(name: str) -> Callable[..., Tensor]:
    """The sampler of this name. Raises InputError with the names that there are."""
    if name not in SAMPLERS:
        raise InputError(f"unknown sampler {name!r}; there are {', '.join(SAMPLERS)}")
    return SAMPLERS[name]
