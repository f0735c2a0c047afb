"""python -m ldm lora inspect|merge|extract|convert, and sample.py --lora with a bad file."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ldm import InputError, StableDiffusion, __main__, lora, tokens
from ldm.formats import Adapter, read_lora, write_lora
from ldm.lora import LoRA, chosen
from ldm.runtime import cli

FACTS = Path(__file__).resolve().parents[1] / "facts" / "lora"
TINY = Path(__file__).resolve().parents[2] / "weights" / "tiny" / "base"
KOHYA, DIFFUSERS = FACTS / "lora_kohya.safetensors", FACTS / "lora_unet_text_diffusers.safetensors"


@pytest.fixture
def run(capsys):
    """run(words...) runs the command. Returns the lines that it prints."""

    def call(*words) -> list[str]:
        __main__.main(["lora", *map(str, words)])
        return capsys.readouterr().out.splitlines()

    return call


def test_inspect_describes_a_lora(run):
    assert run("inspect", KOHYA, "--model", TINY) == [
        f"{KOHYA}: LoRA of 60 modules, rank 4, alpha / rank 0.25",
        "UNet: 57,344 parameters in 48 modules",
        "text encoder: 18,432 parameters in 12 modules",
        "ss_base_model_version: sd_v1",
        f"fits {TINY}",
    ]
    assert run("inspect", DIFFUSERS)[0] == f"{DIFFUSERS}: LoRA of 40 modules, rank 4, alpha / rank 2"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["merged.safetensors", "merged"])
def test_merge_writes_the_sum_in_both_layouts(name, run, tmp_path):
    lines = run("merge", TINY, tmp_path / name, "--lora", f"{KOHYA}:0.7", "--lora", DIFFUSERS, "--dtype", "fp32")
    assert lines[1:] == [
        f"added 0.7 x {KOHYA}: 60 modules",
        f"added 1 x {DIFFUSERS}: 40 modules",
        f"wrote {tmp_path / name}",
    ]
    merged, sd = StableDiffusion.load(tmp_path / name), StableDiffusion.load(TINY)
    before = {key: tensor.clone() for key, tensor in sd.state().items()}
    sd.merge_lora(KOHYA, 0.7)
    sd.merge_lora(DIFFUSERS)
    changed = {key for key, tensor in sd.state().items() if not torch.equal(tensor, before[key])}
    assert len(changed) == 60  # diffusers' 40 modules are among kohya's
    for key, tensor in merged.state().items():  # the base is fp16, and so is the sum
        assert (tensor - sd.state()[key]).abs().max() <= 2**-10 * max(1e-3, sd.state()[key].abs().max())


@pytest.mark.parametrize("dtype", [None, "fp32", "fp16"])
def test_a_sum_is_made_in_fp32_and_rounded_once(dtype, run, random_model, tmp_path):
    """Of a model in bf16 and two LoRAs whose changes are small beside its steps."""
    base, loras = random_model(), [tmp_path / f"{i}.safetensors" for i in range(2)]
    base.save(tmp_path / "base.safetensors", dtype=torch.bfloat16)
    for path in loras:
        pairs = {}
        for name, layer in chosen(base.lora_layers(), "attention").items():
            pair = LoRA(layer, 1, 1.0).draw(0, name).pair()
            pairs[name] = pair._replace(up=torch.full_like(pair.up, 1e-3))
        write_lora(path, Adapter(pairs).tensors(), {})
    flags = ["--lora", loras[0], "--lora", loras[1], *(("--dtype", dtype) if dtype else ())]
    run("merge", tmp_path / "base.safetensors", tmp_path / "a.safetensors", *flags)
    before, after = (
        StableDiffusion.load(tmp_path / f"{name}.safetensors", dtype=None).lora_layers() for name in ("base", "a")
    )
    stored = {None: torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}[dtype]
    for name, pair in read_lora(loras[0]).pairs.items():
        due = before[name].weight.float() + pair.change() + pair.change()
        assert after[name].weight.dtype == stored and torch.equal(after[name].weight, due.to(stored))


@pytest.fixture
def two(random_model, tmp_path):
    """two(change): the files of a small model before and after `change(sd)`, the models, and the LoRA to write."""

    def make(change) -> tuple:
        base, tuned = random_model(), random_model()
        with torch.no_grad():
            change(tuned)
        paths = [tmp_path / f"{name}.safetensors" for name in ("base", "tuned", "lora")]
        base.save(paths[0])
        tuned.save(paths[1])
        return paths, base, tuned

    return make


def test_extract_finds_the_lora_that_was_merged(run, two, tmp_path):
    """The difference has rank 4, and so the LoRA of rank 4 is exact."""
    merged = tmp_path / "merged.safetensors"

    def change(sd: StableDiffusion) -> None:
        pairs, generator = {}, torch.Generator().manual_seed(0)
        for name, layer in chosen(sd.lora_layers(), "transformer").items():
            lora = LoRA(layer, 4, 1.0).draw(0, name)
            lora.lora_up.weight.normal_(generator=generator)
            pairs[name] = lora.pair()
        write_lora(merged, Adapter(pairs).tensors(), {})
        sd.merge_lora(merged)

    paths, *_ = two(change)
    lines = run("extract", *paths, "--rank", 4)
    expected, found = (read_lora(path).pairs for path in (merged, paths[2]))
    assert lines[0] == f"kept 100.0% of the squared change of {len(expected)} weights"
    assert lines[1] == "not in the LoRA: 0.0% of the squared change of the whole model, in other tensors"
    assert found.keys() == expected.keys() and {pair.scale for pair in found.values()} == {1.0}
    for name, pair in found.items():
        due = expected[name].change()
        assert (pair.change() - due).norm() <= 1e-4 * due.norm()

    lines = run("extract", *paths, "--energy", 0.8, "--overwrite")
    kept = float(lines[0].split()[1].rstrip("%")) / 100
    found = read_lora(paths[2]).pairs
    assert len({pair.rank for pair in found.values()}) > 1 and all(pair.rank <= 4 for pair in found.values())
    assert len({pair.alpha for pair in found.values()}) == 1  # programs expect one alpha
    with safe_open(paths[2], "pt") as file:
        said = file.metadata()
    alpha = next(iter(found.values())).alpha
    assert (said["ss_network_dim"], said["ss_network_alpha"]) == ("Dynamic", f"{alpha:g}")  # kohya's word
    assert said["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert said["modelspec.title"] == "LoRA of tuned, for base" and said["modelspec.hash_sha256"]
    left = sum((pair.change() - expected[name].change()).square().sum().item() for name, pair in found.items())
    whole = sum(pair.change().square().sum().item() for pair in expected.values())
    assert 0.8 <= kept < 1 and kept == pytest.approx(1 - left / whole, abs=1e-3)


def test_extract_leaves_a_learned_token_out_and_says_so(run, two):
    def change(sd: StableDiffusion) -> None:
        tokens.begin(sd, "[V]", "a")
        sd.unet.middle_block[1].proj_in.weight.add_(0.1)

    paths, *_ = two(change)
    lines = run("extract", *paths, "--rank", 1)
    assert lines[0] == "kept 100.0% of the squared change of 1 weights" and lines[1].startswith("not in the LoRA: 0.0%")
    assert lines[-1] == "not in it: token [V]"
    assert list(read_lora(paths[2]).pairs) == ["lora_unet_mid_block_attentions_0_proj_in"]


def test_extract_makes_no_rank_that_is_refused_later(run, two, monkeypatch):
    monkeypatch.setattr(lora, "MAX_RANK", 5)

    def change(sd: StableDiffusion) -> None:
        for parameter in sd.parameters().values():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))

    paths, *_ = two(change)
    assert float(run("extract", *paths, "--energy", 1)[0].split()[1].rstrip("%")) < 100
    assert max(pair.rank for pair in read_lora(paths[2]).pairs.values()) == 5


def test_extract_equals_the_truncated_svd_also_of_convolutions(run, two):
    """Of every kind of layer. What no LoRA holds is reported: here the biases, norms and embeddings."""

    def change(sd: StableDiffusion) -> None:
        generator = torch.Generator().manual_seed(0)
        for name, parameter in sd.parameters().items():
            if not name.startswith("first_stage"):
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))

    paths, base, tuned = two(change)
    lines = run("extract", *paths, "--rank", 3)
    pairs = read_lora(paths[2]).pairs
    before, after, kept, whole = base.lora_layers(), tuned.lora_layers(), 0.0, 0.0
    for name, pair in pairs.items():
        change = (after[name].weight - before[name].weight).detach()
        u, s, v = torch.linalg.svd(change.flatten(1), full_matrices=False)
        due = (u[:, :3] * s[:3] @ v[:3]).view(change.shape)
        assert (pair.change() - due).norm() <= 1e-2 * due.norm(), name  # singular values may lie close together
        assert (pair.change() - change).norm().item() == pytest.approx(s[3:].norm().item(), rel=1e-4), name
        kept, whole = kept + s[:3].square().sum(), whole + s.square().sum()
    assert pairs.keys() == chosen(before, "all").keys()
    assert any(pair.down.ndim == 4 and pair.down.shape[-1] == 3 for pair in pairs.values())
    assert lines[0] == f"kept {kept / whole:.1%} of the squared change of {len(pairs)} weights"
    assert float(lines[1].split()[4].rstrip("%")) > 1
    with safe_open(paths[2], "pt") as file:
        assert file.metadata()["ss_network_args"] == '{"conv_dim": "3", "conv_alpha": "3"}'


def test_convert_there_and_back(run, tmp_path):
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    assert run("convert", KOHYA, there, "--names", "diffusers", "--dtype", "fp32") == [f"wrote {there}"]
    keys = load_file(there).keys()
    assert len(keys) == 120 and all(key.split(".")[0] in ("unet", "text_encoder") for key in keys)
    renamed, said = load_file(there), {"modelspec.title": "cats", "modelspec.hash_sha256": "0x0", "author": "me"}
    save_file(renamed, there, said)
    run("convert", there, back)
    with safe_open(back, "pt") as file:
        said = file.metadata()
    assert (said["ss_v2"], said["ss_network_dim"], said["ss_network_alpha"]) == ("False", "4", "4")
    content = hashlib.sha256(back.read_bytes()[8 + int.from_bytes(back.read_bytes()[:8], "little") :]).hexdigest()
    assert (said["modelspec.title"], said["modelspec.hash_sha256"]) == ("cats", f"0x{content}")
    expected, found = read_lora(KOHYA).pairs, read_lora(back).pairs
    assert found.keys() == expected.keys()
    assert all(torch.equal(pair.change(), expected[name].change()) for name, pair in found.items())
    run("convert", KOHYA, tmp_path / "half.safetensors", "--dtype", "bf16")
    half = load_file(tmp_path / "half.safetensors")
    assert all(tensor.dtype == (torch.float32 if "alpha" in key else torch.bfloat16) for key, tensor in half.items())


def test_convert_keeps_what_a_lora_is_for(run, tmp_path):
    """Zero terminal SNR under any names; the family also where only layers of the text encoder tell it."""
    name = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 1024), f"{name}.lora_up.weight": torch.ones(1024, 2)}
    save_file(tensors, tmp_path / "a.safetensors", {"ss_zero_terminal_snr": "True"})
    for names in ("diffusers", "kohya"):
        run("convert", tmp_path / "a.safetensors", tmp_path / f"{names}.safetensors", "--names", names)
        adapter = read_lora(tmp_path / f"{names}.safetensors")
        assert adapter.has_zero_terminal_snr
    assert adapter.metadata["ss_v2"] == "True" and adapter.metadata["ss_base_model_version"] == "sd_v2"


@pytest.mark.parametrize("names", ["kohya", "diffusers"])
def test_diffusers_opens_what_convert_writes(names, run, tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="needs the parity extra")
    run("convert", KOHYA, tmp_path / "a.safetensors", "--names", names, "--dtype", "fp32")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(TINY, safety_checker=None)
    pipe.load_lora_weights(tmp_path, weight_name="a.safetensors", adapter_name="a")
    sd = StableDiffusion.load(TINY)
    sd.apply_lora(KOHYA)
    x, t = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([300])
    ids = sd.tokenizer(["a red cat"])
    with torch.no_grad():
        ours = sd.text_encoder(ids), sd.unet(x, t, sd.text_encoder(ids))
        theirs = pipe.text_encoder(ids)[0], pipe.unet(x, t, ours[0]).sample
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-5 * a.abs().max()


# Refusals


def refused(call) -> str:
    with pytest.raises(InputError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_impossible_commands_are_refused(run, saved, tmp_path):
    new, small = tmp_path / "new.safetensors", saved["official"]
    for words, said in (
        (("inspect", TINY), "it is a folder"),
        (("inspect", KOHYA, "--model", "nowhere"), "nowhere: no such model"),
        (("convert", KOHYA, tmp_path / "a.pt"), "pickled files are read, never written"),
        (("convert", KOHYA, tmp_path / "a"), "should end in .safetensors"),
        (("convert", KOHYA, KOHYA), "is there already"),
        (("convert", KOHYA, new, "--names", "x"), "invalid choice: 'x'"),
        (("merge", TINY, new), "required: --lora"),
        (("merge", TINY, new, "--lora", f"{KOHYA}:nan"), "the scale nan is not a number from -100 to 100"),
        (("merge", TINY, new, "--lora", f"{KOHYA}:1e9"), "the scale 1e9 is not a number"),
        (("merge", TINY, new, "--lora", "nowhere:x"), "nowhere:x can't be read: No such file"),
        (("merge", TINY, new, "--lora", ""), "--lora: the name of the file is empty"),
        (("merge", TINY, new, "--lora", f"{KOHYA}:0,5"), "the scale 0,5 is not a number from -100 to 100"),
        (("extract", small, small, new), "one of the arguments --rank --energy is required"),
        (("extract", small, small, new, "--rank", 2000), "--rank 2000 is too much: it should be at most 1024"),
        (("extract", small, small, new, "--energy", 0), "--energy 0.0 is not a share"),
        (("extract", small, small, new, "--energy", "nan"), "--energy nan is not a share"),
        (("extract", small, small, tmp_path / "a", "--rank", 2), "should end in .safetensors"),
        (("extract", small, small, new, "--rank", 2), "no weight that a LoRA can hold differs"),
    ):
        assert said in refused(lambda words=words: run(*words)), words
        assert not new.exists()
    message = refused(lambda: run("extract", TINY, small, new, "--rank", 2))
    assert "was not tuned from" in message
    message = refused(lambda: run("merge", small, new, "--lora", KOHYA))
    assert "the LoRA is for another kind of model" in message
    big = {key: tensor.float() * 1e5 for key, tensor in load_file(KOHYA).items() if "alpha" not in key}
    save_file(big, tmp_path / "big.safetensors")
    assert "too large for fp16" in refused(lambda: run("convert", tmp_path / "big.safetensors", new, "--dtype", "fp16"))
    assert not new.exists()


def test_sample_py_refuses_a_bad_lora_in_one_line_with_status_2(root, tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
    line = [sys.executable, root / "sample.py", "--prompt", "a cat", "--lora", tmp_path / "a.pt"]
    done = subprocess.run(list(map(str, line)), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("sample.py: error: ") and "is pickled" in done.stderr
    assert not (tmp_path / "samples").exists()


def test_a_path_may_have_a_colon(tmp_path):
    path = tmp_path / "a:0.5"
    path.mkdir()
    sd = StableDiffusion.load(TINY)
    (path / "b:2").write_bytes(KOHYA.read_bytes())
    assert cli.scaled_path(str(path / "b:2")) == (str(path / "b:2"), 1.0)
    assert cli.scaled_path(str(path / "b:2:0.25")) == (str(path / "b:2"), 0.25)
    assert cli.scaled_path("c:d") == ("c:d", 1.0) and cli.scaled_path("c:-2") == ("c", -2.0)
    sd.apply_lora(*cli.scaled_path(str(path / "b:2")))
