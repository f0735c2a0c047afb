"""The folder of a training run: its settings, metrics, sheets, checkpoints and the final model.

Only the main process of a world writes, and what it finds wrong is raised in all of them.
"""

import dataclasses
import fcntl
import hashlib
import json
import re
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.errors import InputError, RunError
from ldm.formats import Tensors
from ldm.runtime import files
from ldm.runtime.processes import World, launch, restarted
from ldm.training import checkpoint
from ldm.training.checkpoint import METRICS
from ldm.training.settings import Settings
from ldm.training.state import TrainingState
from ldm.training.tracking import tracker

DEFAULT = Path("runs", "dreambooth")
CONFIG, LOCK = "config.json", "lock"
LATEST = "latest"
MODELS = {"official": "model.safetensors", "diffusers": "model"}  # names of the final model by its layout

# Settings that may differ between a run and the run that goes on from its checkpoint.
FREE = {
    "checkpointing_steps",
    "checkpoints_total_limit",
    "class_data_dir",
    "device",
    "gradient_accumulation_steps",  # the global batch counts, not how it is cut
    "gradient_checkpointing",
    "instance_data_dir",  # the pictures count, not where they lie
    "launch",
    "layout",
    "model",  # the fingerprint counts, not the path
    "num_validation_images",
    "output_dir",
    "report_to",
    "resume_from_checkpoint",
    "sample_batch_size",
    "train_batch_size",
    "validation_prompt",
}


class Run:
    """Claims a folder for a run; nothing is made or written before `start`.

    A new run wants a new or empty folder; one that resumes, or that torchrun restarts, wants its own.
    Raises InputError if the folder is something else.
    """

    def __init__(self, settings: Settings, world: World):
        self.settings, self.world = settings, world
        batch = settings.train_batch_size * settings.gradient_accumulation_steps * world.size
        self.identity: dict[str, Any] = {"global_batch": batch}
        self.folder: Path = world.on_main(self._claim)

    def _claim(self) -> Path:
        wanted, numbered = self.settings.resume_from_checkpoint, _numbered()
        self._named = Path(wanted).resolve() if wanted not in (None, LATEST) else None
        back = [path for path in numbered.values() if self._is_back(path)]
        if self.settings.output_dir is not None:
            folder = Path(self.settings.output_dir)
        elif back:
            folder = back[-1]
        elif wanted == LATEST and numbered:
            folder = numbered[max(numbered)]
        elif self._named is not None and (self._named.parent.parent / CONFIG).exists():
            folder = self._named.parent.parent
        else:
            folder = DEFAULT.with_name(f"{DEFAULT.name}-{max(numbered) + 1}") if numbered else DEFAULT
        files.check_writable(folder, "--output-dir")
        # A run that was killed while it began may have left its lock and a temporary name.
        if folder.is_dir() and any(path.name != LOCK and path.name[0] != "." for path in folder.iterdir()):
            if wanted is None and not self._is_back(folder):
                raise InputError(
                    f"--output-dir {folder} is not empty; give a new folder, or --resume-from-checkpoint latest"
                )
            if not (folder / CONFIG).exists():
                raise InputError(f"--output-dir {folder} holds no run to go on with: it has no {CONFIG}")
        if self._named is not None and not self._is_back(folder):
            if not self._named.exists() and (folder / "checkpoints" / wanted).is_dir():
                self._named = folder / "checkpoints" / wanted  # its name alone will do
            checkpoint.check_whole(self._named)
        self._check_unchanged(folder, _read_config(folder))  # as far as is known before the model is read
        return folder

    def _is_back(self, folder: Path) -> bool:
        """Whether torchrun has started us again after a worker was lost, and we were at work in that folder before."""
        return restarted() and (_read_config(folder) or {}).get("launch") == launch()

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def start(self, identity: dict[str, Any], bytes_to_save: int) -> Path | None:
        """Locks the folder, tidies it and writes config.json. Returns the checkpoint to go on from, if any.

        identity: what makes it this run beside its settings (base model, pictures, global batch).
        Raises InputError if another run is at work here, or was here with other settings; RunError if space is short.
        """
        self.identity |= identity | {"launch": launch()}
        found = self.world.on_main(lambda: self._start(bytes_to_save))
        with self.world.agreed():
            if not (self.folder / CONFIG).exists():
                raise InputError(f"--output-dir {self.folder} is not on a disk that {socket.gethostname()} shares")
        return found

    def _start(self, bytes_to_save: int) -> Path | None:
        with files.written(self.folder):
            new = not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / LOCK).open("w")
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"--output-dir {self.folder}: another run is at work there; wait, or give another"
                ) from None
            self._tidy()
            try:
                found = self._find()
                self._check_same_run(found)
                checkpoint.check_space(self.folder, bytes_to_save)
            except (InputError, RunError):
                if new:  # and ours: nobody else has the lock
                    checkpoint.remove(self.folder)
                raise
            with files.replacing(self.folder / CONFIG) as path:
                path.write_text(json.dumps(self._config(), indent=2) + "\n", encoding="utf-8")
            with files.replacing(self.folder / METRICS) as path:
                path.write_text((found / METRICS).read_text(encoding="utf-8") if found else "", encoding="utf-8")
            self.checkpoints.mkdir(exist_ok=True)
            self._track = tracker(self.settings.report_to, self.folder, self._config())
            return found

    def _tidy(self) -> None:
        """Removes what a killed run has left half-written."""
        checkpoint.clean(self.checkpoints)
        for pattern in (f".{CONFIG}.*", f".{METRICS}.*", ".model.*", "sheets/.*.png.*"):
            for path in self.folder.glob(pattern):
                checkpoint.remove(path)

    def _find(self) -> Path | None:
        """The checkpoint to go on from."""
        back = self._is_back(self.folder)
        if self._named is not None and not back:
            return self._named
        found = checkpoint.newest(self.checkpoints) or self._named
        finished = any((self.folder / name).exists() for name in MODELS.values())
        if found is None and finished and not back:
            raise InputError(
                f"--output-dir {self.folder} holds a finished run's model, and no checkpoint to go on from; "
                "give a new folder"
            )
        return found

    def _check_same_run(self, found: Path | None) -> None:
        if found is not None:
            state = checkpoint.load_state(found)
            self._check_unchanged(found, state["run"])
            if state["step"] > self.settings.max_train_steps:
                raise InputError(f"{found} is beyond --max-train-steps {self.settings.max_train_steps}")
        self._check_unchanged(self.folder, _read_config(self.folder))

    def _check_unchanged(self, path: Path, before: dict[str, Any] | None) -> None:
        if before is not None and (changes := self._changes(before)):
            raise InputError(f"{path} belongs to another run: {'; '.join(changes)}")

    def _config(self) -> dict[str, Any]:
        return json.loads(json.dumps({**dataclasses.asdict(self.settings), **self.identity}))

    def _changes(self, before: dict[str, Any]) -> list[str]:
        """What makes this another run than the one with that configuration, a phrase each."""
        free = FREE | ({"max_train_steps"} if self.settings.lr_scheduler == "constant" else set())
        return [
            f"{name} was {before.get(name)!r} and is {value!r}"
            for name, value in self._config().items()
            if name not in free and before.get(name) != value
        ]

    def save(self, state: TrainingState) -> None:
        """Writes a checkpoint, and deletes old ones when it is safe. Raises RunError if the disk won't take it."""

        def write() -> None:
            state.check_finite()
            checkpoint.check_space(self.folder, state.size)
            metrics = (self.folder / METRICS).read_text(encoding="utf-8")
            numbers = {**state.numbers(), "run": self._config()}
            checkpoint.save(self.checkpoints, state.step, state.save_model, state.tensors(), numbers, metrics)
            checkpoint.prune(self.checkpoints, self.settings.checkpoints_total_limit, state.step)

        self.world.on_main(write)

    def load(self, found: Path) -> tuple[Tensors, Tensors, dict[str, Any]]:
        """The model's tensors, the training tensors and the numbers of a checkpoint that `start` has found."""
        return checkpoint.load(found)

    def log(self, **metrics: Any) -> None:
        """One line of metrics.jsonl, and a point on the tracker's curves."""
        if self.world.main:
            self._track(metrics["step"], {k: v for k, v in metrics.items() if isinstance(v, float)})
            with files.written(self.folder / METRICS), (self.folder / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")

    def sheet(self, name: str) -> Path:
        return self.folder / "sheets" / f"{name}.png"

    def save_sheet(self, name: str, sheet: Image.Image) -> None:
        with files.written(self.sheet(name)), files.replacing(self.sheet(name)) as path:
            sheet.save(path, format="PNG")

    def save_model(self, state: TrainingState) -> list[str]:
        """Writes the model that all this was for. Returns the names of tensors that its layout has no place for."""
        with files.written(self.model_path):
            state.check_finite()
            return state.sd.save(self.model_path, self.settings.layout, metadata=state.metadata())

    @property
    def model_path(self) -> Path:
        return self.folder / MODELS[self.settings.layout]


def _numbered() -> dict[int, Path]:
    """The folders that runs without --output-dir have taken, the last one last."""
    found = {}
    for path in DEFAULT.parent.glob(f"{DEFAULT.name}*"):
        if number := re.fullmatch(r"-(\d+)|", path.name.removeprefix(DEFAULT.name)):
            found[int(number[1] or 1)] = path
    return dict(sorted(found.items()))


def _read_config(folder: Path) -> dict[str, Any] | None:
    path = folder / CONFIG
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}); give another --output-dir") from None


def digest(paths: Iterable[Path]) -> str:
    """SHA-256 over the contents of files, in their order."""
    return hashlib.sha256("".join(checkpoint.sha256(path) for path in paths).encode()).hexdigest()
