"""Full fine-tuning on small GPUs: stochastic rounding, and updates inside the backward pass."""

import math

import pytest
import torch
from runs import BOTH, LATEST, LORA, SMALL, call, checkpoints, losses, metrics, refused, slow_after, weights

import train
from ldm.errors import InputError, RunError
from ldm.runtime.processes import World
from ldm.training import FullTuning, LoRATuning, Run, parse
from ldm.training.optimizer import adamw
from ldm.training.piecewise import Piecewise, rounded

BF16 = ("--train-dtype", "bf16")
FUSED = ("--fused-backward", "--max-grad-norm", 0)
MODES = {
    "bf16": BF16,
    "fused": FUSED,
    "bf16, fused": (*BF16, *FUSED),
    "bf16, fused, 8-bit, checkpointing": (*BF16, *FUSED, "--use-8bit-adam", "--gradient-checkpointing"),
    "fused, LoRA": (*FUSED, *LORA),
    "bf16, one network": (*BF16, "--no-train-text-encoder", "--use-ema"),
}


@pytest.fixture
def base(request, saved, photographs) -> tuple:
    tuned = getattr(request, "param", ())  # the flags of BOTH, or those of full tuning
    return ("--model", saved["official"], "--instance-data-dir", photographs, *SMALL, *tuned)


def test_rounding_keeps_the_mean_and_takes_one_of_the_two_nearest_numbers():
    x = torch.tensor([1.0 + 0.3 / 128, -2.0 - 0.75 / 64, 3e-5, 0.0, -7.5])
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([rounded(x, generator).double() for _ in range(20_000)])
    for value, column in zip(x.double().tolist(), draws.T, strict=True):
        found = column.unique().tolist()
        if value in found:  # bf16 holds it
            assert found == [value]
            continue
        low, high = found
        assert low < value < high and high - low == 2.0 ** (math.floor(math.log2(abs(value))) - 7)  # 8 bits
        share = (value - low) / (high - low)  # of the draws that should go up
        assert (column == high).double().mean().item() == pytest.approx(share, abs=4 * (0.25 / 20_000) ** 0.5)


def test_small_updates_are_kept_in_the_mean():
    """300 steps of 1e-5 move bf16 weights by 0.003; rounding to the nearest number loses them all."""
    weight = torch.nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
    nearest = torch.ones(20_000, dtype=torch.bfloat16)
    optimizer = Piecewise([{"params": [weight], "lr": 1e-5, "stop": None}], False, seed=0)
    for group in optimizer._inner.values():
        group[0].param_groups[0]["weight_decay"] = 0.0
    for step in range(1, 301):
        optimizer.begin(step)
        weight.grad = torch.ones_like(weight)  # AdamW moves by lr
        optimizer.step()
        nearest -= 1e-5
    assert (1.0 - weight.float()).mean().item() == pytest.approx(0.003, rel=0.05)
    assert torch.equal(nearest, torch.ones_like(nearest))


def test_updates_in_the_backward_pass_equal_those_after_it():
    """In fp32 both are AdamW, to the same bits; the gradients are gone afterwards, and their norm is the same."""

    def train(fused: bool) -> tuple[list[torch.Tensor], list[float]]:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.Linear(8, 1))
        groups = [{"params": list(net.parameters()), "lr": 1e-2, "stop": None}]
        optimizer = Piecewise(groups, False, seed=0) if fused else adamw(groups, False)
        if fused:
            optimizer.update_in_backward()
        norms = []
        for step in range(1, 6):
            if fused:
                optimizer.begin(step)
            net(torch.linspace(-1, 1, 12).view(3, 4)).square().sum().backward()
            if fused:
                assert all(p.grad is None for p in net.parameters())
                norms.append(optimizer.norm().item())
            else:
                norms.append(torch.nn.utils.get_total_norm([p.grad for p in net.parameters()]).item())
                optimizer.step()
                optimizer.zero_grad()
        return list(net.parameters()), norms

    (one, norms), (other, same_norms) = train(True), train(False)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert norms == pytest.approx(same_norms, rel=1e-5)


@pytest.mark.parametrize("mode", slow_after(0, MODES))
def test_a_resumed_run_equals_the_run_that_never_stopped(mode, base, tmp_path):
    if "8-bit" in mode:
        pytest.importorskip("bitsandbytes")
    flags = (*base, *MODES[mode], "--checkpointing-steps", 2)
    call(*flags, "--max-train-steps", 4, "--output-dir", tmp_path / "whole")
    call(*flags, "--max-train-steps", 2, "--output-dir", tmp_path / "parts")
    call(*flags, "--max-train-steps", 4, "--output-dir", tmp_path / "parts", *LATEST)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_the_first_losses_are_close_to_those_of_fp32(base, tmp_path):
    flags = (*base, "--max-train-steps", 6, "--learning-rate", "2e-4", "--max-grad-norm", 0)
    call(*flags, "--output-dir", tmp_path / "fp32")
    call(*flags, *FUSED, "--output-dir", tmp_path / "fused")
    call(*flags, *BF16, "--output-dir", tmp_path / "bf16")
    full, fused, half = (losses(tmp_path / name) for name in ("fp32", "fused", "bf16"))
    assert fused == full
    assert half != full and half == pytest.approx(full, rel=0.03)
    norms = [[line["grad_norm"] for line in metrics(tmp_path / name)] for name in ("fp32", "fused")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize("base", BOTH, indirect=True)
def test_a_loss_that_is_not_finite_ends_a_fused_run_and_is_not_saved(base, tmp_path):
    flags = (*base, *FUSED, "--learning-rate", "1e30", "--checkpointing-steps", 1, "--output-dir", tmp_path / "run")
    with pytest.raises(RunError, match="at step 2, and nothing was saved of it"):
        call(*flags)
    assert not [*(tmp_path / "run").glob("*.safetensors")]


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--fused-backward", "--fused-backward needs --max-grad-norm 0"),
        ("--fused-backward --max-grad-norm 0 --gradient-accumulation-steps 2", "needs --gradient-accumulation-steps 1"),
        ("--fused-backward --max-grad-norm 0 --mixed-precision fp16", "needs no --mixed-precision fp16"),
        ("--train-dtype bf16 --mixed-precision fp16", "--train-dtype bf16 computes in bf16"),
        ("--train-dtype bf16 --lora-rank 4", "--train-dtype bf16 is for whole networks"),
        ("--max-grad-norm -1", "--max-grad-norm -1.0 is not a number from 0"),
    ],
)
def test_modes_that_do_not_go_together_are_refused(flags, said, base):
    assert said in refused(*base, *flags.split())


def test_several_processes_are_refused_for_updates_in_the_backward_pass(base):
    settings = parse([str(flag) for flag in (*base, *FUSED)], train.TINY)
    with pytest.raises(InputError, match="--fused-backward trains in one process"):
        Run(settings, World(0, 2, torch.device("cpu")))


@pytest.mark.parametrize("base", BOTH, indirect=True)
def test_an_error_before_the_first_update_of_a_step_saves_the_step_before(base, tmp_path):
    """With updates inside the backward pass a step is whole until the first of them."""

    class Failing(LoRATuning if LORA[0] in base else FullTuning):
        def forward(self, noisy, t, prompts):
            self.calls = getattr(self, "calls", 0) + (0 if noisy.is_meta else 1)
            if self.calls == 3:
                raise OSError("a photograph is gone")
            return super().forward(noisy, t, prompts)

    with pytest.warns(match="step 2 is saved"), pytest.raises(OSError, match="gone"):
        call(*base, *FUSED, "--output-dir", tmp_path / "run", tuning=Failing)
    assert checkpoints(tmp_path / "run") == [2]
