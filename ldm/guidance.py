"""Classifier-free guidance, which makes a sampler's denoiser of a UNet; seeded noise; encoded prompts that are kept."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.errors import InputError
from ldm.runtime import captured
from ldm.samplers import Denoise
from ldm.schedule import Schedule
from ldm.unet import UNet


def guided(without: Tensor, with_prompt: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6).

    Extrapolates from the prediction without the prompt through the prediction with it, (B, C, h, w) each. scale: 1
    returns the latter. rescale: guidance raises each picture's standard deviation; 0 leaves it raised, 1 brings it
    back to the prompt's own, and values between mix the two.
    """
    prediction = without + scale * (with_prompt - without)
    if rescale == 0.0:
        return prediction
    # Lin et al. 2023, eq. 14 to 16
    ratio = with_prompt.flatten(1).std(1) / prediction.flatten(1).std(1)  # (B,)
    return prediction * (rescale * ratio + 1.0 - rescale).view(-1, 1, 1, 1)


def denoiser(
    unet: UNet,
    schedule: Schedule,
    context: Tensor,
    scale: float,
    rescale: float = 0.0,
    progress: Callable[[], object] | None = None,
) -> Denoise:
    """Makes denoise(x, t) -> eps, guided, for x (B, C, h, w) and a step t.

    context: (2B, L, D), negative prompts, then prompts, for guidance: the UNet runs on both halves in one batch. Or
    (B, L, D), prompts alone: no guidance, at half the cost. progress: called after each evaluation of the UNet.
    """
    dtype = next(unet.parameters()).dtype
    text = unet.keys_values(context)  # once for all steps
    predict = captured(lambda rows, steps: unet(rows, steps, text), context.device)

    def denoise(x: Tensor, t: float) -> Tensor:
        rows = x.repeat(len(context) // len(x), 1, 1, 1)
        steps = torch.full((len(rows),), round(t), device=x.device)  # the UNet was trained on whole steps
        prediction = predict(rows.to(dtype), steps).to(x.dtype)
        if len(rows) > len(x):
            prediction = guided(*prediction.chunk(2), scale, rescale)
        if progress is not None:
            progress()
        return schedule.eps(prediction, x, t)

    return denoise


class SeededNoise:
    """noise() -> standard normal noise, (B, C, h, w) float32, fresh at each call. Row i depends on seeds[i] alone.

    `torch.Generator().manual_seed(seed)` draws the numbers on the CPU, for any device.
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, int, int], device: torch.device):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape, self.device = shape, device

    def __call__(self) -> Tensor:
        # from pinned memory, so that a step does not wait until a GPU has copied its noise
        noise = torch.empty(len(self.generators), *self.shape, pin_memory=self.device.type == "cuda")
        for row, generator in zip(noise, self.generators, strict=True):
            torch.randn(self.shape, generator=generator, out=row)
        return noise.to(self.device, non_blocking=True)


def pair_up(prompts: str | Sequence[str], seeds: Sequence[int], latents: int) -> tuple[list[str], list[int]]:
    """Makes the prompts and the seeds equally many: a list of length one is broadcast. latents: their number.

    Raises InputError if the three lengths do not agree.
    """
    prompts = [prompts] if isinstance(prompts, str) else prompts
    count = max(len(prompts), len(seeds), latents)
    if any(length not in (1, count) for length in (len(prompts), len(seeds), latents)):
        raise InputError(f"{len(prompts)} prompts, {len(seeds)} seeds and {latents} latents do not pair up")
    return list(prompts) * (count // len(prompts)), list(seeds) * (count // len(seeds))


class Contexts:
    """Prompts -> what the UNet is conditioned on, while a text encoder trains or after it has stopped.

    A prompt's ids are made once, and its context once while the text encoder is frozen. Only prompts that `keep` names
    stay: with shuffled tags there is no end of other ones. The host does not wait for the device.
    """

    def __init__(
        self, tokenize: Callable[[list[str]], Tensor], encode: Callable[[Tensor], Tensor], device: torch.device
    ):
        """tokenize: P prompts -> ids (P, L); encode: ids -> (P, L, D), the text encoder."""
        self._tokenize, self._encode, self._device = tokenize, encode, device
        self._kept: set[str] = set()
        self._ids: dict[str, Tensor] = {}  # (L,)
        self._contexts: dict[str, Tensor] = {}  # (L, D)

    def keep(self, prompts: Sequence[str]) -> None:
        """Names prompts that will come again."""
        self._kept.update(prompts)

    def trained(self, prompts: Sequence[str]) -> Tensor:
        """(B, L, D) for B prompts, with gradients; encodes each distinct one once."""
        distinct = list(dict.fromkeys(prompts))
        rows = self._sent(torch.tensor([distinct.index(prompt) for prompt in prompts]))
        return self._encode(self._ids_of(distinct)).index_select(0, rows)

    @torch.no_grad()
    def frozen(self, prompts: Sequence[str]) -> Tensor:
        """(B, L, D) for B prompts; encodes only those that it does not keep yet, in one batch."""
        made: dict[str, Tensor] = {}
        if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._contexts]:
            made = dict(zip(new, self._encode(self._ids_of(new)), strict=True))
        self._contexts |= {prompt: context for prompt, context in made.items() if prompt in self._kept}
        return torch.stack([made[prompt] if prompt in made else self._contexts[prompt] for prompt in prompts])

    def _ids_of(self, prompts: list[str]) -> Tensor:
        rows = [self._ids[p] if p in self._ids else self._sent(self._tokenize([p])[0]) for p in prompts]
        self._ids |= {prompt: row for prompt, row in zip(prompts, rows, strict=True) if prompt in self._kept}
        return torch.stack(rows)

    def _sent(self, values: Tensor) -> Tensor:
        values = values.pin_memory() if self._device.type == "cuda" else values  # else a copy waits for the device
        return values.to(self._device, non_blocking=True)
