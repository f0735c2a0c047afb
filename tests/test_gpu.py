"""What only a CUDA device can show. Run `pytest -m gpu` where there is one; elsewhere every test is skipped."""

import shutil
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from runs import LATEST, SMALL, call, command, losses, pixels, run, weights

from ldm import StableDiffusion, samplers
from ldm.errors import RunError
from ldm.runtime import compile_blocks
from ldm.unet import CrossAttention, ResBlock, TransformerBlock

CUDA = torch.device("cuda")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """fp32 convolutions in fp32, and the same algorithms in every call."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def load(root, dtype=torch.float32, device=CUDA) -> StableDiffusion:
    """The embedded model."""
    return StableDiffusion.load(root / "weights" / "tiny" / "base", device, dtype)


def latents(sd, sampler="ddim", steps=6, guidance=4.0, seeds=(1, 2)):
    given = {"sampler": sampler, "steps": steps, "guidance": guidance, "seeds": seeds, "eta": 0.5}
    return sd.generate("a photo of a dog", negative_prompt="snow", output="latent", **given)


def close(found, expected, share):
    torch.testing.assert_close(found.cpu(), expected.cpu(), rtol=0, atol=share * expected.abs().max().item())


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_latents_equal_those_of_the_cpu(sampler, root):
    close(latents(load(root), sampler), latents(load(root, device="cpu"), sampler), 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("sampler", ["ddim", "plms", "heun"])
def test_a_replayed_recording_has_the_bits_of_plain_calls(sampler, guidance, dtype, root, monkeypatch):
    sd, calls = load(root, dtype), []
    sd.unet.register_forward_hook(lambda *_: calls.append(1))
    replayed = latents(sd, sampler, guidance=guidance)
    assert len(calls) == 2  # once plainly, once to record
    monkeypatch.setattr("ldm.guidance.captured", lambda function, device: function)
    assert torch.equal(replayed, latents(sd, sampler, guidance=guidance))


def test_a_recording_under_autocast_has_the_bits_of_plain_calls(root, monkeypatch):
    sd = load(root)
    with torch.autocast("cuda", torch.bfloat16):
        replayed = latents(sd)
        monkeypatch.setattr("ldm.guidance.captured", lambda function, device: function)
        assert torch.equal(replayed, latents(sd))


def test_the_memory_of_a_recording_is_freed(root):
    sd, allocated = load(root), []
    for _ in range(4):
        latents(sd)
        torch.cuda.synchronize()
        allocated.append(torch.cuda.memory_allocated())
    assert allocated[-1] == allocated[1]


@pytest.mark.filterwarnings("error:called a synchronizing CUDA operation")
@pytest.mark.parametrize("sampler", ["ddim", "euler_a"])
def test_a_step_does_not_wait_for_the_device(sampler, root, monkeypatch):
    sd, loop = load(root), samplers.SAMPLERS[sampler].loop

    def watched(denoise, x, schedule, times, **others):
        denoise(x, times[0]), denoise(x, times[0])  # records, which may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            return loop(denoise, x, schedule, times, **others)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setitem(samplers.SAMPLERS, sampler, samplers.Sampler(watched))
    assert latents(sd, sampler).isfinite().all()


def test_channels_last_makes_the_same_latents(root):
    sd = load(root)
    expected = latents(sd)
    sd.unet.to(memory_format=torch.channels_last)
    close(latents(sd), expected, 1e-3)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("dtype, share", [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
def test_compiled_blocks_make_the_same_latents(dtype, share, root):
    sd = load(root, dtype)
    expected = latents(sd)
    compile_blocks(sd.unet, ResBlock, TransformerBlock)
    close(latents(sd), expected, share)


def test_attention_whose_logits_overflow_fp16_is_computed_in_fp32():
    attention = CrossAttention(64, 64, heads=1, upcast=True).to(CUDA, torch.float16)
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0)).to(CUDA, torch.float16)
    with torch.no_grad():
        attention.to_q.weight.copy_(400.0 * torch.eye(64))
        attention.to_k.weight.copy_(400.0 * torch.eye(64))  # q k^T is up to 400 * 400 * 64 * 9
        found = attention(x, x)
        expected = deepcopy(attention).double()(x.double(), x.double())
    assert found.isfinite().all()
    close(found.double(), expected, 1e-2)


@pytest.mark.parametrize("tiling", [False, True])
@torch.no_grad()
def test_an_autoencoder_that_overflows_fp16_decodes_in_fp32(tiling, root):
    sd = load(root, torch.float16)
    sd.vae.decoder.conv_in.weight.mul_(1e4)  # the first norm's input overflows, and the norm takes the scale away again
    sd.vae.decoder.conv_in.bias.mul_(1e4)
    sd.tiling = tiling
    z = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)).to(CUDA)
    assert not sd.vae.decode((z / sd.config.vae.scale_factor).half()).isfinite().all()
    images = sd.decode_latents(z)
    assert images.isfinite().all() and images.dtype == torch.float32
    close(images, deepcopy(sd.vae).float().decode(z / sd.config.vae.scale_factor), 1e-3)


@torch.no_grad()
def test_strips_need_less_memory_for_the_same_picture(root):
    sd = load(root)
    z, peaks, pictures = torch.randn(4, 4, 128, 128, device=CUDA), [], []
    for sd.tiling in (False, True):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        pictures.append(sd.decode_latents(z))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    close(*pictures, 1e-4)
    assert peaks[1] < peaks[0] / 3


# Training


@pytest.mark.parametrize(
    "flags", [{}, {"gradient_checkpointing": True}, {"mixed_precision": "bf16"}, {"train_batch_size": 2}], ids=str
)
def test_the_peak_of_a_training_step_is_within_15_percent_of_the_prediction(flags):
    """SD1 at full size, 512 pixels, against the largest number of bytes that CUDA's allocator has given out."""
    from ldm import StableDiffusion
    from ldm.config import SD1
    from ldm.dreambooth import dreambooth_loss
    from ldm.preflight.memory import Rehearsal
    from ldm.settings import Settings
    from ldm.training import FullTuning
    from ldm.training.optimizer import adamw
    from ldm.training.precision import Precision

    device = torch.device("cuda")
    settings = replace(Settings(instance_prompt="a sks dog", class_prompt="a dog"), **flags)
    with torch.device("meta"):
        sd = StableDiffusion(SD1)
    rehearsal = Rehearsal(sd, FullTuning, settings, device)
    rehearsal.prepare()
    predicted = rehearsal.training_step(1).total

    before = torch.cuda.memory_allocated()
    for network in sd.networks().values():
        network.to_empty(device=device)
        for parameter in network.parameters():
            torch.nn.init.constant_(parameter, 1e-3)
    precision, trainable = Precision(settings.mixed_precision, device), FullTuning(sd, settings)
    optimizer = adamw(trainable.parameter_groups(settings), settings.use_8bit_adam)
    prompts = [p for p in (settings.instance_prompt, settings.class_prompt) for _ in range(settings.train_batch_size)]
    is_class = torch.tensor([prompt == settings.class_prompt for prompt in prompts], device=device)
    sd.forget_encoder()
    sd.freeze(sd.vae, precision.dtype)
    trainable.prepare(tuple(dict.fromkeys(prompts)), precision.dtype)
    for step in range(3):
        if step == 1:  # the first step has no moments yet
            torch.cuda.reset_peak_memory_stats()
        optimizer.zero_grad(set_to_none=True)
        noisy = torch.randn(len(prompts), 4, 64, 64, device=device)
        with precision.autocast():
            prediction = trainable(noisy, torch.randint(1000, (len(prompts),), device=device), prompts)
        precision.backward(dreambooth_loss(prediction, noisy, is_class, 1.0).total)
        del prediction
        torch.nn.utils.clip_grad_norm_(list(trainable.trained.values()), settings.max_grad_norm)
        optimizer.step()
    assert predicted == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.15)


@pytest.fixture
def base(saved, photographs) -> tuple:
    return ("--model", saved["official"], "--instance-data-dir", photographs, *SMALL, "--max-train-steps", 6)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_losses_equal_those_of_the_cpu(precision, base, tmp_path):
    flags = (*base, "--mixed-precision", precision, "--use-ema")
    for device in ("cpu", "cuda"):
        call(*flags, "--device", device, "--class-data-dir", tmp_path / "class", "--output-dir", tmp_path / device)
    mine, theirs = losses(tmp_path / "cuda"), losses(tmp_path / "cpu")
    assert mine == pytest.approx(theirs, rel={"no": 1e-3, "bf16": 3e-2, "fp16": 1e-2}[precision])


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--mixed-precision", "fp16"),
        ("--train-dtype", "bf16", "--fused-backward", "--max-grad-norm", 0),
        ("--prior", "prediction", "--mixed-precision", "bf16"),
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_a_deterministic_run_resumes_to_the_same_bits(flags, base, tmp_path):
    flags = [str(flag) for flag in (*base, *flags, "--device", "cuda", "--deterministic", "--checkpointing-steps", 3)]
    for folder, stops in (("whole", [6]), ("parts", [3, 6])):
        for last in stops:
            more = ("--max-train-steps", last, "--output-dir", tmp_path / folder, *LATEST)
            done = run(command([*flags, *more]), tmp_path)
            assert done.status == 0, done.err
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_training_step_does_not_wait_for_the_device(base, tmp_path):
    """torch warns of each operation that waits; numbers are read through an event, which is none."""
    from ldm.training import Run, TrainingState

    update, seen = TrainingState.update, []

    def noted(run, state):
        seen.append(state.step)
        if state.step == 6:
            torch.cuda.set_sync_debug_mode("default")

    def watched(state, numbers):
        if state.step == 3:  # the first steps move tables and compile kernels
            torch.cuda.set_sync_debug_mode("error")
        return update(state, numbers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingState, "update", watched)
        patch.setattr(Run, "save_if_due", noted)
        try:
            call(*base, "--device", "cuda", "--output-dir", tmp_path / "run")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert seen == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_class_pictures_are_those_of_any_batch(precision, base, tmp_path):
    """Files that are missing are made again; on a GPU their bits may depend on the batch, and their look does not."""
    flags = (*base, "--mixed-precision", precision, "--device", "cuda", "--max-train-steps", 1)
    call(*flags, "--class-data-dir", tmp_path / "two", "--output-dir", tmp_path / "run-two")
    one = ("--sample-batch-size", 1, "--class-data-dir", tmp_path / "one", "--output-dir", tmp_path / "run-one")
    call(*flags, *one)
    for path in sorted((tmp_path / "one").glob("*.png")):
        first, second = (pixels(tmp_path / folder / path.name) for folder in ("one", "two"))
        assert abs(first - second).mean() < 2.0


def test_out_of_memory_is_one_line(base, tmp_path):
    taken = torch.cuda.mem_get_info()[0]
    flags = (*base, "--device", "cuda", "--train-batch-size", 4096, "--resolution", 512, "--num-class-images", 1)
    with pytest.raises(RunError, match="ran out of memory") as error:
        with torch.cuda.device(0):
            torch.cuda.set_per_process_memory_fraction(min(1.0, 4e9 / taken))
            try:
                call(*flags, "--output-dir", tmp_path / "run")
            finally:
                torch.cuda.set_per_process_memory_fraction(1.0)
    assert "\n" not in str(error.value)


def test_as_many_processes_as_gpus_train_as_one(base, tmp_path):
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip("needs two GPUs")
    flags = (*base, "--device", "cuda", "--class-data-dir", tmp_path / "class")
    call(*flags, "--train-batch-size", count, "--output-dir", tmp_path / "one")
    done = run(command([*flags, "--output-dir", tmp_path / "all"], count), tmp_path)
    assert done.status == 0, done.err
    assert losses(tmp_path / "all") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
