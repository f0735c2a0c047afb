"""What `StableDiffusion.generate` makes pictures of: noise from seeds, guidance, and 8-bit colours in the end.

Knows no network: the UNet and what the text encoder made of the prompts are given.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ldm.errors import InputError
from ldm.samplers import Denoise
from ldm.schedule import Schedule


def guided(without: Tensor, with_prompt: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6): away from one prediction, beyond the other (B, C, h, w).

    rescale: how far each picture's spread, which that widens, is led back to the prompt's: 0 not, 1 all the way.
    """
    prediction = without + scale * (with_prompt - without)
    if rescale == 0.0:
        return prediction
    # Lin et al. 2023, eq. 14 to 16
    ratio = with_prompt.flatten(1).std(1) / prediction.flatten(1).std(1)  # (B,)
    return prediction * (rescale * ratio + 1.0 - rescale).view(-1, 1, 1, 1)


def denoiser(
    unet: nn.Module,
    schedule: Schedule,
    context: Tensor,
    scale: float,
    rescale: float = 0.0,
    progress: Callable[[], object] | None = None,
) -> Denoise:
    """denoise(x, t) -> eps for x (B, C, h, w), guided.

    context: (2B, L, D), of the negative prompts and then of the prompts, which go through the UNet in one batch; or
    (B, L, D), of the prompts alone, which costs half: then nothing is guided.
    progress: called after each evaluation of the UNet.
    """
    dtype = next(unet.parameters()).dtype

    def denoise(x: Tensor, t: float) -> Tensor:
        rows = x.repeat(len(context) // len(x), 1, 1, 1)
        steps = torch.full((len(rows),), round(t), device=x.device)  # it has seen whole steps only
        prediction = unet(rows.to(dtype), steps, context).to(x.dtype)
        if len(rows) > len(x):
            prediction = guided(*prediction.chunk(2), scale, rescale)
        if progress is not None:
            progress()
        return schedule.eps(prediction, x, t)

    return denoise


class Noise:
    """noise() -> standard normal, (B, C, h, w) and float32: fresh at each call, row i from seeds[i] and no other.

    It is what `torch.Generator().manual_seed(seed)` draws on the CPU, on any device.
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, int, int], device: torch.device):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape, self.device = shape, device

    def __call__(self) -> Tensor:
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)


def paired(prompts: Sequence[str], seeds: Sequence[int], latents: int) -> tuple[list[str], list[int]]:
    """As many prompts as seeds: what there is one of serves all. Raises InputError if they do not pair up."""
    count = max(len(prompts), len(seeds), latents)
    if any(length not in (1, count) for length in (len(prompts), len(seeds), latents)):
        raise InputError(f"{len(prompts)} prompts, {len(seeds)} seeds and {latents} latents do not pair up")
    return list(prompts) * (count // len(prompts)), list(seeds) * (count // len(seeds))
