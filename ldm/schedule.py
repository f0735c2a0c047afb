"""The forward process and the three names of one prediction: eps, x0 and v.

    q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I)                                      DDPM, eq. 4

Every formula here is about x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps and nothing else. A step t is a tensor, (B,)
whole steps, one for each row; or one number for all rows, which may lie between two whole steps.
"""

import math

import numpy as np
import torch
from torch import Tensor

from ldm.config import ScheduleConfig
from ldm.errors import InputError

FLOOR = 2.0**-24  # of abar; only a schedule with zero terminal SNR reaches it


class Schedule:
    """betas and alphas_cumprod, (T,) float64 on the CPU, and what follows from them.

    With zero terminal SNR the last beta is 1, and abar would end on 0, where x_0 can't be had from eps: it ends on
    2**-24 instead, as in diffusers' Euler and DPM-Solver++. In float32, x0 = (x - sqrt(1 - abar) eps) / sqrt(abar)
    loses about 2**-24 / sqrt(abar) to rounding, and the floor itself shifts it by sqrt(abar): 2**-12 makes them equal.

    Raises InputError for a spacing that there is not, and for zero terminal SNR with a model that predicts eps, or
    with leading steps.
    """

    def __init__(self, config: ScheduleConfig):
        self.config = config
        if config.timesteps < 2:
            raise InputError(f"a schedule of {config.timesteps} timesteps has no steps to sample; 1000 are usual")
        if not 0.0 < config.beta_start <= config.beta_end < 1.0:
            raise InputError(f"betas from {config.beta_start} to {config.beta_end} are not between 0 and 1")
        # "scaled linear": linear in the square root of beta, as the official code has it
        ends = config.beta_start**0.5, config.beta_end**0.5
        self.betas = torch.linspace(*ends, config.timesteps, dtype=torch.float64, device="cpu") ** 2
        if config.spacing not in ("leading", "trailing"):
            raise InputError(f"unknown spacing of steps {config.spacing!r}; there are leading and trailing")
        if config.zero_terminal_snr:
            if config.prediction == "eps":
                raise InputError(
                    "zero terminal SNR needs a model that predicts v: the eps of pure noise says nothing of a picture"
                )
            if config.spacing != "trailing":
                raise InputError("zero terminal SNR needs trailing steps: leading ones never begin at the last")
            self.betas = _zero_terminal_snr(self.betas)
        self.alphas_cumprod = torch.cumprod(1.0 - self.betas, dim=0).clamp(min=FLOOR)

    @property
    def timesteps(self) -> int:
        return self.config.timesteps

    def alpha_bar(self, t: float) -> float:
        """abar at step t. Between whole steps log sigma is linear, and with it logit(abar) = -2 log sigma."""
        low = min(int(t), self.timesteps - 2)
        if t == int(t):
            return self.alphas_cumprod[int(t)].item()
        return torch.lerp(*self.alphas_cumprod[low : low + 2].logit(), t - low).sigmoid().item()

    def step_at(self, sigma: float) -> float:
        """The inverse: the step, between 0 and T - 1, at which sqrt((1 - abar) / abar) is sigma."""
        table = -self.alphas_cumprod.logit() / 2  # log sigma, rising
        place = torch.tensor(math.log(sigma), dtype=table.dtype)
        low = int(torch.searchsorted(table, place).clamp(1, self.timesteps - 1)) - 1
        part = (place - table[low]) / (table[low + 1] - table[low])
        return low + part.clamp(0.0, 1.0).item()

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
        """A draw from q(x_t | x_0), DDPM eq. 4. x0, noise: (B, C, h, w)."""
        signal, sigma = self._scales(t, x0)
        return signal * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
        """What the UNet is asked for at step t: the noise (DDPM, eq. 14), or v."""
        return noise if self.config.prediction == "eps" else self.v(x0, noise, t)

    def v(self, x0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
        """v = sqrt(abar) eps - sqrt(1 - abar) x_0. Salimans & Ho 2022, section 4."""
        signal, sigma = self._scales(t, x0)
        return signal * noise - sigma * x0

    def eps(self, prediction: Tensor, x: Tensor, t: Tensor | float) -> Tensor:
        """The noise in x (B, C, h, w) at step t, whichever of the two the network predicts."""
        if self.config.prediction == "eps":
            return prediction
        signal, sigma = self._scales(t, x)
        return signal * prediction + sigma * x  # Salimans & Ho 2022, appendix D

    def x0(self, eps: Tensor, x: Tensor, t: Tensor | float) -> Tensor:
        """The clean latents that this noise leaves: DDPM eq. 4 solved for x_0."""
        signal, sigma = self._scales(t, x)
        return (x - sigma * eps) / signal

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio abar / (1 - abar) at steps t: (B,) float32."""
        abar = self.alphas_cumprod.to(t.device, torch.float32)[t]
        return abar / (1.0 - abar)

    def spaced(self, steps: int) -> list[int]:
        """The steps that a sampler takes, noisiest first; exactly as many, also where the number does not divide T.

        leading: 1 + i * (T // steps), as the official DDIM. trailing: from T - 1 on, so that the first step is the
        noisiest that there is (Lin et al. 2023, table 2). Raises InputError unless 1 <= steps < T.
        """
        if not 1 <= steps < self.timesteps:
            raise InputError(f"steps must be 1 to {self.timesteps - 1}, not {steps}")
        if self.config.spacing == "trailing":
            t = np.arange(self.timesteps, 0, -self.timesteps / steps)[:steps]  # rounding may make one too many
            return [int(after) - 1 for after in t.round()]
        return [1 + i * (self.timesteps // steps) for i in reversed(range(steps))]

    def official_buffers(self) -> dict[str, Tensor]:
        """The twelve (T,) float32 tables that the official class stores in its checkpoints; we use none of them."""
        betas, abar = self.betas, self.alphas_cumprod
        before = torch.cat([abar.new_ones(1), abar[:-1]])  # abar_{t-1}
        variance = betas * (1.0 - before) / (1.0 - abar)  # of q(x_{t-1} | x_t, x_0), DDPM eq. 7
        tables = {
            "betas": betas,
            "alphas_cumprod": abar,
            "alphas_cumprod_prev": before,
            "sqrt_alphas_cumprod": abar.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1.0 - abar).sqrt(),
            "log_one_minus_alphas_cumprod": (1.0 - abar).log(),
            "sqrt_recip_alphas_cumprod": (1.0 / abar).sqrt(),
            "sqrt_recipm1_alphas_cumprod": (1.0 / abar - 1.0).sqrt(),
            "posterior_variance": variance,
            "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
            "posterior_mean_coef1": betas * before.sqrt() / (1.0 - abar),
            "posterior_mean_coef2": (1.0 - before) * (1.0 - betas).sqrt() / (1.0 - abar),
        }
        return {name: table.float() for name, table in tables.items()}

    def _scales(self, t: Tensor | float, like: Tensor) -> tuple[Tensor, Tensor] | tuple[float, float]:
        """sqrt(abar_t) and sqrt(1 - abar_t): (B, 1, 1, 1) of the type and on the device of `like`, or two numbers."""
        if not isinstance(t, Tensor):
            abar = self.alpha_bar(t)
            return abar**0.5, (1.0 - abar) ** 0.5
        shape = (-1, *[1] * (like.ndim - 1))
        signal, sigma = self.alphas_cumprod.sqrt().to(like), (1.0 - self.alphas_cumprod).sqrt().to(like)
        return signal[t].view(shape), sigma[t].view(shape)


def _zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas whose abar ends on 0 and begins where it did: Lin et al. 2023, algorithm 1."""
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return 1.0 - torch.cat([abar[:1], abar[1:] / abar[:-1]])
