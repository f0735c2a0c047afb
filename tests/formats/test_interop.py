"""Model files of other programs are read as those programs mean them, and ours say what they are in their words.

What other programs write, from their sources: ComfyUI comfy/model_base.py `state_dict_for_saving` and
comfy_extras/nodes_model_merging.py `save_checkpoint` (an empty tensor v_pred, modelspec.predict_key),
comfy/supported_models.py (ztsnr; SD1's text encoder with and without text_model., logit_scale, text_projection).
The names of the entries: github.com/Stability-AI/ModelSpec, and kohya's sd-scripts library/sai_model_spec.py.
"""

import hashlib
import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ldm import InputError, StableDiffusion, formats
from ldm.config import SD1, SD2, SD2_V
from ldm.formats import card, modelspec

TEXT = "cond_stage_model.transformer."


@pytest.fixture
def theirs(narrow, tmp_path):
    """theirs(family, change, metadata): the path of a single file without our metadata; change(tensors) -> tensors."""

    def make(family, change=lambda tensors: tensors, metadata=None):
        path = tmp_path / "theirs.safetensors"
        narrow(family).save(path)
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        save_file(change(tensors), path, metadata)
        return path

    yield make
    shutil.rmtree(tmp_path)


def schedule(path, **options):
    found = formats.read(path, **options).config.schedule
    return found.prediction, found.zero_terminal_snr, found.spacing


EPS, V, V_ZERO = ("eps", False, "leading"), ("v", False, "leading"), ("v", True, "trailing")


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_a_model_that_comfyui_marks_predicts_v(family, theirs):
    empty = torch.tensor([])
    path = theirs(family, lambda tensors: tensors | {"v_pred": empty}, {"modelspec.predict_key": "v"})
    assert schedule(path) == V
    assert schedule(path, prediction="eps") == EPS
    assert "predicts v (the file's tensor v_pred)" in formats.read(path).describe()
    path = theirs(family, lambda tensors: tensors | {"v_pred": empty, "ztsnr": empty})
    assert schedule(path) == V_ZERO
    assert schedule(path, prediction="eps") == EPS  # where zero terminal SNR means nothing
    sd = StableDiffusion.load(path)
    copy = path.with_name("copy.safetensors")
    assert sd.save(copy) == [] and schedule(copy) == V_ZERO
    assert not {"v_pred", "ztsnr"} & load_file(copy).keys()


@pytest.mark.parametrize("key", ["modelspec.predict_key", "modelspec.prediction_type"])
@pytest.mark.parametrize("word, expected", [("epsilon", EPS), ("v", V), ("v_prediction", V), ("x0", V)])
def test_the_metadata_say_what_the_model_predicts(key, word, expected, theirs):
    path = theirs("sd2_v", metadata={key: word})
    assert schedule(path) == expected  # SD2's file with an unknown word is taken as one without it
    said = "assumed for SD 2.x" if word == "x0" else "the file's metadata"
    assert f"predicts {expected[0]} ({said}" in formats.read(path).describe()


def test_a_text_encoder_without_text_model_in_its_names_is_read(narrow, theirs):
    def shorten(tensors):
        return {name.replace(f"{TEXT}text_model.", TEXT): tensor for name, tensor in tensors.items()}

    path = theirs("sd1", shorten)
    assert not any("text_model." in name for name in load_file(path))
    assert StableDiffusion.load(path).source_fingerprint() == narrow("sd1").source_fingerprint()
    StableDiffusion.load(path).save(path.with_name("copy.safetensors"))
    assert f"{TEXT}text_model.embeddings.position_ids" in load_file(path.with_name("copy.safetensors"))
    with pytest.raises(InputError, match=rf"unknown tensor {re.escape(TEXT)}final_layer_norm\.bias"):
        StableDiffusion.load(theirs("sd1", lambda tensors: tensors | {f"{TEXT}final_layer_norm.bias": torch.ones(24)}))


@pytest.mark.parametrize("where", ["cond_stage_model.", TEXT])
def test_sd1_with_clips_projection_and_temperature_is_read_and_keeps_them(where, narrow, theirs):
    width = narrow("sd1").config.text.width
    more = {
        f"{where}logit_scale": torch.tensor(4.6055),
        f"{where}text_projection.weight": torch.eye(width),
        f"{where}text_projection": torch.eye(width) * 2,
    }
    path = theirs("sd1", lambda tensors: tensors | more)
    sd = StableDiffusion.load(path)
    assert sd.source_fingerprint() == narrow("sd1").source_fingerprint()
    sd.save(path.with_name("copy.safetensors"))
    found = load_file(path.with_name("copy.safetensors"))
    assert all(torch.equal(found[name], tensor) for name, tensor in more.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_layer_that_never_runs_has_the_files_type(dtype, narrow, tmp_path):
    narrow("sd2").save(tmp_path / "a.safetensors", dtype=dtype)
    tensors = load_file(tmp_path / "a.safetensors")
    text = {tensor.dtype for name, tensor in tensors.items() if name.startswith("cond_stage_model.")}
    assert text == {dtype} and len([name for name in tensors if ".resblocks.2." in name]) == 12


def entries(path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return {key: text for key, text in file.metadata().items() if key.startswith("modelspec.")}


def test_a_file_says_what_it_is(theirs):
    path = theirs("sd1")
    StableDiffusion.load(path).save(path.with_name("a.safetensors"))
    content = path.with_name("a.safetensors").read_bytes()
    body = content[8 + int.from_bytes(content[:8], "little") :]
    assert entries(path.with_name("a.safetensors")) == {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": "theirs",
        "modelspec.resolution": "512x512",
        "modelspec.prediction_type": "epsilon",
        "modelspec.hash_sha256": "0x" + hashlib.sha256(body).hexdigest(),
    }


@pytest.mark.parametrize(
    "config, adapter, expected",
    [
        (SD1, None, ("stable-diffusion-v1", "512x512", "epsilon")),
        (SD2, None, ("stable-diffusion-v2-512", "512x512", "epsilon")),
        (SD2_V, None, ("stable-diffusion-v2-768-v", "768x768", "v")),
        (replace(SD1, schedule=SD2_V.schedule), "lora", ("stable-diffusion-v1/lora", "512x512", "v")),
        (SD2, "textual-inversion", ("stable-diffusion-v2-512/textual-inversion", "512x512", "epsilon")),
    ],
)
def test_architectures_have_the_names_of_the_specification(config, adapter, expected):
    said = modelspec.describe(config, "a title", adapter)
    keys = ("architecture", "resolution", "prediction_type")
    assert tuple(said[f"modelspec.{key}"] for key in keys) == expected and said["modelspec.title"] == "a title"


def test_an_authors_entries_stay_through_both_layouts_and_computed_ones_are_made_anew(narrow, theirs, monkeypatch):
    given = {"modelspec.title": "Mine", "modelspec.license": "CC0", "modelspec.description": "a, b", "ss_v2": "False"}
    old = {"modelspec.hash_sha256": "0x12", "modelspec.resolution": "9x9", "modelspec.predict_key": "epsilon"}
    path = theirs("sd2_v", metadata=given | old | {"modelspec.date": "2001-01-01"})
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    StableDiffusion.load(path).save(path.with_name("folder"), "diffusers")
    StableDiffusion.load(path.with_name("folder")).save(path.with_name("copy.safetensors"))
    found = entries(path.with_name("copy.safetensors"))
    assert given.items() - found.items() == {("ss_v2", "False")}
    assert found["modelspec.resolution"] == "512x512" and len(found["modelspec.hash_sha256"]) == 66
    assert found["modelspec.architecture"] == "stable-diffusion-v2-512" and "modelspec.predict_key" not in found
    assert found["modelspec.date"] == "2023-11-14T22:13:20Z"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(InputError, match="SOURCE_DATE_EPOCH is 'yesterday', and should be a number of seconds"):
        StableDiffusion.load(path).save(path.with_name("more.safetensors"))
    assert not path.with_name("more.safetensors").exists()


# The model card of a diffusers folder


def test_a_tuned_folder_has_a_card_that_says_where_it_comes_from(narrow, theirs):
    said = {
        "ldm.instance_prompt": 'a photo of "sks" dog | <b>*bold*</b>',
        "ldm.step": "400",
        "ldm.base": "f" * 64,
        "ldm.sampling": json.dumps({"sampler": "euler", "guidance_scale": 4.0}),
        "ldm.training": json.dumps({"base_model": "v1-5", "learning_rate": 2e-6, "prior_loss_weight": None}),
        "modelspec.title": "My [dog]\nand more",
    }
    path = theirs("sd1", metadata=said)
    folder = path.with_name("folder")
    StableDiffusion.load(path).save(folder, "diffusers")
    front, body = (folder / "README.md").read_text(encoding="utf-8").removeprefix("---\n").split("---\n", 1)
    assert "library_name: diffusers" in front and "\nlicense:" not in front  # the user's to choose
    assert "# My &#91;dog&#93; and more\n" in body and "Stable Diffusion 1, 512 px, predicts eps." in body
    for row in ("training steps | 400", "sampler | euler", "guidance scale | 4.0", "base model | v1-5"):
        assert f"| {row} |\n" in body
    assert "prior loss weight" not in body and "| learning rate | 2e-06 |" in body
    assert '| a photo of "sks" dog &#124; &#60;b&#62;&#42;bold&#42;&#60;/b&#62; |' in body
    assert '    pipe("a photo of \\"sks\\" dog | <b>*bold*</b>").images[0]\n' in body


@pytest.mark.parametrize("text", ["{", "[1]", json.dumps({"<": "<script>\ud800", "a\nb": [1] * 10_000})])
def test_damaged_metadata_make_a_plain_card(text, narrow):
    model = narrow("sd1")
    source = formats.Source(model.config, model.tokenizer, {}, metadata={"ldm.training": text, "ldm.sampling": text})
    made = card.model_card(source)
    assert "<script>" not in made and len(made) < 2500 and made.encode()


def test_someone_elses_card_is_kept(narrow, tmp_path):
    model = narrow("sd1")
    model.save(tmp_path / "model", "diffusers")
    card.illustrate(tmp_path / "model", tmp_path / "model" / "model_index.json")
    model.save(tmp_path / "model", "diffusers")  # over its own card and picture
    assert not (tmp_path / "model" / "samples.png").exists()
    (tmp_path / "model" / "README.md").write_text("mine")
    with pytest.raises(InputError, match=r"model is a folder with other things in it, README\.md for one"):
        model.save(tmp_path / "model", "diffusers")
    assert (tmp_path / "model" / "README.md").read_text() == "mine"
