"""With a LoRA that another program wrote we make that program's pictures; without it, again our own to the bit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from runs import pixels

from ldm import StableDiffusion
from ldm.lora import LoRA, attach, disabled

FACTS = Path(__file__).resolve().parents[1] / "facts" / "lora"
TINY = Path(__file__).resolve().parents[2] / "weights" / "tiny" / "base"
FILES = ("lora_unet_peft_fp16", "lora_unet_text_diffusers", "lora_kohya")


@pytest.fixture(scope="module")
def sd() -> StableDiffusion:
    return StableDiffusion.load(TINY)


def picture(sd: StableDiffusion) -> np.ndarray:
    images = sd.generate("a photo of a red cat in the snow", steps=10, guidance=4.0, height=64, width=64)
    return np.asarray(images[0]).astype(int)


def check(sd: StableDiffusion, golden: str) -> None:
    """Our picture and the other program's differ by at most 1 of 255."""
    ours = picture(sd)
    assert np.abs(ours - pixels(FACTS / f"{golden}.png")).max() <= 1
    if golden != "base":
        assert np.abs(ours - pixels(FACTS / "base.png")).max() > 100


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("name", FILES)
def test_our_pictures_equal_those_of_the_program_that_wrote_the_file(name, scale, sd):
    sd.apply_lora(FACTS / f"{name}.safetensors", scale)
    try:
        check(sd, f"{name}_{scale}")
    finally:
        sd.remove_lora()


def test_two_loras_add_up_and_removing_them_gives_back_the_same_bits(sd):
    before = picture(sd)
    x, t, context = torch.randn(2, 4, 16, 16), torch.tensor([3, 700]), sd.encode_prompt(["a cat", ""])
    with torch.no_grad():
        prediction = sd.unet(x, t, context)
    check(sd, "base")
    sd.apply_lora(FACTS / f"{FILES[0]}.safetensors", 0.7)
    sd.apply_lora(FACTS / f"{FILES[1]}.safetensors", 0.3)
    check(sd, "two_loras_0.7_0.3")
    sd.remove_lora()
    with torch.no_grad():
        assert torch.equal(sd.unet(x, t, context), prediction)
        assert torch.equal(sd.encode_prompt(["a cat", ""]), context)
    assert np.array_equal(picture(sd), before)


@pytest.mark.parametrize("name", FILES)
def test_merging_equals_applying(name, sd):
    """Within 1e-6 of the scale of what the networks compute, UNet and text encoder."""
    merged, path = StableDiffusion.load(TINY), FACTS / f"{name}.safetensors"
    merged.merge_lora(path, 0.8)
    sd.apply_lora(path, 0.8)
    x, t = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 700])
    with torch.no_grad():
        contexts = [model.encode_prompt(["a cat", "a red car"]) for model in (sd, merged)]
        one, other = (model.unet(x, t, contexts[0]) for model in (sd, merged))
    sd.remove_lora()
    for a, b in (contexts, (one, other)):
        assert (a - b).abs().max() <= 1e-6 * a.abs().max()


def test_the_saved_model_does_not_contain_an_applied_lora(sd, tmp_path):
    before = {name: tensor.clone() for name, tensor in sd.state().items()}
    sd.apply_lora(FACTS / "lora_kohya.safetensors")
    sd.save(tmp_path / "a.safetensors")
    sd.remove_lora()
    after = StableDiffusion.load(tmp_path / "a.safetensors").state()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_disabled_lora_leaves_the_layer_as_it_was():
    layer, x = torch.nn.Linear(5, 7), torch.randn(3, 5)
    expected = layer(x)
    lora = LoRA(layer, 2, 4.0).draw(0, "a")
    attach(layer, lora)
    assert torch.equal(layer(x), expected)  # up is zero at first
    with torch.no_grad():
        lora.lora_up.weight.normal_()
    assert torch.allclose(layer(x), expected + 2.0 * x @ lora.lora_down.weight.T @ lora.lora_up.weight.T)  # eq. 3
    with disabled([lora]):
        assert torch.equal(layer(x), expected)
    assert not torch.equal(layer(x), expected)


def test_initial_values_depend_on_seed_and_name_alone():
    """Uniform within 1 / sqrt(in), as a new nn.Linear is: kaiming's with a = sqrt(5)."""
    layer = torch.nn.Conv2d(16, 8, 3)
    state = torch.random.get_rng_state()
    one, same, other = (LoRA(layer, 64, 1.0).draw(3, name).lora_down.weight.detach() for name in ("a", "a", "b"))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one, same) and not torch.equal(one, other)
    bound = (16 * 9) ** -0.5
    assert 0.99 * bound < one.abs().max() <= bound and one.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
