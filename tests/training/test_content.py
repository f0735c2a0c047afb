"""A checkpoint whose checksums fit and whose content does not is refused as a whole, before anything is restored."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from runs import LATEST, SMALL, call, checkpoints, losses, photograph, refused, slow_after
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ldm import StableDiffusion
from ldm.settings import Settings
from ldm.training import FullTuning, TrainingState, checkpoint
from ldm.training.precision import Precision

BIAS = "model.diffusion_model.out.2.bias"
DEVICE = torch.device("cpu")


@pytest.fixture(scope="module")
def base(saved, tmp_path_factory) -> tuple:
    photographs = photograph(tmp_path_factory.mktemp("photographs") / "dog")
    return ("--model", saved["official"], "--instance-data-dir", photographs, *SMALL, "--use-ema")


def run_with(base: tuple, folder: Path, *flags: object) -> Path:
    """A run of two steps with a checkpoint after each."""
    call(*base, *flags, "--output-dir", folder, "--max-train-steps", 2, "--checkpointing-steps", 1)
    return folder


@pytest.fixture(scope="module")
def made(base, tmp_path_factory) -> Path:
    return run_with(base, tmp_path_factory.mktemp("run") / "once")


@pytest.fixture
def once(made, tmp_path) -> Path:
    return shutil.copytree(made, tmp_path / "once")


def state_of(saved, precision: str = "no", **settings) -> TrainingState:
    """The state of a run that has not begun yet."""
    given = Settings(mixed_precision=precision, **settings)
    sd = StableDiffusion.load(saved["official"])
    return TrainingState(FullTuning(sd, given), given, Precision(precision, DEVICE), "")


def seal(folder: Path) -> None:
    """Writes the checksums of what is there now."""
    names = ("model.safetensors", "training.safetensors", "state.json", "metrics.jsonl")
    lines = [f"{checkpoint.sha256(folder / name)}  {name}\n" for name in names]
    (folder / "SHA256SUMS").write_text("".join(lines))


def rewrite(path: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Changes tensors of a file; None removes one."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()} | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, metadata)


STATE = {
    "an absurd step": ({"step": 10**12}, "step is 1000000000000, and should be"),
    "a negative step": ({"step": -1}, "step is -1, and should be"),
    "fewer draws than steps": ({"draws": 1}, "draws is 1, and should be a whole number from 2 to 152"),
    "absurd draws": ({"draws": 10**15}, "draws is 10*, and should be"),
    "no draws": ({"draws": None}, "draws is None, and should be"),
    "more updates of the averages than steps": ({"ema_updates": 3}, "ema_updates is 3, and should be .* from 0 to 2"),
    "a scaler where there is none": ({"scaler": {"scale": 1.0}}, "scaler has scale, and should have nothing"),
    "a scaler that is a list": ({"scaler": []}, r"scaler is \[\], and should be a JSON object"),
    "numbers of the optimizer": (
        {"optimizer": {BIAS: {"step": 2}}},
        f"the numbers of the optimizer for {BIAS} are unk",
    ),
    "an optimizer that is text": ({"optimizer": "AdamW"}, "optimizer is 'AdamW', and should be a JSON object"),
    "a step before the moments": ({"step": 0, "draws": 0, "ema_updates": 0}, "unknown tensor optimizer.exp_avg"),
}
TRAINING = {
    "a moment is missing": ({f"optimizer.exp_avg.{BIAS}": None}, f"missing tensor optimizer.exp_avg.{BIAS}"),
    "a count is missing": ({f"optimizer.step.{BIAS}": None}, f"missing tensor optimizer.step.{BIAS}"),
    "an average is missing": ({f"ema.{BIAS}": None}, f"missing tensor ema.{BIAS}"),
    "an unknown name": ({"optimizer.exp_avg.adapter": torch.zeros(3)}, "unknown tensor optimizer.exp_avg.adapter"),
    "an unknown owner": ({"adapter": torch.zeros(3)}, "unknown tensor adapter"),
    "another shape": (
        {f"optimizer.exp_avg.{BIAS}": torch.zeros(5)},
        rf"optimizer.exp_avg.{BIAS} is \(5,\) torch.float32, and should be \(4,\) torch.float32",
    ),
    "another type": (
        {f"ema.{BIAS}": torch.zeros(4, dtype=torch.float16)},
        rf"ema.{BIAS} is \(4,\) torch.float16, and should be \(4,\) torch.float32",
    ),
    "NaN": ({f"optimizer.exp_avg.{BIAS}": torch.full((4,), torch.nan)}, f"optimizer.exp_avg.{BIAS} holds NaN or inf"),
    "infinity": ({f"ema.{BIAS}": torch.full((4,), torch.inf)}, f"ema.{BIAS} holds NaN or infinity"),
    "a negative square": (
        {f"optimizer.exp_avg_sq.{BIAS}": -torch.ones(4)},
        f"optimizer.exp_avg_sq.{BIAS} holds a negative number",
    ),
    "a count ahead of the step": (
        {f"optimizer.step.{BIAS}": torch.tensor(3.0)},
        f"optimizer.step.{BIAS} is 3.0, and should be from 1 to 2",
    ),
}
MODEL = {
    "a weight is missing": ({BIAS: None}, f"missing tensor {BIAS}"),
    "an unknown weight": ({"model.diffusion_model.adapter": torch.zeros(3)}, "unknown tensor .*adapter"),
    "a weight of another shape": ({BIAS: torch.zeros(5)}, rf"{BIAS} is \(5,\), and should be \(4,\)"),
    "a weight of another type": (
        {BIAS: torch.zeros(4, dtype=torch.float64)},
        rf"{BIAS} is \(4,\) torch.float64, and should be \(4,\) torch.float32",
    ),
    "a weight that is NaN": ({BIAS: torch.full((4,), torch.nan)}, f"{BIAS} holds NaN or infinity"),
}


@pytest.mark.parametrize("what", [*STATE, *TRAINING, *MODEL])
def test_what_is_wrong_first_is_named(what, once, saved):
    path = once / "checkpoints" / "checkpoint-000002"
    state = state_of(saved, use_ema=True)
    assert checkpoint.damaged(path) is None and checkpoint.misfit(path, state) is None
    forge(path, what)
    said = (STATE | TRAINING | MODEL)[what][1]
    assert checkpoint.damaged(path) is None
    with pytest.raises(AssertionError, match=f"^{said}"):
        raise AssertionError(checkpoint.misfit(path, state))
    assert not state.optimizer.state and state.step == 0


def forge(path: Path, what: str) -> None:
    if what in STATE:
        numbers = checkpoint.load_state(path)
        (path / "state.json").write_text(json.dumps(numbers | STATE[what][0]))
    else:
        changes, name = (TRAINING[what][0], "training") if what in TRAINING else (MODEL[what][0], "model")
        rewrite(path / f"{name}.safetensors", changes)
    seal(path)


@pytest.mark.parametrize("what", ["absurd draws", "a moment is missing", "a weight that is NaN"])
def test_a_named_one_is_refused_and_latest_takes_the_one_before(what, once, base, tmp_path):
    newest = once / "checkpoints" / "checkpoint-000002"
    forge(newest, what)
    before = {path: path.read_bytes() for path in once.rglob("*") if path.is_file()}
    said = (STATE | TRAINING | MODEL)[what][1]
    message = refused(*base, "--output-dir", tmp_path / "new", "--resume-from-checkpoint", newest)
    assert message.startswith(f"--resume-from-checkpoint {newest} is damaged: ") and "take an older one" in message
    assert not (tmp_path / "new").exists() and {path: path.read_bytes() for path in before} == before
    with pytest.warns(match=f"checkpoint {newest} is damaged: {said}.*; taking the one before it"):
        call(*base, "--output-dir", once, "--max-train-steps", 3, "--checkpointing-steps", 1, *LATEST)
    assert len(losses(once)) == 3 and checkpoints(once) == [1, 2, 3]


@pytest.mark.parametrize(
    ("scaler", "said"),
    slow_after(
        2,
        [
            ({"scale": float("nan")}, "scale is nan, and should be a positive number"),
            ({"scale": -1.0}, "scale is -1.0, and should be a positive number"),
            ({"scale": "65536"}, "scale is '65536', and should be a positive number"),
            ({"scale": 10**400}, "scale is 10*, and should be a positive number"),
            ({"growth_factor": 0.5}, "growth_factor is 0.5, and should be 2.0"),
            ({"_growth_tracker": -1}, "_growth_tracker is -1, and should be a whole number from 0"),
        ],
    ),
)
def test_the_scale_of_fp16_is_a_number(scaler, said, base, saved, tmp_path):
    path = run_with(base, tmp_path / "run", "--mixed-precision", "fp16") / "checkpoints" / "checkpoint-000002"
    state = state_of(saved, "fp16", use_ema=True)
    assert checkpoint.misfit(path, state) is None
    numbers = checkpoint.load_state(path)
    numbers["scaler"] |= scaler
    (path / "state.json").write_text(json.dumps(numbers))
    seal(path)
    with pytest.raises(AssertionError, match=f"^{said}"):
        raise AssertionError(checkpoint.misfit(path, state))


def test_moments_in_eight_bits_are_checked_too(base, saved, tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs the bitsandbytes extra")
    path = run_with(base, tmp_path / "run", "--use-8bit-adam") / "checkpoints" / "checkpoint-000002"
    state = state_of(saved, use_ema=True, use_8bit_adam=True)
    assert checkpoint.misfit(path, state) is None and not state.optimizer.state
    numbers, training = checkpoint.load_state(path), load_file(path / "training.safetensors")
    name = next(name for name, tensor in training.items() if tensor.dtype == torch.uint8)
    for changes, said in (
        ({name: training[name].float()}, f"{name} is .* torch.float32, and should be .* torch.uint8"),
        ({name: None}, f"missing tensor {name}"),
    ):
        rewrite(path / "training.safetensors", changes)
        seal(path)
        with pytest.raises(AssertionError, match=f"^{said}"):
            raise AssertionError(checkpoint.misfit(path, state))
    save_file(training, path / "training.safetensors")
    for value, said in ((None, "is None"), (3, "is 3"), (1.5, "is 1.5")):
        numbers["optimizer"][BIAS]["step"] = value
        (path / "state.json").write_text(json.dumps(numbers))
        seal(path)
        assert f"step of {BIAS} {said}, and should be a whole number from 1 to 2" in checkpoint.misfit(path, state)
    del numbers["optimizer"][BIAS]
    (path / "state.json").write_text(json.dumps(numbers))
    assert f"the numbers of the optimizer for {BIAS} are missing" in checkpoint.misfit(path, state)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "SHA256SUMS does not name the four files of a checkpoint"),
        ("0" * 64 + "  ../../../../dev/zero\n", "SHA256SUMS does not name the four files"),
        ("\0" * 100_000, "SHA256SUMS is too large: it should have at most 4096 bytes"),
        ("é".encode("latin1"), "SHA256SUMS can't be read: it is not UTF-8 text"),
    ],
)
def test_checksums_lead_nowhere_else(text, said, once):
    path = once / "checkpoints" / "checkpoint-000002"
    (path / "SHA256SUMS").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert said in checkpoint.damaged(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "state.json is damaged: it does not hold a JSON object"),
        ("{}", "state.json does not name its step and its run"),
        ('{"step": 2, "run": []}', "state.json does not name its step and its run"),
        ('{"step": "2", "run": {}}', "state.json does not name its step and its run"),
        ('{"step": true, "run": {}}', "state.json does not name its step and its run"),
        ("[" * 100_000, "state.json is damaged: it is nested too deeply"),
        ('{"step": 1, "step": 2, "run": {}}', "state.json is damaged: 'step' is in it twice"),
    ],
)
def test_a_state_that_is_no_state_is_damage(text, said, once):
    path = once / "checkpoints" / "checkpoint-000002"
    (path / "state.json").write_text(text)
    seal(path)
    assert said in checkpoint.damaged(path)


def test_a_pipe_in_a_checkpoint_is_not_opened(once):
    path = once / "checkpoints" / "checkpoint-000002"
    (path / "training.safetensors").unlink()
    os.mkfifo(path / "training.safetensors")
    assert "training.safetensors can't be read: it is a pipe" in checkpoint.damaged(path)
