"""What a run measures while it trains: losses on a fixed grid, language drift, a sheet of pictures, the best model.

Nothing of it changes the training: it computes no gradients, and its random numbers are functions of the seed.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from ldm import images, rng
from ldm.data import Example, Subject, read_examples, words_of
from ldm.errors import InputError, RunError
from ldm.runtime import Stopped
from ldm.settings import Settings
from ldm.training import ClassPictures, Run, TrainingState, checkpoint, sheets
from ldm.validation import best, grid
from ldm.validation.advice import Line, advise, of_class
from ldm.validation.drift import Drift, is_wanted

LOSSES = {"validation_loss": "held-out loss", "training_loss": "photographs", "class_loss": "class"}


def hold_out(settings: Settings, subjects: Sequence[Subject]) -> tuple[list[Subject], list[Example]]:
    """The subjects with the photographs to train on, and the held-out pictures: some of each subject's photographs,
    or those of a folder, which show the first subject.

    Raises InputError if no photograph is left, or if a held-out picture can't be read.
    """
    if settings.validation_data_dir is not None:
        first = settings.taught[0]
        words = words_of(
            first.instance_prompt, first.class_prompt, settings.placeholder_token, settings.initializer_token
        )
        return list(subjects), read_examples(settings.validation_data_dir, first.instance_prompt, words)
    left, held_out = [], []
    for subject in subjects:
        count = len(subject.examples)
        if settings.hold_out >= count:
            raise InputError(
                f"--hold-out {settings.hold_out} leaves none of {count} photographs to train on; give a lower number"
            )
        order = torch.randperm(count, generator=rng.generator(settings.seed, "hold out", subject.name)).tolist()
        chosen = set(order[: settings.hold_out])
        held_out += [example for i, example in enumerate(subject.examples) if i in chosen]
        left.append(replace(subject, examples=[e for i, e in enumerate(subject.examples) if i not in chosen]))
    return left, held_out


class Validation:
    """Measures every --validation-steps, before the first step and after the last one. Without the flag does nothing.

    Made while the model is still the base model and the autoencoder whole.
    """

    def __init__(
        self, run: Run, state: TrainingState, subjects: Sequence[Subject], class_pictures: Sequence[ClassPictures]
    ):
        self.run, self.settings, self.trainable = run, run.settings, state.trainable
        if self.settings.validation_steps is None:
            return
        with run.together():
            self.parts = self._parts(subjects, class_pictures)
        self.drift = self._begin_drift()
        self.done = {line["step"] for line in self._lines()}
        if not self.settings.holds_out:
            self._say("no held-out pictures (--validation-data-dir or --hold-out): no best model is kept in best/")

    def _parts(self, subjects: Sequence[Subject], class_pictures: Sequence[ClassPictures]) -> list[grid.Part]:
        encode = partial(grid.make_part, self.run, self.trainable.sd)
        photographs = some([(example, subject) for subject in subjects for example in subject.examples])
        parts = [encode("training_loss", [example for example, _ in photographs])]
        if self.run.held_out:
            parts.append(encode("validation_loss", self.run.held_out))
        paths = [(path, pictures.recipe["prompt"]) for pictures in class_pictures for path in pictures.paths]
        if paths:
            examples = [Example(images.read_picture(path), prompt) for path, prompt in some(paths)]
            parts.append(encode("class_loss", examples))
        if self.settings.predicts_prior:  # as in a step: each photograph's noisy latents, with its subject's class
            prompts = tuple(subject.class_prompt for _, subject in photographs)
            parts.append(replace(parts[0], name="class_loss", prompts=prompts, by_base=True))
        return parts

    def _begin_drift(self) -> Drift | None:
        """None if drift is not wanted, or can't be measured; a line then says why."""
        given = self.settings
        if not is_wanted(given):
            return None
        prompts = list(dict.fromkeys(subject.class_prompt for subject in given.taught if subject.class_prompt))
        if not prompts:
            self._say("no --class-prompt: language drift is not measured")
            return None
        with self._optional("language drift"):
            return Drift(self.run, self.trainable, prompts, self.parts[0])
        return None

    def is_due(self, state: TrainingState) -> bool:
        """Whether the state should be measured now, and has not been."""
        given = self.settings
        if given.validation_steps is None or state.skipped or state.step in self.done:
            return False
        return state.step % given.validation_steps == 0 or state.step == given.max_train_steps

    def measure(self, state: TrainingState) -> None:
        """Measures the state, with averaged weights if the run keeps averages. A signal ends it without a trace.

        Out of memory and pictures of NaN cost what was measured, and a warning. Raises RunError if validation.jsonl or
        best/ can't be written.
        """
        self.run.settle()
        if self.run.stopped:
            return
        began = time.perf_counter()
        try:
            with state.averaged():
                line: Line = {"step": state.step}
                with self._optional("losses"):
                    line |= grid.losses(self.run, self.trainable, self.parts)
                with self._optional("language drift"):
                    line |= self._drift(state.step)
                if 0 < state.step < self.settings.max_train_steps:  # else the run makes its sheets before and after
                    with self._optional("sheet"):
                        self.run.world.on_main(lambda: self._sheet(state.step))
                line["seconds"] = round(time.perf_counter() - began, 4)
                self.done.add(state.step)
                self.run.world.on_main(lambda: self.run.lines.add_validation(line))
                self._say(described(line))
                lines = self._lines()
                if self.settings.keeps_best and best.is_best(lines, self.settings):
                    best.keep(self.run, state, lines)
        except Stopped:
            self.run.stopped = True

    def tell_advice(self) -> None:
        """Prints which step the measures speak for, and where it is."""
        if self.settings.validation_steps is None:
            return
        advice = advise(self._lines())
        if advice.step is not None:
            self._say(f"advice: take step {advice.step}, {self._place(advice.step)}: {advice.reason}")

    def _place(self, step: int) -> str:
        """Where the model of a step is."""
        if step == self.settings.max_train_steps:
            return "the last one"
        if best.kept_step(self.run.folder) == step:
            return f"which is in {self.run.folder / best.FOLDER}"
        if (path := checkpoint.path_of(self.run.claim.checkpoints, step)).exists():
            return f"which is in {path}"
        return f"which is not saved (--max-train-steps {step} makes it)"

    def _lines(self) -> list[Line]:
        """The lines of validation.jsonl so far, in all processes."""
        return self.run.world.on_main(lambda: self.run.lines.validations)

    def _drift(self, step: int) -> Line:
        if self.drift is None:
            return {}
        return self.drift.measure() if step > 0 else {"drift": 0.0, "diversity": 1.0}  # by definition

    def _sheet(self, step: int) -> None:
        path = sheets.make_step_sheet(self.run, self.trainable.sd, step)
        self.run.lines.tracker.picture(step, "sheet", path)

    @contextmanager
    def _optional(self, what: str) -> Iterator[None]:
        """Inside, a RunError, which has been raised in all processes, costs what is measured there, and a warning."""
        try:
            yield
        except RunError as error:
            self._say(f"warning: no {what}: {error}")

    def _say(self, text: str) -> None:
        if self.run.world.main:
            tqdm.write(text)  # above the progress bar


def described(line: Line) -> str:
    """A line of validation.jsonl in words."""
    parts = [f"{LOSSES[name]} {line[name]:.4f}" for name in LOSSES if name in line]
    parts += [of_class(line)] if "drift" in line or "diversity" in line else []
    return f"step {line['step']}: {', '.join(parts) or 'nothing was measured'}"


def some(items: Sequence[Any]) -> Sequence[Any]:
    """At most grid.MOST of the items, evenly spread."""
    return items[:: -(-len(items) // grid.MOST)] if items else items
