"""Everything that changes while a run trains, as tensors and numbers that can be saved and put back bit for bit."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.dreambooth import Trainable
from ldm.errors import RunError
from ldm.formats import SAMPLING_KEY, TRAINING_KEY, Tensors, modelspec
from ldm.runtime import written
from ldm.settings import Settings
from ldm.training import optimizer
from ldm.training.ema import EMA
from ldm.training.numbers import Numbers
from ldm.training.piecewise import Piecewise
from ldm.training.precision import Precision

MAX_OVERFLOWS = 50  # in a row; each halves fp16's scale, so nothing is left of the gradients by then

Metrics = dict[str, Any]


class Diverged(RunError):
    """Training itself has failed: a loss, a gradient or a weight is not a finite number."""


class TrainingState:
    """What trains, its optimizer and its average, and how far they are.

    base: the fingerprint of the model that training began with. step: updates made. taken: how often batches were
    taken, more than `step` where fp16 overflowed and an update was skipped. skipped: whether the last update was.
    """

    def __init__(self, trainable: Trainable, settings: Settings, precision: Precision, base: str):
        self.trainable, self.settings, self.precision, self.base = trainable, settings, precision, base
        self.parameters = trainable.named_parameters_saved()
        groups = trainable.parameter_groups(settings)
        if settings.train_dtype == "bf16" or settings.fused_backward:
            self.optimizer = Piecewise(groups, settings.use_8bit_adam, settings.seed)
        else:
            self.optimizer = optimizer.adamw(groups, settings.use_8bit_adam)
        if settings.fused_backward:
            self.optimizer.update_in_backward()
        self.ema = EMA(self.parameters, settings.ema_decay) if settings.use_ema else None
        self.step = self.taken = self.overflows = 0
        self.skipped = False
        self._updating = False
        self._wrapped = False
        # Whether the host decides on each update, and waits for the numbers; fused AdamW decides on the device.
        self.waits = precision.scaler.is_enabled() or settings.use_8bit_adam

    @property
    def bytes_saved(self) -> int:
        """The size of a checkpoint: the weights, two moments of what trains, its average if there is one, headers."""
        copies = 3 if self.ema is not None else 2
        moments = copies * sum(4 * p.numel() for p in self.parameters.values())
        metrics = 400 * min(self.settings.max_train_steps, 20_000)
        return self.trainable.bytes_saved() + moments + metrics + 2**20

    @property
    def bytes_needed(self) -> int:
        """The disk space of a checkpoint, and of best/ if the run keeps one."""
        return self.bytes_saved + (self.trainable.bytes_saved() if self.settings.keeps_best else 0)

    @property
    def is_whole(self) -> bool:
        """False while an update is under way, from its first parameter on. Such a state is never saved."""
        return not self._updating and not (self.settings.fused_backward and self.optimizer.has_begun)

    # One step

    def start_step(self) -> bool:
        """Sets the learning rate, clears the gradients, and freezes what trains no longer.

        Returns True if other parameters train than in the step before, as in the first step: the module that averages
        gradients over processes has to be made anew then.
        """
        self._began, step, given = time.perf_counter(), self.step + 1, self.settings
        changed = self._freeze_stopped(step) or not self._wrapped
        self._wrapped = True
        factor = optimizer.lr_factor(given.lr_scheduler, step, given.lr_warmup_steps, given.max_train_steps)
        optimizer.set_lr(self.optimizer, factor)
        self.optimizer.zero_grad(set_to_none=True)
        if isinstance(self.optimizer, Piecewise):
            self.optimizer.begin(step)
        return changed

    def _freeze_stopped(self, step: int) -> bool:
        """Freezes the parameters that train no longer at `step`. Returns whether there are new ones."""
        if not optimizer.freeze_stopped(self.optimizer, step):
            return False
        with self.precision.autocast():
            self.trainable.after_stop()
        return True

    def clip_gradients(self) -> Tensor:
        """Scales the gradients down to the largest norm allowed. Returns their norm before, a scalar on the device."""
        if self.settings.fused_backward:
            return self.optimizer.norm()
        self.precision.scaler.unscale_(self.optimizer)
        most = self.settings.max_grad_norm or math.inf
        return nn.utils.clip_grad_norm_(list(self.parameters.values()), most)

    def update(self, numbers: Numbers) -> Metrics:
        """Updates the weights, unless a loss or the norm of the gradients is not finite. Returns the step's metrics.

        Fused AdamW leaves out such an update on the device, and the run ends when the numbers arrive. Where fp16
        overflowed, the step is done again on new rows with a lower scale. Raises Diverged if that never helps.
        """
        step, scaler = self.step + 1, self.precision.scaler
        metrics = {"step": step, "lr": self.optimizer.param_groups[0]["lr"], "began": self._began}
        self.skipped = self.waits and not numbers.are_finite
        self._updating = True
        if not self.waits:
            self.optimizer.found_inf = numbers.found_inf
        if not self.skipped:
            scaler.step(self.optimizer)
            self.trainable.after_update()
        scaler.update()
        self.taken += 1
        self.overflows = self.overflows + 1 if self.skipped else 0
        if not self.skipped:
            self.step = step
            if self.ema is not None:
                self.ema.update()
        elif scaler.is_enabled():
            metrics |= {"grad_norm": None, "skipped": True, "scale": scaler.get_scale()}
            if self.overflows == MAX_OVERFLOWS:
                raise Diverged(f"fp16 overflowed {self.overflows} times in a row at step {step}; take bf16")
        if self.settings.fused_backward:
            self.optimizer.begin(self.step + 1)
        self._updating = False
        return metrics

    # Saving

    def kept_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        """What the optimizer keeps of a parameter: see `optimizer.kept_of`."""
        if isinstance(self.optimizer, Piecewise):
            return self.optimizer.kept_of(parameter)
        return optimizer.kept_of(self.optimizer, parameter)

    def check_finite(self) -> None:
        """Raises Diverged if the last update has left NaN or infinity in a weight, so that no such model is saved."""
        for name, parameter in self.parameters.items():
            if not parameter.isfinite().all():
                raise Diverged(f"{name} is not finite after step {self.step}, and was not saved; lower --learning-rate")

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model's weights are their averages, if the run keeps averages. Frees the gradients first."""
        self.optimizer.zero_grad(set_to_none=True)  # sampling needs their memory
        if self.ema is None:
            yield
            return
        with self.ema.applied(), self.trainable.with_other_weights():
            yield

    def metadata(self) -> dict[str, str]:
        """Where the model comes from and how its pictures are sampled, for the headers of its files."""
        given = self.settings
        subject = given.taught[0]  # a program's example is a prompt that shows it
        prompts = {"instance_prompt": subject.instance_prompt, "class_prompt": subject.class_prompt}
        sampling = {
            "sampler": given.sampler,
            "steps": given.sample_steps,
            "guidance_scale": given.guidance_scale,
            "resolution": given.resolution,
        }
        training = {
            "base_model": self.trainable.sd.source.title() if self.trainable.sd.source else None,
            "learning_rate": given.learning_rate,
            "prior_loss_weight": given.prior_loss_weight if given.with_prior_preservation else None,
            "seed": given.seed,
        }
        lines = {"step": str(self.step), "base": self.base} | prompts
        header = {f"ldm.{name}": text for name, text in lines.items() if text}
        if given.subjects:
            header["ldm.subjects"] = json.dumps({one.name: one.instance_prompt for one in given.taught})
        header |= {SAMPLING_KEY: json.dumps(sampling)}  # sample.py's defaults for this model
        header |= {TRAINING_KEY: json.dumps(training)}  # for the model's card
        return header | modelspec.usage(subject.instance_prompt) if subject.instance_prompt else header

    def save_result(self, folder: Path) -> tuple[Path, list[str]]:
        """Writes what the run is for. Returns its path, and the names of tensors that have no place in it."""
        path = self.trainable.result_path(folder, self.settings)
        with written(path):
            self.check_finite()
            return path, self.trainable.result(path, self.settings, self.metadata())

    def tensors(self) -> Tensors:
        """The optimizer's moments and the averages, on the CPU."""
        tensors: Tensors = {}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{key}.{name}"] = value.detach().cpu()
        if self.ema is not None:
            tensors |= {f"ema.{name}": average.cpu() for name, average in self.ema.averages.items()}
        return tensors

    def numbers(self) -> dict[str, Any]:
        """All that is no tensor, ready for JSON."""
        return {
            "step": self.step,
            "draws": self.taken,
            "scaler": self.precision.scaler.state_dict(),
            "ema_updates": self.ema.updates if self.ema else 0,
            "optimizer": {  # 8-bit AdamW counts its steps in plain numbers
                name: counts
                for name, p in self.parameters.items()
                if (counts := {k: v for k, v in self.optimizer.state.get(p, {}).items() if isinstance(v, int | float)})
            },
        }

    def restore(self, weights: Path, training: Tensors, numbers: dict[str, Any]) -> None:
        """The inverse of `trainable.save`, `tensors` and `numbers`. Adopts the training tensors without a copy."""
        self.trainable.load(weights)
        for name, tensor in training.items():
            owner, _, rest = name.partition(".")
            if owner == "ema":
                self.ema.averages[rest] = laid_out_as(self.parameters[rest], tensor)
            else:
                key, _, rest = rest.partition(".")
                parameter = self.parameters[rest]
                self.optimizer.state[parameter][key] = laid_out_as(parameter, tensor)
        for name, values in numbers["optimizer"].items():
            self.optimizer.state[self.parameters[name]].update(values)
        self.step, self.taken = numbers["step"], numbers["draws"]
        self.precision.scaler.load_state_dict(numbers["scaler"])
        if self.ema is not None:
            self.ema.updates = numbers["ema_updates"]
        self._freeze_stopped(self.step)  # as it was after that step


def laid_out_as(parameter: nn.Parameter, tensor: Tensor) -> Tensor:
    """The tensor on the parameter's device. One of the same shape gets its strides too, as a fused update expects."""
    if tensor.shape == parameter.shape and tensor.stride() != parameter.stride():
        return torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
    return tensor.to(parameter.device)


def check_finite(name: str, value: float, step: int) -> None:
    """Raises Diverged for NaN or infinity."""
    if not math.isfinite(value):
        raise Diverged(f"the {name} is {value} at step {step}, and nothing was saved of it; lower --learning-rate")
