"""The class prior of DreamBooth (Ruiz et al. 2023, section 3.2): pictures that the base model makes of the class."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ldm import images, rng
from ldm.errors import InputError
from ldm.model import StableDiffusion
from ldm.runtime import files
from ldm.runtime.processes import World
from ldm.runtime.signals import Stop
from ldm.runtime.threads import one_thread
from ldm.samplers import evaluations

MANIFEST = "manifest.json"

# The flag that each entry of a recipe comes from.
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
            own = images.list_pictures(self.folder, ours={MANIFEST, *made})
        wanted = max(0, count - len(own))
        self.planned = {f"class-{i:05d}.png": rng.number(seed, "class picture", i) for i in range(wanted)}
        clash = [p.name for p in own if p.name in self.planned]
        if clash:
            raise InputError(f"{self.folder / clash[0]} has the name of a picture to be generated; rename it")
        self.own = own[:count]
        self.paths = self.own + [self.folder / name for name in self.planned]
        if self.missing():
            files.check_writable(self.folder, "--class-data-dir")
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

    def generate(self, sd: StableDiffusion, batch_size: int, world: World, stop: Stop) -> bool:
        """Makes what is missing, every process its share of the batches, and first the manifest that says how.

        Returns False if a signal ended it early; what was made by then is kept.
        """
        missing = set(world.share(self.missing()))
        if not missing:
            return True
        with world.agreed(), files.written(self.folder / MANIFEST):
            if world.main:
                self.folder.mkdir(parents=True, exist_ok=True)
                _write(self.folder / MANIFEST, json.dumps(self._record, indent=1).encode() + b"\n")
        # Whole batches, also where only some of their pictures are missing: which others a picture is computed
        # beside can change its last bit, so the batch that picture i falls into is always the same one.
        names = list(self.planned)
        batches = [names[i : i + batch_size] for i in range(0, len(names), batch_size)]
        batches = [batch for batch in batches if missing & set(batch)]
        rounds = [batches[i : i + world.size] for i in range(0, len(batches), world.size)]
        total = len(rounds) * evaluations(self.recipe["sampler"], self.recipe["steps"])
        with tqdm(total=total, desc="class pictures", unit="step", disable=not world.main) as bar:
            for round in rounds:
                with world.agreed(), files.written(self.folder), one_thread():
                    for batch in round[world.rank : world.rank + 1]:  # in the last round there may be none for us
                        self._make(sd, batch, missing, bar.update)
                if world.any(stop.asked):
                    return False
        return True

    def _make(self, sd: StableDiffusion, batch: list[str], missing: set[str], progress: Callable[[], object]) -> None:
        pictures = sd.generate(
            self.recipe["prompt"],
            steps=self.recipe["steps"],
            guidance=self.recipe["guidance_scale"],
            sampler=self.recipe["sampler"],
            seeds=[self.planned[name] for name in batch],
            height=self.recipe["resolution"],
            width=self.recipe["resolution"],
            progress=progress,
        )
        for name, picture in zip(batch, pictures, strict=True):
            if name in missing:
                content = io.BytesIO()
                picture.save(content, format="PNG")
                _write(self.folder / name, content.getvalue())


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
