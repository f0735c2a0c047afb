"""What sampling is made of: guidance, which makes a denoiser of a UNet; painting in; seeded noise."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.config import ModelConfig
from ldm.errors import InputError
from ldm.runtime import captured
from ldm.samplers import Denoise, Times, steps_for_strength
from ldm.schedule import Schedule
from ldm.unet import UNet

Encode = Callable[[Tensor, Sequence[torch.Generator]], Tensor]


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
    beside: Tensor | None = None,
) -> Denoise:
    """Makes denoise(x, t) -> eps, guided, for x (B, C, h, w) and a step t.

    context: (2B, L, D), negative prompts, then prompts, for guidance: the UNet runs on both halves in one batch. Or
    (B, L, D), prompts alone: no guidance, at half the cost. progress: called after each evaluation of the UNet.
    beside: (B, C + 1, h, w), what a UNet of 2C + 1 input channels sees beside x; see `masked_columns`.
    """
    dtype = next(unet.parameters()).dtype
    text = unet.keys_values(context)  # once for all steps
    predict = captured(lambda rows, steps: unet(rows, steps, text), context.device)

    def denoise(x: Tensor, t: float) -> Tensor:
        rows = seen(x, beside).repeat(len(context) // len(x), 1, 1, 1)
        steps = torch.full((len(rows),), round(t), device=x.device)  # the UNet was trained on whole steps
        prediction = predict(rows.to(dtype), steps).to(x.dtype)
        if len(rows) > len(x):
            prediction = guided(*prediction.chunk(2), scale, rescale)
        if progress is not None:
            progress()
        return schedule.eps(prediction, x, t)

    return denoise


# Pictures to start from, and painting in: a mask says which part of the picture is made anew.


@dataclass(frozen=True)
class Canvas:
    """A picture to start from. strength: fraction of the steps to run; 0 returns the picture, 1 ignores it.

    image: (3, H, W) in [-1, 1]; mask: (1, H, W) bool, True where the picture is painted; None if it is all of it.
    Raises InputError for other shapes and types.
    """

    image: Tensor
    strength: float
    mask: Tensor | None = None

    def __post_init__(self):
        if self.image.ndim != 3 or len(self.image) != 3:
            raise InputError(f"init_image is {tuple(self.image.shape)}, and should be (3, H, W)")
        mask, shape = self.mask, (1, *self.image.shape[1:])
        if mask is not None and (mask.dtype != torch.bool or mask.shape != shape):
            what = f"{str(mask.dtype).removeprefix('torch.')} {tuple(mask.shape)}"
            raise InputError(f"mask is {what}, and should be bool {shape}, as large as init_image")

    @classmethod
    def of(cls, image: Tensor | None, mask: Tensor | None, strength: float | None) -> "Canvas | None":
        """None without a picture. strength: if None, 0.8 for the whole picture, and 1 for a part of it."""
        if image is None and mask is not None:
            raise InputError("a mask without init_image: it says which part of that picture is painted")
        if strength is None:
            strength = 0.8 if mask is None else 1.0
        return None if image is None else cls(image, strength, mask)

    @classmethod
    def blank(cls, height: int, width: int) -> "Canvas":
        """A grey picture, all of which is painted: what a model for painting in makes a picture of a prompt from."""
        return cls(torch.zeros(3, height, width), 1.0, torch.ones(1, height, width, dtype=torch.bool))

    def latent_mask(self, size: Sequence[int]) -> Tensor:
        """The mask at the latents' size: (1, 1, h, w) bool. Raises InputError if it covers no latent.

        A latent is painted if its top left pixel is, as in diffusers and in the training of the official models.
        """
        if self.mask is None:
            return torch.ones(1, 1, *size, dtype=torch.bool)
        covered = F.interpolate(self.mask[None].float(), size=tuple(size)) > 0.5
        if not covered.any():
            factor = self.mask.shape[-1] // size[-1]
            fine = f"is too fine: it covers the top left pixel of no square of {factor} x {factor} pixels"
            raise InputError(f"the mask {fine if self.mask.any() else 'is empty'}, so that there is nothing to paint")
        return covered

    def visible(self) -> Tensor:
        """The picture with grey where it is painted: (3, H, W)."""
        return torch.zeros_like(self.image) if self.mask is None else self.image.masked_fill(self.mask, 0.0)

    def paste(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) inside the mask, and the picture itself outside."""
        return images if self.mask is None else torch.where(self.mask.to(images.device), images, self.image.to(images))


class Start:
    """Where sampling starts: from noise, or from a picture. What it does about a mask depends on the model.

    A model for painting in sees mask and picture: they are its further input channels, `beside`. For any other one the
    known part replaces x outside the mask at each evaluation; see `keeping`.
    """

    def __init__(self, canvas: Canvas | None, config: ModelConfig, schedule: Schedule, encode: Encode):
        """encode: (image (3, H, W), generators) -> latents (B, C, h, w), each drawn by its generator."""
        self.canvas, self.config, self.schedule, self.encode = canvas, config, schedule, encode
        self.beside: Tensor | None = None
        self._keeps = canvas is not None and canvas.mask is not None and not config.unet.paints_in

    def begin(self, noise: "SeededNoise", latents: Tensor | None, times: Times) -> tuple[Tensor, Times]:
        """x (B, C, h, w) to start from, and those of the times that are left. latents: noise to take instead.

        Each generator draws in diffusers' order: for the picture's latents, the noise, the masked picture's latents.
        """
        canvas, generators, factor = self.canvas, noise.generators, self.config.vae.factor
        if canvas is None and self.config.unet.paints_in:
            canvas = Canvas.blank(*(side * factor for side in noise.shape[1:]))
        if canvas is not None:
            times = times[len(times) - steps_for_strength(len(times), canvas.strength) :]
            self._mask = canvas.latent_mask(noise.shape[1:]).to(noise.device)
        from_noise = canvas is None or (canvas.mask is not None and canvas.strength == 1.0)
        known = None if from_noise and not self._keeps else self.encode(canvas.image, generators)
        x = start = noise() if latents is None else latents.to(noise.device, torch.float32)
        if self.config.unet.paints_in:
            self.beside = masked_columns(self._mask, self.encode(canvas.visible(), generators))
        if not from_noise:
            x = self.schedule.add_noise(known, start, times[0]) if times else known
        self._known, self._noise, self._first = known, start, times[0] if times else None
        return x, times

    def keeping(self, denoise: Denoise) -> Denoise:
        """Shows a denoiser that knows no masks the noised picture outside the mask, at each evaluation but the first.

        RePaint, Lugmayr et al. 2022, eq. 8, with one noise for all steps. The arithmetic of samplers does not mix
        positions, so that their own x outside the mask has no influence.
        """
        if not self._keeps:
            return denoise

        def denoise_beside_known(x: Tensor, t: float) -> Tensor:
            if t != self._first:
                x = torch.where(self._mask, x, self.schedule.add_noise(self._known, self._noise, t))
            return denoise(x, t)

        return denoise_beside_known

    def finish(self, z: Tensor) -> Tensor:
        """A sampler's latents (B, C, h, w), with those of the picture outside the mask."""
        return torch.where(self._mask, z, self._known) if self._keeps else z

    def paste(self, images: Tensor) -> Tensor:
        """Decoded images (B, 3, H, W), with the picture's own pixels outside the mask."""
        return images if self.canvas is None else self.canvas.paste(images)


def seen(x: Tensor, beside: Tensor | None) -> Tensor:
    """The UNet's input: x (B, C, h, w), and beside it what a model for painting in sees, (B, C + 1, h, w) or None."""
    return x if beside is None else torch.cat([x, beside], 1)


def masked_columns(mask: Tensor, visible: Tensor) -> Tensor:
    """What a model for painting in sees beside the noisy latents: (B, C + 1, h, w), the mask first.

    mask: (1 or B, 1, h, w), True where the picture is painted; visible: (B, C, h, w), latents of the masked picture.
    """
    return torch.cat([mask.to(visible).expand(len(visible), -1, -1, -1), visible], 1)


# Seeded noise


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
