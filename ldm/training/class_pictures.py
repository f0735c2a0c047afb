"""The class prior of DreamBooth (Ruiz et al. 2023, section 3.2): pictures of the class by the base model."""

import io
import json
import os
import re
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ldm import images, rng, samplers
from ldm.data import Example, Subject, captioned, companions
from ldm.errors import InputError
from ldm.model import StableDiffusion
from ldm.runtime import (
    at_once,
    check_writable,
    exists,
    list_folder,
    locked,
    read_json,
    side_by_side,
    written,
)
from ldm.training import continuity
from ldm.training.pace import duration
from ldm.training.run import Run

MANIFEST = "manifest.json"
# The temporary name of a file, with the host and the process that write it.
TEMPORARY = re.compile(r"\.(?:class-\d{5,}\.png|manifest\.json)(?:\.(.+)-(\d+))?\.tmp")

# The flag that sets each entry of a recipe.
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
    """The class prior: pictures of "a dog" that the base model makes before it learns your dog.

    Picture i is a function of (seed, i). A folder of generated pictures has a manifest that says how they were made.
    Missing pictures are generated if the manifest agrees with the recipe; else InputError is raised. Pictures that the
    manifest does not name are the user's own, and count.
    """

    def __init__(self, folder: str | Path, count: int, seed: int, recipe: dict[str, Any]):
        """recipe: prompt, sampler, steps, guidance_scale, resolution, prediction ("eps" or "v"), and model, the base
        model's fingerprint.

        Raises InputError, with nothing written, if the folder's manifest does not agree.
        """
        self.folder, self.recipe, self.seed = Path(folder), recipe, seed
        manifest = self._read_manifest()
        made = manifest["pictures"] if manifest else {}
        own: list[Path] = []
        if exists(self.folder) and self.folder.is_dir():
            own = images.list_pictures(self.folder, ours={MANIFEST, *made, *companions(list_folder(self.folder))})
        wanted = max(0, count - len(own))
        self.planned = {f"class-{i:05d}.png": rng.number(seed, "class picture", i) for i in range(wanted)}
        clash = [p.name for p in own if p.name in self.planned]
        if clash:
            raise InputError(f"{self.folder / clash[0]} has the name of a picture to be generated; rename it")
        self.own = own[:count]
        self.paths = self.own + [self.folder / name for name in self.planned]
        if self.missing():
            check_writable(self.folder, "--class-data-dir")

    def _read_manifest(self) -> dict[str, Any] | None:
        path = self.folder / MANIFEST
        if not os.path.lexists(path):
            return None
        try:
            manifest = read_json(path)
        except InputError as error:
            raise InputError(f"{error}; give another --class-data-dir") from None
        names = (*self.recipe, "seed", "pictures")
        found = {name: manifest[name] for name in names if name in manifest} if isinstance(manifest, dict) else {}
        if missing := [name for name in names if name not in found]:
            raise InputError(f"{path} is damaged: it does not say {missing[0]}; give another --class-data-dir")
        if not isinstance(found["pictures"], dict):
            raise InputError(f"{path} is damaged: its pictures are no JSON object; give another --class-data-dir")
        for name, value in {**self.recipe, "seed": self.seed}.items():
            if found[name] != value:
                raise InputError(
                    f"{self.folder} was generated with {name} {found[name]!r}, and this run has {value!r}; "
                    f"give that {FLAGS[name]}, or another --class-data-dir"
                )
        return found

    def missing(self) -> list[str]:
        """Names of the pictures that are still to be generated."""
        return [name for name in self.planned if not os.path.lexists(self.folder / name)]

    def generate(self, run: Run, sd: StableDiffusion) -> None:
        """Writes the manifest, then generates missing pictures; each process makes a share.

        Raises Stopped if a signal ends it early; complete pictures are kept.
        """
        world, size = run.world, run.settings.sample_batch_size
        missing = set(world.share(self.missing()))
        if not missing:
            return
        world.on_main(self._write_manifest)
        # The other pictures in a batch can change a picture's last bit. So picture i is always in the same batch, and
        # the whole batch is made even if only one of its pictures is missing.
        names = list(self.planned)
        batches = [names[i : i + size] for i in range(0, len(names), size)]
        batches = [batch for batch in batches if missing & set(batch)]
        share = world.share(at_once(world.device))  # batches that a process makes side by side
        rounds = [batches[i : i + share * world.size] for i in range(0, len(batches), share * world.size)]
        evaluations = samplers.find(self.recipe["sampler"]).evaluations(self.recipe["steps"])
        total = sum(len(round[world.rank :: world.size]) for round in rounds) * evaluations
        with run.progress_bar("class pictures", total) as progress:
            began = time.perf_counter()
            for i, round in enumerate(rounds):
                if i == 1 and world.main:
                    left = duration((time.perf_counter() - began) * (len(rounds) - 1))
                    tqdm.write(f"about {left} of class pictures left")
                mine = round[world.rank :: world.size]
                with (
                    world.agreed(),
                    written(self.folder),
                    run.enough_memory("sampling", "while it made class pictures"),
                ):
                    side_by_side(lambda batch: self._make(run, sd, batch, missing, progress), mine, world.device)

    def _write_manifest(self) -> None:
        """Writes the recipe. Raises InputError if another run has begun to fill the folder with another recipe."""
        with written(self.folder / MANIFEST):
            self.folder.mkdir(parents=True, exist_ok=True)
            with locked(self.folder):
                _tidy(self.folder)
                already = self._read_manifest() or {"pictures": {}}
                record = {**self.recipe, "seed": self.seed, "pictures": already["pictures"] | self.planned}
                _write(self.folder / MANIFEST, json.dumps(record, indent=1).encode() + b"\n")

    def _make(
        self, run: Run, sd: StableDiffusion, batch: list[str], missing: set[str], progress: Callable[[], object]
    ) -> None:
        if all((self.folder / name).exists() for name in missing.intersection(batch)):
            return  # another run has made them meanwhile
        with run.precision.sampling():
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


def plan_class_pictures(run: Run, sd: StableDiffusion, base: str, subjects: Sequence[Subject]) -> list[ClassPictures]:
    """The class pictures of each subject; none if the prior term does without. base: the base model's fingerprint.

    Subjects of one class, with no folder of their own, share its pictures. Raises InputError as `ClassPictures`.
    """
    settings = run.settings
    if not settings.uses_class_pictures:
        return []
    guidance = settings.class_guidance_scale
    recipe = {
        "sampler": settings.sampler,
        "steps": settings.sample_steps,
        "guidance_scale": settings.guidance_scale if guidance is None else guidance,
        "resolution": settings.resolution,
        "prediction": sd.config.schedule.prediction,
        "model": base,
    }
    first = {subject.class_prompt: subject.name for subject in reversed(subjects)}  # of each class
    planned = []
    for subject in subjects:
        own = run.folder / "class"
        if len(first) > 1:
            own /= first[subject.class_prompt]
        folder = subject.class_data_dir or own
        about = {"prompt": subject.class_prompt, **recipe}
        planned.append(ClassPictures(folder, subject.num_class_images, settings.seed, about))
    return planned


def distinct_class_pictures(planned: Sequence[ClassPictures]) -> list[ClassPictures]:
    """One entry for each folder: of the subjects that share its pictures, that of the one with most of them."""
    by_number = sorted(planned, key=lambda pictures: len(pictures.paths))
    most = {pictures.folder: pictures for pictures in by_number}
    return [most[folder] for folder in dict.fromkeys(pictures.folder for pictures in planned)]


def read_class_pictures(run: Run, planned: Sequence[ClassPictures]) -> list[list[Example]]:
    """All class pictures of each subject.

    Raises InputError if one can't be read, or is not the one that a resumed run began with.
    """
    examples = [_read(pictures) for pictures in planned]
    found = [
        (example, pictures.recipe["prompt"]) for pictures, own in zip(planned, examples, strict=True) for example in own
    ]
    sums = continuity.sums(example.picture for example, _ in found)
    run.identify(class_pictures=sums, class_captions=continuity.captions(found))
    return examples


def _read(pictures: ClassPictures) -> list[Example]:
    """The user's own class pictures with their captions, and the generated ones."""
    prompt = pictures.recipe["prompt"]
    own = [Example(example.picture, example.prompt) for example in captioned(pictures.own, prompt)]
    generated = [pictures.folder / name for name in pictures.planned]
    return own + [Example(images.read_picture(path), prompt) for path in generated]


def _write(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all; replaces a manifest, and leaves a picture that is there already.

    Another run that shares the folder may have made it, and have begun to train on it.
    """
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        if path.name == MANIFEST:
            os.replace(temporary, path)
        else:
            with suppress(FileExistsError):
                os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _tidy(folder: Path) -> None:
    """Removes half-written files of killed runs of this machine."""
    for path in folder.glob(".*.tmp"):
        if name := TEMPORARY.fullmatch(path.name):
            host, pid = name.groups()
            if host is None or (host == socket.gethostname() and not _is_alive(int(pid))):
                path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    """Whether a process of this machine has this number."""
    try:
        os.kill(pid, 0)  # sends no signal
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is another user's
        pass
    return True
