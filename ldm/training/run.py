"""A run: what its parts share, its folder, and what it writes there. The main process writes; errors reach all."""

import json
import math
import socket
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.dreambooth import Losses
from ldm.errors import InputError, RunError
from ldm.runtime import Stop, World, out_of_memory_named, processes, replacing, written
from ldm.training import checkpoint, claim, continuity
from ldm.training.checkpoint import METRICS
from ldm.training.continuity import CONFIG
from ldm.training.precision import Precision
from ldm.training.settings import SAVES_MEMORY, Settings
from ldm.training.state import Metrics, TrainingState
from ldm.training.tracking import tracker


class Run:
    """settings, world, precision, stop and folder: what the parts of a training program share.

    Nothing is written before `begin`. Raises InputError if the folder is not free for this run.
    """

    def __init__(self, settings: Settings, world: World):
        self.settings, self.world = settings, world
        self.precision, self.stop = Precision(settings.mixed_precision, world.device), Stop()
        self.stopped = False  # whether a signal has come to any process, as of the last step
        batch = settings.train_batch_size * settings.gradient_accumulation_steps * world.size
        self.identity: dict[str, Any] = {"global_batch": batch}
        self.claim: claim.Claim = world.on_main(self._choose)
        self.folder = self.claim.folder

    def _choose(self) -> claim.Claim:
        chosen = claim.choose(self.settings)
        self._check_same_run(chosen.folder, continuity.read_config(chosen.folder))  # as far as is known by now
        return chosen

    def begin(self, state: TrainingState, pictures: Sequence[Path]) -> Path | None:
        """Locks the folder, tidies it and writes config.json. Returns the checkpoint to resume from, if any.

        pictures: the user's own, which a resumed run has to have too. Raises InputError if another run is at work in
        the folder, or was there with other settings; RunError if the disk has too little space.
        """
        self.identity |= {"base": state.base, "tuning": type(state.trainable).__name__, "launch": processes.launch()}
        self.identity["pictures"] = self.world.on_main(lambda: continuity.digest(pictures))
        self.resumed_from: Path | None = self.world.on_main(lambda: self._begin(state))
        with self.world.agreed():
            if not (self.folder / CONFIG).exists():
                raise InputError(f"--output-dir {self.folder} is not on a disk that {socket.gethostname()} shares")
        return self.resumed_from

    def _begin(self, state: TrainingState) -> Path | None:
        with written(self.folder):
            new = not self.folder.exists()
            self._lock = self.claim.lock()
            self.claim.tidy()
            try:
                self._check_same_run(self.folder, continuity.read_config(self.folder))
                found = self.claim.find_checkpoint(state.trainable.result_path(self.folder, self.settings), state)
                self._check_resumable(found, state)
                checkpoint.check_space(self.folder, state.bytes_saved)
            except (InputError, RunError):
                if new:  # and ours: nobody else has the lock
                    checkpoint.remove(self.folder)
                raise
            with replacing(self.folder / CONFIG) as path:
                path.write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")
            with replacing(self.folder / METRICS) as path:
                path.write_text((found / METRICS).read_text(encoding="utf-8") if found else "", encoding="utf-8")
            self.claim.checkpoints.mkdir(exist_ok=True)
            self._track = tracker(self.settings.report_to, self.folder, self.config)
            return found

    def _check_resumable(self, found: Path | None, state: TrainingState) -> None:
        if found is not None:
            numbers = checkpoint.load_state(found)
            self._check_same_run(found, numbers["run"])
            if found == self.claim.named:  # `latest` fits
                checkpoint.check_fits(found, state)
            if numbers["step"] > self.settings.max_train_steps:
                raise InputError(f"{found} is beyond --max-train-steps {self.settings.max_train_steps}")

    def _check_same_run(self, path: Path, before: dict[str, Any] | None) -> None:
        continuity.check_same_run(path, before, self.config, self.settings)

    @property
    def config(self) -> dict[str, Any]:
        """The settings, and what else makes it this run, ready for JSON."""
        return continuity.config(self.settings, self.identity)

    def restore(self, state: TrainingState) -> None:
        """Puts back the state of the checkpoint that `begin` has found, if any."""
        if self.resumed_from is not None:
            checkpoint.restore(self.resumed_from, state)

    # One step

    def reduce(self, losses: Sequence[Losses], norm: Tensor) -> Metrics:
        """The mean losses over all processes and their batches, and the gradients' norm, as numbers.

        The only read from the device in a step. Also learns whether a signal has come to any process.
        """
        *values, norm = torch.cat([torch.stack([*map(torch.stack, losses)]).flatten(), norm[None]]).tolist()
        *sums, signals = self.world.sum([*(math.fsum(values[i::3]) for i in range(3)), float(self.stop.asked)])
        self.stopped = signals > 0
        total, subject, prior = (value / (len(losses) * self.world.size) for value in sums)
        return {"loss": total, "subject_loss": subject, "prior_loss": prior, "grad_norm": norm}

    @contextmanager
    def progress(self, step: int) -> Iterator[None]:
        """Shows a progress bar, which `log` moves. step: where it begins."""
        total = self.settings.max_train_steps
        with tqdm(initial=step, total=total, desc="training", unit="step", disable=not self.world.main) as self._bar:
            yield

    def log(self, metrics: Metrics) -> None:
        """Writes one line of metrics.jsonl, and a point on the tracker's curves."""
        if not metrics.get("skipped"):
            shown = {name.removesuffix("_loss"): f"{metrics[name]:.4f}" for name in metrics if name.endswith("loss")}
            self._bar.update()
            self._bar.set_postfix(shown, refresh=False)
        if self.world.main:
            self._track(metrics["step"], {k: v for k, v in metrics.items() if isinstance(v, float)})
            with written(self.folder / METRICS), (self.folder / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")

    def save_if_due(self, state: TrainingState) -> None:
        """Writes a checkpoint after every --checkpointing-steps updates, and when a signal has come."""
        if self.stopped or (not state.skipped and state.step % self.settings.checkpointing_steps == 0):
            self.world.on_main(lambda: self._save(state))

    def _save(self, state: TrainingState) -> None:
        state.check_finite()
        checkpoint.check_space(self.folder, state.bytes_saved)
        metrics = (self.folder / METRICS).read_text(encoding="utf-8")
        checkpoint.save(self.claim.checkpoints, state, self.config, metrics)
        checkpoint.prune(self.claim.checkpoints, self.settings.checkpoints_total_limit, state.step)

    # Around it

    def enough_memory(self, work: str, doing: str) -> AbstractContextManager:
        """Names running out of memory in one line. work: "training" or "sampling", which says what helps."""
        return out_of_memory_named(self.world.device, doing, SAVES_MEMORY[work])

    def save_result(self, state: TrainingState) -> tuple[Path, list[str]]:
        """Writes what all this was for. Returns its path, and the names of tensors that have no place in it."""
        path = state.trainable.result_path(self.folder, self.settings)
        with written(path):
            state.check_finite()
            return path, state.trainable.result(path, self.settings, state.metadata())
