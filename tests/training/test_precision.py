"""Mixed precision, and numbers that are not finite: what stays fp32, which steps are skipped, when a run stops."""

import math
from pathlib import Path

import pytest
import torch
from runs import (
    BOTH,
    SMALL,
    call,
    checkpoints,
    command,
    latent_rows,
    losses,
    metrics,
    run,
    sample_rows,
    timeless,
    weights,
)

import train
from ldm import StableDiffusion
from ldm.data import read_subjects
from ldm.errors import RunError
from ldm.runtime.processes import World
from ldm.settings import Settings
from ldm.training import FullTuning, Run, TrainingState, parse

UNET = "model.diffusion_model."
ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture
def base(request, saved, photographs) -> tuple:
    tuned = getattr(request, "param", ())  # the flags of BOTH, or those of full tuning
    return ("--model", saved["official"], "--instance-data-dir", photographs, *SMALL, *tuned)


def failed(*arguments: object) -> str:
    """The message, one line, of the RunError that ends a run with these arguments."""
    with pytest.raises(RunError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_half_precision_learns_as_fp32_does(name, base, tmp_path):
    base = (*base, "--max-train-steps", 40, "--learning-rate", "2e-3", "--train-batch-size", 2)
    call(*base, "--output-dir", tmp_path / "fp32")
    call(*base, "--output-dir", tmp_path / name, "--mixed-precision", name)
    full, half = (torch.tensor(losses(tmp_path / folder)) for folder in ("fp32", name))
    assert half[-10:].mean() < 0.8 * half[:10].mean()
    assert 1e-6 < ((half[:2] - full[:2]) / full[:2]).abs().max() < 2e-2  # close, but not equal


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_trained_weights_are_fp32_and_frozen_weights_are_saved_unchanged(name, base, saved, tmp_path):
    flags = ("--mixed-precision", name, "--no-train-text-encoder", "--output-dir", tmp_path / "run")
    call(*base, *flags)
    before, after = weights(saved["official"].parent), weights(tmp_path / "run")
    assert all(tensor.dtype == torch.float32 for tensor in after.values() if tensor.is_floating_point())
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert changed and all(key.startswith(UNET) for key in changed)

    settings = parse([str(flag) for flag in (*base, *flags, "--output-dir", tmp_path / "new")], train.TINY)
    sd, another = StableDiffusion.load(saved["official"]), Run(settings, ALONE)
    state = TrainingState(FullTuning(sd, settings), settings, another.precision, "")
    another.identity.parts["global_batch"] = 1
    train.prepare(another, state, read_subjects(settings), [])
    types = {kind: {p.dtype for p in net.parameters()} for kind, net in sd.networks().items()}
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}[name]
    assert list(types.values()) == [{torch.float32}, {half}, {half}]
    assert isinstance(sd.vae.encoder, torch.nn.Identity)  # the encoder is freed when it is no longer needed


@pytest.mark.slow
def test_a_base_model_in_fp16_is_upcast(random_model, base, tmp_path):
    random_model().save(tmp_path / "fp16.safetensors", dtype=torch.float16)
    upcast = StableDiffusion.load(tmp_path / "fp16.safetensors")
    upcast.save(tmp_path / "fp32.safetensors")
    for name in ("fp16", "fp32"):
        flags = ("--learning-rate", "1e-6", "--output-dir", tmp_path / name)
        call(*base, "--model", tmp_path / f"{name}.safetensors", *flags, "--mixed-precision", "bf16")
    half, full = weights(tmp_path / "fp16"), weights(tmp_path / "fp32")
    assert losses(tmp_path / "fp16") == losses(tmp_path / "fp32")
    key = UNET + "middle_block.0.in_layers.2.weight"
    assert half[key].dtype == torch.float32 and torch.equal(half[key], full[key])
    assert not torch.equal(half[key], half[key].half().float())  # fp16 would round such small updates away


@pytest.fixture
def steep(random_model, tmp_path) -> Path:
    """A base model whose gradients overflow fp16 at the initial loss scale."""
    sd = random_model()
    with torch.no_grad():
        sd.unet.out[2].weight.mul_(30.0)
    sd.save(tmp_path / "steep.safetensors")
    return tmp_path / "steep.safetensors"


@pytest.mark.parametrize("base", BOTH, indirect=True)
def test_an_overflow_is_skipped_and_advances_neither_step_nor_schedule(steep, base, tmp_path):
    flags = ("--model", steep, "--mixed-precision", "fp16", "--lr-scheduler", "linear", "--max-train-steps", 6)
    call(*base, *flags, "--output-dir", tmp_path / "run", "--checkpointing-steps", 2)
    lines = metrics(tmp_path / "run")
    skipped = [line for line in lines if line.get("skipped")]
    assert skipped and all(line["grad_norm"] is None for line in skipped)
    scales = [line["scale"] for line in skipped]
    assert scales == [2.0 ** (16 - n) for n in range(1, len(scales) + 1)]
    done = [line for line in lines if not line.get("skipped")]
    assert [line["step"] for line in done] == [1, 2, 3, 4, 5, 6]
    assert [line["lr"] for line in done] == pytest.approx([1e-4 * (1 - n / 6) for n in range(6)])
    for line, following in zip(lines, lines[1:], strict=False):  # a skipped step is tried again, with other rows
        assert following["step"] == line["step"] + (not line.get("skipped")) and following["loss"] != line["loss"]

    parts = tmp_path / "parts"  # the scale and the skipped rows are part of the state
    call(
        *base, *flags, "--output-dir", parts, "--resume-from-checkpoint", tmp_path / "run/checkpoints/checkpoint-000002"
    )
    assert timeless(metrics(parts)) == timeless(lines)
    one, other = weights(tmp_path / "run"), weights(parts)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_a_model_beyond_the_range_of_fp16_is_refused_before_training(random_model, base, tmp_path):
    sd = random_model()
    with torch.no_grad():
        sd.unet.out[2].weight.mul_(1e9)
        sd.unet.out[0].weight.mul_(1e-9)
        sd.unet.out[0].bias.mul_(1e-9)
    sd.save(tmp_path / "wide.safetensors")
    flags = ("--model", tmp_path / "wide.safetensors", "--output-dir", tmp_path / "run")
    assert "fp16 is too narrow for the model (take bf16" in failed(*base, *flags, "--mixed-precision", "fp16")
    assert not [*(tmp_path / "run").glob("*.safetensors")]
    call(*base, *flags, "--mixed-precision", "bf16", "--output-dir", tmp_path / "bf16")


@pytest.mark.parametrize("base", BOTH, indirect=True)
def test_a_run_that_diverges_stops_and_does_not_save_that_step(base, tmp_path):
    flags = ("--learning-rate", "1e30", "--checkpointing-steps", 1, "--output-dir", tmp_path / "run")
    message = failed(*base, *flags)
    assert "at step 2, and nothing was saved of it; lower --learning-rate" in message
    assert checkpoints(tmp_path / "run") == [1] and not [*(tmp_path / "run").glob("*.safetensors")]
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run/checkpoints/checkpoint-000001").values())


@pytest.mark.parametrize("every", [1, 100])
@pytest.mark.parametrize("base", BOTH, indirect=True)
def test_weights_that_are_not_finite_are_not_saved(every, base, tmp_path):
    """The last step's loss is finite, but its update makes weights that are not."""
    flags = ("--learning-rate", "1e39", "--max-train-steps", 1, "--checkpointing-steps", every)
    message = failed(*base, *flags, "--output-dir", tmp_path / "run")
    assert "is not finite after step 1, and was not saved" in message
    assert checkpoints(tmp_path / "run") == [] and not [*(tmp_path / "run").glob("*.safetensors")]


@pytest.mark.slow
@pytest.mark.parametrize("base", BOTH, indirect=True)
def test_a_loss_that_is_not_finite_stops_both_processes(random_model, base, tmp_path):
    """The latents overflow fp16. The run ends with one line that says so, and does not save the step."""
    sd = random_model()
    with torch.no_grad():
        sd.vae.quant_conv.weight.mul_(1e6)
    sd.save(tmp_path / "large.safetensors")
    flags = ("--model", tmp_path / "large.safetensors", "--mixed-precision", "fp16", "--no-with-prior-preservation")
    flags = (*base, *flags, "--checkpointing-steps", 1, "--output-dir", tmp_path / "run")
    done = run(command(flags, 2), tmp_path, status=1)
    assert "the loss is" in done.complaint and "nothing was saved of it" in done.complaint
    assert checkpoints(tmp_path / "run") == [n + 1 for n in range(len(losses(tmp_path / "run")))]


@pytest.mark.slow
@pytest.mark.parametrize("base", BOTH, indirect=True)
def test_a_loss_that_is_not_finite_in_one_process_stops_both(random_model, base, tmp_path):
    """The model overflows only at late timesteps t, so that at some update it overflows in one process only."""
    sd, late = random_model(), 900
    width = sd.config.unet.channels[0]
    slowest = late * 10000 ** (1 / (width // 2) - 1)  # angle of the embedding's last sine, which rises with t
    first, _, second = sd.unet.time_embed
    with torch.no_grad():
        first.weight[0] = 0.0
        first.weight[0, -1], first.bias[0] = 1e20, -1e20 * math.sin(slowest)
        second.weight[:, 0] = 1e25
    sd.save(tmp_path / "late.safetensors")
    rows = latent_rows("instance", torch.zeros(3, 1, 4, 4, 4), torch.ones(3, 1, 4, 4, 4))
    too_late = [[bool(sample_rows(rows, 2 * step + rank, 1)[2] > late) for rank in (0, 1)] for step in range(100)]
    step = next(step for step, ranks in enumerate(too_late, start=1) if any(ranks))
    assert step > 1 and too_late[step - 1].count(True) == 1
    flags = ("--model", tmp_path / "late.safetensors", "--no-with-prior-preservation", "--max-train-steps", 100)
    done = run(command([*base, *flags, "--checkpointing-steps", 1, "--output-dir", tmp_path / "run"], 2), tmp_path, 1)
    assert f"the loss is nan at step {step}, and nothing was saved of it" in done.complaint
    assert checkpoints(tmp_path / "run") == list(range(1, step)) and len(losses(tmp_path / "run")) == step - 1
    last = weights(tmp_path / "run" / "checkpoints" / f"checkpoint-{step - 1:06d}")
    assert all(tensor.isfinite().all() for tensor in last.values())


def test_gradient_checkpointing_gives_the_same_gradients(random_model):
    sd = random_model()
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t, grads = torch.tensor([10, 700]), []
    for checkpointing in (False, True):
        trainable = FullTuning(sd, Settings(gradient_checkpointing=checkpointing))
        trainable.zero_grad()
        trainable(z, t, ["a dog", "a sks dog"]).square().mean().backward()
        grads.append([p.grad.clone() for p in trainable.parameters()])
    scale = max(g.abs().max() for g in grads[0])
    assert max((a - b).abs().max() for a, b in zip(*grads, strict=True)) <= 1e-6 * scale


def test_deterministic_tf32_and_gradient_checkpointing_give_the_same_losses(base, tmp_path):
    call(*base, "--output-dir", tmp_path / "plain")
    how = ("--deterministic", "--allow-tf32", "--gradient-checkpointing")
    try:
        call(*base, *how, "--output-dir", tmp_path / "how")
    finally:
        torch.use_deterministic_algorithms(False)
    assert losses(tmp_path / "how") == pytest.approx(losses(tmp_path / "plain"), rel=1e-6)
