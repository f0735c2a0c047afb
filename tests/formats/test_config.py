"""A configuration is refused exactly if its networks can't run, or can't take each other's outputs."""

import random

import pytest
import torch

from ldm import StableDiffusion
from ldm.config import ModelConfig, TextConfig, UNetConfig, VAEConfig
from ldm.tokenizer import Tokenizer


def draw(rng: random.Random) -> ModelConfig:
    """A small model, of which about half can run: most values are fitting, some are drawn wrong."""

    def value(right, *wrong):
        return rng.choice(wrong) if wrong and rng.random() < 0.08 else right

    levels = rng.choice((1, 2, 3))
    widths = tuple(value(rng.choice((8, 12, 24)), 0, 5, 6, 7) for _ in range(levels))
    by_width = rng.random() < 0.3
    return ModelConfig(
        unet=UNetConfig(
            in_channels=value(4, 3, 0),
            out_channels=value(4, 3),
            channels=widths,
            attention=tuple(rng.random() < 0.5 for _ in range(value(levels, levels - 1, levels + 1))) or (True,),
            blocks=value(rng.choice((1, 2)), 0),
            heads=None if by_width else value(2, 0, 3, 5),
            head_dim=value(4, 0, 3, 5) if by_width else None,
            linear_projection=rng.random() < 0.5,
            context_dim=value(12, 8, 0),
            norm_groups=value(2, 0, 3, 4),
        ),
        vae=VAEConfig(
            channels=tuple(value(rng.choice((4, 8)), 0, 3) for _ in range(rng.choice((1, 2, 3)))),
            blocks=value(1, 0),
            latent_channels=value(4, 3, 0),
            norm_groups=value(2, 0, 3),
        ),
        text=TextConfig(
            vocab_size=6,
            context_length=5,
            width=value(12, 8, 0),
            mlp_width=value(16, 0),
            layers=value(1, 0),
            heads=value(3, 0, 5),
            activation=value("gelu", "relu"),
        ),
    )


@torch.no_grad()
def runs(config: ModelConfig, tokenizer: Tokenizer) -> bool:
    """Whether the three networks make a picture of a picture."""
    try:
        sd = StableDiffusion(config, tokenizer)
        context = sd.text_encoder(torch.zeros(1, config.text.context_length, dtype=torch.long))
        image = torch.zeros(1, 3, config.vae.factor, config.vae.factor)
        z = sd.vae.encode(image).mode()
        return sd.unet(z, torch.zeros(1), context).shape == z.shape and sd.vae.decode(z).shape == image.shape
    except Exception:  # torch has no class for it
        return False


def is_accepted(config: ModelConfig, tokenizer: Tokenizer) -> bool:
    """As `StableDiffusion.load` does it: the check, and then the networks' own constructors."""
    try:
        config.check_fits()
        with torch.device("meta"):
            StableDiffusion(config, tokenizer)
    except Exception:
        return False
    return True


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.slow
def test_a_configuration_is_accepted_if_its_networks_run(random_model):
    rng, tokenizer, counts = random.Random(0), random_model().tokenizer, {True: 0, False: 0}
    for _ in range(100):
        config = draw(rng)
        expected = runs(config, tokenizer)
        counts[expected] += 1
        # empty layers run on some paths, and no model has one
        sizes = *config.unet.channels, *config.vae.channels, config.text.mlp_width
        empty = 0 in (*sizes, config.unet.blocks, config.vae.blocks, config.text.layers)
        assert is_accepted(config, tokenizer) == expected or (empty and expected), config
    assert min(counts.values()) > 25
