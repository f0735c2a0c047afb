"""Reading, writing and converting model files keeps every bit, in every layout and for both families."""

import json
import shutil
import struct
import time
from pathlib import Path

import pytest
import torch
from runs import slow_after
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ldm import InputError, StableDiffusion
from ldm.formats import Source, single
from ldm.formats.folder import PARTS
from ldm.formats.tensors import save_tensors

FAMILIES = ("sd1", "sd2_v")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
EMA = "model_ema."


@pytest.fixture
def there(tmp_path):
    """A folder that is removed after the test."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def same_bits(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def official_tensors(sd: StableDiffusion, folder: Path, dtype=None) -> dict[str, torch.Tensor]:
    """The tensors of an official file of this model, without the metadata in its header."""
    file = folder / "official.safetensors"
    sd.save(file, dtype=dtype)
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    file.unlink()
    return tensors


def averages(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """EMA tensors of the UNet under the names of the original code's LitEma: no dots, and no "model." in front."""
    unet = {name: tensor for name, tensor in tensors.items() if name.startswith("model.diffusion_model.")}
    made = {EMA + name.removeprefix("model.").replace(".", ""): tensor * 0.5 for name, tensor in unet.items()}
    return made | {EMA + "decay": torch.tensor(0.9999), EMA + "num_updates": torch.tensor(7, dtype=torch.int32)}


# Each of these functions writes one layout as other programs do, and returns the model's path.


def safetensors(sd, folder, dtype):
    save_file(official_tensors(sd, folder, dtype), folder / "model.safetensors", {"format": "pt"})
    return folder / "model.safetensors"


def ckpt_bare(sd, folder, dtype):
    torch.save(official_tensors(sd, folder, dtype), folder / "model.ckpt")
    return folder / "model.ckpt"


def ckpt_full(sd, folder, dtype):
    tensors = official_tensors(sd, folder, dtype)
    state = {"epoch": 3, "global_step": 470000, "optimizer_states": [{"lr": 1e-4, "exp_avg": torch.zeros(9)}]}
    torch.save(state | {"state_dict": tensors | averages(tensors)}, folder / "model.ckpt")
    return folder / "model.ckpt"


def diffusers_folder(sd, folder, dtype):
    sd.save(folder / "model", "diffusers", dtype)
    return folder / "model"


def diffusers_bin(sd, folder, dtype):
    path = diffusers_folder(sd, folder, dtype)
    for part, stem in PARTS.items():
        whole = path / part / f"{stem}.safetensors"
        name = "pytorch_model.bin" if part == "text_encoder" else f"{stem}.bin"
        torch.save(load_file(whole), whole.with_name(name))
        whole.unlink()
    return path


def diffusers_variant(sd, folder, dtype):
    path = diffusers_folder(sd, folder, dtype)
    for part, stem in PARTS.items():
        whole = path / part / f"{stem}.safetensors"
        whole.rename(whole.with_name(f"{stem}.fp16.safetensors"))
    return path


def diffusers_shards(sd, folder, dtype, variant=""):
    path = diffusers_folder(sd, folder, dtype)
    for part, stem in PARTS.items():
        whole = path / part / f"{stem}.safetensors"
        shard(whole, f"{stem}{variant}", f"{stem}.safetensors.index{variant}.json")
    return path


def diffusers_shards_variant(sd, folder, dtype):
    return diffusers_shards(sd, folder, dtype, ".fp16")


def shard(whole: Path, stem: str, index: str, count: int = 3) -> None:
    """Splits a file into shards with an index, under the names that diffusers and transformers use."""
    tensors = load_file(whole)
    names = sorted(tensors)
    weight_map = {}
    for i in range(count):
        piece = f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors"
        save_file({name: tensors[name].clone() for name in names[i::count]}, whole.with_name(piece), {"format": "pt"})
        weight_map |= dict.fromkeys(names[i::count], piece)
    whole.unlink()
    tree = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    whole.with_name(index).write_text(json.dumps(tree))


LAYOUTS = (
    safetensors,
    ckpt_bare,
    ckpt_full,
    diffusers_folder,
    diffusers_bin,
    diffusers_variant,
    diffusers_shards,
    diffusers_shards_variant,
)


@pytest.mark.parametrize(
    "layout, dtype",
    slow_after(
        2,
        [(layout, "fp16" if "variant" in layout.__name__ else "fp32") for layout in LAYOUTS]
        + [(safetensors, "bf16"), (ckpt_bare, "fp16"), (ckpt_full, "bf16")],
    ),
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.parametrize("family", slow_after(1, FAMILIES))
def test_any_layout_converts_into_any_other_and_back_bit_for_bit(family, layout, dtype, narrow, there):
    original, dtype = narrow(family), DTYPES[dtype]
    expected = {name: tensor.to(dtype) for name, tensor in original.state().items()}
    variant = "fp16" if "variant" in layout.__name__ else None
    first = StableDiffusion.load(layout(original, there, dtype), dtype=None, variant=variant)
    assert same_bits(first.state(), expected)
    assert first.config == original.config  # the family comes from the tensors or from the folder
    first.save(there / "second", "diffusers")
    second = StableDiffusion.load(there / "second", dtype=None)
    second.save(there / "third.safetensors")
    third = StableDiffusion.load(there / "third.safetensors", dtype=None)
    for sd in (second, third):
        assert same_bits(sd.state(), expected) and sd.config == original.config
    assert first.source_fingerprint() == third.source_fingerprint()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_folders_that_diffusers_writes_in_shards_are_read(safe, family, narrow, there):
    diffusers = pytest.importorskip("diffusers", reason="needs the parity extra")
    original = narrow(family)
    original.save(there / "ours", "diffusers")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(there / "ours").to(torch.float16)
    pipe.save_pretrained(there / "theirs", safe_serialization=safe, variant="fp16", max_shard_size="100KB")
    names = [path.name for path in (there / "theirs" / "unet").iterdir()]
    assert any("index.fp16.json" in name for name in names) and sum("-of-" in name for name in names) > 1
    with pytest.raises(InputError, match="variant fp16 only; give variant fp16$"):
        StableDiffusion.load(there / "theirs")
    sd = StableDiffusion.load(there / "theirs", dtype=None, variant="fp16")
    assert same_bits(sd.state(), {name: tensor.half() for name, tensor in original.state().items()})
    assert sd.config.schedule.prediction == original.config.schedule.prediction


@pytest.mark.parametrize("kind", ["ckpt", "safetensors"])
def test_a_full_checkpoint_loads_either_unet_and_no_ema_is_ever_written(kind, narrow, there):
    original = narrow("sd1")
    path = ckpt_full(original, there, None)
    if kind == "safetensors":
        tensors = torch.load(path, weights_only=True)["state_dict"]
        path = there / "full.safetensors"
        save_file(tensors, path)
    last, averaged = StableDiffusion.load(path), StableDiffusion.load(path, ema=True)
    halved = {k: t * 0.5 if k.startswith("model.") else t for k, t in original.state().items()}
    assert same_bits(last.state(), original.state()) and same_bits(averaged.state(), halved)
    every = set(averages(original.state()))
    for sd, dropped in ((last, every), (averaged, {EMA + "decay", EMA + "num_updates"})):
        assert set(sd.save(there / "folder", "diffusers")) > dropped == set(sd.save(there / "saved.safetensors"))
        with safe_open(there / "saved.safetensors", "pt") as file:
            assert not any(name.startswith(EMA) for name in file.keys())
        assert same_bits(StableDiffusion.load(there / "saved.safetensors").state(), sd.state())
        with pytest.raises(InputError, match=r"has no EMA weights for model\.diffusion_model\..* load it without ema"):
            StableDiffusion.load(there / "saved.safetensors", ema=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_a_folder_names_the_tensors_left_out_and_saving_a_file_keeps_them(family, narrow, there):
    tensors = official_tensors(narrow(family), there)
    kept = {"first_stage_model.loss.logvar": torch.tensor(0.25), "betas": torch.full((1000,), 0.5)}
    if family != "sd1":  # OpenCLIP's last block and projection: the original code has them and never runs them
        last = [name for name in tensors if ".resblocks.2." in name]
        assert len(last) == 12
        for name in [*last, "cond_stage_model.model.text_projection", "cond_stage_model.model.logit_scale"]:
            kept[name] = torch.randn(tensors[name].shape)
    save_file(tensors | kept, there / "a.safetensors")
    sd = StableDiffusion.load(there / "a.safetensors")
    left_out = sd.save(there / "folder", "diffusers")
    assert set(kept) <= set(left_out) and set(left_out) == set(tensors) - official_networks(tensors) | set(kept)
    assert sd.save(there / "b.safetensors", dtype=torch.float16) == []
    found = load_file(there / "b.safetensors")
    for name in kept:  # the text encoder's tensors get its type, whether they run or not; others are unchanged
        kept[name] = kept[name].half() if name.startswith("cond_stage_model.") else kept[name]
    assert same_bits({name: found[name] for name in kept}, kept)


def official_networks(tensors) -> set[str]:
    ours = {name for name in tensors if name.startswith(("model.diffusion_model.", "first_stage_model."))}
    text = {name for name in tensors if name.startswith("cond_stage_model.")}
    unused = (".position_ids", "model.text_projection", "model.logit_scale")
    return ours | {name for name in text if not name.endswith(unused) and ".resblocks.2." not in name}


def test_the_header_says_what_the_model_is_and_where_it_comes_from(narrow, there):
    narrow("sd2").save(there / "a.safetensors", metadata={"ldm.step": "400", "ldm.base": "f" * 64})
    with safe_open(there / "a.safetensors", "pt") as file:
        said = file.metadata()
    assert said["format"] == "pt" and said["ldm.step"] == "400" and said["ldm.base"] == "f" * 64
    assert json.loads(said["ldm.config"])["unet"]["context_dim"] == 24
    assert json.loads(said["ldm.tokenizer"]) == {"vocab": "clip", "merges": [], "context_length": 77, "pad_id": 0}
    narrow("sd2").save(there / "folder", "diffusers", metadata={"ldm.step": "400"})
    with safe_open(there / "folder" / "unet" / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "ldm.step": "400"}


# What the model predicts, eps or v, is not visible in the tensors


@pytest.mark.slow
def test_the_summary_says_what_the_model_predicts_and_how_we_know(narrow, there):
    file = safetensors(narrow("sd2_v"), there, None)
    guessed = StableDiffusion.load(file)
    assert (guessed.config.schedule.prediction, guessed.config.resolution) == ("v", 768)
    assert "predicts v (assumed for SD 2.x; a 512-base model needs prediction eps)" in guessed.summary
    told = StableDiffusion.load(file, prediction="eps")
    assert (told.config.schedule.prediction, told.config.resolution) == ("eps", 512)
    assert told.summary.endswith("predicts eps (as requested)") and str(file) in told.summary
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}
    for word, said in {"epsilon": ("eps", 512), "v": ("v", 768), "v_prediction": ("v", 768)}.items():
        save_file(tensors, there / "named.safetensors", {"modelspec.prediction_type": word})
        named = StableDiffusion.load(there / "named.safetensors")
        assert (named.config.schedule.prediction, named.config.resolution) == said
        assert named.summary.endswith(f"predicts {said[0]} (the file's metadata)")
    told.save(there / "ours.safetensors")
    assert StableDiffusion.load(there / "ours.safetensors").summary.endswith("predicts eps (the file's metadata)")
    guessed.save(there / "folder", "diffusers")
    assert StableDiffusion.load(there / "folder").summary.endswith("predicts v (the scheduler's JSON)")
    overruled = StableDiffusion.load(there / "folder", prediction="eps")
    assert overruled.summary.endswith("predicts eps (as requested)")
    first = safetensors(narrow("sd1"), there, None)
    assert "Stable Diffusion 1, official single file, float32, predicts eps" in StableDiffusion.load(first).summary
    with pytest.raises(InputError, match="prediction 'x0' is neither eps nor v"):
        StableDiffusion.load(first, prediction="x0")


# Damaged files: the error is one line that names the file.


@pytest.fixture
def sharded(narrow, there):
    """A folder of shards, and the index of its UNet."""
    path = diffusers_shards(narrow("sd1"), there, None)
    return path, path / "unet" / "diffusion_pytorch_model.safetensors.index.json"


def test_a_damaged_or_false_index_is_refused(sharded, there):
    path, index = sharded
    good = json.loads(index.read_text())
    name = min(good["weight_map"])
    piece = good["weight_map"][name]
    (there / "outside.safetensors").write_bytes((index.parent / piece).read_bytes())

    def mapped(**changes):
        return json.dumps({"weight_map": good["weight_map"] | changes})

    text = json.dumps(good)
    twice = text.replace(f'"{name}": ', f'"{name}": "{piece}", "{name}": ', 1)
    lies = {
        text[: len(text) // 2]: "is damaged",
        "[]": "is damaged",
        '{"weight_map": []}': "is damaged",
        '{"weight_map": {"a": 1}}': "is damaged: its weight_map does not name a file for each tensor",
        '{"weight_map": {"a": ["b"]}}': "is damaged",
        "[" * 100_000: "is damaged",
        twice: f"is damaged: .*{name}.* twice",
        mapped(**{name: "../../../outside.safetensors"}): r"a shard '\.\./.*' that is not beside it",
        mapped(**{name: str(there / "outside.safetensors")}): "that is not beside it",
        mapped(**{name: ".."}): "that is not beside it",
        mapped(**{name: ""}): "that is not beside it",
        mapped(**{name: "nothing.safetensors"}): "that is not beside it",
        mapped(**{name: "nul\0.safetensors"}): "that is not beside it",
        mapped(**{"adapter.weight": piece}): r"differ in tensor adapter\.weight",
        mapped(**{name: next(p for p in good["weight_map"].values() if p != piece)}): f"differ in tensor {name}",
    }
    for text, said in lies.items():
        index.write_text(text)
        with pytest.raises(InputError, match=said) as error:
            StableDiffusion.load(path)
        assert str(index) in str(error.value) and "\n" not in str(error.value)


def test_a_tensor_in_two_shards_is_refused(sharded):
    path, index = sharded
    pieces = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    first, second = (load_file(index.parent / piece) for piece in pieces[:2])
    name = min(first)
    save_file({k: t.clone() for k, t in (second | {name: first[name]}).items()}, index.parent / pieces[1])
    with pytest.raises(InputError, match=f"{pieces[1]} differ in tensor {name}"):
        StableDiffusion.load(path)


def test_shards_may_be_links_as_in_the_cache_of_the_hub(sharded, there):
    path, index = sharded
    for piece in set(json.loads(index.read_text())["weight_map"].values()):
        (there / piece).write_bytes((index.parent / piece).read_bytes())
        (index.parent / piece).unlink()
        (index.parent / piece).symlink_to(there / piece)
    StableDiffusion.load(path)


FLOATS = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
# name: (header, data, what the error says)
HEADERS = {
    "length beyond all memory": (b"{}", b"", "header too large"),
    "length beyond the file": (b"{}", b"", "header"),
    "no JSON": (b"\x80\x02cposix\nsystem\n.", b"", "header"),
    "nested": (b'{"a":' + b"[" * 100_000, b"", "recursion limit"),
    "another shape": ({"a": FLOATS | {"shape": [1 << 40]}}, bytes(8), "invalid shape"),
    "overflowing shape": ({"a": FLOATS | {"shape": [1 << 33, 1 << 33]}}, bytes(8), "overflow"),
    "negative shape": ({"a": FLOATS | {"shape": [-2]}}, bytes(8), "invalid value"),
    "overlapping": ({"a": FLOATS, "b": FLOATS | {"data_offsets": [4, 12]}}, bytes(12), "invalid offset"),
    "shared": ({"a": FLOATS, "b": FLOATS}, bytes(8), "invalid offset"),
    "hidden bytes": ({"a": FLOATS | {"data_offsets": [8, 16]}}, bytes(16), "invalid offset"),
    "cut short": ({"a": FLOATS}, bytes(7), "not fully covered"),
    "too long": ({"a": FLOATS}, bytes(9), "not fully covered"),
    "unknown type": ({"a": FLOATS | {"dtype": "F7"}}, bytes(8), "unknown variant"),
    "one name twice": (
        b'{"a":%b,"a":%b}' % (json.dumps(FLOATS).encode(), json.dumps(FLOATS | {"data_offsets": [8, 16]}).encode()),
        bytes(16),
        "invalid offset",
    ),
    "no model": ({"a": FLOATS}, bytes(8), "does not look like Stable Diffusion"),
    "metadata that lies": ({"__metadata__": {"ldm.config": "[]"}, "a": FLOATS}, bytes(8), "metadata is damaged"),
    "metadata too deep": (
        {"__metadata__": {"ldm.config": "[" * 100_000}, "a": FLOATS},
        bytes(8),
        "metadata is damaged",
    ),
    "metadata cut short": ({"__metadata__": {"ldm.config": "{"}, "a": FLOATS}, bytes(8), "metadata is damaged"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_hostile_header_is_refused(name, tmp_path):
    header, data, said = HEADERS[name]
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = {"length beyond all memory": (1 << 64) - 1, "length beyond the file": 1 << 20}.get(name, len(raw))
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", length) + raw + data)
    with pytest.raises(InputError, match=said) as error:
        StableDiffusion.load(tmp_path / "a.safetensors")
    assert str(tmp_path / "a.safetensors") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\x00" * 7, b"<html>not found</html>" * 9, b"PK\x03\x04" * 9])
def test_a_file_that_is_not_safetensors_is_refused(content, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="is not a whole .safetensors file"):
        StableDiffusion.load(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "value, said",
    [
        (
            torch.tensor([float("nan")] * 16),
            "holds NaN or infinity; the model's file is damaged, or the model has diverged",
        ),
        (torch.tensor([0.0] * 15 + [float("inf")]), "holds NaN or infinity"),
        (torch.zeros(16, dtype=torch.float8_e4m3fn), "holds torch.float8_e4m3fn, and should hold"),
        (torch.zeros(16, dtype=torch.int32), "holds torch.int32, and should hold"),
        (torch.zeros(16, dtype=torch.complex64), "holds torch.complex64, and should hold"),
        (torch.zeros(4, 4), r"is \(4, 4\), and should be \(16,\)"),
        (torch.zeros(()), r"is \(\), and should be \(16,\)"),
        (torch.zeros(0), r"is \(0,\), and should be \(16,\)"),
    ],
    ids=["nan", "inf", "fp8", "int", "complex", "shape", "scalar", "empty"],
)
@pytest.mark.parametrize("dtype", slow_after(1, [torch.float32, None]), ids=["fp32", "as stored"])
def test_a_tensor_of_a_wrong_type_shape_or_value_is_refused_by_name(value, said, dtype, narrow, there):
    tensors = official_tensors(narrow("sd1"), there)
    name = "model.diffusion_model.input_blocks.0.0.bias"
    save_file(tensors | {name: value}, there / "a.safetensors")
    with pytest.raises(InputError, match=f"{name} {said}"):  # loading alone does not read the values
        StableDiffusion.load(there / "a.safetensors", dtype=dtype).check_finite()


@pytest.mark.parametrize("suffix", slow_after(1, [".ckpt", ".bin"]))
@pytest.mark.parametrize("key", [1, ("a", "b"), None, b"unet", "a\nb", "\x1b[2J", "a\udc80", "a" * 2000], ids=ascii)
def test_a_tensor_whose_name_is_not_plain_text_is_refused(key, suffix, narrow, there):
    tensors = official_tensors(narrow("sd1"), there)
    torch.save({"state_dict": {**tensors, key: torch.zeros(2)}}, there / f"a{suffix}")
    with pytest.raises(InputError, match="under a name that is no text"):
        StableDiffusion.load(there / f"a{suffix}")


@pytest.mark.parametrize(
    "part, name",
    [("text", "layers"), ("unet", "blocks"), ("vae", "blocks"), ("schedule", "timesteps"), ("text", "vocab_size")],
)
def test_absurd_sizes_are_refused_before_memory_is_allocated(part, name, random_model, there):
    sd = random_model()
    sd.save(there / "a.safetensors")
    with safe_open(there / "a.safetensors", "pt") as file:
        metadata = file.metadata()
    tree = json.loads(metadata["ldm.config"])
    tree[part][name] = 10**9
    save_file(load_file(there / "a.safetensors"), there / "b.safetensors", metadata | {"ldm.config": json.dumps(tree)})
    began = time.perf_counter()
    with pytest.raises(InputError, match=f"{name} can't be 1000000000"):
        StableDiffusion.load(there / "b.safetensors")
    assert time.perf_counter() - began < 5


def test_the_largest_configuration_takes_seconds(random_model, there):
    """A file of one tensor can describe any number of layers. They are built, on no device, before one is missing."""
    sd = random_model()
    tree = sd.config.to_dict()
    tree["unet"] |= {"channels": [2**18] * 6, "attention": [True] * 6, "blocks": 6}
    tree["vae"] |= {"channels": [2**18] * 6, "blocks": 6}
    tree["text"] |= {"layers": 48}
    metadata = {"ldm.config": json.dumps(tree), "ldm.tokenizer": sd.tokenizer.to_metadata()}
    save_file({"a": torch.zeros(1)}, there / "a.safetensors", metadata)
    began = time.process_time()
    with pytest.raises(InputError, match="missing tensor"):
        StableDiffusion.load(there / "a.safetensors")
    assert time.process_time() - began < 10


def in_folder(sd: StableDiffusion, there: Path, file: str, **changes: object) -> Path:
    """A diffusers folder, with other settings in one of its JSON files."""
    sd.save(there / "model", "diffusers")
    path = there / "model" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return there / "model"


@pytest.mark.parametrize("value", [0, 0.0, -0.18215, float("nan"), float("inf"), 1e-300, 1e300, 10**400, "0.18", None])
def test_latents_are_scaled_by_a_number_between_bounds(value, random_model, there):
    path = in_folder(random_model(), there, "vae/config.json", scaling_factor=value)
    with pytest.raises(InputError, match=r"VAEConfig\.scale_factor can't be "):
        StableDiffusion.load(path)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"beta_start": 1e-30}, "1000 betas from 1e-30 to 0.012 make NaN: alphas_cumprod"),
        ({"beta_start": 5e-324}, "make NaN: alphas_cumprod"),
        ({"beta_end": 0.999999}, "1000 betas from 0.00085 to 0.999999 make NaN: alphas_cumprod"),
        ({"num_train_timesteps": 100_000}, "100000 betas from 0.00085 to 0.012 make NaN: alphas_cumprod"),
        ({"beta_start": float("nan")}, r"ScheduleConfig\.beta_start can't be nan"),
        ({"beta_end": -0.01}, "betas from 0.00085 to -0.01 are not between 0 and 1"),
        ({"beta_start": 10**400}, "betas from 1000+ .* are not between 0 and 1|beta_start can't be"),
    ],
)
def test_a_schedule_that_makes_nan_is_refused_with_the_reason(changes, said, random_model, there):
    path = in_folder(random_model(), there, "scheduler/scheduler_config.json", **changes)
    with pytest.raises(InputError, match=said):
        StableDiffusion.load(path)


def test_tensors_that_share_memory_are_written_separately(tmp_path):
    base = torch.arange(24.0)
    tensors = {"a": base[:16], "b": base[8:24], "c": base, "d": base[4:5], "e": torch.zeros(0)}
    save_tensors(tmp_path / "a.safetensors", tensors, {"format": "pt"})
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    "file, name, value",
    [
        ("unet", "addition_embed_type", "text_time"),
        ("unet", "transformer_layers_per_block", [1, 2, 10, 1]),
        ("vae", "shift_factor", 0.1),
        ("text_encoder", "layer_norm_eps", 1e-3),
        ("scheduler", "trained_betas", [0.1, 0.2]),
    ],
)
def test_a_folder_of_another_architecture_is_refused_by_its_configuration(file, name, value, random_model, there):
    random_model().save(there / "folder", "diffusers")
    path = there / "folder" / file / ("scheduler_config.json" if file == "scheduler" else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(InputError, match=f"{name} is .*, and only .* is Stable Diffusion 1 or 2"):
        StableDiffusion.load(there / "folder")


def test_a_model_keeps_the_metadata_of_its_training(random_model, there):
    origin = {"ldm.base": "f" * 64, "ldm.step": "7", "ldm.instance_prompt": "a sks dog"}
    origin["ldm.sampling"] = '{"sampler": "ddim", "steps": 25}'
    random_model().save(there / "a.safetensors", metadata=origin)
    StableDiffusion.load(there / "a.safetensors").save(there / "folder", "diffusers")
    for part, stem in PARTS.items():  # a variant keeps it too
        (there / "folder" / part / f"{stem}.safetensors").rename(there / "folder" / part / f"{stem}.fp16.safetensors")
    StableDiffusion.load(there / "folder", variant="fp16").save(there / "b.safetensors")
    with safe_open(there / "b.safetensors", "pt") as file:
        assert {key: text for key, text in file.metadata().items() if key in origin} == origin
    StableDiffusion.load(there / "b.safetensors").save(there / "c.safetensors", metadata={"ldm.step": "9"})
    with safe_open(there / "c.safetensors", "pt") as file:
        assert (
            file.metadata()["ldm.step"] == "9" and "ldm.base" not in file.metadata()
        )  # metadata that are given replace the source's


@pytest.mark.parametrize("shape", [(), (7,), (71, 24), (72,)], ids=str)
def test_openclip_stacks_that_do_not_split_into_three_are_refused_by_name(shape, narrow, there):
    tensors = official_tensors(narrow("sd2"), there)
    name = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"
    save_file(tensors | {name: torch.zeros(shape)}, there / "a.safetensors")
    with pytest.raises(InputError, match=r"layers\.0\.self_attn\.k_proj\.weight is \(.*\), and should be \(24, 24\)"):
        StableDiffusion.load(there / "a.safetensors")


def test_openclip_stacks_that_are_missing_or_unknown_are_named(narrow, there):
    tensors = official_tensors(narrow("sd2"), there)
    prefix = "cond_stage_model.model.transformer.resblocks."
    for change, said in (
        ({prefix + "0.attn.in_proj_weight": None}, r"missing tensor .*layers\.0\.self_attn\.k_proj\.weight"),
        ({prefix + "3.ln_1.weight": torch.zeros(24)}, r"unknown tensor .*resblocks\.3\.ln_1\.weight"),
        ({prefix + "9.attn.in_proj_weight": torch.zeros(72, 24)}, r"unknown tensor .*9\."),
    ):
        changed = {k: t for k, t in (tensors | change).items() if t is not None}
        save_file(changed, there / "a.safetensors")
        with pytest.raises(InputError, match=said):
            StableDiffusion.load(there / "a.safetensors")


# Saving


def test_a_model_can_be_saved_over_the_file_that_it_is_mapped_from(narrow, there):
    original = narrow("sd1")
    original.save(there / "a.safetensors")
    sd = StableDiffusion.load(there / "a.safetensors")
    sd.save(there / "a.safetensors", dtype=torch.float16)
    assert same_bits(sd.state(), original.state())  # the old file stays mapped
    halves = {name: tensor.half() for name, tensor in original.state().items()}
    assert same_bits(StableDiffusion.load(there / "a.safetensors", dtype=None).state(), halves)


def test_changing_a_loaded_model_does_not_change_its_file(narrow, there):
    for path in (safetensors(narrow("sd1"), there, None), ckpt_bare(narrow("sd1"), there, None)):
        before = path.read_bytes()
        sd = StableDiffusion.load(path)
        with torch.no_grad():
            for parameter in sd.parameters().values():
                parameter.add_(1.0)
        assert path.read_bytes() == before


@pytest.mark.parametrize("family, official", [("SD1", "sd1"), ("SD2", "sd2"), ("SD2_V", "sd2")])
def test_a_saved_file_has_the_tensors_of_the_published_ones(family, official, monkeypatch, tmp_path):
    """Compares names, shapes and types at full size on the meta device, without the two remaining EMA tensors."""
    from published import published_rows

    from ldm import config

    preset = getattr(config, family)
    with torch.device("meta"):
        sd = StableDiffusion(preset)
    written = {}
    monkeypatch.setattr(single, "save_tensors", lambda path, tensors, header: (path.touch(), written.update(tensors)))
    single.write_single(tmp_path / "a.safetensors", Source(preset, sd.tokenizer, sd.state()))
    assert {name: (tuple(t.shape), t.dtype) for name, t in written.items()} == published_rows(official)
