"""Fixtures for several test files."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # processes that share the cores are slow with several threads each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # train.py and sample.py are scripts at the top level, not modules of the package
sys.path.append(str(ROOT / "tests" / "networks"))  # whose comparisons are made again at full size

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from runs import photograph  # noqa: E402

from ldm import StableDiffusion  # noqa: E402
from ldm.config import SD1, SD2, SD2_V, ModelConfig, TextConfig, UNetConfig, VAEConfig  # noqa: E402
from ldm.formats import source  # noqa: E402
from ldm.tokenizer import BOS, EOS, Tokenizer, clip_vocabulary  # noqa: E402


@pytest.fixture(scope="session")
def root() -> Path:
    """The top of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def randomised():
    """randomised(network) draws every parameter at random. A layer of zeros would hide the layers before it."""

    def draw(network: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in network.parameters():
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
                scale = fan_in**-0.5 if parameter.ndim > 1 else 0.1
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
                if parameter.ndim == 1:
                    parameter.add_(0.5)
        return network

    return draw


@pytest.fixture(scope="session")
def random_model(randomised):
    """random_model(): a small Stable Diffusion with odd widths and its own vocabulary.

    Pictures are 32x32, latents 8x8. Cross-attention and output are amplified, so that the text changes the picture.
    """

    def make(seed: int = 0) -> StableDiffusion:
        vocab, merges = clip_vocabulary()
        tokens = [*list(vocab)[: 512 + 200], BOS, EOS]
        tokenizer = Tokenizer({token: id for id, token in enumerate(tokens)}, merges[:200], 24, len(tokens) - 1)
        config = ModelConfig(
            unet=UNetConfig(
                channels=(16, 32), attention=(True, False), blocks=1, heads=2, context_dim=24, norm_groups=4
            ),
            vae=VAEConfig(channels=(8, 16, 24), blocks=1, norm_groups=4, scale_factor=0.25),
            text=TextConfig(len(tokens), 24, width=24, mlp_width=48, layers=2, heads=3, pad_id=len(tokens) - 1),
            sample_size=8,
        )
        sd = StableDiffusion(config, tokenizer)
        for network in sd.networks().values():
            randomised(network, seed).eval()
        with torch.no_grad():
            sd.unet.out[2].weight.mul_(3.0)
            for name, parameter in sd.unet.named_parameters():
                if "attn2.to_v" in name:
                    parameter.mul_(5.0)
        return sd

    return make


@pytest.fixture
def narrow(randomised, monkeypatch):
    """narrow(family): a Stable Diffusion "sd1", "sd2" or "sd2_v" with all layers of the official one, but narrow.

    Its text encoder has only two blocks. While a test uses this fixture, official files that do not state their
    configuration are read as such models.
    """
    unet = {"channels": (16, 32, 48, 48), "norm_groups": 8, "context_dim": 24}
    vae = VAEConfig(channels=(8, 16, 24, 24), norm_groups=4)
    text = {"width": 24, "mlp_width": 96, "layers": 2, "heads": 3}
    presets = {
        "sd1": replace(SD1, unet=replace(SD1.unet, heads=4, **unet), vae=vae, text=replace(SD1.text, **text)),
        "sd2": replace(SD2, unet=replace(SD2.unet, head_dim=4, **unet), vae=vae, text=replace(SD2.text, **text)),
    }
    presets["sd2_v"] = replace(presets["sd2"], schedule=SD2_V.schedule, sample_size=SD2_V.sample_size)
    for name, preset in presets.items():
        monkeypatch.setitem(source.PRESETS, name, preset)

    def make(family: str, seed: int = 0) -> StableDiffusion:
        sd = StableDiffusion(presets[family])
        for network in sd.networks().values():
            randomised(network, seed).eval()
        return sd

    return make


@pytest.fixture(scope="session")
def saved(random_model, tmp_path_factory) -> dict[str, Path]:
    """{layout: path} of a saved `random_model()`. Tests must not write to these paths."""
    folder = tmp_path_factory.mktemp("model")
    paths = {"official": folder / "model.safetensors", "diffusers": folder / "model"}
    for layout, path in paths.items():
        random_model().save(path, layout)
    return paths


@pytest.fixture(scope="session")
def scheduler_of_diffusers():
    """scheduler_of_diffusers(sampler, config) returns diffusers' scheduler for our sampler of this name."""
    diffusers = pytest.importorskip("diffusers", reason="needs the parity extra")
    names = {
        "ddpm": "DDPMScheduler",
        "ddim": "DDIMScheduler",
        "plms": "PNDMScheduler",
        "euler": "EulerDiscreteScheduler",
        "euler_a": "EulerAncestralDiscreteScheduler",
        "heun": "HeunDiscreteScheduler",
        "dpmpp_2m": "DPMSolverMultistepScheduler",
        "dpmpp_2m_karras": "DPMSolverMultistepScheduler",
    }

    def make(sampler: str, config):
        karras = {"use_karras_sigmas": True} if sampler == "dpmpp_2m_karras" else {}
        return getattr(diffusers, names[sampler]).from_config(config, **karras)

    return make


@pytest.fixture
def photographs(tmp_path) -> Path:
    """A folder with three photographs of different sizes."""
    return photograph(tmp_path / "photographs", [(40, 32), (32, 50), (64, 64)])
