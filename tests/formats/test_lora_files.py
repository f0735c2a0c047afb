"""LoRA files of every program are read, ours have kohya's names and shapes, and bad ones are refused in one line."""

import json
import math
import re
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm import InputError, StableDiffusion
from ldm.config import SD1, SD2, SD2_V
from ldm.formats import Adapter, Pair, kohya_metadata, open_tensors, read_lora, write_lora
from ldm.formats.names import invert, rename, unet_table
from ldm.lora import TARGETS, LoRA, chosen

FACTS = Path(__file__).resolve().parents[1] / "facts" / "lora"
TINY = Path(__file__).resolve().parents[2] / "weights" / "tiny" / "base"


@pytest.fixture(scope="module")
def tiny() -> StableDiffusion:
    return StableDiffusion.load(TINY)


@lru_cache
def on_meta(config) -> StableDiffusion:
    with torch.device("meta"):
        return StableDiffusion(config)


def made(sd: StableDiffusion, targets: str, rank: int = 4) -> Adapter:
    """A LoRA of these layers as training makes it."""
    layers = chosen(sd.lora_layers(), targets)
    return Adapter({name: LoRA(layer, rank, 1.0).draw(0, name).pair() for name, layer in layers.items()})


# Names and shapes


def test_names_and_shapes_at_full_size_are_those_of_kohyas_network():
    expected = {}
    for line in (FACTS / "kohya_sd1.txt").read_text().splitlines():
        name, *shapes = line.split()
        down, up = (tuple(map(int, shape.split("x"))) for shape in shapes)
        expected |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": ()}
    tensors = made(on_meta(SD1), "transformer").tensors()
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected


@pytest.mark.parametrize(
    ("config", "targets", "unet", "text"),
    [
        (SD1, "attention", 128, 48),
        (SD1, "transformer", 192, 72),
        (SD1, "all", 278, 72),
        (SD2, "transformer", 192, 138),
        (SD2, "attention", 128, 92),
    ],
)
def test_the_sets_of_layers_have_the_sizes_of_kohyas_and_diffusers(config, targets, unet, text):
    names = made(on_meta(config), targets).pairs
    assert sum(name.startswith("lora_unet_") for name in names) == unet and len(names) == unet + text


def test_a_rank_has_as_many_numbers_as_published():
    """423,936 for each rank of SD1's UNet, 165,888 of its text encoder: with rank 128 in fp16 the known 151 MB."""
    pairs = made(on_meta(SD1), "transformer", 1).pairs
    count = {"unet": 0, "te": 0}
    for name, pair in pairs.items():
        count[name.split("_")[1]] += pair.down.numel() + pair.up.numel()
    assert count == {"unet": 423_936, "te": 165_888}


def test_the_header_says_what_kohyas_and_a1111_read(tiny):
    adapter = made(tiny, "transformer")
    said = {"ss_network_module": "networks.lora", "ss_network_dim": "4", "ss_network_alpha": "1"}
    for config, version in ((SD1, "sd_v1"), (SD2, "sd_v2"), (SD2_V, "sd_v2_v")):
        kind = {"ss_v2": str(version != "sd_v1"), "ss_base_model_version": version}
        assert kohya_metadata(config, adapter) == said | kind
    theirs = open_tensors(FACTS / "lora_kohya.safetensors")[1]
    ours = kohya_metadata(SD1, made(tiny, "transformer", 4))
    assert {key: float(text) if text[0].isdigit() else text for key, text in ours.items()} == {
        key: float(text) if text[0].isdigit() else text for key, text in theirs.items() if key in ours
    }
    assert json.loads(kohya_metadata(SD1, made(tiny, "all"))["ss_network_args"]) == {"conv_dim": "4", "conv_alpha": "1"}


# Every scheme of names


def old_diffusers(key: str) -> str:
    """As diffusers up to 0.21 named the attention of a UNet."""
    module, kind = re.fullmatch(r"unet\.(.*)\.lora_([AB])\.weight", key).groups()
    head, _, last = module.removesuffix(".0").rpartition(".")
    return f"unet.{head}.processor.{last}_lora.{'down' if kind == 'A' else 'up'}.weight"


def official(key: str, config) -> str:
    inner, end = re.fullmatch(r"unet\.(.*)(\.lora_[AB]\.weight)", key).groups()
    return rename(inner, invert(unet_table(config))) + end


SCHEMES = {
    "old diffusers": lambda key, config: old_diffusers(key),
    "old diffusers without unet": lambda key, config: old_diffusers(key).removeprefix("unet."),
    "peft with its adapter's name": lambda key, config: key.replace(".weight", ".default.weight"),
    "a peft model": lambda key, config: "base_model.model." + key.removeprefix("unet."),
    "official": lambda key, config: "diffusion_model." + official(key, config),
    "official with underscores": lambda key, config: re.sub(
        r"(.*)\.lora_([AB])\.weight",
        lambda m: f"lora_unet_{m[1].replace('.', '_')}.lora_{'down' if m[2] == 'A' else 'up'}.weight",
        official(key, config),
    ),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_names_of_every_scheme_mean_the_same_modules(scheme, tiny, tmp_path):
    config = tiny.config.unet
    tensors = load_file(FACTS / "lora_unet_peft_fp16.safetensors")
    renamed = {SCHEMES[scheme](key, config): tensor for key, tensor in tensors.items()}
    assert len(renamed) == len(tensors) and not renamed.keys() & tensors.keys()
    save_file(renamed, tmp_path / "a.safetensors")
    ours = read_lora(tmp_path / "a.safetensors", config)
    expected = read_lora(FACTS / "lora_unet_peft_fp16.safetensors", config)
    assert ours.pairs.keys() == expected.pairs.keys() and len(expected.pairs) == 32
    assert all(torch.equal(pair.down, expected.pairs[name].down) for name, pair in ours.pairs.items())


@pytest.mark.parametrize(
    "name",
    [
        "text_encoder.text_model.encoder.layers.1.self_attn.q_proj.lora_linear_layer.{}.weight",
        "text_encoder.encoder.layers.1.self_attn.q_proj.lora_linear_layer.{}.weight",
        "text_encoder.text_model.encoder.layers.1.self_attn.to_q_lora.{}.weight",
        "lora_te1_text_model_encoder_layers_1_self_attn_q_proj.lora_{}.weight",
        "base_model.model.text_model.encoder.layers.1.self_attn.q_proj.lora.{}.weight",
    ],
)
def test_names_of_the_text_encoder(name, tiny, tmp_path):
    save_file(
        {name.format("down"): torch.ones(2, 128), name.format("up"): torch.ones(128, 2)}, tmp_path / "a.safetensors"
    )
    adapter = tiny.read_lora(tmp_path / "a.safetensors")
    assert list(adapter.pairs) == ["lora_te_text_model_encoder_layers_1_self_attn_q_proj"]


def test_alpha_from_tensors_from_diffusers_header_and_from_pefts_file(tmp_path):
    def scales(path):
        return {pair.scale for pair in read_lora(path).pairs.values()}

    assert scales(FACTS / "lora_kohya.safetensors") == {0.25}
    assert scales(FACTS / "lora_unet_text_diffusers.safetensors") == {2.0}
    assert scales(FACTS / "lora_unet_peft_fp16.safetensors") == {1.0}
    tensors = load_file(FACTS / "lora_unet_peft_fp16.safetensors")
    renamed = {"base_model.model." + key.removeprefix("unet."): tensor for key, tensor in tensors.items()}
    save_file(renamed, tmp_path / "adapter_model.safetensors")
    for config, scale in (
        ({"r": 4, "lora_alpha": 8}, {2.0}),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, {4.0}),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 2}}, {2.0, 0.5}),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {r"attn1\.to_q$": 2}}, {2.0, 0.5}),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"^attn1.to_q": 2}}, {2.0}),  # no name is this as a whole
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        assert scales(tmp_path / "adapter_model.safetensors") == scale
    (tmp_path / "adapter_config.json").write_text(json.dumps({"alpha_pattern": {"(a+)+": 2}}))
    with pytest.raises(InputError, match=r"its alpha_pattern '\(a\+\)\+' is a regular expression"):
        scales(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").unlink()
    with pytest.warns(UserWarning, match="adapter_config.json is not beside it; its alpha is taken to be the rank"):
        assert scales(tmp_path / "adapter_model.safetensors") == {1.0}


@pytest.mark.parametrize("name", ["bundle_emb.[V].string_to_param.*", "bundle_emb.[V].clip_l"])
def test_a_token_in_the_file_has_the_names_of_a1111_and_of_onetrainer(name, tmp_path):
    save_file(GOOD | {name: torch.ones(2, 128)}, tmp_path / "a.safetensors")
    adapter = read_lora(tmp_path / "a.safetensors")
    assert list(adapter.pairs) == [NAME] and torch.equal(adapter.tokens["[V]"], torch.ones(2, 128))
    save_file(
        GOOD | {name: torch.ones(2, 128), "bundle_emb.[V].clip_g": torch.ones(2, 1280)}, tmp_path / "a.safetensors"
    )
    with pytest.raises(InputError, match=r"bundle_emb.\[V\].clip_g is no part of a LoRA"):
        read_lora(tmp_path / "a.safetensors")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_alpha_may_be_a_whole_number_as_kohyas_svd_merge_lora_writes_it(dtype, tmp_path):
    save_file(GOOD | {ALPHA: torch.tensor(3, dtype=dtype)}, tmp_path / "a.safetensors")
    (pair,) = read_lora(tmp_path / "a.safetensors").pairs.values()
    assert pair.alpha == 3.0 and pair.scale == 1.5


@pytest.mark.parametrize("alpha", [1e-9, 1e5])
def test_an_alpha_that_fp16_can_t_hold_is_written(alpha, tmp_path):
    half = Adapter({NAME: Pair(GOOD[DOWN], GOOD[UP], alpha)}).to(torch.float16)
    write_lora(tmp_path / "a.safetensors", half.tensors(), {})
    (pair,) = read_lora(tmp_path / "a.safetensors").pairs.values()
    assert pair.down.dtype == torch.float16 and pair.alpha == pytest.approx(alpha)


# Bad adapters

NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
GOOD = {f"{NAME}.lora_down.weight": torch.ones(2, 128), f"{NAME}.lora_up.weight": torch.ones(128, 2)}
ALPHA, DOWN, UP = f"{NAME}.alpha", f"{NAME}.lora_down.weight", f"{NAME}.lora_up.weight"


def without(key: str) -> dict:
    return {name: tensor for name, tensor in GOOD.items() if name != key}


BAD = {
    "wrong shape": (GOOD | {DOWN: torch.ones(2, 96)}, r"changes a weight of \(128, 96\), and the model's is"),
    "no pair": (GOOD | {DOWN: torch.ones(3, 128)}, r"\(3, 128\) and \(128, 2\), and should be \(rank, in\)"),
    "no matrix": (GOOD | {DOWN: torch.ones(2)}, r"should be \(rank, in\)"),
    "no numbers": (GOOD | {DOWN: torch.ones(0, 128), UP: torch.ones(128, 0)}, r"should be \(rank, in\)"),
    "other family": (
        {"lora_te_text_model_encoder_layers_20_mlp_fc1" + key.removeprefix(NAME): t for key, t in GOOD.items()},
        "the model has no module lora_te_text_model_encoder_layers_20_mlp_fc1; the LoRA is for another kind",
    ),
    "sdxl": ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(2, 2)}, "te2_.* is no part"),
    "nan": (GOOD | {UP: torch.full((128, 2), math.nan)}, f"{UP} holds NaN or infinity"),
    "no up": (without(UP), f"{NAME} lacks its tensor up"),
    "no down": (without(DOWN), f"{NAME} lacks its tensor down"),
    "alpha alone": ({ALPHA: torch.tensor(1.0)}, "lacks its tensor down"),
    "huge rank": (GOOD | {DOWN: torch.ones(1025, 128), UP: torch.ones(128, 1025)}, "rank 1025, and should have"),
    "alpha 0": (GOOD | {ALPHA: torch.tensor(0.0)}, "alpha of .* is 0, and should be a positive number"),
    "alpha too small for fp32": (GOOD | {ALPHA: torch.tensor(1e-60, dtype=torch.float64)}, "alpha of .* is 1e-60, and"),
    "alpha below 0": (GOOD | {ALPHA: torch.tensor(-1.0)}, "alpha of .* is -1, and should be a positive number"),
    "alpha nan": (GOOD | {ALPHA: torch.tensor(math.nan)}, "alpha holds NaN"),
    "alpha twice": (GOOD | {ALPHA: torch.ones(2)}, r"alpha of .* is \(2,\) torch.float32, and should be one number"),
    "alpha true": (GOOD | {ALPHA: torch.tensor(True)}, r"alpha of .* is \(\) torch.bool, and should be one number"),
    "three dimensions": (GOOD | {DOWN: GOOD[DOWN][..., None]}, r"down and up of .* are .*, and should be \(rank, in\)"),
    "fp8 nan": (GOOD | {UP: torch.full((128, 2), math.nan).to(torch.float8_e4m3fn)}, "holds torch.float8_e4m3fn"),
    "whole numbers": (GOOD | {UP: torch.ones(128, 2, dtype=torch.int8)}, "holds torch.int8"),
    "dora": (GOOD | {f"{NAME}.dora_scale": torch.ones(1)}, f"{NAME}.dora_scale is no part of a LoRA"),
    "twice": (GOOD | {"mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora.up.weight": GOOD[UP] * 2}, "twice"),
    "a model": ({"model.diffusion_model.out.2.bias": torch.ones(4)}, "out.2.bias is no part of a LoRA"),
    "nothing": ({}, "holds no LoRA"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_adapter_is_refused_in_one_line_and_the_model_stays_as_it_was(case, tiny, tmp_path):
    tensors, words = BAD[case]
    path = tmp_path / "bad.safetensors"
    save_file(tensors, path)
    with pytest.raises(InputError, match=words) as error:
        tiny.apply_lora(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not any(layer._forward_hooks for layer in tiny.lora_layers().values())


@pytest.mark.parametrize(
    "said", ["[]", "{", '{"unet.lora_alpha": 0}', '{"unet.lora_alpha": "4"}', '{"unet.lora_alpha": NaN}']
)
def test_a_header_that_states_no_usable_alpha_is_refused(said, tiny, tmp_path):
    save_file(GOOD, tmp_path / "bad.safetensors", {"lora_adapter_metadata": said})
    with pytest.raises(InputError, match="alpha|JSON|damaged"):
        tiny.read_lora(tmp_path / "bad.safetensors")


def test_files_that_are_no_safetensors_are_refused(tiny, tmp_path):
    torch.save(GOOD, tmp_path / "a.pt")
    torch.save(GOOD, tmp_path / "pickled.safetensors")
    save_file(GOOD, tmp_path / "whole.safetensors")
    (tmp_path / "half.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-9])
    for name, words in {
        "a.pt": "is pickled; a LoRA is read from a .safetensors file",
        "pickled.safetensors": "is not a whole .safetensors file",
        "half.safetensors": "is not a whole .safetensors file",
        "nowhere.safetensors": "can't be read: No such file",
        ".": "can't be read: it is a folder",
    }.items():
        with pytest.raises(InputError, match=words) as error:
            tiny.read_lora(tmp_path / name)
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_sd2_files_fit_where_a_program_wrote_convolutions_for_matrices(narrow, tmp_path):
    """kohya's proj_in is a 1x1 convolution for SD1 and a matrix for SD2; the numbers are the same."""
    for family, shape in (("sd1", (2, 16)), ("sd2", (2, 16, 1, 1))):
        name = "lora_unet_down_blocks_0_attentions_0_proj_in"
        up = (16, 2, *shape[2:])
        save_file(
            {f"{name}.lora_down.weight": torch.ones(shape), f"{name}.lora_up.weight": torch.ones(up)},
            tmp_path / "a.safetensors",
        )
        sd = narrow(family)
        change = sd.read_lora(tmp_path / "a.safetensors").pairs[name].change()
        assert change.shape == sd.unet.input_blocks[1][1].proj_in.weight.shape and (change == 2).all()


def test_targets_are_sets_within_each_other(tiny):
    sets = [chosen(tiny.lora_layers(), targets).keys() for targets in TARGETS]
    assert sets[0] < sets[1] < sets[2] < tiny.lora_layers().keys()
