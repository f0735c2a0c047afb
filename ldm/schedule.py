"""The forward process and the three names of one prediction: eps, x0 and v.

    q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I)                                      DDPM, eq. 4

Every formula follows from x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps. A step t is a tensor (B,) of whole steps, one
for each row, or one number for all rows, which may lie between two whole steps.
"""

import math
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ldm.config import ScheduleConfig
from ldm.errors import InputError

FLOOR = 2.0**-24  # smallest abar of a schedule without zero terminal SNR
LAST_FLOOR = 2.0**-32  # and with it


class Schedule:
    """betas and alphas_cumprod, (T,) float64 on the CPU, and the formulas on them.

    With zero terminal SNR the last beta is 1 and abar would end on 0, where x_0 does not follow from eps. It ends on
    2**-24 instead, as in diffusers' Euler and DPM-Solver++. In float32, x0 = (x - sqrt(1 - abar) eps) / sqrt(abar)
    loses about 2**-24 / sqrt(abar) to rounding, and the floor shifts it by sqrt(abar): both are 2**-12 here.
    Betas above SD's can bring abar below that one step earlier; it ends on half of that step's then.

    Raises InputError for betas that make NaN, for an unknown spacing, and for zero terminal SNR with a model that
    predicts eps or with leading steps.
    """

    def __init__(self, config: ScheduleConfig):
        self.config = config
        if config.timesteps < 2:
            raise InputError(f"a schedule of {config.timesteps} timesteps has no steps to sample; 1000 are usual")
        if not 0.0 < config.beta_start <= config.beta_end < 1.0:
            raise InputError(f"betas from {config.beta_start} to {config.beta_end} are not between 0 and 1")
        # "scaled linear": linear in the square root of beta, as in the official code
        ends = config.beta_start**0.5, config.beta_end**0.5
        self.betas = torch.linspace(*ends, config.timesteps, dtype=torch.float64, device="cpu") ** 2
        if config.spacing not in ("leading", "trailing"):
            raise InputError(f"unknown spacing of steps {config.spacing!r}; there are leading and trailing")
        if config.zero_terminal_snr:
            if config.prediction == "eps":
                raise InputError("zero terminal SNR needs a model that predicts v: the eps of pure noise tells nothing")
            if config.spacing != "trailing":
                raise InputError("zero terminal SNR needs trailing steps: leading steps never begin at the last one")
            self.betas = _zero_terminal_snr(self.betas)
        least = LAST_FLOOR if config.zero_terminal_snr else FLOOR
        self.alphas_cumprod = torch.cumprod(1.0 - self.betas, dim=0).clamp(min=least)
        if config.zero_terminal_snr:
            self.alphas_cumprod[-1] = min(FLOOR, self.alphas_cumprod[-2].item() / 2)
        if self.alphas_cumprod[0] > 1.0 - FLOOR or not (self.alphas_cumprod.diff() < 0.0).all():
            raise InputError(
                f"{config.timesteps} betas from {config.beta_start} to {config.beta_end} make NaN: alphas_cumprod, the "
                f"share of the picture in x_t, has to fall at every step, from at most 1 - 2**-24 to {least:.0e}"
            )
        self._moved: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}
        self._asked: dict[tuple[Schedule, torch.device], tuple[Tensor, Tensor, Tensor]] = {}

    @property
    def timesteps(self) -> int:
        return self.config.timesteps

    def alpha_bar(self, t: float) -> float:
        """abar at step t. Between whole steps log sigma is interpolated linearly: logit(abar) = -2 log sigma."""
        low = min(int(t), self.timesteps - 2)
        if t == int(t):
            return self.alphas_cumprod[int(t)].item()
        return torch.lerp(*self.alphas_cumprod[low : low + 2].logit(), t - low).sigmoid().item()

    def step_at(self, sigma: float) -> float:
        """The step from 0 to T - 1 at which sqrt((1 - abar) / abar) is sigma; the inverse of `alpha_bar`."""
        table = -self.alphas_cumprod.logit() / 2  # log sigma, rising
        place = torch.tensor(math.log(sigma), dtype=table.dtype)
        low = int(torch.searchsorted(table, place).clamp(1, self.timesteps - 1)) - 1
        part = (place - table[low]) / (table[low + 1] - table[low])
        return low + part.clamp(0.0, 1.0).item()

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
        """A sample of q(x_t | x_0), DDPM eq. 4. x0, noise: (B, C, h, w)."""
        signal, sigma = self._scales(t, x0)
        return signal * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
        """The tensor that the UNet is trained to predict at step t: the noise (DDPM, eq. 14), or v."""
        return noise if self.config.prediction == "eps" else self.v(x0, noise, t)

    def v(self, x0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
        """v = sqrt(abar) eps - sqrt(1 - abar) x_0. Salimans & Ho 2022, section 4."""
        signal, sigma = self._scales(t, x0)
        return signal * noise - sigma * x0

    def eps(self, prediction: Tensor, x: Tensor, t: Tensor | float) -> Tensor:
        """The noise in x (B, C, h, w) at step t, from a prediction of eps or of v."""
        if self.config.prediction == "eps":
            return prediction
        signal, sigma = self._scales(t, x)
        return signal * prediction + sigma * x  # Salimans & Ho 2022, appendix D

    def x0(self, eps: Tensor, x: Tensor, t: Tensor | float) -> Tensor:
        """The clean latents of x, given its noise: DDPM eq. 4 solved for x_0."""
        signal, sigma = self._scales(t, x)
        return (x - sigma * eps) / signal

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio abar / (1 - abar) at steps t: (B,) float32."""
        abar = self._table("abar", t.device, torch.float32)[t]
        return abar / (1.0 - abar)

    def ask(self, model: Callable[[Tensor, Tensor], Tensor], known: "Schedule", x: Tensor, t: Tensor) -> Tensor:
        """What a model that was trained on the schedule `known` predicts for x (B, C, h, w) at steps t of this one.

        model(x, t) predicts v, or either if both schedules are the same. It is asked at its own step of the same noise,
        which may lie between two whole steps; at its last step for x with more noise than it knows.
        """
        if known.config == self.config:
            return model(x, t)
        if (known, x.device) not in self._asked:
            abar = self.alphas_cumprod.clamp(known.alphas_cumprod[-1], known.alphas_cumprod[0])
            steps = [known.step_at(sigma) for sigma in ((1.0 - abar) / abar).sqrt().tolist()]
            tables = torch.tensor(steps), abar.sqrt(), (1.0 - abar).sqrt()
            self._asked[known, x.device] = tuple(table.to(x.device, torch.float32) for table in tables)
        steps, signal, sigma = (table[t] for table in self._asked[known, x.device])
        v = model(x, steps)
        x0 = signal.view(-1, 1, 1, 1) * x - sigma.view(-1, 1, 1, 1) * v  # Salimans & Ho 2022, appendix D
        signal, sigma = self._scales(t, x)
        return (signal * x - x0) / sigma  # v of this schedule, from x = signal x_0 + sigma eps

    def spaced(self, steps: int, with_end: bool = False) -> list[int]:
        """The steps t of a sampler, noisiest first; exactly `steps`, also when it does not divide T.

        leading: 1 + i * (T // steps), as in the official DDIM; warns if this begins far from pure noise.
        trailing: from T - 1 on, so that the first step is the noisiest (Lin et al. 2023, table 2).
        with_end: space one more leading step, and leave out the last one, where the sampler ends.
        Raises InputError unless 1 <= steps < T.
        """
        self.check_steps(steps)
        T = self.timesteps
        if self.config.spacing == "trailing":
            t = np.arange(T, 0, -T / steps)[:steps]  # rounding may make one too many
            return [int(s) - 1 for s in t.round()]
        left_out = 1 if with_end and steps + 1 < T else 0
        stride, rest = divmod(T, steps + left_out)
        times = [1 + i * stride for i in reversed(range(left_out, steps + left_out))]
        if times[0] < T - 1 and (stride == 1 or rest > T // 10):
            better = T // (stride + 1) - left_out
            warnings.warn(
                f"{steps} leading steps begin at t = {times[0]} of {T}, far from pure noise; "
                f"take {better} steps or trailing spacing",
                stacklevel=2,
            )
        return times

    def check_steps(self, steps: int) -> None:
        """Raises InputError unless 1 <= steps < T."""
        if not 1 <= steps < self.timesteps:
            raise InputError(f"steps must be 1 to {self.timesteps - 1}, not {steps}")

    def official_buffers(self) -> dict[str, Tensor]:
        """The twelve (T,) float32 tables that official checkpoints hold. This program writes them and uses none."""
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
        """sqrt(abar_t) and sqrt(1 - abar_t): (B, 1, 1, 1) with the type and device of `like`, or two numbers."""
        if not isinstance(t, Tensor):
            abar = self.alpha_bar(t)
            return abar**0.5, (1.0 - abar) ** 0.5
        signal, sigma = (self._table(name, like.device, like.dtype) for name in ("signal", "sigma"))
        shape = (-1, *[1] * (like.ndim - 1))
        return signal[t].view(shape), sigma[t].view(shape)

    def _table(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """(T,) "abar", or "signal" = sqrt(abar), or "sigma" = sqrt(1 - abar); computed once for a device and type."""
        if (name, device, dtype) not in self._moved:
            abar = self.alphas_cumprod
            table = {"abar": abar, "signal": abar.sqrt(), "sigma": (1.0 - abar).sqrt()}[name]
            self._moved[name, device, dtype] = table.to(device, dtype)
        return self._moved[name, device, dtype]


def _zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas whose abar ends on 0 and begins unchanged: Lin et al. 2023, algorithm 1."""
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return 1.0 - torch.cat([abar[:1], abar[1:] / abar[:-1]])
