"""A checkpoint of an older version resumes to the result that the older version computed."""

import shutil
from pathlib import Path

import pytest
import torch
from runs import call, losses, metrics, weights
from safetensors.torch import load_file

from ldm.training import checkpoint

OLD = Path(__file__).parent.parent / "facts" / "run_d634439"
FLAGS = """--instance-prompt=a sks dog|--class-prompt=a dog|--num-class-images=2|--resolution=16|--sample-steps=1
--guidance-scale=1|--num-validation-images=1|--learning-rate=1e-3|--use-ema|--ema-decay=0.9|--checkpointing-steps=2"""
FLAGS = tuple(FLAGS.replace("\n", "|").split("|"))


@pytest.fixture
def old(tmp_path) -> Path:
    return shutil.copytree(OLD, tmp_path / "old")


def inputs(folder: Path) -> tuple:
    names = {"--model": "base.safetensors", "--instance-data-dir": "photographs", "--class-data-dir": "class"}
    return tuple(word for flag, name in names.items() for word in (flag, folder / name)) + FLAGS


def test_its_checkpoint_resumes(old):
    """The bits are equal on the machine that wrote it. On other machines the order of a sum may differ."""
    expected, final = losses(old / "run"), weights(old / "run")
    (old / "run" / "model.safetensors").unlink()
    call(*inputs(old), "--max-train-steps", 4, "--output-dir", old / "run", "--resume-from-checkpoint", "latest")
    assert losses(old / "run")[:2] == expected[:2]  # copied, not computed again
    assert losses(old / "run") == pytest.approx(expected, rel=1e-6)
    found = weights(old / "run")
    assert found.keys() == final.keys()
    for name, tensor in final.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def test_the_same_run_again_gives_the_same_losses(old, tmp_path):
    call(*inputs(old), "--max-train-steps", 4, "--output-dir", tmp_path / "new")
    for line, before in zip(metrics(tmp_path / "new"), metrics(old / "run"), strict=True):
        for name in ("loss", "subject_loss", "prior_loss", "grad_norm", "lr"):
            assert line[name] == pytest.approx(before[name], rel=1e-6)


def test_its_checkpoint_has_the_tensors_and_the_keys_of_todays(old, tmp_path):
    """Compares the names and shapes of all tensors of a checkpoint, and the keys of its state."""
    call(*inputs(old), "--max-train-steps", 2, "--output-dir", tmp_path / "new")
    before, now = (folder / "checkpoints" / "checkpoint-000002" for folder in (old / "run", tmp_path / "new"))
    for name in ("model.safetensors", "training.safetensors"):
        a, b = load_file(before / name), load_file(now / name)
        assert {n: t.shape for n, t in a.items()} == {n: t.shape for n, t in b.items()}
    assert checkpoint.load_state(before).keys() == checkpoint.load_state(now).keys()
