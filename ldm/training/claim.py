"""Which folder a run works in, which checkpoint it resumes from, and that no other run is at work there."""

import fcntl
import os
import re
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from ldm.errors import InputError
from ldm.runtime import check_writable, processes
from ldm.training import checkpoint
from ldm.training.checkpoint import METRICS
from ldm.training.continuity import CONFIG, read_config
from ldm.training.settings import Settings
from ldm.training.state import TrainingState

DEFAULT = Path("runs", "dreambooth")
LOCK = "lock"
LATEST = "latest"  # as a name of a checkpoint: the newest whole one


@dataclass(frozen=True)
class Claim:
    """folder: the run's. named: the checkpoint that --resume-from-checkpoint names, None for `latest` or nothing."""

    folder: Path
    named: Path | None

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def find_checkpoint(self, result: Path, state: TrainingState) -> Path | None:
        """The checkpoint to resume from, if any. result: what a finished run has written. state: of this run.

        Raises InputError if every checkpoint is damaged, or if a finished run left none to resume from.
        """
        back = was_here(self.folder)
        if self.named is not None and not back:
            return self.named
        found = checkpoint.newest(self.checkpoints, state) or self.named
        if found is None and result.exists() and not back:
            raise InputError(
                f"--output-dir {self.folder} holds a finished run's model, and no checkpoint to resume from; "
                "give a new folder"
            )
        return found

    def lock(self) -> TextIO:
        """Makes the folder and locks it until the file is closed. Raises InputError if another run is at work there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = (self.folder / LOCK).open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"--output-dir {self.folder}: another run is at work there; wait, or give another folder"
            ) from None
        # A loader's process must not hold the lock when this one has been killed. It has a copy of the open file.
        alive = weakref.ref(file)
        os.register_at_fork(after_in_child=lambda: (mine := alive()) and mine.close())
        return file

    def tidy(self) -> None:
        """Removes what a killed run has left half-written."""
        checkpoint.clean(self.checkpoints)
        for pattern in (f".{CONFIG}.*", f".{METRICS}.*", ".model.*", "sheets/.*.png.*"):
            for path in self.folder.glob(pattern):
                checkpoint.remove(path)


def choose(settings: Settings) -> Claim:
    """The folder for a run; nothing is written. A new run takes a new or empty folder; one that resumes takes its own.

    Raises InputError for a folder that is something else, and for a named checkpoint that is not whole.
    """
    resume, numbered = settings.resume_from_checkpoint, numbered_folders()
    named = Path(resume).resolve() if resume not in (None, LATEST) else None
    back = [path for path in numbered.values() if was_here(path)]
    if settings.output_dir is not None:
        folder = Path(settings.output_dir)
    elif back:
        folder = back[-1]
    elif resume == LATEST and numbered:
        folder = numbered[max(numbered)]
    elif named is not None and (named.parent.parent / CONFIG).exists():
        folder = named.parent.parent
    else:
        folder = DEFAULT.with_name(f"{DEFAULT.name}-{max(numbered) + 1}") if numbered else DEFAULT
    check_writable(folder, "--output-dir")
    # A run that was killed while it began may have left its lock and a temporary name.
    if folder.is_dir() and any(path.name != LOCK and path.name[0] != "." for path in folder.iterdir()):
        if resume is None and not was_here(folder):
            raise InputError(
                f"--output-dir {folder} is not empty; give a new folder, or --resume-from-checkpoint latest"
            )
        if not (folder / CONFIG).exists():
            raise InputError(f"--output-dir {folder} holds no run to resume: it has no {CONFIG}")
    if named is not None and not was_here(folder):
        if not named.exists() and (folder / "checkpoints" / resume).is_dir():
            named = folder / "checkpoints" / resume  # given by its name alone
        checkpoint.check_whole(named)
    return Claim(folder, named)


def was_here(folder: Path) -> bool:
    """Whether torchrun has restarted us after it lost a worker, and we were at work in that folder before."""
    return processes.restarted() and (read_config(folder) or {}).get("launch") == processes.launch()


def numbered_folders() -> dict[int, Path]:
    """The folders of runs without --output-dir, by number."""
    found = {}
    for path in DEFAULT.parent.glob(f"{DEFAULT.name}*"):
        if number := re.fullmatch(r"-(\d+)|", path.name.removeprefix(DEFAULT.name)):
            found[int(number[1] or 1)] = path
    return dict(sorted(found.items()))
