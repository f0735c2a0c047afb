"""One object owns what trains: another way of fine-tuning is one subclass of Trainable, and no other code changes."""

import inspect

import pytest
import torch
from runs import LATEST, SMALL, call, checkpoints, losses
from safetensors.torch import load_file

from ldm import InputError, StableDiffusion
from ldm.dreambooth import Trainable
from ldm.settings import Settings
from ldm.training import FullTuning


class KeysAndValues(Trainable):
    """Trains only the keys and values of the cross-attention (Custom Diffusion, Kumari et al. 2023, section 3.1)."""

    def __init__(self, sd, settings):
        names = [name for name in sd.parameters() if "attn2.to_k." in name or "attn2.to_v." in name]
        super().__init__(sd, settings, {name: sd.parameters()[name] for name in names})


@pytest.fixture
def base(saved, photographs) -> tuple:
    return ("--model", saved["official"], "--instance-data-dir", photographs, *SMALL, "--learning-rate", "1e-2")


def test_another_way_of_fine_tuning_takes_less_than_forty_lines():
    assert len(inspect.getsource(KeysAndValues).splitlines()) < 40


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--use-ema", "--mixed-precision", "bf16", "--gradient-accumulation-steps", 2)])
def test_a_run_of_keys_and_values_alone_resumes_to_the_same_bits_and_writes_only_them(flags, base, saved, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    base = (*base, *flags)
    call(*base, "--max-train-steps", 6, "--output-dir", whole, tuning=KeysAndValues)
    call(*base, "--max-train-steps", 3, "--output-dir", parts, "--checkpointing-steps", 1, tuning=KeysAndValues)
    assert checkpoints(parts)[-1] == 3
    call(*base, "--max-train-steps", 6, "--output-dir", parts, *LATEST, tuning=KeysAndValues)
    assert losses(whole) == losses(parts) and len(losses(whole)) == 6

    a, b = load_file(whole / "trained.safetensors"), load_file(parts / "trained.safetensors")
    before = StableDiffusion.load(saved["official"]).state()
    assert a.keys() == b.keys() == {name for name in before if "attn2.to_k" in name or "attn2.to_v" in name}
    assert all(torch.equal(a[name], b[name]) and not torch.equal(a[name], before[name]) for name in a)
    moments = load_file(parts / "checkpoints" / "checkpoint-000003" / "training.safetensors")
    assert {name.partition("model.")[2] for name in moments if "exp_avg" in name} == {
        n.partition("model.")[2] for n in a
    }
    assert not (whole / "model.safetensors").exists()  # only the trained parameters are written


def test_only_keys_and_values_get_a_gradient(base, saved):
    """The gradient of the prediction reaches the keys and values, and no other parameter."""
    sd = StableDiffusion.load(saved["official"])
    trainable = KeysAndValues(sd, Settings())
    trainable(torch.randn(2, 4, 8, 8), torch.tensor([10, 700]), ["a dog", "a sks dog"]).square().mean().backward()
    assert {name for name, p in sd.parameters().items() if p.grad is not None} == trainable.trained.keys()


def test_a_run_is_refused_with_another_trainable(base, tmp_path):
    flags = (*base, "--output-dir", tmp_path / "run", "--checkpointing-steps", 1)
    call(*flags, "--max-train-steps", 1, tuning=KeysAndValues)
    with pytest.raises(InputError, match="tuning was 'KeysAndValues' and is 'FullTuning'"):
        call(*flags, *LATEST, tuning=FullTuning)
