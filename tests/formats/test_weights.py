"""Model files: every layout keeps the tensors bit for bit, loading is strict, saving is atomic."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ldm import InputError, StableDiffusion
from ldm.formats.tensors import STORED_DTYPES, raw_bytes, save_tensors

TEXT = "cond_stage_model.transformer.text_model."
LAYOUTS = {"official": "model.safetensors", "diffusers": "model"}  # {layout: name of a model in it}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def same_bits(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("second", LAYOUTS)
@pytest.mark.parametrize("first", LAYOUTS)
def test_a_round_trip_through_any_two_layouts_is_bitwise(first, second, dtype, random_model, tmp_path):
    original = random_model()
    a, b = tmp_path / "a" / LAYOUTS[first], tmp_path / "b" / LAYOUTS[second]
    original.save(a, first, dtype=dtype)
    once = StableDiffusion.load(a, dtype=dtype)
    once.save(b, second)
    twice = StableDiffusion.load(b, dtype=dtype)
    expected = {name: tensor.to(dtype) for name, tensor in original.state().items()}
    assert same_bits(once.state(), expected) and same_bits(twice.state(), expected)
    assert original.config == once.config == twice.config  # including the odd widths
    prompt = ["a photo of sks dog, isn't it?"]
    assert torch.equal(original.tokenizer(prompt), twice.tokenizer(prompt))
    assert once.source_fingerprint() == twice.source_fingerprint()  # it does not depend on the layout


def test_the_fingerprint_distinguishes_models_and_types(saved, random_model, tmp_path):
    original = StableDiffusion.load(saved["official"])
    assert original.source_fingerprint() == StableDiffusion.load(saved["diffusers"]).source_fingerprint()
    assert (
        original.source_fingerprint()
        == StableDiffusion.load(saved["official"], dtype=torch.float16).source_fingerprint()
    )
    original.save(tmp_path / "half.safetensors", dtype=torch.float16)
    with torch.no_grad():
        changed = random_model()
        changed.vae.post_quant_conv.bias[0] += 1e-6
    prints = [original, StableDiffusion.load(tmp_path / "half.safetensors"), changed]
    assert len({sd.source_fingerprint() for sd in prints}) == 3


def test_the_fingerprint_is_that_of_the_source_even_after_the_model_changes(saved):
    sd = StableDiffusion.load(saved["official"])
    before, summary = sd.source_fingerprint(), sd.summary
    with torch.no_grad():
        sd.unet.out[2].bias += 1.0
    assert sd.source_fingerprint() == before and sd.summary == summary
    assert sd.source.path == saved["official"] and sd.source.tensors == {}  # the tensors are not held twice
    with pytest.raises(ValueError, match="without its tensors has no fingerprint"):
        sd.source.fingerprint()


def test_latents_that_overflow_fp16_are_decoded_in_fp32_and_the_model_stays_fp16(random_model, tmp_path):
    sd = random_model()
    with torch.no_grad():
        sd.vae.post_quant_conv.weight *= 1e4
    sd.vae.half()
    weights = {name: tensor.clone() for name, tensor in sd.vae.state_dict().items()}
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 10
    with torch.no_grad():
        assert not sd.vae.decode((z / sd.config.vae.scale_factor).half()).isfinite().all()
        images = sd.decode_latents(z)
        assert images.dtype == torch.float32 and images.isfinite().all()
        assert same_bits(sd.vae.state_dict(), weights)
        sd.save(tmp_path / "a.safetensors")
        assert torch.equal(images, sd.vae.float().decode(z / sd.config.vae.scale_factor))
    stored = load_file(tmp_path / "a.safetensors")
    assert {t.dtype for name, t in stored.items() if name.startswith("first_stage_model.")} == {torch.float16}


SAVE_TWICE = """
import sys
from ldm import StableDiffusion
sd = StableDiffusion.load(sys.argv[1])
metadata = {f"ldm.{name}": name for name in ("step", "base", "instance_prompt", "class_prompt", "sampling", "größe")}
sd.save(sys.argv[2] + ".safetensors", metadata=metadata)
sd.save(sys.argv[2], "diffusers", metadata=metadata)
"""


@pytest.mark.slow
def test_every_process_saves_the_same_model_to_the_same_bytes(saved, root, tmp_path):
    for seed in ("1", "2"):
        command = [sys.executable, "-c", SAVE_TWICE, saved["official"], tmp_path / seed]
        subprocess.run(command, cwd=root, env=os.environ | {"PYTHONHASHSEED": seed}, check=True)
    first, second = (
        {
            path.relative_to(tmp_path / seed): path.read_bytes()
            for path in (tmp_path / seed).rglob("*")
            if path.is_file()
        }
        for seed in ("1", "2")
    )
    assert len(first) > 8 and first == second
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()


def test_a_file_has_the_same_bytes_as_the_safetensors_library_writes(tmp_path):
    """Checked with all types of the format, odd shapes and unsorted names."""
    ramp = torch.arange(6).view(2, 3)
    tensors = {f"{i % 3}.{dtype}": ramp.to(dtype) for i, dtype in enumerate(STORED_DTYPES)}
    tensors |= {"ö": torch.zeros(0, 3), "scalar": torch.tensor(2.5), 'a "b"': torch.zeros(3, dtype=torch.bool)}
    for metadata in ({}, {"format": "pt"}):
        save_tensors(tmp_path / "a.safetensors", tensors, metadata)
        save_file(tensors, tmp_path / "b.safetensors", metadata or None)
        assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    save_tensors(tmp_path / "a.safetensors", tensors, {"b": "2", "a": "ö"})
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"a": "ö", "b": "2"}
        assert all((raw_bytes(file.get_tensor(n)) == raw_bytes(t)).all() for n, t in tensors.items())
    with pytest.raises(InputError, match=r"w holds torch\.complex128, which a \.safetensors file can't hold"):
        save_tensors(tmp_path / "c.safetensors", {"w": torch.zeros(1, dtype=torch.complex128)}, {})
    assert not (tmp_path / "c.safetensors").exists()


# The tables that CompVis' DDPM.register_schedule keeps in its checkpoints: first, second and last entry, computed
# from its formulas in float64. Tests of other ports contain alphas_cumprod too, for example tinygrad's
# external_test_models.py: sqrt_alphas_cumprod 0.99957490 and 0.06826485.
BUFFERS = {
    "betas": (0.00085, 0.0008546986554056862, 0.012),
    "alphas_cumprod": (0.99915, 0.9982960278384514, 0.004660098513077238),
    "sqrt_alphas_cumprod": (0.9995749096490968, None, 0.0682649142171675),
    "sqrt_one_minus_alphas_cumprod": (0.029154759474226803, None, 0.9976672298351403),
    "posterior_variance": (0.0, 0.00042635312564883403, 0.01199931761537886),
    "posterior_log_variance_clipped": (-46.051701859880914, -7.760242621622523, -4.422905496196129),
    "posterior_mean_coef1": (0.9999999999999795, 0.5013786906459231, 0.0008279972760209865),
    "posterior_mean_coef2": (0.0, 0.49862121846488955, 0.9939253680201147),
}


def test_an_official_file_has_the_tables_that_the_original_class_expects(saved):
    tensors = load_file(saved["official"])
    for name, values in BUFFERS.items():
        assert (tensors[name].shape, tensors[name].dtype) == ((1000,), torch.float32)
        for index, value in zip((0, 1, 999), values, strict=True):
            if value is not None:
                assert math.isclose(tensors[name][index].item(), value, rel_tol=1e-7, abs_tol=1e-12), (name, index)
    abar = np.cumprod(1.0 - np.linspace(0.00085**0.5, 0.0120**0.5, 1000) ** 2)
    formulas = {
        "alphas_cumprod_prev": np.append(1.0, abar[:-1]),
        "log_one_minus_alphas_cumprod": np.log(1.0 - abar),
        "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / abar),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / abar - 1.0),
    }
    for name, values in formulas.items():
        np.testing.assert_allclose(tensors[name].numpy(), values, rtol=1e-6, err_msg=name)
    positions = tensors[TEXT + "embeddings.position_ids"]
    assert positions.dtype == torch.int64 and positions.tolist() == [list(range(24))]
    networks = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.")
    others = {name for name in tensors if not name.startswith(networks)}
    assert others == BUFFERS.keys() | formulas.keys()


def test_the_other_tensors_of_an_official_file_are_kept(saved, tmp_path):
    tensors = load_file(saved["official"])
    kept = {
        "betas": torch.full((1000,), 0.5),  # even wrong values are kept
        "first_stage_model.loss.logvar": torch.tensor(0.25),
        TEXT + "embeddings.position_ids": torch.arange(24, dtype=torch.int64)[None],
    }
    averages = {"model_ema.diffusion_modelout2bias": torch.zeros(4), "model_ema.num_updates": torch.tensor(7)}
    with safe_open(saved["official"], "pt") as file:
        save_file(tensors | kept | averages, tmp_path / "a.safetensors", file.metadata())
    sd = StableDiffusion.load(tmp_path / "a.safetensors")
    sd.save(tmp_path / "b.safetensors", dtype=torch.float16)
    found = load_file(tmp_path / "b.safetensors")
    assert same_bits({name: found[name] for name in kept}, kept)
    assert not any(name.startswith("model_ema") for name in found)


@contextmanager
def rewritten(file):
    """Yields the tensors of a .safetensors file. Changes made in the block are written back at its end."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    yield tensors
    save_file(tensors, file, metadata)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fault", ["missing", "unknown", "shape"])
def test_loading_is_strict_and_names_the_tensor(layout, fault, saved, tmp_path):
    path = tmp_path / LAYOUTS[layout]
    if layout == "official":
        shutil.copy(saved[layout], path)
        file, name = path, "model.diffusion_model.input_blocks.1.0.in_layers.0.weight"
    else:
        shutil.copytree(saved[layout], path)
        file, name = path / "unet" / "diffusion_pytorch_model.safetensors", "down_blocks.0.resnets.0.norm1.weight"
    official = "model.diffusion_model.input_blocks.1.0.in_layers.0.weight"  # messages use this name for both layouts
    with rewritten(file) as tensors:
        if fault == "missing":
            del tensors[name]
        elif fault == "unknown":
            tensors["adapter.weight"] = torch.zeros(3)
        else:
            tensors[name] = tensors[name][:3].clone()
    said = {
        "missing": rf"missing tensor {re.escape(official)}$",
        "unknown": r"unknown tensor .*adapter\.weight$",
        "shape": rf"{re.escape(official)} is \(3,\), and should be \(16,\)$",
    }
    with pytest.raises(InputError, match=said[fault]) as error:
        StableDiffusion.load(path)
    assert str(path) in str(error.value)


def test_old_and_new_folders_are_read(saved, tmp_path):
    """Old and new folders differ in the text encoder's names, the tokenizer's files and the VAE's attention."""
    theirs, expected = tmp_path / "model", StableDiffusion.load(saved["diffusers"])
    shutil.copytree(saved["diffusers"], theirs)
    encoder = theirs / "text_encoder" / "model.safetensors"
    today = all(not name.startswith("text_model.") for name in load_file(encoder))
    with rewritten(encoder) as tensors:
        for name in list(tensors):
            other = "text_model." + name if today else name.removeprefix("text_model.")
            tensors[other] = tensors.pop(name)
        if today:
            tensors["text_model.embeddings.position_ids"] = torch.arange(24)[None]
    with rewritten(theirs / "vae" / "diffusion_pytorch_model.safetensors") as tensors:
        old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
        for name in [name for name in tensors if ".attentions." in name]:
            renamed = name
            for new_part, old_part in old.items():
                renamed = renamed.replace(new_part, old_part)
            tensors[renamed] = tensors.pop(name)
    vocab = json.loads((theirs / "tokenizer" / "vocab.json").read_text())
    merges = [line.split() for line in (theirs / "tokenizer" / "merges.txt").read_text().splitlines()[1:]]
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):
        (theirs / "tokenizer" / name).unlink()
    (theirs / "tokenizer" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab, "merges": merges}}))
    loaded = StableDiffusion.load(theirs)
    assert same_bits(loaded.state(), expected.state())
    assert loaded.config == expected.config and loaded.source_fingerprint() == expected.source_fingerprint()
    assert torch.equal(loaded.tokenizer(["a photo, that's it"]), expected.tokenizer(["a photo, that's it"]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_failed_save_leaves_the_old_model_whole(layout, random_model, saved, tmp_path, monkeypatch):
    path = tmp_path / LAYOUTS[layout]
    random_model().save(path, layout)
    before = StableDiffusion.load(path).source_fingerprint()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    for name in ("to_metadata", "save"):  # each is called while a layout is being written
        monkeypatch.setattr("ldm.tokenizer.Tokenizer." + name, full)
    with pytest.raises(OSError, match="No space"):
        random_model(1).save(path, layout)
    monkeypatch.undo()
    assert StableDiffusion.load(path).source_fingerprint() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]  # no temporary files
    random_model(1).save(path, layout)
    assert StableDiffusion.load(path).source_fingerprint() == random_model(1).source_fingerprint()


def test_a_folder_with_other_things_is_not_replaced(random_model, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="other things in it"):
        random_model().save(tmp_path / "home", "diffusers")
    with pytest.raises(InputError, match=r"should end in \.safetensors"):
        random_model().save(tmp_path / "home", "official")
    with pytest.raises(InputError, match="unknown layout 'zip'; there are official and diffusers"):
        random_model().save(tmp_path / "model.zip", "zip")
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_saved_model_has_the_permissions_of_any_new_file(layout, random_model, tmp_path):
    """The safetensors library writes files that only their owner can read, but a server may run as another user."""
    (tmp_path / "any").touch()
    (tmp_path / "anywhere").mkdir()
    random_model().save(tmp_path / LAYOUTS[layout], layout)
    for path in [tmp_path / LAYOUTS[layout], *(tmp_path / LAYOUTS[layout]).rglob("*")]:
        like = tmp_path / ("anywhere" if path.is_dir() else "any")
        assert path.stat().st_mode == like.stat().st_mode, path
