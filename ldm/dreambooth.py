"""What makes fine-tuning DreamBooth (Ruiz et al. 2023): the loss, what trains, and the class pictures."""

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ldm import data, draws, files
from ldm.distributed import World, one_thread
from ldm.errors import InputError
from ldm.model import StableDiffusion
from ldm.samplers import evaluations

MANIFEST = "manifest.json"


def dreambooth_loss(
    prediction: Tensor, target: Tensor, is_class: Tensor, prior_weight: float, row_weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Subject term plus weighted prior-preservation term (DreamBooth, eq. 2).

    prediction, target: (B, C, h, w); is_class: (B,) bool, True for rows of the class prior.
    row_weight: (B,) factors on the rows' errors, 1 if None.
    Returns (loss, subject_mse, prior_mse), scalars in the units of the target squared. The mean of no rows is 0.
    """
    error = (prediction.float() - target.float()).square().flatten(1).mean(1)  # (B,)
    if row_weight is not None:
        error = error * row_weight
    subject, prior = _mean(error[~is_class]), _mean(error[is_class])
    return subject + prior_weight * prior, subject, prior


def _mean(values: Tensor) -> Tensor:
    return values.sum() / max(len(values), 1)


def min_snr_weight(snr: Tensor, gamma: float, prediction: str) -> Tensor:
    """Row weights (B,) that tame the easy, little-noised steps. Min-SNR, Hang et al. 2023, section 3.4.

    snr: (B,) of the rows' steps; prediction: "eps" or "v", whose errors are x_0's times snr, or snr + 1.
    """
    return snr.clamp(max=gamma) / (snr if prediction == "eps" else snr + 1.0)


class Trainee(nn.Module):
    """What trains, as one module with one forward pass: the UNet, and the text encoder before it if that trains."""

    def __init__(self, sd: StableDiffusion, text_encoder: bool, checkpointing: bool = False):
        """checkpointing: compute activations again in the backward pass instead of keeping them."""
        super().__init__()
        for network in sd.networks().values():
            network.requires_grad_(False)
        self.unet = sd.unet.requires_grad_(True)
        self.text_encoder = sd.text_encoder.requires_grad_(True) if text_encoder else None
        self.unet.checkpointing = sd.text_encoder.text_model.checkpointing = checkpointing

    @property
    def text_encoder_trains(self) -> bool:
        return self.text_encoder is not None and next(self.text_encoder.parameters()).requires_grad

    def forward(self, x: Tensor, t: Tensor, prompts: Tensor) -> Tensor:
        """x: (B, 4, h, w); t: (B,); prompts: ids (P, L) if the text encoder trains, else context (P, L, D).

        Each of the P prompts serves B / P rows, in order. Returns the prediction, (B, 4, h, w).
        """
        context = self.text_encoder(prompts) if self.text_encoder is not None else prompts
        return self.unet(x, t, context.repeat_interleave(len(x) // len(prompts), dim=0))


class ClassPictures:
    """The class prior: pictures of "a dog" that the base model makes itself before it learns of your dog.

    Picture i is a function of (seed, i). A folder of generated pictures has a manifest that says how they were made,
    and is topped up or refused accordingly; pictures that the manifest does not name are the user's own, and count.
    """

    def __init__(self, folder: str | Path, count: int, seed: int, recipe: dict[str, Any]):
        """recipe: prompt, sampler, steps, guidance_scale, resolution and model, the base model's fingerprint.

        Raises InputError, with nothing written, if the folder's manifest says otherwise.
        """
        self.folder, self.recipe, self.seed = Path(folder), recipe, seed
        manifest = self._read_manifest()
        made = manifest["pictures"] if manifest else {}
        own: list[Path] = []
        if self.folder.is_dir():
            own = data.list_pictures(self.folder, ours={MANIFEST, *made})
        wanted = max(0, count - len(own))
        self.planned = {f"class-{i:05d}.png": draws.number(seed, "class picture", i) for i in range(wanted)}
        clash = [p.name for p in own if p.name in self.planned]
        if clash:
            raise InputError(f"{self.folder / clash[0]} has the name of a picture to be generated; rename it")
        self.own = own[:count]
        self.paths = self.own + [self.folder / name for name in self.planned]
        if self.missing():
            files.insist_writable(self.folder, "--class-data-dir")
        self._record = {**recipe, "seed": seed, "pictures": made | self.planned}

    def _read_manifest(self) -> dict[str, Any] | None:
        path = self.folder / MANIFEST
        if not path.exists():
            return None
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            found = {name: manifest[name] for name in (*self.recipe, "seed", "pictures")}
            found["pictures"] = dict(found["pictures"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged ({error!r}); give another --class-data-dir") from None
        for name, value in {**self.recipe, "seed": self.seed}.items():
            if found[name] != value:
                raise InputError(
                    f"{self.folder} was generated with {name} {found[name]!r}, and this run has {value!r}; "
                    f"give that {FLAGS[name]}, or another --class-data-dir"
                )
        return found

    def missing(self) -> list[str]:
        """Names of the pictures that are still to be generated."""
        return [name for name in self.planned if not (self.folder / name).exists()]

    def generate(self, sd: StableDiffusion, batch_size: int, world: World) -> None:
        """Makes what is missing, every process its share of the batches, and first the manifest that says how."""
        missing = set(world.share(self.missing()))
        if not missing:
            return
        with world.agreed(), files.written(self.folder / MANIFEST):
            if world.main:
                self.folder.mkdir(parents=True, exist_ok=True)
                _write(self.folder / MANIFEST, json.dumps(self._record, indent=1).encode() + b"\n")
        names, recipe = list(self.planned), self.recipe
        # Whole batches, also where only some of their pictures are missing: which others a picture is computed
        # beside can change its last bit, so the batch that picture i falls into is always the same one.
        batches = [names[i : i + batch_size] for i in range(0, len(names), batch_size)]
        batches = [batch for batch in batches if missing & set(batch)][world.rank :: world.size]
        total = len(batches) * evaluations(recipe["sampler"], recipe["steps"])
        with (
            world.agreed(),  # and so all wait until the last picture is there
            files.written(self.folder),
            one_thread(),
            tqdm(total=total, desc="class pictures", unit="step", disable=not world.main) as bar,
        ):
            for batch in batches:
                pictures = sd.generate(
                    recipe["prompt"],
                    steps=recipe["steps"],
                    guidance=recipe["guidance_scale"],
                    sampler=recipe["sampler"],
                    seeds=[self.planned[name] for name in batch],
                    height=recipe["resolution"],
                    width=recipe["resolution"],
                    progress=bar.update,
                )
                for name, picture in zip(batch, pictures, strict=True):
                    if name in missing:
                        _save_png(self.folder / name, picture)


FLAGS = {
    "prompt": "--class-prompt",
    "sampler": "--sampler",
    "steps": "--sample-steps",
    "guidance_scale": "--class-guidance-scale",
    "resolution": "--resolution",
    "model": "--model",
    "prediction": "--prediction-type",
    "seed": "--seed",
}


def encode(sd: StableDiffusion, images: Tensor) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) in [-1, 1] -> mean and standard deviation of their scaled latents, (B, 4, h, w) each."""
    with torch.no_grad(), one_thread():
        posterior = sd.vae.encode(images)
    return posterior.mean * sd.config.vae.scale_factor, posterior.std * sd.config.vae.scale_factor


def training_rows(
    sd: StableDiffusion, kind: str, paths: list[Path], resolution: int, crop: bool, flip: bool, bar: bool
) -> data.Rows:
    """The rows of one kind: pictures encoded once, or at every step if they are cut anew each time."""
    if crop:
        rows = {"shape": sd.latent_shape(resolution, resolution), "timesteps": sd.schedule.timesteps}
        return data.CroppedRows(kind, paths, resolution, flip, partial(encode, sd), rows | {"device": sd.device})
    moments = []
    for path in tqdm(paths, desc=f"encoding {kind} pictures", unit="picture", disable=not bar):
        image = data.load_picture(path, resolution).to(sd.device)
        views = [image, image.flip(2)] if flip else [image]
        moments.append(
            torch.stack([torch.cat(part) for part in zip(*(encode(sd, v[None]) for v in views), strict=True)])
        )
    mean, std = torch.stack(moments, dim=1)  # (N, views, 4, h, w) each
    return data.LatentRows(kind, mean, std, sd.schedule.timesteps)


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _save_png(path: Path, picture: Image.Image) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    picture.save(temporary, format="PNG")
    os.replace(temporary, path)
