"""Photographs encoded -> training rows."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm import rng
from ldm.images import load_picture
from ldm.model import StableDiffusion
from ldm.runtime.threads import one_thread

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]


class Rows:
    """Training rows of one kind. Row `index` of a run is a function of (seed, kind, index) alone (rule 4)."""

    def __init__(self, kind: str, count: int, shape: tuple[int, int, int], timesteps: int, device: torch.device):
        """count: pictures; shape: (C, h, w) of their latents."""
        self.kind, self.count, self.shape, self.timesteps, self.device = kind, count, shape, timesteps, device

    def moments(self, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of picture k's latents, (C, h, w) each, of one view drawn from the generator."""
        raise NotImplementedError

    def draw(self, seed: int, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows first ... first + count - 1: latents sampled anew and noise, (count, C, h, w), and steps t, (count,)."""
        latents, noises, steps = [], [], []
        for index in range(first, first + count):
            generator = rng.generator(seed, self.kind, "noise", index)
            spread, noise = torch.randn((2, *self.shape), generator=generator).to(self.device)
            steps.append(torch.randint(self.timesteps, (), generator=generator))
            mean, std = self.moments(rng.pick(seed, self.kind, index, self.count), generator)
            latents.append(mean + std * spread)
            noises.append(noise)
        return torch.stack(latents), torch.stack(noises), torch.stack(steps).to(self.device)


class LatentRows(Rows):
    """Rows of pictures that were encoded once: mean and std are (N, views, C, h, w), views 2 where one is mirrored."""

    def __init__(self, kind: str, mean: Tensor, std: Tensor, timesteps: int):
        super().__init__(kind, len(mean), tuple(mean.shape[2:]), timesteps, mean.device)
        self.mean, self.std = mean, std

    def moments(self, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        views = self.mean.shape[1]
        view = int(torch.randint(views, (), generator=generator)) if views > 1 else 0
        return self.mean[k, view], self.std[k, view]


class CroppedRows(Rows):
    """Rows of pictures that are cut anew, and mirrored half of the time if `flip`, and so encoded each time."""

    def __init__(self, kind: str, paths: list[Path], resolution: int, flip: bool, encode: Encode, rows: dict[str, Any]):
        """encode: (B, 3, R, R) in [-1, 1] -> mean and std of the latents; rows: shape, timesteps and device."""
        super().__init__(kind, len(paths), **rows)
        self.paths, self.resolution, self.flip, self.encode = paths, resolution, flip, encode

    def moments(self, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x, y, mirrored = torch.rand(3, generator=generator).tolist()
        image = load_picture(self.paths[k], self.resolution, (x, y))[None].to(self.device)
        mean, std = self.encode(image.flip(3) if self.flip and mirrored < 0.5 else image)
        return mean[0], std[0]


def encode(sd: StableDiffusion, images: Tensor) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) in [-1, 1] -> mean and standard deviation of their scaled latents, (B, 4, h, w) each."""
    with torch.no_grad(), one_thread():
        posterior = sd.vae.encode(images)
    return posterior.mean * sd.config.vae.scale_factor, posterior.std * sd.config.vae.scale_factor


def training_rows(
    sd: StableDiffusion, kind: str, paths: list[Path], resolution: int, crop: bool, flip: bool, bar: bool
) -> Rows:
    """The rows of one kind: pictures encoded once, or at every step if they are cut anew each time."""
    if crop:
        rows = {"shape": sd.latent_shape(resolution, resolution), "timesteps": sd.schedule.timesteps}
        return CroppedRows(kind, paths, resolution, flip, partial(encode, sd), rows | {"device": sd.device})
    moments = []
    for path in tqdm(paths, desc=f"encoding {kind} pictures", unit="picture", disable=not bar):
        image = load_picture(path, resolution).to(sd.device)
        views = [image, image.flip(2)] if flip else [image]
        moments.append(
            torch.stack([torch.cat(part) for part in zip(*(encode(sd, v[None]) for v in views), strict=True)])
        )
    mean, std = torch.stack(moments, dim=1)  # (N, views, 4, h, w) each
    return LatentRows(kind, mean, std, sd.schedule.timesteps)
