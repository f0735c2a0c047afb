"""Stable Diffusion 2's text encoder equals OpenCLIP's text tower, under the names of the official file."""

import importlib
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from ldm import StableDiffusion
from ldm.clip import TextEncoder
from ldm.config import SD2
from ldm.formats import names


@pytest.fixture(scope="module")
def towers():
    """The module open_clip.transformer.

    Its package imports torchvision for pictures. Where torchvision can't be imported (PyPI's needs a torch with CUDA),
    only this module is imported, with empty stand-ins for its own imports.
    """
    transformers = pytest.importorskip("transformers", reason="needs the parity extra")
    # transformers looks for torchvision only once, which must happen before our stand-in exists
    transformers.utils.import_utils.is_torchvision_available()
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        pytest.skip("needs open_clip of the parity extra")
    try:
        return importlib.import_module("open_clip.transformer")
    except (ImportError, RuntimeError):
        pass
    package, vision = ModuleType("open_clip"), ModuleType("torchvision.ops.misc")
    package.__path__ = spec.submodule_search_locations
    vision.FrozenBatchNorm2d = type(None)
    stand_ins = {"torchvision": ModuleType("torchvision"), "torchvision.ops": ModuleType("torchvision.ops")}
    stand_ins |= {"open_clip": package, "torchvision.ops.misc": vision}
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stand_ins.items():
            patch.setitem(sys.modules, name, module)
        module = importlib.import_module("open_clip.transformer")
        for name in [name for name in sys.modules if name.startswith("open_clip.")]:
            del sys.modules[name]
    return module


def tower(towers, config):
    """OpenCLIP's text tower, including the last block, which SD2 never runs. Outputs one vector for each token."""
    theirs = towers.TextTransformer(
        context_length=config.context_length,
        vocab_size=config.vocab_size,
        width=config.width,
        heads=config.heads,
        layers=config.layers + 1,
        mlp_ratio=config.mlp_width / config.width,
        output_dim=config.width,
        pool_type="none",
        proj_type="linear",
    )
    return theirs.eval()


def penultimate(theirs, ids):
    """All blocks except the last, then the final norm, as FrozenOpenCLIPEmbedder of the original code does."""
    h = theirs.token_embedding(ids) + theirs.positional_embedding
    for block in theirs.transformer.resblocks[:-1]:
        h = block(h, attn_mask=theirs.attn_mask)
    return theirs.ln_final(h)


@pytest.mark.parametrize("layers", [1, 3])
def test_the_text_encoder_equals_openclips_under_the_official_names(layers, towers, randomised):
    config = replace(SD2.text, vocab_size=100, context_length=20, width=48, mlp_width=192, layers=layers, heads=3)
    theirs = randomised(tower(towers, config), seed=layers)
    with torch.no_grad():
        theirs.positional_embedding.mul_(0.3)
    official = {name: tensor for name, tensor in theirs.state_dict().items()}
    last = f"transformer.resblocks.{layers}."
    expected_extra = {name for name in official if name.startswith(last)} | {"text_projection"}
    ours = TextEncoder(config)
    translated = names.from_openclip({k: t for k, t in official.items() if k not in expected_extra}, config)
    ours.load_state_dict(translated)  # strict: no name is missing or left over
    ids = torch.randint(0, 100, (3, 20), generator=torch.Generator().manual_seed(1))
    a, b = ours(ids), penultimate(theirs, ids)
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()

    back = names.to_openclip(ours.state_dict(), config)
    prefix = names.OPENCLIP_PREFIX
    unused = {name.removeprefix(prefix): tensor.shape for name, tensor in names.unused_text(config).items()}
    # the temperature belongs to the whole CLIP, not to the text tower
    assert back.keys() | unused.keys() == official.keys() | {"logit_scale"}
    assert all(torch.equal(back[name], official[name]) for name in back)
    assert all(official[name].shape == shape for name, shape in unused.items() if name != "logit_scale")


def test_gradients_equal_openclips_too(towers, randomised):
    config = replace(SD2.text, vocab_size=100, context_length=20, width=48, mlp_width=192, layers=2, heads=3)
    theirs, ours = randomised(tower(towers, config)), TextEncoder(config)
    run = {k: t for k, t in theirs.state_dict().items() if ".resblocks.2." not in k and k != "text_projection"}
    ours.load_state_dict(names.from_openclip(run, config))
    ids = torch.randint(0, 100, (2, 20), generator=torch.Generator().manual_seed(1))
    cotangent = torch.randn(2, 20, 48, generator=torch.Generator().manual_seed(2))
    (ours(ids) * cotangent).sum().backward()
    (penultimate(theirs, ids) * cotangent).sum().backward()
    mine = names.to_openclip({name: p.grad for name, p in ours.named_parameters()}, config)
    scale = max(gradient.abs().max() for gradient in mine.values())
    for name, parameter in theirs.named_parameters():
        if name in mine:
            assert (mine[name] - parameter.grad).abs().max() <= 1e-5 * scale, name


def test_an_official_file_of_sd2_runs_in_openclip(towers, narrow, tmp_path):
    """OpenCLIP's class loads the tensors that `save` writes, strictly."""
    sd = narrow("sd2")
    sd.save(tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    text = names.take_prefixed(tensors, names.OPENCLIP_PREFIX)
    text.pop("logit_scale")
    theirs = tower(towers, sd.config.text)
    theirs.load_state_dict(text)
    ids = sd.tokenizer(["a photo of sks dog", "!"])
    with torch.no_grad():
        a, b = sd.text_encoder(ids), penultimate(theirs, ids)
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    assert ids[1].tolist() == [49406, 256, 49407] + [0] * 74


@pytest.mark.parametrize("family, prediction", [("sd2", "epsilon"), ("sd2_v", "v_prediction")])
def test_a_folder_of_sd2_opens_in_diffusers_with_its_prediction_type(family, prediction, narrow, tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="needs the parity extra")
    sd = narrow(family)
    sd.save(tmp_path / "model", "diffusers")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    assert pipe.scheduler.config.prediction_type == prediction
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    arguments = {"prompt": "a red cat!", "num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "latent"}
    ids = sd.tokenizer(["", "a red cat!"])  # no prompt: transformers reads its "!" as padding (diffusers#4153)
    without, context = pipe.text_encoder(ids)[0].chunk(2)
    del arguments["prompt"]
    theirs = pipe(prompt_embeds=context, negative_prompt_embeds=without, latents=latents, **arguments).images
    ours = StableDiffusion.load(tmp_path / "model").generate(
        "a red cat!", steps=3, guidance=5.0, latents=latents, output="latent"
    )
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
