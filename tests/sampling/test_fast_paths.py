"""What makes sampling fast or small changes no picture: compared with the plain way."""

import importlib
import shutil
from contextlib import contextmanager, nullcontext
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sample
from ldm import StableDiffusion, tiling
from ldm.errors import RunError
from ldm.runtime import compile_blocks, graphs
from ldm.unet import ResBlock, TransformerBlock

BLOCKS = ResBlock, TransformerBlock


@pytest.fixture(scope="module")
def tiny(root) -> StableDiffusion:
    """The embedded model."""
    return StableDiffusion.load(root / "weights" / "tiny" / "base")


# Keys and values, and prompts


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@torch.no_grad()
def test_keys_and_values_computed_once_give_the_same_bits(family, narrow):
    unet, draw = narrow(family).unet, torch.Generator().manual_seed(0)
    context = torch.randn(2, 11, unet.config.context_dim, generator=draw)
    text = unet.keys_values(context)
    assert len(text) == 16  # as many cross-attentions as Stable Diffusion has
    for t in (10, 500):
        x = torch.randn(2, 4, 8, 8, generator=draw)
        assert torch.equal(unet(x, torch.full((2,), t), text), unet(x, torch.full((2,), t), context))


def test_the_keys_of_a_text_are_computed_once_for_all_steps(random_model):
    sd, calls = random_model(), []
    attentions = [block.attn2 for block in sd.unet.modules() if isinstance(block, TransformerBlock)]
    for attention in attentions:
        attention.to_k.register_forward_hook(lambda *_: calls.append(1))
    sd.generate("a cat", steps=7, output="latent")
    assert len(calls) == len(attentions) > 0


@torch.no_grad()
def test_equal_prompts_are_encoded_once_and_come_out_in_order(random_model):
    sd, sizes = random_model(), []
    alone = {prompt: sd.encode_prompt(prompt) for prompt in ("fog", "a cat", "snow")}
    sd.text_encoder.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    prompts = ["fog", "fog", "a cat", "snow", "a cat"]
    context = sd.encode_prompt(prompts)
    assert sizes == [3]
    expected = torch.cat([alone[prompt] for prompt in prompts])
    torch.testing.assert_close(context, expected, rtol=0, atol=1e-5)
    assert (alone["fog"] - alone["snow"]).abs().max() > 0.1


# Recorded kernels


class Recorder(TorchDispatchMode):
    """Stands for a CUDA graph: notes operations and their tensors, and runs them again on the same memory."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for operation, args, kwargs, result in self.operations:
            again = operation(*args, **kwargs)
            for old, new in zip(*(r if isinstance(r, tuple | list) else [r] for r in (result, again)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class FakeStream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, stream):
        pass


@pytest.fixture
def recorded(monkeypatch):
    """Makes `captured` record on the CPU. Returns the list of recordings, and counts plain calls in it."""
    recordings = []

    @contextmanager
    def record(graph, stream, capture_error_mode):
        recordings.append(graph)
        with graph:
            yield

    for name, fake in {"Stream": FakeStream, "CUDAGraph": Recorder, "graph": record}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    monkeypatch.setattr("ldm.guidance.captured", graphs.Captured)
    return recordings


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("sampler", ["ddim", "plms"])
def test_replaying_a_recording_gives_the_same_bits(sampler, guidance, random_model, recorded, monkeypatch):
    """plms keeps predictions of earlier steps, which a replay must not overwrite."""
    sd, calls = random_model(), []
    sd.unet.register_forward_hook(lambda *_: calls.append(1))
    given = {"seeds": [3, 4], "sampler": sampler, "steps": 6, "guidance": guidance, "output": "latent"}
    replayed = sd.generate("a cat", **given)
    assert len(recorded) == 1 and len(calls) == 2  # once plainly, once to record
    monkeypatch.setattr("ldm.guidance.captured", lambda function, device: function)
    assert torch.equal(replayed, sd.generate("a cat", **given))


def test_other_shapes_and_gradients_are_not_replayed(recorded):
    double, w = graphs.Captured(lambda x: 2.0 * x, torch.device("cpu")), torch.ones(2, requires_grad=True)
    with torch.no_grad():
        for number in (1.0, 2.0, 3.0):
            assert torch.equal(double(torch.full((2,), number)), torch.full((2,), 2 * number))
        assert torch.equal(double(torch.ones(3)), torch.full((3,), 2.0))
    double(w).sum().backward()
    assert torch.equal(w.grad, torch.full((2,), 2.0)) and len(recorded) == 1


def test_without_cuda_a_function_stays_as_it_is():
    def function(x):
        return x

    assert graphs.captured(function, torch.device("cpu")) is function


# Compiled blocks


def test_a_machine_without_a_compiler_is_told_in_one_line(random_model, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RunError, match="^torch needs a C.. compiler to compile a network, and found none; install g"):
        compile_blocks(random_model().unet, *BLOCKS)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_compiled_blocks_give_the_same_pictures(tiny, root):
    sd = StableDiffusion.load(root / "weights" / "tiny" / "base")
    names = sd.unet.state_dict().keys()
    compile_blocks(sd.unet, *BLOCKS)
    assert sd.unet.state_dict().keys() == names
    given = {"seeds": [1, 2], "steps": 5, "guidance": 4.0, "output": "latent"}
    expected, found = (one.generate("a photo of a dog", **given) for one in (tiny, sd))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    assert importlib.import_module("torch._dynamo.utils").counters["stats"]["unique_graphs"] > 3  # it did compile


# Decoding in strips


@pytest.mark.parametrize("rows", [8, 24, 1000])
@pytest.mark.parametrize("height, width", [(16, 24), (40, 16)])
@torch.no_grad()
def test_strips_give_the_same_picture(height, width, rows, tiny, monkeypatch):
    monkeypatch.setattr(tiling, "ROWS", rows)
    z = torch.randn(2, 4, height, width, generator=torch.Generator().manual_seed(0))
    expected = tiny.vae.decode(z)
    by_pixel = deepcopy(tiny.vae).to(memory_format=torch.channels_last)  # as on a GPU
    for vae in (tiny.vae, by_pixel):
        torch.testing.assert_close(tiling.decode(vae, z), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@torch.no_grad()
def test_no_layer_of_a_strip_sees_the_whole_picture(tiny, monkeypatch):
    monkeypatch.setattr(tiling, "ROWS", 16)
    vae, heights = deepcopy(tiny.vae), []
    for name, module in vae.decoder.up.named_modules():
        if isinstance(module, torch.nn.Conv2d) and "conv" in name:
            module.register_forward_hook(lambda module, inputs, output: heights.append(inputs[0].shape[2]))
    tiling.decode(vae, torch.zeros(1, 4, 48, 16))
    assert heights and max(heights) <= 2 * 18  # a strip and a row of each neighbour, doubled by an Upsample


def test_sample_py_decodes_in_strips(root, tmp_path, monkeypatch):
    decoded, decode = [], tiling.decode
    monkeypatch.setattr(tiling, "decode", lambda vae, z: (decoded.append(z.shape), decode(vae, z))[1])
    flags = ["--prompt", "a photo of a cat", "--steps", "2", "--num-images", "2", "--height", "96", "--device", "cpu"]
    sample.main([*flags, "--output-dir", str(tmp_path / "plain")])
    assert not decoded
    sample.main([*flags, "--output-dir", str(tmp_path / "strips"), "--vae-tiling"])
    assert decoded == [(2, 4, 24, 16)]
    for plain in (tmp_path / "plain").iterdir():
        assert _difference(plain, tmp_path / "strips" / plain.name) <= 1  # of 255


@pytest.mark.slow
@torch.no_grad()
def test_a_large_picture_in_strips_has_no_seams(tiny):
    """1024 pixels high, sampled by the embedded model: 16 strips at its full size."""
    given = {"steps": 3, "guidance": 4.0, "height": 1024, "width": 256}
    z = tiny.generate("a photo of a red cat in the snow", output="latent", **given) / tiny.config.vae.scale_factor
    expected = tiny.vae.decode(z)
    assert expected.std() > 0.1
    assert (tiling.decode(tiny.vae, z) - expected).abs().max() < 1e-4


def _difference(a, b) -> int:
    a, b = (np.asarray(sample.images.open_picture(path)).astype(int) for path in (a, b))
    return np.abs(a - b).max()
