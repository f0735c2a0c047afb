"""A run: its folder, and the objects that its parts share. The main process writes; its errors are raised in all."""

import json
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from ldm.data import Example, Subject
from ldm.dreambooth import Losses
from ldm.errors import InputError, RunError
from ldm.images import Picture
from ldm.runtime import Stop, Stopped, World, out_of_memory_named, processes, progress_bar, replacing, written
from ldm.settings import SAVES_MEMORY, SETTINGS, Settings, to_toml
from ldm.training import checkpoint, claim
from ldm.training.continuity import CONFIG, Identity, digest, read_config, sums, what_is_taught, what_trains
from ldm.training.log import Log, Reporter
from ldm.training.numbers import Numbers, SubjectLosses
from ldm.training.precision import Precision
from ldm.training.saver import Saver
from ldm.training.state import Metrics, TrainingState
from ldm.training.tracking import Tracker

PREFLIGHT = "preflight.json"


class Run:
    """settings, world, precision, stop, folder: shared by all parts of a run. Raises InputError for a folder in use.

    Inside `with run:`, a signal sets a flag. An error before `begin` leaves no file.
    """

    def __init__(self, settings: Settings, world: World):
        settings.check_processes(world.size)
        self.settings, self.world = settings, world
        self.precision, self.stop = Precision(settings.mixed_precision, world.device, settings.train_dtype), Stop()
        self.progress_bar = partial(progress_bar, self.stop, show=world.main)
        self.stopped = False  # whether a signal has come to any process, as of the last step
        self.held_out: list[Example] = []  # pictures of the subjects for validation alone
        self.identity = Identity(settings, global_batch=settings.photographs_of_step * world.size)
        self.subject_losses = SubjectLosses((), world.device)  # of several subjects, set before training
        self.notes: list[dict[str, Any]] = []  # what `preflight` has said, ready for JSON
        self.state = self._lock = self.saver = self.lines = None  # the last three in the main process alone
        self.claim: claim.Claim = world.on_main(self._choose)
        self.folder = self.claim.folder

    def _choose(self) -> claim.Claim:
        chosen, self._lock = claim.choose(self.settings)
        self.identity.check(chosen.folder, read_config(chosen.folder))  # with the parts known so far
        return chosen

    def __enter__(self) -> "Run":
        self.stop.__enter__()
        return self

    def __exit__(self, kind: type | None, *error: object) -> bool:
        self.stop.__exit__(kind, *error)
        if self.saver is not None:
            self.saver.reserve.release()
        elif self.world.main:
            self.claim.undo()
        if is_stop := kind is Stopped:
            self.world.print_main(_farewell(self))
        return is_stop

    def begin(self, state: TrainingState, subjects: Sequence[Subject], own: Sequence[Picture]) -> Path | None:
        """Locks the folder, tidies it and writes the settings. Returns the checkpoint to resume from, if any.

        own: the user's class pictures; a resumed run must have the same, and the same photographs, captions and masks.
        Raises InputError if another run uses the folder, or used it with other settings; RunError for too little space.
        """
        self.identity.parts |= {
            "base": state.base,
            **what_trains(state.trainable),
            "launch": processes.launch(),
            "pictures": digest([*(example.picture for one in subjects for example in one.examples), *own]),
            **what_is_taught(subjects),
        } | ({"held_out": sums(example.picture for example in self.held_out)} if self.held_out else {})
        self.identity.check_everywhere(self.world)
        self.resumed_from: Path | None = self.world.on_main(lambda: self._begin(state))
        with self.world.agreed():
            if not (self.folder / CONFIG).exists():
                raise InputError(f"--output-dir {self.folder} is not on a disk that {socket.gethostname()} shares")
        return self.resumed_from

    def _begin(self, state: TrainingState) -> Path | None:
        with written(self.folder):
            new = not self.folder.exists()
            self._lock = self._lock or self.claim.lock()
            self.claim.tidy()
            try:
                self.identity.check(self.folder, read_config(self.folder))
                found = self.claim.find_checkpoint(state, self.identity)
                checkpoint.check_space(self.folder, state.bytes_needed)
            except (InputError, RunError):
                if new:  # and only this run uses it: it has the lock
                    checkpoint.remove(self.folder)
                raise
            _write_settings(self, found)
            _open_files(self, state, found)
            return found

    def identify(self, **parts: Any) -> None:
        """Adds parts to the run's identity. Raises InputError if those of the run that it resumes differ."""
        self.identity.parts |= parts
        if self.resumed_from is not None:
            self.identity.check_checkpoint(self.resumed_from)

    # Training

    @contextmanager
    def together(self) -> Iterator[None]:
        """Wraps work before training, without collectives: an error or a signal in any process ends it in all."""
        with self.world.agreed(), self.stop.at_once():
            yield

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Calls `work` in the main process alone; a signal ends it. All processes get its result, or its error."""

        def interruptible() -> Any:
            with self.stop.at_once():
                return work()

        return self.world.on_main(interruptible)

    def restore(self, state: TrainingState) -> None:
        """Loads the state of the checkpoint that `begin` has found, if any."""
        if self.resumed_from is not None:
            checkpoint.restore(self.resumed_from, state)

    @contextmanager
    def training(self, state: TrainingState) -> Iterator[None]:
        """Shows a progress bar, which `log` moves. On any error but Diverged, saves the last step, then raises it."""
        self.state = state
        bar = {"initial": state.step, "total": self.settings.max_train_steps, "desc": "training", "unit": "step"}
        with tqdm(**bar, disable=not self.world.main) as bar, self.enough_memory("training", "while it trained"):
            self._reporter = Reporter(bar, self.lines, self.settings.rows_of_step * self.world.size)
            saver = self.saver  # None but in the main process
            with saver.rescuing(state, lambda: self._save(state)) if saver is not None else nullcontext():
                yield

    def reduce(self, losses: Sequence[Losses], norm: Tensor) -> Numbers:
        """The losses of all processes and their batches, and the gradients' norm, on their way to the host."""
        return Numbers(self.world, losses, self.subject_losses, norm, self.stop.asked)

    def log(self, numbers: Numbers, metrics: Metrics) -> None:
        """Reports the step when its numbers have arrived: on a GPU while it runs the next step, else at once.

        Sets `stopped` if a signal has come to any process. Raises Diverged if a loss or the norm is not finite.
        """
        self._reporter.add(numbers, metrics)
        if self.state.waits or not self.world.is_asynchronous:
            self._reporter.finish()
        self.stopped = self._reporter.stopped

    def save_if_due(self, state: TrainingState) -> None:
        """Saves after every --checkpointing-steps updates, after the last one, and when a signal has come."""
        due = state.step % self.settings.checkpointing_steps == 0 or state.step == self.settings.max_train_steps
        if self.stopped or (due and not state.skipped):
            self.settle()
            self.world.on_main(lambda: self._save(state))

    def settle(self) -> None:
        """Waits for the numbers of the last step, and reports it."""
        self._reporter.finish()
        self.stopped = self.stopped or self._reporter.stopped

    def _save(self, state: TrainingState) -> None:
        self._reporter.finish()
        self.saver.save(state, self.identity.config, self.lines.metrics, self.lines.validation)

    def enough_memory(self, work: str, doing: str) -> AbstractContextManager:
        """Wraps work: reports out of memory in one line. work: "training" or "sampling", which selects the advice."""
        return out_of_memory_named(self.world.device, doing, SAVES_MEMORY[work])


def _open_files(run: Run, state: TrainingState, found: Path | None) -> None:
    """Opens what the run writes to. found: the checkpoint that it resumes from."""
    lines = checkpoint.lines_of(found) if found else ("", "")
    run.lines = Log(run.folder, *lines, Tracker(run.settings.report_to, run.folder, run.identity.config))
    run.claim.checkpoints.mkdir(exist_ok=True)
    run.saver = Saver(run.claim.checkpoints, run.settings, state.bytes_needed)


def _write_settings(run: Run, found: Path | None) -> None:
    """Writes what the run was told, and what `preflight` said when it began. found: as in `_open_files`."""
    texts = {
        SETTINGS: to_toml(run.settings, run.folder / SETTINGS, run.world.size, run.identity.parts["program"]),
        PREFLIGHT: json.dumps(run.notes, indent=2) + "\n",
        CONFIG: json.dumps(run.identity.config, indent=2) + "\n",
    }
    if found and (run.folder / PREFLIGHT).exists():
        del texts[PREFLIGHT]
    for name, text in texts.items():
        with replacing(run.folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="replace")  # a path need not be UTF-8


def _farewell(run: Run) -> str:
    """What is printed when a run ends before its last step."""
    if run.settings.dry_run:
        return "dry run: nothing was written"
    when = "before training" if run.state is None else f"after step {run.state.step}"
    return f"stopped {when}; --resume-from-checkpoint latest resumes it"
