"""The presets have the parameters of the published checkpoints: the same number, names and shapes."""

from functools import cache

import pytest
import torch
from published import published

from ldm import StableDiffusion
from ldm.config import SD1, SD2
from ldm.formats import names
from ldm.schedule import Schedule

PREFIXES = {"unet": names.UNET_PREFIX, "vae": names.VAE_PREFIX, "text_encoder": names.TEXT_PREFIX}
# a buffer of older versions of transformers: 0 to 76
POSITION_IDS = names.TEXT_PREFIX + "text_model.embeddings.position_ids"


@cache
def built(family: str) -> StableDiffusion:
    with torch.device("meta"):
        return StableDiffusion({"sd1": SD1, "sd2": SD2}[family])


@pytest.mark.parametrize(
    ("family", "part", "count"),
    [
        ("sd1", "unet", 859_520_964),
        ("sd1", "vae", 83_653_863),
        ("sd1", "text_encoder", 123_060_480),
        ("sd2", "unet", 865_910_724),
        ("sd2", "vae", 83_653_863),
    ],
)
def test_a_network_has_the_published_parameters(family, part, count):
    network, prefix = getattr(built(family), part), PREFIXES[part]
    assert sum(parameter.numel() for parameter in network.parameters()) == count
    ours = {prefix + name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    theirs = {name: shape for name, shape in published(family).items() if name.startswith(prefix)}
    theirs.pop(POSITION_IDS, None)
    assert ours == theirs


def test_a_published_file_also_has_the_schedules_tables_and_three_other_tensors():
    """The schedule's tables, which we write too, the position ids, and two remaining tensors of the EMA."""
    networks = (names.UNET_PREFIX, names.VAE_PREFIX, names.TEXT_PREFIX)
    rest = {name: shape for name, shape in published("sd1").items() if not name.startswith(networks)}
    buffers = {name: tuple(table.shape) for name, table in Schedule(SD1.schedule).official_buffers().items()}
    assert rest == buffers | {"model_ema.decay": (), "model_ema.num_updates": ()}
    assert published("sd1")[POSITION_IDS] == (1, SD1.text.context_length)
