"""What only a CUDA device can show about sampling. Run by hand where there is one: `pytest tests/test_gpu.py`."""

import shutil
from copy import deepcopy

import pytest
import torch

from ldm import StableDiffusion, samplers
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
