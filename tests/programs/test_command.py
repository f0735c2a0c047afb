"""The output and the one-line errors of python -m ldm weights inspect|convert|verify."""

import hashlib
import re
import subprocess
import sys

import pytest
import torch
from runs import slow_after
from safetensors.torch import load_file, save_file

from ldm import InputError, StableDiffusion, __main__


@pytest.fixture
def run(capsys):
    """run(words...) runs the command. Returns the lines that it prints."""

    def call(*words) -> list[str]:
        __main__.main(["weights", *map(str, words)])
        return capsys.readouterr().out.splitlines()

    return call


@pytest.fixture
def file(narrow, tmp_path):
    """An official file of SD1 with EMA weights of its UNet and without metadata."""
    narrow("sd1").save(tmp_path / "saved.safetensors")
    tensors = {name: tensor.clone() for name, tensor in load_file(tmp_path / "saved.safetensors").items()}
    for name in [name for name in tensors if name.startswith("model.diffusion_model.")]:
        tensors["model_ema." + name.removeprefix("model.").replace(".", "")] = tensors[name] * 2
    save_file(tensors, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def test_inspect_describes_a_model(run, file, narrow):
    sd = narrow("sd1")
    counts = [sum(p.numel() for p in network.parameters()) for network in sd.networks().values()]
    assert run("inspect", file) == [
        f"{file}: Stable Diffusion 1, official single file, float32, predicts eps (SD 1.x always does)",
        f"UNet: {counts[0]:,} parameters in 686 tensors",
        f"autoencoder: {counts[1]:,} parameters in 248 tensors",
        f"text encoder: {counts[2]:,} parameters in {2 + 2 * 16 + 2} tensors",
        "EMA weights: yes; tensors carried along: 13",
        "complete: every tensor is there with its shape, and all numbers are finite",
    ]
    sd.save(file.parent / "folder", "diffusers", torch.bfloat16)
    lines = run("inspect", file.parent / "folder")
    assert lines[0].endswith("Stable Diffusion 1, diffusers folder, bfloat16, predicts eps (the scheduler's JSON)")
    assert lines[-2:] == [
        "EMA weights: no; tensors carried along: 0",
        "complete: every tensor is there with its shape, and all numbers are finite",
    ]


def test_inspect_names_missing_unknown_and_misshapen_tensors_and_fails(run, file, capsys):
    tensors = load_file(file)
    del tensors["model.diffusion_model.out.2.bias"]
    tensors["first_stage_model.decoder.conv_in.bias"] = torch.zeros(3)
    tensors["cond_stage_model.transformer.adapter.weight"] = torch.zeros(3)
    damaged = file.with_name("damaged.safetensors")
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, damaged)
    with pytest.raises(SystemExit) as end:
        run("inspect", damaged)
    assert end.value.code == 1
    assert capsys.readouterr().out.splitlines()[-4:] == [
        "missing tensor model.diffusion_model.out.2.bias",
        "unknown tensor cond_stage_model.transformer.adapter.weight",
        "first_stage_model.decoder.conv_in.bias is (3,), and should be (24,)",
        "3 problems",
    ]


@pytest.mark.slow
def test_convert_writes_a_folder_and_back_in_the_requested_type(run, file, narrow):
    folder, back = file.parent / "folder", file.parent / "back.safetensors"
    lines = run("convert", file, folder, "--dtype", "fp16")
    assert lines[0].endswith("predicts eps (SD 1.x always does)") and lines[1] == f"wrote {folder}"
    assert lines[2:] == ["not in it: 686 EMA tensors, alphas_cumprod, alphas_cumprod_prev, betas and 10 more"]
    assert run("convert", folder, back) == [
        f"{folder}: Stable Diffusion 1, diffusers folder, float16, predicts eps (the scheduler's JSON)",
        f"wrote {back}",
    ]
    expected = narrow("sd1").state()
    found = StableDiffusion.load(back, dtype=None).state()
    assert all(torch.equal(found[name], tensor.half()) for name, tensor in expected.items())
    assert run("convert", file, back, "--ema", "--overwrite")[1:] == [f"wrote {back}"]
    found = StableDiffusion.load(back, dtype=None).state()
    assert all(torch.equal(found[k], t * 2 if k.startswith("model.") else t) for k, t in expected.items())
    assert run("convert", file, back, "--overwrite")[1:] == [f"wrote {back}", "not in it: 686 EMA tensors"]


@pytest.mark.parametrize("name", ["a.ckpt", "a.bin", "a.pt"])
def test_convert_writes_no_pickles(name, run, file):
    with pytest.raises(InputError, match="pickled files are read, never written"):
        run("convert", file, file.with_name(name))
    assert not file.with_name(name).exists()


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_convert_replaces_nothing_without_overwrite(run, file):
    folder, copy, mine = file.parent / "folder", file.parent / "copy.safetensors", file.parent / "mine.safetensors"
    run("convert", file, folder), run("convert", file, copy)
    mine.write_bytes(b"years of work")
    (file.parent / "gone.safetensors").symlink_to("nowhere")
    before = contents(file.parent)
    for output in (folder, copy, mine, file, file.parent / "gone.safetensors"):
        with pytest.raises(InputError, match=f"{output} is there already; give a new name, or --overwrite to replace"):
            run("convert", file, output)
    assert contents(file.parent) == before
    run("convert", file, mine, "--overwrite"), run("convert", file, folder, "--overwrite")
    assert contents(file.parent) == before | {mine: copy.read_bytes()}
    (file.parent / "empty").mkdir()
    run("convert", file, file.parent / "empty")
    assert len(contents(file.parent / "empty")) == len(contents(folder))


@pytest.mark.parametrize(
    "name", slow_after(2, ["thesis.txt", "unet/notes.txt", "safety_checker/a.bin", "unet/a.fp16.safetensors"])
)
@pytest.mark.parametrize("flags", [(), ("--overwrite",)], ids=["", "overwrite"])
def test_convert_deletes_no_file_that_it_does_not_write(name, flags, run, file):
    folder = file.parent / "folder"
    run("convert", file, folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"years of work")
    before = contents(file.parent)
    said = f"other things in it, {name} for one; give a new name" if flags else "is there already"
    with pytest.raises(InputError, match=said):
        run("convert", file, folder, *flags)
    assert contents(file.parent) == before


def test_convert_deletes_no_empty_folder_and_no_link(run, file):
    folder = file.parent / "folder"
    run("convert", file, folder)
    (folder / "plans").mkdir()
    with pytest.raises(InputError, match="other things in it, plans for one"):
        run("convert", file, folder, "--overwrite")
    (folder / "plans").rmdir()
    (folder / "plans").symlink_to(file.parent)
    with pytest.raises(InputError, match="other things in it, plans for one"):
        run("convert", file, folder, "--overwrite")
    assert (folder / "plans").is_symlink() and file.exists()


def test_verify_recognises_the_official_files_by_their_hash(run, tmp_path, monkeypatch):
    file = tmp_path / "download.safetensors"
    file.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    with pytest.raises(InputError, match=f"SHA-256 {digest} is none of the official files in .*SHA256SUMS"):
        run("verify", file)
    sums = tmp_path / "SHA256SUMS"
    sums.write_text(f"# a comment\n{'0' * 64}  other.ckpt\n{digest}  v1-5.safetensors\n")
    monkeypatch.setattr(__main__, "OFFICIAL_SUMS", sums)
    assert run("verify", file) == [f"{file} is v1-5.safetensors (SHA-256 {digest})"]
    with pytest.raises(InputError, match="is no file; verify takes the official single files"):
        run("verify", tmp_path)
    sums.unlink()
    with pytest.raises(InputError, match=r"SHA256SUMS can't be read: No such file"):
        run("verify", file)


def test_a_file_that_this_user_may_not_read_is_refused_in_one_line(run, file, narrow, monkeypatch):
    narrow("sd1").save(file.parent / "folder", "diffusers")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    for path in (file, file.parent / "folder"):
        with pytest.raises(InputError, match=f"{path} is not for this user to read; chmod gives the permission"):
            run("inspect", path)


def test_the_list_of_hashes_has_the_format_of_sha256sum():
    lines = [line for line in __main__.OFFICIAL_SUMS.read_text().splitlines() if not line.startswith("#")]
    assert len(lines) == 14 and all(re.fullmatch(r"[0-9a-f]{64}  [\w.-]+\.(ckpt|safetensors)", line) for line in lines)
    assert len({line[:64] for line in lines}) == len({line[66:] for line in lines}) == 14


@pytest.mark.slow
def test_a_mistake_gives_one_line_and_status_2(tmp_path, root):
    (tmp_path / "a.safetensors").write_bytes(b"\0" * 99)
    for words, said in (
        (["inspect", tmp_path / "nothing.ckpt"], "no such model; give a .safetensors or .ckpt file"),
        (
            ["inspect", "runwayml/stable-diffusion-v1-5"],
            "fetch the model first (weights/README.md says what and where)",
        ),
        (["inspect", tmp_path / "a.safetensors"], "is not a whole .safetensors file"),
        (["convert", tmp_path / "a.safetensors"], "the following arguments are required: output"),
        (
            ["inspect", tmp_path / "a.safetensors", "--variant", "fp16"],
            "is one file, and variant fp16 is for diffusers folders",
        ),
        (["verify"], "the following arguments are required: path"),
        (["paint"], "invalid choice: 'paint'"),
    ):
        command = [sys.executable, "-m", "ldm", "weights", *map(str, words)]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
        assert done.returncode == 2 and done.stdout == "", words
        assert len(done.stderr.splitlines()) == 1 and said in done.stderr, done.stderr
        assert done.stderr.startswith("python -m ldm: error: ")
