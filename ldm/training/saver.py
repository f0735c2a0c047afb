"""Writes checkpoints, and keeps disk space for the next one."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ldm.errors import RunError
from ldm.training import checkpoint
from ldm.training.settings import Settings
from ldm.training.state import Diverged, TrainingState


class Reserve:
    """Disk space for one checkpoint, held from the start of a run, so that a full disk loses no step."""

    def __init__(self, folder: Path, size: int):
        self.path, self.size = folder / ".reserve", size

    def hold(self) -> None:
        """Takes the space. Raises OSError, and takes nothing, if the disk has less."""
        try:
            with self.path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, self.size)
        except OSError:
            self.release()
            raise

    def release(self) -> None:
        """Gives the space back to the disk."""
        self.path.unlink(missing_ok=True)


class Saver:
    """Writes the checkpoints of a run into a folder, and deletes old ones."""

    def __init__(self, folder: Path, settings: Settings, size: int):
        """size: bytes of a checkpoint. Raises RunError if the disk has less."""
        self.folder, self.settings, self.saved = folder, settings, -1
        checkpoint.check_space(folder, size)
        self.reserve = Reserve(folder.parent, size)
        self.reserve.hold()

    def save(self, state: TrainingState, config: dict[str, Any], metrics: str) -> None:
        """Writes a checkpoint; on a full disk, into the space that was kept for it.

        Raises RunError if it can't be written, or if it is written and the disk has no space for another.
        """
        state.check_finite()
        last = state.step == self.settings.max_train_steps
        short = checkpoint.free_space(self.folder) < self.reserve.size
        if last or short:
            self.reserve.release()
        checkpoint.save(self.folder, state, config, metrics)
        self.saved = state.step
        checkpoint.prune(self.folder, self.settings.checkpoints_total_limit, state.step)
        if short and not last:
            try:
                self.reserve.hold()
            except OSError:
                raise RunError(
                    f"the disk of {self.folder} is full; step {state.step} is saved: free some space, then "
                    "--resume-from-checkpoint latest"
                ) from None

    @contextmanager
    def rescuing(self, state: TrainingState, save) -> Iterator[None]:
        """Inside, any error but Diverged first saves the last step that was completed."""
        try:
            yield
        except Diverged:
            raise
        except BaseException:
            if state.step != self.saved:
                self.reserve.release()
                with suppress(RunError):
                    save()
                    warnings.warn(
                        f"step {state.step} is saved; --resume-from-checkpoint latest resumes it", stacklevel=2
                    )
            raise
