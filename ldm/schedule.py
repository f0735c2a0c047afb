"""The forward process and the three names of one prediction: eps, x0 and v.

    q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I)                                      DDPM, eq. 4

Every formula here is about x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps and nothing else.
"""

import torch
from torch import Tensor

from ldm.config import ScheduleConfig
from ldm.errors import InputError


class Schedule:
    """betas and alphas_cumprod, (T,) float64 on the CPU, and what follows from them."""

    def __init__(self, config: ScheduleConfig):
        self.config = config
        # "scaled linear": linear in the square root of beta, as the official code has it
        ends = config.beta_start**0.5, config.beta_end**0.5
        self.betas = torch.linspace(*ends, config.timesteps, dtype=torch.float64, device="cpu") ** 2
        self.alphas_cumprod = torch.cumprod(1.0 - self.betas, dim=0)

    @property
    def timesteps(self) -> int:
        return self.config.timesteps

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """A draw from q(x_t | x_0), DDPM eq. 4. x0, noise: (B, C, h, w); t: (B,) integer steps."""
        signal, sigma = self._scales(t, x0)
        return signal * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the UNet is asked for at step t: the noise (DDPM, eq. 14), or v."""
        return noise if self.config.prediction == "eps" else self.v(x0, noise, t)

    def v(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """v = sqrt(abar) eps - sqrt(1 - abar) x_0. Salimans & Ho 2022, section 4."""
        signal, sigma = self._scales(t, x0)
        return signal * noise - sigma * x0

    def eps(self, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The noise in x (B, C, h, w) at steps t (B,), whichever of the two the network predicts."""
        if self.config.prediction == "eps":
            return prediction
        signal, sigma = self._scales(t, x)
        return signal * prediction + sigma * x  # Salimans & Ho 2022, appendix D

    def x0(self, eps: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The clean latents that this noise leaves: DDPM eq. 4 solved for x_0."""
        signal, sigma = self._scales(t, x)
        return (x - sigma * eps) / signal

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio abar / (1 - abar) at steps t: (B,) float32."""
        abar = self.alphas_cumprod.to(t.device, torch.float32)[t]
        return abar / (1.0 - abar)

    def leading(self, steps: int) -> list[tuple[int, int]]:
        """The steps that samplers take, noisiest first: pairs (t, the step after it), the last pair's second below 0.

        1 + i * (1000 // n), as the official DDIM: exactly n steps, also where n does not divide 1000.
        Raises InputError unless 1 <= steps < 1000.
        """
        if not 1 <= steps < self.timesteps:
            raise InputError(f"steps must be 1 to {self.timesteps - 1}, not {steps}")
        stride = self.timesteps // steps
        return [(1 + i * stride, 1 + (i - 1) * stride) for i in reversed(range(steps))]

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

    def _scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar_t) and sqrt(1 - abar_t), each (B, 1, 1, 1), in the type and on the device of `like`."""
        shape = (-1, *[1] * (like.ndim - 1))
        signal, sigma = self.alphas_cumprod.sqrt().to(like), (1.0 - self.alphas_cumprod).sqrt().to(like)
        return signal[t].view(shape), sigma[t].view(shape)
