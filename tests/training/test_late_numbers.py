"""A training step reads nothing from the device: what people read of it arrives while the next step runs.

On torch's meta device tensors have no values, so that any read raises, and so does any tensor on another device.
"""

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from runs import BOTH, SMALL, call, checkpoints, latent_rows, metrics, timeless, weights

import train
from ldm import StableDiffusion, training
from ldm.data import Batches
from ldm.errors import RunError
from ldm.runtime.processes import World
from ldm.training import FullTuning, Run, SubjectLosses, TrainingState, numbers
from ldm.training.precision import Precision
from ldm.validation import Validation

META = torch.device("meta")
FLAGS = ("--use-ema", "--snr-gamma", "5", "--gradient-accumulation-steps", "2", "--gradient-checkpointing")


@pytest.fixture
def base(request, saved, photographs) -> tuple:
    tuned = getattr(request, "param", ())  # the flags of BOTH, or those of full tuning
    return ("--model", saved["official"], "--instance-data-dir", photographs, *SMALL, *tuned)


@pytest.fixture
def loop(base, random_model, tmp_path, monkeypatch):
    """loop(): the steps of a run, three of them, with everything on the meta device. Returns the steps reported."""
    monkeypatch.setattr(World, "is_asynchronous", True)
    monkeypatch.setattr(numbers, "to_host", lambda values: torch.zeros(values.shape, device="cpu"))
    # Fused AdamW knows how to compute shapes on the meta device, but its constructor refuses to.
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda *_: None)

    def go(*flags: str, subjects: tuple[str, ...] = ()) -> list[dict]:
        arguments = [*base, *FLAGS, *flags, "--max-train-steps", "3", "--output-dir", str(tmp_path / "run")]
        settings = training.parse([str(flag) for flag in arguments], train.TINY)
        run = Run(settings, World(0, 1, META))
        run.precision = Precision("no", torch.device("cpu"))  # autocast knows no meta device
        with META:
            sd = StableDiffusion(random_model().config, random_model().tokenizer)
        monkeypatch.setattr(sd, "freeze", lambda *_: None)  # which keeps a copy on the CPU
        state = TrainingState(FullTuning(sd, settings), settings, run.precision, "")
        state.trainable.prepare((settings.instance_prompt, settings.class_prompt), torch.float32)
        latents = torch.empty(3, 1, *sd.latent_shape(settings.resolution, settings.resolution), device=META)
        rows = [
            latent_rows(kind, latents, latents, prompt=prompt)
            for kind, prompt in (("instance", settings.instance_prompt), ("class", settings.class_prompt))
        ]
        batches = Batches(rows, settings, run.world)
        run.subject_losses = SubjectLosses(subjects, META)
        lines = []
        run.saver, run.lines = SimpleNamespace(rescuing=lambda *_: nullcontext()), SimpleNamespace(add=lines.append)
        monkeypatch.setattr(run, "save_if_due", lambda state: None)
        train.train(run, state, batches, Validation(run, state, (), None))
        return lines

    return go


@pytest.mark.parametrize(
    "flags",
    [pytest.param((), marks=pytest.mark.slow), ("--no-train-text-encoder",)],
    ids=["text encoder too", "unet alone"],
)
def test_a_step_reads_nothing_from_the_device(flags, loop):
    assert [line["step"] for line in loop(*flags)] == [1, 2]  # that of the third step is still on its way


def test_losses_of_several_subjects_are_not_read_in_a_step(loop):
    assert len(loop("--no-train-text-encoder", subjects=("dog", "cat"))) == 2


@pytest.mark.parametrize("read", [torch.Tensor.item, torch.Tensor.cpu, bool])
def test_a_read_in_a_step_is_found(read, loop, monkeypatch):
    two_terms = train.two_terms

    def reading(*inputs):
        losses = two_terms(*inputs)
        read(losses.total)
        return losses

    monkeypatch.setattr(train, "two_terms", reading)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        loop()


# The same lines, weights and errors as where every step is reported at once.


@pytest.fixture
def late(monkeypatch):
    """Steps are reported while the next one runs, as on a GPU."""
    monkeypatch.setattr(World, "is_asynchronous", True)


@pytest.mark.parametrize("base", BOTH, indirect=True)
def test_late_numbers_change_nothing(base, tmp_path, monkeypatch):
    flags = (*base, "--max-train-steps", 5, "--checkpointing-steps", 2, "--use-ema")
    call(*flags, "--output-dir", tmp_path / "plain")
    monkeypatch.setattr(World, "is_asynchronous", True)
    call(*flags, "--output-dir", tmp_path / "late")
    plain, late = (timeless(metrics(tmp_path / name)) for name in ("plain", "late"))
    assert plain == late and [line["step"] for line in late] == [1, 2, 3, 4, 5]
    for step in (2, 4):  # a checkpoint holds the line of its own step
        lines = metrics(tmp_path / "late" / "checkpoints" / f"checkpoint-{step:06d}")
        assert [line["step"] for line in lines] == list(range(1, step + 1))
    one, other = weights(tmp_path / "plain"), weights(tmp_path / "late")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("every", [1, 100])
@pytest.mark.parametrize("base", BOTH, indirect=True)
def test_a_run_that_diverges_ends_when_its_numbers_arrive(every, late, base, tmp_path):
    flags = ("--learning-rate", "1e30", "--checkpointing-steps", every, "--output-dir", tmp_path / "run")
    with pytest.raises(RunError, match="at step 2, and nothing was saved of it; lower --learning-rate"):
        call(*base, *flags)
    assert checkpoints(tmp_path / "run") == ([1] if every == 1 else [])
    assert not [*(tmp_path / "run").glob("*.safetensors")]


@pytest.mark.parametrize("eight_bit", [False, True], ids=["fused", "8-bit"])
@pytest.mark.parametrize("base", BOTH, indirect=True)
def test_a_gradient_that_is_not_finite_leaves_the_weights_and_moments(eight_bit, late, base, tmp_path, monkeypatch):
    """The second step's loss is finite and its gradient is not."""
    if eight_bit:
        pytest.importorskip("bitsandbytes")
    kept, clip = [], TrainingState.clip_gradients

    def spoiled(state: TrainingState) -> torch.Tensor:
        parameters = list(state.parameters.values())
        if state.step == 1:
            parameters[0].grad.view(-1)[0] = float("inf")
            kept.extend((state, [p.detach().clone() for p in parameters], state.tensors()))
        return clip(state)

    monkeypatch.setattr(TrainingState, "clip_gradients", spoiled)
    monkeypatch.setattr(TrainingState, "start_step", stop_at(2, TrainingState.start_step))
    flags = ("--max-train-steps", 4, *(["--use-8bit-adam"] if eight_bit else []), "--output-dir", tmp_path / "run")
    with pytest.raises((RunError, Enough)):
        call(*base, *flags)
    state, before, moments = kept
    assert all(torch.equal(p, q) for p, q in zip(state.parameters.values(), before, strict=True))
    after = state.tensors()
    assert all(torch.equal(after[name], moments[name]) for name in moments)


class Enough(Exception):
    pass


def stop_at(step: int, start_step):
    """start_step, which raises Enough after this many updates."""

    def start(state: TrainingState) -> bool:
        if state.step == step:
            raise Enough
        return start_step(state)

    return start
