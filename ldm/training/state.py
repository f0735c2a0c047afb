"""All that changes while a run trains, as tensors and numbers that can be saved and put back bit for bit."""

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.dreambooth import Trainee
from ldm.errors import RunError
from ldm.formats import Tensors
from ldm.model import StableDiffusion
from ldm.training import optimizer
from ldm.training.ema import EMA
from ldm.training.precision import Precision
from ldm.training.settings import Settings


class TrainingState:
    """step: updates done; draws: batches drawn, more than steps where fp16 overflowed and an update was skipped.

    base: the fingerprint of the model that training began with.
    """

    def __init__(self, sd: StableDiffusion, trainee: Trainee, settings: Settings, precision: Precision, base: str):
        self.sd, self.settings, self.precision, self.base = sd, settings, precision, base
        trained = {id(p) for p in trainee.parameters()}
        self.parameters = {name: p for name, p in sd.parameters().items() if id(p) in trained}
        rates = {"unet": settings.learning_rate, "text_encoder": settings.text_encoder_learning_rate}
        groups = [
            {"params": list(network.parameters()), "lr": rates[name] or settings.learning_rate}
            for name, network in trainee.named_children()
        ]
        self.optimizer = optimizer.adamw(groups, settings.use_8bit_adam)
        self.ema = EMA(self.parameters, settings.ema_decay) if settings.use_ema else None
        self.step = self.draws = 0
        # Bytes of a checkpoint: the model in fp32, two moments of what trains and its average if any, and headers.
        trains = sum(parameter.numel() for parameter in self.parameters.values())
        copies = 3 if self.ema is not None else 2
        self.size = 4 * (sum(t.numel() for t in sd.state().values()) + copies * trains) + 2**20

    def advance(self) -> None:
        """Counts an update that was made."""
        self.step += 1
        if self.ema is not None:
            self.ema.update()

    def check_finite(self) -> None:
        """Raises RunError if the update has left a weight that is no number: such a model is not to be saved."""
        for name, parameter in self.parameters.items():
            if not parameter.isfinite().all():
                raise RunError(f"{name} is not finite after step {self.step}, and was not saved; lower --learning-rate")

    def averaged(self) -> AbstractContextManager:
        """Inside, the model's weights are their averages, if there are any."""
        return self.ema.applied() if self.ema is not None else nullcontext()

    def save_model(self, path: Path) -> None:
        """The model of this step as an official single file."""
        self.sd.save(path, "official", metadata=self.metadata())

    def metadata(self) -> dict[str, str]:
        """Where the model comes from, for the headers of its files."""
        prompts = {"instance_prompt": self.settings.instance_prompt, "class_prompt": self.settings.class_prompt}
        about = {"step": str(self.step), "base": self.base} | {name: text for name, text in prompts.items() if text}
        s = self.settings
        sampling = {"sampler": s.sampler, "steps": s.sample_steps, "guidance_scale": s.guidance_scale}
        about["sampling"] = json.dumps(sampling | {"resolution": s.resolution})  # sample.py's defaults for this model
        return {f"ldm.{name}": text for name, text in about.items()}

    def tensors(self) -> Tensors:
        tensors: Tensors = {}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{key}.{name}"] = value.detach().cpu()
        if self.ema is not None:
            tensors |= {f"ema.{name}": average.cpu() for name, average in self.ema.averages.items()}
        return tensors

    def numbers(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "draws": self.draws,
            "scaler": self.precision.scaler.state_dict(),
            "ema_updates": self.ema.updates if self.ema else 0,
            "optimizer": {  # 8-bit AdamW counts its steps in plain numbers
                name: counts
                for name, p in self.parameters.items()
                if (counts := {k: v for k, v in self.optimizer.state.get(p, {}).items() if isinstance(v, int | float)})
            },
        }

    @torch.no_grad()
    def restore(self, model: Tensors, training: Tensors, numbers: dict[str, Any]) -> None:
        """The inverse of `save_model`, `tensors` and `numbers`. The training tensors are adopted, not copied."""
        for name, parameter in self.parameters.items():
            parameter.copy_(model[name])
        for name, tensor in training.items():
            owner, _, rest = name.partition(".")
            if owner == "ema":
                self.ema.averages[rest] = tensor.to(self.parameters[rest].device)
            else:
                key, _, rest = rest.partition(".")
                parameter = self.parameters[rest]
                # AdamW counts steps on the CPU unless fused on a GPU; its moments lie beside their parameter
                self.optimizer.state[parameter][key] = tensor.to(parameter.device)
        for name, values in numbers["optimizer"].items():
            self.optimizer.state[self.parameters[name]].update(values)
        self.step, self.draws = numbers["step"], numbers["draws"]
        self.precision.scaler.load_state_dict(numbers["scaler"])
        if self.ema is not None:
            self.ema.updates = numbers["ema_updates"]
