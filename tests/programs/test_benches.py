"""The benchmarks run to their end on small sizes, and append what they measured."""

import importlib
import json
import subprocess
import sys

import pytest
import torch
from runs import ROOT
from torch import Tensor, nn

for package in ("diffusers", "transformers", "accelerate"):
    pytest.importorskip(package, reason="needs the parity extra")

BENCH = ROOT / "tests" / "bench"
SMALL = ("--rounds", "1", "--device", "cpu")
# Name of the results -> the flags that make them.
SCRIPTS = {
    "startup": ("--steps", "1"),
    "memory": ("--steps", "1", "--pictures", "1", "--rows", "1"),
    "training_whole": ("--whole", "--steps", "2", "--rows", "1"),
}


@pytest.fixture
def bench(monkeypatch):
    """bench(name): the module tests/bench/NAME.py. What it changes in this process is set back."""
    monkeypatch.syspath_prepend(str(BENCH))
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        monkeypatch.setenv(name, "")  # sets it back afterwards
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    tf32 = [backend.allow_tf32 for backend in backends]
    yield importlib.import_module
    for backend, allowed in zip(backends, tf32, strict=True):
        backend.allow_tf32 = allowed
    for name in ("measure", "sampling", "training", "load"):
        sys.modules.pop(name, None)


def last_line(folder, name: str) -> dict:
    return json.loads((folder / f"{name}.jsonl").read_text().splitlines()[-1])


def check_times(record: dict) -> None:
    assert record["case"]["model"] == "embedded" and record["versions"].keys() >= {"torch", "diffusers"}
    for side in record["sides"].values():
        assert 0 < side["p10"] <= side["median"] <= side["p90"] and len(side["seconds"]) == 2
    assert record["sides"].keys() == {"ours", "diffusers"} and record["ratio"] > 0 and record["device"]


def flop_by_layer(unet: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Twice the multiplications of one evaluation, from the shapes of the layers' inputs and outputs."""
    total = []

    def layer(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        total.append(2 * output.numel() * module.weight[0].numel())

    def attention(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        x, context = inputs
        total.append(2 * 2 * x.numel() * context.shape[1])  # q times k, then weights times v, over all heads

    hooks = []
    for module in unet.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            hooks.append(module.register_forward_hook(layer))
        elif type(module).__name__ == "CrossAttention":
            hooks.append(module.register_forward_hook(attention))
    with torch.no_grad():
        unet(*inputs)
    for hook in hooks:
        hook.remove()
    return sum(total)


@pytest.mark.slow
def test_sampling_is_timed_beside_diffusers(bench, tmp_path, capsys):
    flags = ("--pictures", "2", "--steps", "2", "--dtype", "bf16", "--results", str(tmp_path))
    bench("sampling").main([*SMALL, *flags])
    record = last_line(tmp_path, "sampling")
    check_times(record)
    least = record["floor"]
    assert least["seconds"] == max(least["flop"] / least["flop_rate"], least["bytes"] / least["byte_rate"])
    table = capsys.readouterr().out
    assert "of peak rate" in table and f"{record['ratio']:.3f} of the time of diffusers" in table


def test_flop_are_those_of_the_layers(bench):
    measure = bench("measure")
    unet = measure.StableDiffusion.load(measure.TINY / "base").unet
    inputs = torch.zeros(2, 4, 16, 16), torch.zeros(2), torch.zeros(2, 32, 128)
    forward = measure.flop_of(lambda: unet(*inputs))
    assert forward == flop_by_layer(unet, inputs)
    both = measure.flop_of(lambda: unet(*inputs).sum().backward())
    assert 2.9 * forward < both <= 3 * forward  # a gradient for each of the two factors, but none of the first input


@pytest.mark.slow
def test_a_training_step_is_timed_beside_that_of_the_script(bench, tmp_path):
    bench("training").main([*SMALL, "--rows", "1", "--steps", "1", "--peer", "best", "--results", str(tmp_path)])
    check_times(last_line(tmp_path, "training"))


def test_sides_that_differ_are_not_timed(bench, tmp_path, monkeypatch):
    sampling = bench("sampling")
    draw, shift = sampling.draw, iter([0.0, 0.01])  # the two sides start from different noise
    monkeypatch.setattr(sampling, "draw", lambda *args: draw(*args) + next(shift))
    with pytest.raises(SystemExit, match="latents differ by up to"):
        sampling.main([*SMALL, "--pictures", "1", "--steps", "1", "--results", str(tmp_path)])
    assert not list(tmp_path.iterdir())
    training = bench("training")
    monkeypatch.setattr(training.F, "mse_loss", lambda a, b: (a - b).square().mean() * 1.0001)
    with pytest.raises(SystemExit, match="losses of step 1"):
        training.main([*SMALL, "--rows", "1", "--results", str(tmp_path)])


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_processes_are_measured_beside_diffusers(name, tmp_path):
    path = BENCH / f"{name.partition('_')[0]}.py"
    command = [sys.executable, str(path), *SMALL, *SCRIPTS[name], "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = last_line(tmp_path, name)
    if name == "memory":
        assert all(peak > 10e6 for by_side in record["peak"].values() for peak in by_side.values())
    else:
        check_times(record)
