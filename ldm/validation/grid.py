"""The loss of pictures on a fixed grid of noise and timesteps, so that the losses of two steps can be compared.

Training draws another timestep and other noise each time, and the loss depends more on these than on the model. Here
every picture meets the same noise at the same timesteps in every validation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm import rng
from ldm.data import Example, encode_pictures
from ldm.dreambooth import Trainable, row_errors
from ldm.guidance import masked_columns, seen
from ldm.model import StableDiffusion
from ldm.runtime import uncompiled
from ldm.training import Run

STRATA = 8  # equal ranges of timesteps
CELLS = 2 * STRATA  # of a picture: two in each range
MOST = 8  # photographs, and class pictures, whose loss is measured


@dataclass(frozen=True)
class Part:
    """The pictures of one loss. latents: (N, C, h, w), the means that the autoencoder gives; prompts: N, one each.

    by_base: the target is the base model's own prediction, as with `--prior prediction`; else the noise, or v.
    """

    name: str  # as in validation.jsonl
    latents: Tensor
    prompts: tuple[str, ...]
    beside: Tensor | None = None  # see `nothing_beside`
    by_base: bool = False


def make_part(run: Run, sd: StableDiffusion, name: str, examples: Sequence[Example]) -> Part:
    """Encodes the pictures, cut to squares. Raises InputError for one that can't be read."""
    side = run.settings.resolution
    latents = encode_pictures(sd, examples, (side, side), False, run.stop.check).mean[:, 0]
    return Part(name, latents, tuple(example.prompt for example in examples), nothing_beside(sd, latents))


@torch.no_grad()
def nothing_beside(sd: StableDiffusion, latents: Tensor) -> Tensor | None:
    """What a model for painting in sees beside latents (N, C, h, w) of which it knows no part: (1, C + 1, h, w).

    None for any other model.
    """
    if not sd.config.unet.paints_in:
        return None
    height, width = (side * sd.config.vae.factor for side in latents.shape[2:])
    blank = sd.encode_images(torch.zeros(1, 3, height, width, device=latents.device))
    return masked_columns(torch.ones_like(blank[:, :1]), blank)


def draw(seed: int, row: int, shape: Sequence[int], timesteps: int) -> tuple[int, Tensor]:
    """The timestep and the noise of a row of the grid: a function of seed and row alone.

    Rows CELLS * i to CELLS * (i + 1) - 1 belong to picture i. One after another they take a timestep of each range.
    """
    generator = rng.generator(seed, "validation", row)
    low, high = (timesteps * (row % STRATA + end) // STRATA for end in (0, 1))
    t = int(torch.randint(low, max(high, low + 1), (), generator=generator))
    return t, torch.randn(tuple(shape), generator=generator)


def losses(run: Run, trainable: Trainable, parts: Sequence[Part]) -> dict[str, float]:
    """The mean squared error over the grid of each part, by its name. A loss that is not finite is left out.

    Each process computes some of the batches; a batch has the same rows in any number of processes, and the rows'
    errors are added in the same order. Raises RunError in all processes if one runs out of memory.
    """
    size = run.settings.sample_batch_size
    counts = [len(part.latents) * CELLS for part in parts]
    batches = [(p, range(i, min(i + size, n))) for p, n in enumerate(counts) for i in range(0, n, size)]
    errors = [torch.zeros(n, device=run.world.device) for n in counts]
    with run.world.agreed(), run.enough_memory("sampling", "while it validated"), uncompiled(run.settings.compile):
        for p, rows in batches[run.world.rank :: run.world.size]:
            run.stop.check()
            errors[p][rows.start : rows.stop] = errors_of(run, trainable, parts[p], rows)
    everyone = run.world.gather(torch.cat(errors)).sum(0).cpu()  # exact: each row is zero in all processes but one
    means = [math.fsum(found.tolist()) / len(found) for found in everyone.split(counts)]
    return {part.name: mean for part, mean in zip(parts, means, strict=True) if math.isfinite(mean)}


@torch.no_grad()
def errors_of(run: Run, trainable: Trainable, part: Part, rows: range) -> Tensor:
    """The squared error of these rows of a part, (len(rows),) fp32, each the mean over its latents."""
    schedule, device = trainable.sd.schedule, run.world.device
    shape = part.latents.shape[1:]
    drawn = [draw(run.settings.seed, row, shape, schedule.timesteps) for row in rows]
    t = torch.tensor([step for step, _ in drawn]).to(device)
    noise = torch.stack([numbers for _, numbers in drawn]).to(device)
    pictures = [row // CELLS for row in rows]
    latents = part.latents[torch.tensor(pictures).to(device)]
    beside = part.beside.expand(len(rows), -1, -1, -1) if part.beside is not None else None
    noisy = seen(schedule.add_noise(latents, noise, t), beside)
    with run.precision.autocast():
        prompts = [part.prompts[picture] for picture in pictures]
        prediction = trainable(noisy, t, prompts)
        target = trainable.base(noisy, t, prompts) if part.by_base else schedule.target(latents, noise, t)
    return row_errors(prediction, target)
