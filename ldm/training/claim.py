"""Chooses the folder of a run and the checkpoint to resume from, and locks the folder against other runs."""

import fcntl
import os
import re
import weakref
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from ldm.errors import InputError
from ldm.runtime import check_writable, exists, list_folder, processes, written
from ldm.settings import SETTINGS, Settings
from ldm.training import checkpoint
from ldm.training.continuity import CONFIG, Identity, read_config
from ldm.training.state import TrainingState

DEFAULT = Path("runs", "dreambooth")
LOCK = "lock"
LATEST = "latest"  # names the newest whole checkpoint


@dataclass(frozen=True)
class Claim:
    """folder: the run's. named: the checkpoint that --resume-from-checkpoint names, None for `latest` or nothing.

    made: the folders that `choose` has made, deepest first.
    """

    folder: Path
    named: Path | None
    made: tuple[Path, ...] = ()

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def find_checkpoint(self, state: TrainingState, identity: Identity) -> Path | None:
        """The checkpoint to resume from, if any: whole, of this run, and with the content that the state needs.

        Raises InputError if every checkpoint is damaged, or if a finished run has none.
        """
        back = is_restart(self.folder)
        found = checkpoint.newest(self.checkpoints, state) if self.named is None or back else None
        result = state.trainable.result_path(self.folder, state.settings)
        if found is None and self.named is None and result.exists() and not back:
            raise InputError(
                f"--output-dir {self.folder} holds a finished run's model, and no checkpoint to resume from; "
                "give a new folder"
            )
        if found is not None:
            identity.check_checkpoint(found)
        elif self.named is not None:
            identity.check_checkpoint(self.named)
            checkpoint.check_fits(self.named, state)
        return found or self.named

    def lock(self) -> TextIO:
        """Makes the folder and locks it until the file is closed. Raises InputError if another run uses it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if (file := lock(self.folder)) is None:
            raise InputError(f"--output-dir {self.folder}: another run is at work there; wait, or give another folder")
        return file

    def tidy(self) -> None:
        """Removes half-written files of a killed run."""
        checkpoint.clean(self.checkpoints)
        checkpoint.clean(self.folder)  # best/
        for pattern in (
            f".{CONFIG}.*",
            f".{SETTINGS}.*",
            ".preflight.json.*",
            ".metrics.jsonl.*",
            ".validation.jsonl.*",
            ".report.html.*",
            ".model.*",
            ".*.safetensors.*",
            ".reserve",
            "sheets/.*.png.*",
        ):
            for path in self.folder.glob(pattern):
                checkpoint.remove(path)

    def undo(self) -> None:
        """Removes the folders that `choose` has made, if they hold only the lock."""
        for path in self.made:
            if path == self.folder:
                (path / LOCK).unlink(missing_ok=True)
            with suppress(OSError):
                path.rmdir()


def lock(folder: Path) -> TextIO | None:
    """Locks a folder until the file is closed, or the process ends. None if another process has it locked."""
    file = (folder / LOCK).open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_there = os.path.samestat(os.fstat(file.fileno()), os.stat(folder / LOCK))  # and not removed meanwhile
    except (BlockingIOError, FileNotFoundError):
        is_there = False
    if not is_there:
        file.close()
        return None
    # A loader's process inherits the open file; it must not hold the lock after this process was killed.
    alive = weakref.ref(file)
    os.register_at_fork(after_in_child=lambda: (mine := alive()) and mine.close())
    return file


def choose(settings: Settings) -> tuple[Claim, TextIO | None]:
    """The folder for a run: a new run takes a new or empty one, a resumed run takes its own.

    Without --output-dir a new run takes the next numbered folder and locks it; nothing else is written. Raises
    InputError for any other folder, and for a named checkpoint that is not whole.
    """
    resume, numbered = settings.resume_from_checkpoint, numbered_folders()
    named = Path(resume).resolve() if resume not in (None, LATEST) else None
    back = [path for path in numbered.values() if is_restart(path)]
    if settings.output_dir is not None:
        folder = Path(settings.output_dir)
    elif back:
        folder = back[-1]
    elif resume == LATEST and numbered:
        folder = numbered[max(numbered)]
    elif named is not None and exists(named.parent.parent / CONFIG):
        folder = named.parent.parent
    elif named is not None and numbered and Path(resume).name == resume and not exists(named):
        folder = numbered[max(numbered)]  # given by its name only: of the run that `latest` resumes
    elif named is not None:
        checkpoint.check_whole(named)
        raise InputError(f"--resume-from-checkpoint {named} does not lie in a run's folder: give --output-dir, too")
    else:
        return take_number(max(numbered, default=1))
    check_writable(folder, "--output-dir")
    if folder.is_dir() and not is_unused(folder):
        if resume is None and not is_restart(folder):
            raise InputError(
                f"--output-dir {folder} is not empty; give a new folder, or --resume-from-checkpoint latest"
            )
        if not (folder / CONFIG).exists():
            raise InputError(f"--output-dir {folder} holds no run to resume: it has no {CONFIG}")
    if named is not None and not is_restart(folder):
        if not exists(named) and Path(resume).name == resume:
            named = folder / "checkpoints" / resume  # given by its name only
        checkpoint.check_whole(named)
    return Claim(folder, named), None


def take_number(number: int) -> tuple[Claim, TextIO]:
    """Makes and locks the first folder, from this number on, that no run uses or has used."""
    while True:
        folder = DEFAULT if number == 1 else DEFAULT.with_name(f"{DEFAULT.name}-{number}")
        check_writable(folder, "--output-dir")
        made = tuple(path for path in (folder, *folder.parents) if not path.exists())
        with written(folder):
            folder.mkdir(parents=True, exist_ok=True)
            file = lock(folder) if is_unused(folder) else None
        if file is not None and is_unused(folder):
            return Claim(folder, None, made), file
        number += 1


def is_unused(folder: Path) -> bool:
    """Whether a folder is empty, or holds only files of a run that was killed while it began."""
    return all(path.name == LOCK or path.name[0] == "." for path in list_folder(folder))


def is_restart(folder: Path) -> bool:
    """Whether torchrun restarted this process, after it lost a worker, for the run in that folder."""
    return processes.restarted() and (read_config(folder) or {}).get("launch") == processes.launch()


def numbered_folders() -> dict[int, Path]:
    """The folders of runs without --output-dir, by number."""
    found = {}
    for path in DEFAULT.parent.glob(f"{DEFAULT.name}*"):
        if number := re.fullmatch(r"-(\d+)|", path.name.removeprefix(DEFAULT.name)):
            found[int(number[1] or 1)] = path
    return dict(sorted(found.items()))
