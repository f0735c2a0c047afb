"""What makes fine-tuning DreamBooth (Ruiz et al. 2023): the loss, what trains, and the class pictures."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ldm import data, draws, files
from ldm.errors import InputError
from ldm.model import StableDiffusion

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


def trainable(sd: StableDiffusion, text_encoder: bool) -> list[nn.Parameter]:
    """The UNet's parameters, and the text encoder's if asked for; all others, the autoencoder's first, are frozen."""
    for network in sd.networks().values():
        network.requires_grad_(False)
    chosen = [sd.unet, sd.text_encoder] if text_encoder else [sd.unet]
    return [parameter for network in chosen for parameter in network.requires_grad_(True).parameters()]


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
        self.paths = own[:count] + [self.folder / name for name in self.planned]
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

    def generate(self, sd: StableDiffusion, batch_size: int) -> None:
        """Makes what is missing, and first the manifest that says how."""
        missing = set(self.missing())
        if not missing:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(self.folder / MANIFEST, json.dumps(self._record, indent=1).encode() + b"\n")
        names, recipe = list(self.planned), self.recipe
        # Whole batches, also where only some of their pictures are missing: which others a picture is computed
        # beside can change its last bit, so the batch that picture i falls into is always the same one.
        batches = [names[i : i + batch_size] for i in range(0, len(names), batch_size)]
        batches = [batch for batch in batches if missing & set(batch)]
        with tqdm(total=len(batches) * recipe["steps"], desc="class pictures", unit="step") as bar:
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
    "guidance_scale": "--guidance-scale",
    "resolution": "--resolution",
    "model": "--model",
    "seed": "--seed",
}


def encode_pictures(sd: StableDiffusion, paths: list[Path], resolution: int, what: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the pictures' scaled latents, (N, 4, h, w) each: encoded once for all steps."""
    moments = []
    for path in tqdm(paths, desc=f"encoding {what}", unit="picture"):
        with torch.no_grad():
            posterior = sd.vae.encode(data.load_picture(path, resolution)[None].to(sd.device))
        moments.append(torch.cat([posterior.mean, posterior.std]) * sd.config.vae.scale_factor)
    mean, std = torch.stack(moments, dim=1)
    return mean, std


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _save_png(path: Path, picture: Image.Image) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    picture.save(temporary, format="PNG")
    os.replace(temporary, path)
