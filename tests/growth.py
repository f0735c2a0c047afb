"""By how much the memory of a process that trains grows, beside the prediction of it.

    PYTHONPATH=. python tests/growth.py MODEL CASES

trains a few steps and prints by how many bytes it grew at its peak, one line for each case. MODEL is a path or sd1,
CASES a JSON list of changed settings. Each case has a process of its own, which trains on the smallest pictures first,
so that code of the libraries and tables do not count.
"""

import ctypes
import gc
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import ROOT, run

from ldm import StableDiffusion
from ldm.config import SD1, ModelConfig
from ldm.dreambooth import Trainable, dreambooth_loss
from ldm.preflight.memory import Memory, Rehearsal
from ldm.settings import Settings
from ldm.training import FullTuning
from ldm.training.ema import EMA
from ldm.training.optimizer import adamw
from ldm.training.precision import Precision

CPU = torch.device("cpu")
BASE = ROOT / "weights" / "tiny" / "base"
SETTINGS = Settings(instance_prompt="a photo of sks monster", class_prompt="a photo of a monster", resolution=64)


def check_growth(model: str, sd: StableDiffusion, cases: list[dict], folder: Path) -> None:
    """Checks that a process that trains grows within 20 % of the prediction."""
    folder.mkdir(exist_ok=True)
    done = run([sys.executable, __file__, model, json.dumps(cases)], folder, PYTHONPATH=str(ROOT))
    for case, grew in zip(cases, map(int, done.out.split()), strict=True):
        assert predicted(sd, replace(SETTINGS, **case)).total == pytest.approx(grew, rel=0.2), case


def predicted(
    sd: StableDiffusion, settings: Settings, device: torch.device = CPU, tuning: type[Trainable] = FullTuning
) -> Memory:
    """What is said before a run of the memory that its first step needs."""
    rehearsal = Rehearsal(sd, tuning, settings, device)
    rehearsal.prepare()
    return rehearsal.training_step(1)


def on_meta(config: ModelConfig) -> StableDiffusion:
    with torch.device("meta"):
        return StableDiffusion(config)


def memory(key: str) -> int:
    """VmRSS, or VmHWM, the largest so far."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[key].split()[0])


def load(model: str) -> StableDiffusion:
    if model != "sd1":
        return StableDiffusion.load(model, mapped=False)
    sd = on_meta(SD1)
    for network in sd.networks().values():
        network.to_empty(device="cpu")
        for parameter in network.parameters():
            torch.nn.init.constant_(parameter, 0.01)
    return sd


def train(model: str, settings: Settings, steps: int = 2) -> None:
    """The steps of train.py, on random latents."""
    sd = load(model)
    precision, trainable = Precision(settings.mixed_precision, CPU), FullTuning(sd, settings)
    parameters = trainable.named_parameters_saved()
    optimizer = adamw(trainable.parameter_groups(settings), settings.use_8bit_adam)
    ema = EMA(parameters, settings.ema_decay) if settings.use_ema else None
    prompts = [p for p in (settings.instance_prompt, settings.class_prompt) for _ in range(settings.train_batch_size)]
    is_class = torch.tensor([prompt == settings.class_prompt for prompt in prompts])
    sd.forget_encoder()
    sd.freeze(sd.vae, precision.dtype)
    trainable.prepare(tuple(dict.fromkeys(prompts)), precision.dtype)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        for _ in range(settings.gradient_accumulation_steps):
            noisy = torch.randn(len(prompts), *sd.latent_shape(settings.resolution, settings.resolution))
            with precision.autocast():
                prediction = trainable(noisy, torch.randint(1000, (len(prompts),)), prompts)
            precision.backward(dreambooth_loss(prediction, noisy, is_class, 1.0).total)
            del prediction
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), settings.max_grad_norm)
        optimizer.step()
        if ema is not None:
            ema.update()


def main(model: str, cases: str) -> None:
    torch.set_num_threads(1)
    for case in json.loads(cases):
        if (child := os.fork()) == 0:
            train(str(BASE), replace(SETTINGS, **case | {"resolution": 16, "train_batch_size": 1}), 1)
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # free memory in the heap would hide growth
            before = memory("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
            train(model, replace(SETTINGS, **case))
            print(memory("VmHWM") - before, flush=True)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            raise SystemExit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
