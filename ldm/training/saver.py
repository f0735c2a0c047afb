"""Writes checkpoints, and keeps disk space for the next one."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ldm.errors import RunError
from ldm.settings import Settings
from ldm.training import checkpoint
from ldm.training.state import Diverged, TrainingState


class Reserve:
    """Disk space for one checkpoint, and for best/ if the run keeps one, so that a disk that fills up costs no step.

    It is held from the start of a run. An unlinked file holds the space, so it is free again as soon as the process
    ends, however it ends. macOS has no call that gives space to a file; there nothing is held.
    """

    def __init__(self, folder: Path, size: int):
        self.path, self.size, self.file = folder / ".reserve", size, None

    def hold(self) -> None:
        """Takes the space. Raises OSError, with nothing taken, if the disk has less."""
        self.file = self.path.open("wb")
        self.path.unlink()
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self.file.fileno(), 0, self.size)
        except OSError:
            self.release()
            raise

    def release(self) -> None:
        """Gives the space back to the disk."""
        if self.file is not None:
            self.file.close()
            self.file = None


class Saver:
    """Writes the checkpoints of a run into a folder, and deletes old ones."""

    def __init__(self, folder: Path, settings: Settings, size: int):
        """size: bytes of a checkpoint, and of best/ if the run keeps one. Raises RunError if the disk has less."""
        self.folder, self.settings, self.saved = folder, settings, -1
        checkpoint.check_space(folder, size)
        self.reserve = Reserve(folder.parent, size)
        self.reserve.hold()
        os.register_at_fork(after_in_child=self.reserve.release)

    def write(self, work: Callable[[], Any]) -> None:
        """Calls `work`, which writes files; where the disk is full, into the space that is held for them.

        Raises RunError if the disk refuses them.
        """
        if checkpoint.free_space(self.folder) < self.reserve.size:
            self.reserve.release()
        try:
            work()
        except RunError:
            if self.reserve.file is None:
                raise
            self.reserve.release()
            work()

    def write_best(self, work: Callable[[], Any]) -> None:
        """Calls `work`, which writes best/, as `write` does, and holds the space again if the disk has it."""
        self.write(work)
        if self.reserve.file is None:
            with suppress(OSError):
                self.reserve.hold()

    def save(self, state: TrainingState, config: dict[str, Any], *lines: str) -> None:
        """Writes a checkpoint. lines: of metrics.jsonl and validation.jsonl.

        Raises RunError if the disk refuses it, or has no space for another.
        """
        state.check_finite()
        last = state.step == self.settings.max_train_steps
        if last:
            self.reserve.release()
        self.write(lambda: checkpoint.save(self.folder, state, config, *lines))
        self.saved = state.step
        checkpoint.prune(self.folder, self.settings.checkpoints_total_limit, state.step)
        if self.reserve.file is None and not last:
            try:
                self.reserve.hold()
            except OSError:
                raise RunError(
                    f"the disk of {self.folder} is full; step {state.step} is saved: free some space, then "
                    "--resume-from-checkpoint latest"
                ) from None

    @contextmanager
    def rescuing(self, state: TrainingState, save: Callable[[], None]) -> Iterator[None]:
        """Inside, any error but Diverged first saves the last complete step."""
        self.saved = state.step
        try:
            yield
        except Diverged:
            raise
        except BaseException:
            if state.step != self.saved and state.is_whole:
                self.reserve.release()
                try:
                    save()
                    said = f"step {state.step} is saved; --resume-from-checkpoint latest resumes it"
                except RunError as error:
                    said = f"step {state.step} is not saved: {error}"
                warnings.warn(said, stacklevel=2)
            raise
