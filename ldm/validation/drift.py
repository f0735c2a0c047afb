"""Language drift: how far the class prompt's pictures have moved toward the subject, and how varied they still are.

Fine-tuning can make every dog your dog (DreamBooth, section 3.2). Pictures of the class prompt show it, always made
from the same seeds. They are described by the middle block of the base model's UNet, so that no other network is
needed: the mean over positions of its output for a picture's latents with a little noise.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy

import torch
from torch import Tensor, nn

from ldm import rng
from ldm.dreambooth import Trainable
from ldm.guidance import seen
from ldm.lora import LoRA, disabled
from ldm.runtime import uncompiled
from ldm.settings import Settings
from ldm.training import Run
from ldm.unet import UNet, timestep_embedding
from ldm.validation.grid import Part

SAMPLER, STEPS = "dpmpp_2m", 8  # rough pictures suffice
NOISE = 0.1  # the timestep of the features, as a share of all


def is_wanted(settings: Settings) -> bool:
    """Whether the settings ask for it. A token alone does not change the class's pictures."""
    return settings.validation_steps is not None and settings.num_drift_images > 0 and settings.train != "token"


class HalfUNet(nn.Module):
    """The way down and the middle of a UNet: x (B, C, h, w), t (B,), context (B, L, D) -> (B, C', h', w')."""

    def __init__(self, unet: UNet):
        super().__init__()
        self.width = unet.config.channels[0]
        self.time_embed, self.input_blocks, self.middle_block = unet.time_embed, unet.input_blocks, unet.middle_block

    @property
    def trains(self) -> bool:
        return any(parameter.requires_grad for parameter in self.parameters())

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        emb = self.time_embed(timestep_embedding(t, self.width).to(x.dtype))
        for block in self.input_blocks:
            x = block(x, emb, context)
        return self.middle_block(x, emb, context)


def weights_kept(settings: Settings, unet: UNet, dtype: torch.dtype) -> list[Tensor]:
    """Tensors of the shapes and type of the weights that `Drift` will keep a copy of, on the CPU."""
    half = HalfUNet(unet)
    return [p.detach().to(dtype, copy=True) for p in half.parameters()] if is_wanted(settings) and half.trains else []


class Drift:
    """Drift and diversity of the class prompt's pictures, against those that the base model made from the same seeds.

    Made before training begins. If the UNet will train, this keeps a copy of its half that is used, in the type that
    matrices are multiplied in: 0.7 GB for SD 1.5 in 16 bits. On a GPU it lies in the host's memory between validations.
    """

    def __init__(self, run: Run, trainable: Trainable, prompts: Sequence[str], photographs: Part):
        """prompts: of the classes, of all subjects; the pictures take them in turn. photographs: of all subjects.

        Raises RunError in all processes if one runs out of memory.
        """
        self.run, self.trainable, self.prompts, unet = run, trainable, prompts, trainable.sd.unet
        self.beside, self.schedule = photographs.beside, trainable.sd.schedule  # training may go on with another one
        self.half = HalfUNet(unet)
        self.keeps_copy = self.half.trains
        if self.keeps_copy:
            self.half = deepcopy(self.half).requires_grad_(False).to("cpu", run.precision.dtype)
        with torch.no_grad():
            self.context = trainable.sd.encode_prompt("")  # (1, L, D)
        with run.world.agreed(), self._working():
            self.photographs = self._features(photographs.latents, 0).mean(0)
        self.base = self._class_features()

    def measure(self) -> dict[str, float]:
        """{"drift", "diversity"}; a number that is not finite is left out. Raises as `__init__`."""
        found = self._class_features()
        centre = self.base.mean(0)
        numbers = {
            "drift": drift(found, self.base, self.photographs),
            "diversity": diversity(found, centre) / diversity(self.base, centre),
        }
        return {name: value for name, value in numbers.items() if math.isfinite(value)}

    def _class_features(self) -> Tensor:
        """(N, D) of the class prompt's pictures by the model as it is now; every process makes some of the batches."""
        settings, world = self.run.settings, self.run.world
        count, size = settings.num_drift_images, settings.sample_batch_size
        width = self.trainable.sd.config.unet.channels[-1]
        found = torch.zeros(count, width, device=world.device)
        with world.agreed(), self._working():
            for first in list(range(0, count, size))[world.rank :: world.size]:
                latents = self._sample(range(first, min(first + size, count)))
                found[first : first + len(latents)] = self._features(latents, first)
        return world.gather(found.flatten()).sum(0).view(count, width)  # exact: all processes but one have zeros

    def _sample(self, numbers: range) -> Tensor:
        """Latents (B, C, h, w) of class pictures, each a function of the seed and its number."""
        settings = self.run.settings
        guidance = settings.class_guidance_scale
        return self.trainable.sd.generate(
            [self.prompts[number % len(self.prompts)] for number in numbers],
            seeds=[rng.number(settings.seed, "drift picture", number) for number in numbers],
            steps=min(STEPS, self.trainable.sd.schedule.timesteps - 1),
            sampler=SAMPLER,
            guidance=settings.guidance_scale if guidance is None else guidance,
            height=settings.resolution,
            width=settings.resolution,
            output="latent",
            progress=self.run.stop.check,
        )

    @torch.no_grad()
    def _features(self, latents: Tensor, first: int) -> Tensor:
        """(B, C, h, w) -> (B, D) fp32. first: the number of the first picture, which chooses the noise."""
        schedule, settings = self.schedule, self.run.settings
        numbers = range(first, first + len(latents))
        noise = [
            torch.randn(latents.shape[1:], generator=rng.generator(settings.seed, "drift noise", number))
            for number in numbers
        ]
        t = torch.full((len(latents),), round(NOISE * schedule.timesteps), device=latents.device)
        noisy = schedule.add_noise(latents.float(), torch.stack(noise).to(latents.device), t)
        noisy = seen(noisy, self.beside.expand(len(noisy), -1, -1, -1) if self.beside is not None else None)
        dtype = next(self.half.parameters()).dtype
        with disabled(module for module in self.trainable.modules() if isinstance(module, LoRA)):
            h = self.half(noisy.to(dtype), t, self.context.to(dtype).expand(len(noisy), -1, -1))
        return h.float().mean((2, 3))

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Wraps sampling and features, without collectives. Inside, the copy is on the device."""
        enough = self.run.enough_memory("sampling", "while it measured language drift")
        with enough, uncompiled(self.run.settings.compile), self.run.precision.sampling():
            try:
                self.half.to(self.run.world.device)
                yield
            finally:
                if self.keeps_copy:
                    self.half.to("cpu")


def drift(found: Tensor, base: Tensor, photographs: Tensor) -> float:
    """How far the mean of `found` (N, D) lies on the way from the mean of `base`, 0, to `photographs` (D,), 1."""
    way = photographs - base.mean(0)
    return (((found.mean(0) - base.mean(0)) @ way) / (way @ way)).item()


def diversity(found: Tensor, centre: Tensor) -> float:
    """The mean cosine distance between two of the vectors, seen from the centre. found: (N, D), N >= 2."""
    unit = torch.nn.functional.normalize(found - centre, dim=1)
    n = len(unit)
    return ((n * n - (unit @ unit.T).sum()) / (n * (n - 1))).item()
