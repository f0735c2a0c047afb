"""Each network equals that of diffusers or transformers on the same random weights: outputs and gradients."""

from dataclasses import replace

import pytest
import torch

from ldm.clip import TextEncoder
from ldm.config import SD1, SD2, ModelConfig, TextConfig, UNetConfig, VAEConfig
from ldm.formats import folder_config, names
from ldm.unet import UNet
from ldm.vae import Autoencoder

diffusers = pytest.importorskip("diffusers", reason="needs the parity extra")
transformers = pytest.importorskip("transformers", reason="needs the parity extra")

UNETS = {
    "sd1": UNetConfig(channels=(32, 64, 96, 96), heads=4, context_dim=40, norm_groups=8),
    "sd2": UNetConfig(
        channels=(32, 64, 96, 96), heads=None, head_dim=16, context_dim=40, norm_groups=8, linear_projection=True
    ),
    "two levels": UNetConfig(
        channels=(32, 48), attention=(False, True), blocks=1, heads=2, context_dim=24, norm_groups=16
    ),
}
VAES = {
    "four levels": VAEConfig(channels=(16, 32, 32, 48), norm_groups=8),
    "three levels": VAEConfig(channels=(16, 32, 48), blocks=1, norm_groups=4),
}
TEXTS = {
    "sd1": TextConfig(vocab_size=100, context_length=20, width=48, mlp_width=96, layers=3, heads=4, pad_id=99),
    "sd2": TextConfig(
        vocab_size=100, context_length=20, width=48, mlp_width=192, layers=2, heads=3, activation="gelu", pad_id=0
    ),
}


def theirs_of(part: str, config: ModelConfig):
    """The network of diffusers or transformers, built from the JSON that we write for it."""
    tree = dict(folder_config.config_files(config, eos_id=99, bos_id=98)[f"{part}/config.json"])
    if part == "text_encoder":
        return transformers.CLIPTextModel(transformers.CLIPTextConfig(**tree)).eval()
    kind = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}[part]
    return kind.from_config(tree).eval()


def copy_into(theirs, ours, table):
    """Copies our weights into their network, name by name. Returns {our name: their name}."""
    mine, yours = dict(ours.named_parameters()), dict(theirs.named_parameters())
    renamed = {key: names.rename(key, table) if table else key for key in mine}
    if not set(renamed.values()) & set(yours):
        renamed = {key: value.removeprefix("text_model.") for key, value in renamed.items()}
    assert set(renamed.values()) == set(yours)
    with torch.no_grad():
        for key, name in renamed.items():
            yours[name].copy_(mine[key].reshape(yours[name].shape))
    return renamed


def assert_same(ours, theirs, what, scale=None):
    scale = theirs.abs().max() if scale is None else scale
    worst = (ours - theirs).abs().max() / scale
    assert worst <= 1e-5, f"{what}: {worst:.2e} of the scale"


def assert_same_gradients(ours, theirs, renamed):
    """Compares relative to the network's largest gradient: that of CLIP's k_proj.bias is only rounding error."""
    mine, yours = dict(ours.named_parameters()), dict(theirs.named_parameters())
    scale = max(p.grad.abs().max() for p in yours.values())
    for key, name in renamed.items():
        assert_same(mine[key].grad, yours[name].grad.reshape(mine[key].shape), key, scale)


@pytest.mark.parametrize("size", [(16, 16), (15, 21)], ids=["even", "odd"])
@pytest.mark.parametrize("kind", UNETS)
def test_unet_equals_diffusers(kind, size, randomised):
    config = replace(SD1, unet=UNETS[kind])
    ours, theirs = randomised(UNet(config.unet)), theirs_of("unet", config)
    renamed = copy_into(theirs, ours, names.unet_table(config.unet))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, *size, generator=generator)
    context = torch.randn(2, 11, config.unet.context_dim, generator=generator)
    t = torch.tensor([3, 981])
    a, b = ours(x, t, context), theirs(x, t, context).sample
    assert_same(a, b, "forward")
    cotangent = torch.randn(a.shape, generator=generator)
    (a * cotangent).sum().backward()
    (b * cotangent).sum().backward()
    assert_same_gradients(ours, theirs, renamed)


@pytest.mark.parametrize("kind", VAES)
def test_autoencoder_equals_diffusers(kind, randomised):
    config = replace(SD1, vae=VAES[kind])
    ours, theirs = randomised(Autoencoder(config.vae)), theirs_of("vae", config)
    renamed = copy_into(theirs, ours, names.vae_table(config.vae))
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, 3, 32, 48, generator=generator) * 2 - 1
    a, b = ours.encode(images), theirs.encode(images).latent_dist
    assert_same(a.mean, b.mean, "mean")
    assert_same(a.std, b.std, "std")
    z_a = a.sample(torch.Generator().manual_seed(2))
    z_b = b.sample(torch.Generator().manual_seed(2))
    assert_same(z_a, z_b, "sample")
    c, d = ours.decode(z_a), theirs.decode(z_b).sample
    assert_same(c, d, "decoded")
    cotangent = torch.randn(c.shape, generator=generator)
    (c * cotangent).sum().backward()
    (d * cotangent).sum().backward()
    assert_same_gradients(ours, theirs, renamed)


def test_kl_equals_torch_distributions(randomised):
    posterior = randomised(Autoencoder(VAES["three levels"])).encode(torch.rand(2, 3, 16, 16) * 2 - 1)
    normal = torch.distributions.Normal
    theirs = torch.distributions.kl_divergence(normal(posterior.mean, posterior.std), normal(0.0, 1.0))
    torch.testing.assert_close(posterior.kl(), theirs.flatten(1).sum(1))


@pytest.mark.parametrize("kind", TEXTS)
def test_text_encoder_equals_transformers(kind, randomised):
    config = replace(SD2 if kind == "sd2" else SD1, text=TEXTS[kind])
    ours, theirs = randomised(TextEncoder(config.text)), theirs_of("text_encoder", config)
    renamed = copy_into(theirs, ours, None)
    ids = torch.randint(0, 98, (3, config.text.context_length), generator=torch.Generator().manual_seed(1))
    a, b = ours(ids), theirs(ids).last_hidden_state
    assert_same(a, b, "forward")
    cotangent = torch.randn(a.shape, generator=torch.Generator().manual_seed(2))
    (a * cotangent).sum().backward()
    (b * cotangent).sum().backward()
    assert_same_gradients(ours, theirs, renamed)
