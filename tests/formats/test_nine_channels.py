"""Models for painting in, whose UNet has nine input channels: their files, in every layout, and the official sizes."""

import json
from dataclasses import replace

import pytest
import torch
from published import published
from safetensors.torch import load_file, save_file

from ldm import InputError, StableDiffusion
from ldm.__main__ import main
from ldm.config import SD1, SD1_INPAINT, SD2_INPAINT
from ldm.data import widen
from ldm.formats import UNET_PREFIX, family, modelspec, read

FIRST = UNET_PREFIX + "input_blocks.0.0.weight"


@pytest.fixture
def nine(narrow):
    """nine(family): a narrow model for painting in of "sd1" or "sd2", all of whose weights are random."""

    def make(name: str) -> StableDiffusion:
        sd = narrow(name)
        widen(sd)
        with torch.no_grad():
            sd.unet.input_blocks[0][0].weight.normal_(generator=torch.Generator().manual_seed(1))
        return sd

    return make


def foreign(sd: StableDiffusion, path):
    """A single file that says nothing about itself, like the official ones, as .safetensors or .ckpt."""
    sd.save(path.with_name("ours.safetensors"))
    tensors = load_file(path.with_name("ours.safetensors"))
    if path.suffix == ".ckpt":
        torch.save({"state_dict": tensors, "global_step": 440000}, path)
    else:
        save_file(tensors, path, {"format": "pt"})
    return path


def test_a_file_that_says_nothing_about_itself_is_known_by_its_first_layer(tmp_path):
    """A few tensors are enough to tell what a file is."""
    text = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    for channels, config in ((4, SD1), (9, SD1_INPAINT)):
        save_file({FIRST: torch.zeros(320, channels, 3, 3), text: torch.zeros(2, 768)}, tmp_path / "a.safetensors")
        assert read(tmp_path / "a.safetensors").config == config


@pytest.mark.slow
@pytest.mark.parametrize("name, suffix", [("sd1", ".ckpt"), ("sd2", ".safetensors")])
def test_a_file_of_either_family_converts_into_both_layouts(name, suffix, nine, tmp_path):
    sd = nine(name)
    loaded = StableDiffusion.load(foreign(sd, tmp_path / f"theirs{suffix}"), dtype=None)
    assert loaded.config == sd.config and loaded.config.schedule.prediction == "eps"
    loaded.save(tmp_path / "folder", "diffusers")
    again = StableDiffusion.load(tmp_path / "folder", dtype=None)
    again.save(tmp_path / "again.safetensors")
    for other in (again, StableDiffusion.load(tmp_path / "again.safetensors", dtype=None)):
        assert other.config == sd.config
        assert all(torch.equal(tensor, other.state()[key]) for key, tensor in sd.state().items())


def test_diffusers_opens_a_saved_folder_as_its_inpainting_pipeline(random_model, tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="needs the parity extra")
    widen(sd := random_model())
    sd.save(tmp_path / "folder", "diffusers")
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "folder")
    assert type(pipe) is diffusers.StableDiffusionInpaintPipeline and pipe.unet.config.in_channels == 9
    pipe.save_pretrained(tmp_path / "theirs")
    theirs = StableDiffusion.load(tmp_path / "theirs")
    assert theirs.config == sd.config and torch.equal(theirs.state()[FIRST], sd.state()[FIRST])


@pytest.mark.parametrize("name, config", [("sd1", SD1_INPAINT), ("sd2", SD2_INPAINT)])
def test_at_full_size_only_the_first_layer_differs_from_the_ordinary_model(name, config):
    with torch.device("meta"):
        unet = StableDiffusion(config).unet
    shapes = {UNET_PREFIX + key: tuple(tensor.shape) for key, tensor in unet.state_dict().items()}
    expected = {key: shape for key, shape in published(name).items() if key.startswith(UNET_PREFIX)}
    assert shapes == expected | {FIRST: (320, 9, 3, 3)}
    # diffusers' count for stable-diffusion-inpainting and stable-diffusion-2-inpainting
    assert sum(p.numel() for p in unet.parameters()) == {"sd1": 859_535_364, "sd2": 865_925_124}[name]


def test_diffusers_builds_the_same_network_at_full_size():
    diffusers = pytest.importorskip("diffusers", reason="needs the parity extra")
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(in_channels=9, cross_attention_dim=768, attention_head_dim=8)
        ours = StableDiffusion(SD1_INPAINT).unet
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())


def test_family_and_architecture_are_named():
    assert family(SD1_INPAINT) == "Stable Diffusion 1 for painting in"
    assert family(SD2_INPAINT) == "Stable Diffusion 2 for painting in"
    architectures = {"stable-diffusion-v1/inpaint": SD1_INPAINT, "stable-diffusion-v2-inpainting": SD2_INPAINT}
    for name, config in architectures.items():  # SwarmUI's names
        assert modelspec.describe(config, "a title")["modelspec.architecture"] == name
    assert modelspec.describe(SD1_INPAINT, "a title", "lora") == modelspec.describe(SD1, "a title", "lora")


def test_a_widened_model_predicts_as_before_whatever_the_mask_is(random_model):
    before, sd = random_model(), random_model()
    widen(sd)
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([5, 700]), torch.randn(2, 24, 24)
    with torch.no_grad():
        wide = sd.unet(torch.cat([x, torch.randn(2, 5, 8, 8)], 1), t, context)
        torch.testing.assert_close(wide, before.unet(x, t, context), rtol=0, atol=1e-6)
    with pytest.raises(InputError, match="has 9 input channels, for painting in, already"):
        widen(sd)


def test_convert_makes_a_model_for_painting_in_and_inspect_describes_it(random_model, tmp_path, capsys):
    random_model().save(tmp_path / "plain.safetensors")
    main(["weights", "convert", str(tmp_path / "plain.safetensors"), str(tmp_path / "nine"), "--inpaint"])
    assert "added the input channels for painting in" in capsys.readouterr().out
    assert json.loads((tmp_path / "nine" / "unet" / "config.json").read_text())["in_channels"] == 9
    assert "StableDiffusionInpaintPipeline" in (tmp_path / "nine" / "README.md").read_text()
    main(["weights", "inspect", str(tmp_path / "nine")])
    assert "complete: every tensor is there" in capsys.readouterr().out
    with pytest.raises(InputError, match="already"):
        main(["weights", "convert", str(tmp_path / "nine"), str(tmp_path / "x.safetensors"), "--inpaint"])
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("channels", [3, 5, 8])
def test_other_numbers_of_input_channels_are_refused(channels, random_model, tmp_path):
    sd = random_model()
    wrong = StableDiffusion(replace(sd.config, unet=replace(sd.config.unet, in_channels=channels)), sd.tokenizer)
    wrong.save(tmp_path / "wrong.safetensors")
    with pytest.raises(InputError, match="the UNet's latents do not have the channels of the autoencoder's"):
        StableDiffusion.load(tmp_path / "wrong.safetensors")
