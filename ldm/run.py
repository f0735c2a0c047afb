"""The folder of a training run: its settings, metrics, sheets, checkpoints and the final model.

Only the main process of a world writes, and what it finds wrong is raised in all of them.
"""

import dataclasses
import fcntl
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm import checkpoint, files
from ldm.distributed import World, restarted
from ldm.errors import InputError, RunError
from ldm.files import Tensors
from ldm.settings import Settings
from ldm.state import TrainingState

DEFAULT = Path("runs", "dreambooth")
CONFIG, METRICS = "config.json", "metrics.jsonl"

# Settings that may differ between a run and the run that goes on from its checkpoint.
FREE = {
    "checkpointing_steps",
    "checkpoints_total_limit",
    "class_data_dir",
    "device",
    "gradient_accumulation_steps",  # the global batch counts, not how it is cut
    "gradient_checkpointing",
    "instance_data_dir",
    "layout",
    "model",  # the fingerprint counts, not the path
    "num_validation_images",
    "output_dir",
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
        self.resumes = settings.resume_from_checkpoint is not None or restarted()
        self.folder = Path(world.share(str(self._choose())))
        taken = self.folder.is_dir() and any(self.folder.iterdir())
        files.insist_writable(self.folder, "--output-dir")
        if taken and not self.resumes:
            raise InputError(
                f"--output-dir {self.folder} is not empty; give a new folder, or --resume-from-checkpoint latest"
            )
        if taken and not (self.folder / CONFIG).exists():
            raise InputError(f"--output-dir {self.folder} holds no run to go on with: it has no {CONFIG}")

    def _choose(self) -> Path:
        if self.settings.output_dir is not None:
            return Path(self.settings.output_dir)
        number, path, last = 1, DEFAULT, DEFAULT
        while path.exists():
            last = path
            number += 1
            path = DEFAULT.with_name(f"{DEFAULT.name}-{number}")
        return last if self.resumes else path

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def start(self, identity: dict[str, Any], bytes_to_save: int) -> Path | None:
        """Locks the folder, tidies it and writes config.json. Returns the checkpoint to go on from, if any.

        identity: what makes it this run beside its settings (the base model's fingerprint, the global batch).
        Raises InputError if another run is at work here, or was here with other settings; RunError if space is short.
        """
        self.identity = identity
        return self._on_main(lambda: self._start(bytes_to_save))

    def _start(self, bytes_to_save: int) -> Path | None:
        try:
            (self.folder / "sheets").mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
            self._lock = (self.folder / "lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"--output-dir {self.folder}: another run is at work there; wait, or give another"
            ) from None
        except OSError as error:
            raise InputError(f"--output-dir {self.folder} can't be written to: {error.strerror}") from None
        found, before = self._find()
        if before is not None and (changes := self._changes(before)):
            raise InputError(f"{found or self.folder} belongs to another run: {'; '.join(changes)}")
        checkpoint.clean(self.checkpoints)
        checkpoint.check_space(self.folder, bytes_to_save)
        self._cut_metrics(checkpoint.step_of(found) if found else 0)
        (self.folder / CONFIG).write_text(json.dumps(self._config(), indent=2) + "\n", encoding="utf-8")
        return found

    def _find(self) -> tuple[Path | None, dict[str, Any] | None]:
        """The checkpoint to go on from, checked, and the settings of the run that it belongs to."""
        wanted = self.settings.resume_from_checkpoint
        if wanted not in (None, "latest"):
            found = checkpoint.checked(Path(wanted))
        else:
            found = checkpoint.newest(self.checkpoints) if self.resumes else None
        if found is not None:
            return found, checkpoint.load(found)[2]["run"]
        config = self.folder / CONFIG
        return None, json.loads(config.read_text(encoding="utf-8")) if config.exists() else None

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
            checkpoint.check_space(self.folder, state.size())
            numbers = {**state.numbers(), "run": self._config()}
            checkpoint.save(self.checkpoints, state.step, state.save_model, state.tensors(), numbers)
            checkpoint.prune(self.checkpoints, self.settings.checkpoints_total_limit)

        self._on_main(write)

    def load(self, found: Path) -> tuple[Tensors, Tensors, dict[str, Any]]:
        """The model's tensors, the training tensors and the numbers of a checkpoint that `start` has found."""
        return checkpoint.load(found)

    def sheet(self, name: str) -> Path:
        return self.folder / "sheets" / f"{name}.png"

    def log(self, **metrics: Any) -> None:
        """One line of metrics.jsonl."""
        if self.world.main:
            with (self.folder / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")

    def _cut_metrics(self, step: int) -> None:
        """Takes away the lines of steps that will be done again."""
        path = self.folder / METRICS
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            temporary = path.with_name(f".{METRICS}.tmp")
            temporary.write_text("".join(kept), encoding="utf-8")
            temporary.replace(path)

    @property
    def model_path(self) -> Path:
        return self.folder / ("model.safetensors" if self.settings.layout == "official" else "model")

    def _on_main(self, work: Callable[[], Any]) -> Any:
        """Runs something on the main process and gives its result, or its error, to all."""
        result = error = None
        if self.world.main:
            try:
                result = work()
            except (InputError, RunError) as caught:
                error = caught
        result, error = self.world.share((result, error))
        if error is not None:
            raise error
        return result
