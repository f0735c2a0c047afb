"""Wrong input ends a program with one line that says what to do, status 2, and no file written."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings
from itertools import cycle
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import slow_after
from safetensors.torch import load_file, save_file

import sample
import train
from ldm import InputError, StableDiffusion
from ldm.errors import MAX_MESSAGE, RunError, one_line
from ldm.runtime import cli

UNET = "unet/diffusion_pytorch_model.safetensors"
SETTINGS = ("unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json")


def listing(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def refused(tmp_path, saved, photographs, monkeypatch, capsys):
    """refused(program, flags, words) runs it with good flags and then these; checks that its error has these words."""
    monkeypatch.chdir(tmp_path)
    for layout, path in saved.items():  # copies that tests may damage
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / layout)
    (tmp_path / "official").rename("official.safetensors")
    good = {
        train: "--model official.safetensors --instance-data-dir photographs --instance-prompt sks --class-prompt dog "
        "--resolution 32 --output-dir out --num-class-images 1 --sample-steps 1 --max-train-steps 1",
        sample: "--model official.safetensors --prompt dog --steps 1 --output-dir out",
    }

    def check(program, flags: str, words: str, without: str = "") -> None:
        argv = [word for word in good[program].split() if word not in without.split()] + flags.split()
        before = listing(tmp_path)
        with pytest.raises(SystemExit) as end, cli.reported(f"{program.__name__}.py"):
            program.main(argv)
        said = capsys.readouterr().err
        assert end.value.code == 2
        assert re.fullmatch(rf"{program.__name__}\.py: error: .*{words}.*\n", said), said
        assert len(said) <= len(f"{program.__name__}.py: ") + MAX_MESSAGE + len("\n")
        assert listing(tmp_path) == before

    return check


MODELS = {
    "nowhere.safetensors": "no such model; give a .safetensors",
    "runwayml/stable-diffusion-v1-5": "name on a model hub: nothing is downloaded",
    "photographs": "not a diffusers folder: it has no model_index.json",
    "notes.txt": "neither a .safetensors",
    "empty.safetensors": "not a whole .safetensors file",
    "short.safetensors": "not a whole .safetensors file",
    "foreign.safetensors": "does not look like Stable Diffusion",
    "fewer.safetensors": "missing tensor model.diffusion_model.out.2.bias",
    "partial": "unet.* is missing; a diffusers folder has it",
    "pipe.safetensors": r"pipe\.safetensors can't be read: it is a pipe, socket or device, and should be a file",
    "pipe.ckpt": r"pipe\.ckpt can't be read: it is a pipe",
    "/dev/zero": "/dev/zero can't be read: it is a pipe, socket or device",
    "list": r"list/model_index\.json does not hold a JSON object",
    "x" * 300: "(no such model; give a|can't be the name of a file)",
}


@pytest.mark.parametrize("program", [train, sample], ids=["train", "sample"])
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model[:60])
def test_a_wrong_model_is_refused(program, model, refused, tmp_path, saved):
    whole = saved["official"].read_bytes()
    (tmp_path / "notes.txt").write_text("my models")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "short.safetensors").write_bytes(whole[: len(whole) // 2])
    save_file({"lora_unet.weight": torch.zeros(3)}, tmp_path / "foreign.safetensors")
    with_metadata(
        lambda tensors: tensors.pop("model.diffusion_model.out.2.bias"), saved, tmp_path / "fewer.safetensors"
    )
    shutil.copytree(tmp_path / "diffusers", tmp_path / "partial")
    shutil.rmtree(tmp_path / "partial" / "unet")
    for name in ("pipe.safetensors", "pipe.ckpt"):
        os.mkfifo(tmp_path / name)
    shutil.copytree(tmp_path / "diffusers", tmp_path / "list")
    (tmp_path / "list" / "model_index.json").write_text("[]")
    refused(program, f"--model {model}", MODELS[model])


def with_metadata(change, saved, path) -> None:
    from safetensors import safe_open

    tensors = load_file(saved["official"])
    change(tensors)
    with safe_open(saved["official"], "pt") as file:
        save_file(tensors, path, file.metadata())


DEEP, LARGE = '{"a": ' * 100_000, "[" + "1, " * 3_000_000 + "1]"


@pytest.mark.parametrize("text", ["{", "[]", "{}", "null", "", "\xff", DEEP, LARGE], ids=lambda text: text[:8])
@pytest.mark.parametrize("name", [*SETTINGS, "tokenizer/vocab.json", "tokenizer/tokenizer_config.json"])
def test_damaged_json_in_a_folder_is_refused(name, text, refused, tmp_path):
    (tmp_path / "diffusers" / name).write_bytes(text.encode("latin1"))
    if name == "tokenizer/tokenizer_config.json" and text == "{}":
        return  # an empty object is allowed
    folder, file = name.split("/")
    refused(sample, "--model diffusers", rf"diffusers/{folder}\b.*")


@pytest.mark.parametrize("name", [*SETTINGS, "model_index.json", "tokenizer/vocab.json", "tokenizer/merges.txt"])
def test_a_pipe_in_a_folder_is_not_opened(name, refused, tmp_path):
    (tmp_path / "diffusers" / name).unlink()
    os.mkfifo(tmp_path / "diffusers" / name)
    refused(sample, "--model diffusers", rf"diffusers/{name} can't be read: it is a pipe, socket or device")


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", slow_after(2, SETTINGS))
def test_no_value_in_a_folders_json_raises_anything_but_an_input_error(name, saved, tmp_path):
    """Whatever value a key has, the folder either makes a picture or is refused."""
    shutil.copytree(saved["diffusers"], tmp_path / "model")
    path = tmp_path / "model" / name
    tree = json.loads(path.read_text())
    nonsense = cycle([None, -1, "x", 0, [[]], 2.5, {}, ["x", "x"], True, [], [0]])
    for key in [*tree, *tree]:
        value = next(nonsense)
        path.write_text(json.dumps(tree | {key: value}))
        try:
            StableDiffusion.load(tmp_path / "model").generate("a", steps=1, output="latent")
        except InputError as error:
            assert "\n" not in str(error), (key, value)
        except Exception as error:
            raise AssertionError(f"{key} {value}: {error!r}") from error


TRAIN = {
    "--instance-data-dir nowhere": "nowhere is not a folder; give the folder of the photographs",
    "--instance-data-dir empty": "empty holds no picture; put the photographs",
    "--instance-data-dir broken": r"broken/cat\.jpg can't be read as a picture .*; repair it or take it away",
    "--class-data-dir broken": r"broken/cat\.jpg can't be read as a picture",
    "--class-data-dir photographs": "--class-data-dir photographs is --instance-data-dir too",
    "--class-data-dir notes.txt": r"--class-data-dir notes\.txt is a file; give a folder",
    "--class-data-dir notes.txt/class": r"--class-data-dir notes\.txt/class can't be written",
    "--class-data-dir cats": "cats was generated with prompt 'cat', and this run has 'dog'; give that --class-prompt",
    "--resolution 30": "height 30 is not a positive multiple of 4 pixels; take 32",
    "--resolution 0": "argument --resolution: 0 is not 1 or more",
    "--resolution 8200": "--resolution 8200 is too much: it should be at most 8192",
    "--num-class-images 1000000000": "--num-class-images 1000000000 is too much: it should be at most 100000",
    "--num-class-images 99999999999": "argument --num-class-images: 99999999999 is not 2147483648 or less",
    "--num-validation-images 1000000000": "--num-validation-images 1000000000 is too much: it should be at most 100",
    "--num-validation-images 90 --resolution 8192": "a sheet of 2 x 90 pictures of 8192 x 8192 pixels is too large",
    "--train-batch-size 5000": "--train-batch-size 5000 is too much: it should be at most 4096",
    "--sample-batch-size 5000": "--sample-batch-size 5000 is too much: it should be at most 4096",
    "--gradient-accumulation-steps 70000": "--gradient-accumulation-steps 70000 is too much: it should be at most",
    "--config many.toml": "--train-batch-size 1000000000 is too much",
    f"--instance-prompt {'a' * 10_001}": "a prompt has 10001 letters, and should have at most 10000: a+ ... a+",
    f"--class-prompt {'a' * 100_000}": "a prompt has 100000 letters, and should have at most 10000: a+ ... a+",
    f"--validation-prompt {'a' * 100_000}": "a prompt has 100000 letters, and should have at most 10000: a+ ... a+",
    "--resolution big": "argument --resolution: big is not a whole number",
    "--sample-steps 0": "argument --sample-steps: 0 is not 1 or more",
    "--sample-steps 1000": "steps must be 1 to 999, not 1000",
    "--sampler magic": "unknown sampler 'magic'; there are .*ddim",
    "--layout zip": "--layout: invalid choice: 'zip'",
    "--learning-rate 0": "--learning-rate 0.0 is not a positive number",
    "--learning-rate nan": "--learning-rate nan is not a positive number",
    "--max-grad-norm -1": "--max-grad-norm -1.0 is not a number from 0",
    "--prior-loss-weight inf": "--prior-loss-weight inf is not a number from 0",
    "--guidance-scale nan": "--guidance-scale nan is not a number",
    "--seed -1": "--seed -1 is",
    "--seed 99999999999999999999": "--seed 99999999999999999999 is",
    "--max-train-steps 1.5": "--max-train-steps: 1.5 is not a whole number",
    "--train-batch-size": "--train-batch-size: expected one argument",
    "--instance-dir photographs": r"--instance-dir: did you mean --instance-data-dir\?",
    "--learnin_rate=1e-4": r"--learnin-rate: did you mean --learning-rate\?",
    "--learning 1e-4": r"--learning: did you mean .*--learning-rate.*\?",  # a prefix is no flag
    "--max-train-steps 5 --no-prior-preservation": r"--no-prior-preservation: .* --no-with-prior-preservation\?",
    "-seed 3": r"-seed: did you mean --seed\?",
    "--seed 3 --lr 1": r"--lr: did you mean --learning-rate or --lora-rank\?",
    "--train-text-encoder true": "true belongs to no flag; --help lists them; text with spaces needs quotes",
    "--output-dir photographs": "--output-dir photographs is not empty; give a new folder",
    "--output-dir notes.txt": r"--output-dir notes\.txt is a file; give a folder",
    "--output-dir notes.txt/run": r"--output-dir notes\.txt/run can't be written",
    "--device hpu": "--device hpu: there is no such device here; try --device cpu",
    "--device tpu9": "--device tpu9: there is no such device here; try --device cpu",
    "--device meta": "--device meta: there is no such device here; try --device cpu",
    "--config nowhere.toml": r"--config nowhere\.toml can't be read",
    "--config empty": "--config empty can't be read",
    "--config notes.txt": r"--config notes\.txt is not TOML",
    "--config unknown.toml": r"unknown\.toml: lr: did you mean learning_rate or lora_rank\?",
    "--config pipe.toml": r"--config pipe\.toml can't be read: it is a pipe, socket or device",
    "--config /dev/zero": "--config /dev/zero can't be read: it is a pipe, socket or device",
    "--config latin.toml": r"--config latin\.toml can't be read: it is not UTF-8 text \(byte 1\)",
    "--config deep.toml": r"--config deep\.toml is (not TOML|damaged): it is nested",
    "--config dots.toml": r"--config dots\.toml is damaged: it is nested over 32 deep",
    "--config large.toml": r"--config large\.toml is too large: it should have at most \d+ bytes",
    "--config digits.toml": r"--config digits\.toml is not TOML: ",
    "--config rate.toml": r"--config rate\.toml: learning_rate is 1000+ \.\.\. 0+, and should be a float",
    "--config nul.toml": r"--class-data-dir a\\x00b can't be the name of a file or folder; a name has at most",
    f"--output-dir {'x' * 300}": "--output-dir x+ can't be the name of a file or folder",
    f"--resume-from-checkpoint {'x' * 300}": "--resume-from-checkpoint x+ can't be the name of a file or folder",
    f"--instance-data-dir {'x/' * 3000}": "--instance-data-dir .* can't be the name of a file or folder",
    "--config kind.toml": r"kind\.toml: resolution is '512', and should be a int",
}


@pytest.mark.parametrize("flags", TRAIN, ids=lambda flags: flags[:60])
def test_train_py_refuses_wrong_flags(flags, refused, tmp_path):
    for name in ("empty", "broken", "cats"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes.txt").write_text("feed the cat")
    (tmp_path / "broken" / "cat.jpg").write_bytes(b"\xff\xd8\xff and then the card was full")
    Image.new("RGB", (32, 32)).save(tmp_path / "broken" / "dog.png")
    recipe = {"prompt": "cat", "sampler": "ddim", "steps": 50, "guidance_scale": 7.5, "resolution": 32}
    made = recipe | {"prediction": "eps", "model": "", "seed": 0, "pictures": {}}
    (tmp_path / "cats" / "manifest.json").write_text(json.dumps(made))
    (tmp_path / "unknown.toml").write_text("lr = 1e-6")
    (tmp_path / "kind.toml").write_text('resolution = "512"')
    (tmp_path / "many.toml").write_text("train_batch_size = 1000000000")
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "latin.toml").write_bytes(b"#\xe9")
    (tmp_path / "deep.toml").write_text("a = " + "[" * 100_000)
    (tmp_path / "dots.toml").write_text(".".join("a" * 1000) + " = 1")
    (tmp_path / "large.toml").write_text("#" * 10_000_000)
    (tmp_path / "digits.toml").write_text("seed = " + "9" * 5000)
    (tmp_path / "rate.toml").write_text("learning_rate = 1" + "0" * 999)
    (tmp_path / "nul.toml").write_text(r'class_data_dir = "a\u0000b"')
    refused(train, flags, TRAIN[flags])


@pytest.mark.parametrize(
    "without, words",
    [
        ("--class-prompt dog", "--class-prompt is missing .*; or give --no-with-prior-preservation"),
        ("--instance-prompt sks", "--instance-prompt is missing"),
        ("--instance-data-dir photographs", "--instance-data-dir is missing"),
    ],
)
def test_train_py_names_missing_flags(without, words, refused):
    refused(train, "", words, without)


SAMPLE = {
    "--steps 0": "steps must be 1 to 999, not 0",
    "--steps 1000": "steps must be 1 to 999, not 1000",
    "--steps 2.5": "--steps: invalid int value: '2.5'",
    "--sampler magic": "unknown sampler 'magic'; there are .*ddim",
    "--eta 2": "--eta 2.0 is not between 0 and 1",
    "--strength 3": "--strength 3.0 is not between 0",
    "--guidance-scale inf": "--guidance-scale inf is not a number",
    "--height 30": "height 30 is not a positive multiple of 4 pixels; take 32",
    "--width 0": "width 0 is not a positive multiple of 4 pixels; take 4",
    "--width -8": "width -8 is not a positive multiple",
    "--width 8200": "--width 8200 is too much: it should be at most 8192 pixels",
    "--height 1000000000": "--height 1000000000 is too much: it should be at most 8192 pixels",
    "--num-images 1000000000": "1000000000 pictures are too many: at most 100000 are made in one call; lower --num-im",
    "--num-images 90 --grid --height 4096 --width 4096": "a sheet of 1 x 90 pictures of 4096 x 4096 pixels is too larg",
    "--batch-size 5000": "--batch-size 5000 is too much: it should be at most 4096",
    "--prompts-file million.txt": "a prompt has 1000000 letters, and should have at most 10000: a+ ... a+",
    "--prompts-file lines.txt": "100001 pictures are too many: at most 100000 are made in one call",
    f"--negative-prompt {'a' * 10_001}": "a prompt has 10001 letters",
    "--num-images 0": "--num-images: 0 is not 1 or more",
    "--seed -1": "--seed -1 is not a whole number from 0",
    "--dtype fp64": "--dtype: invalid choice: 'fp64'",
    "--colour red": "--colour: there is no such flag; --help lists them",
    "--num-image 2": r"--num-image: did you mean --num-images\?",
    "a cat": "a cat belongs to no flag; --help lists them",
    "--prompts-file nowhere.txt": r"--prompts-file nowhere\.txt can't be read",
    "--prompts-file photographs": "--prompts-file photographs can't be read",
    "--prompts-file photographs/0.png": r"--prompts-file photographs/0\.png can't be read",
    "--prompts-file pipe": "--prompts-file pipe can't be read: it is a pipe, socket or device",
    "--prompts-file /dev/zero": "--prompts-file /dev/zero can't be read: it is a pipe, socket or device",
    "--prompts-file large.txt": r"--prompts-file large\.txt is too large: it should have at most \d+ bytes",
    "--init-image pipe": "pipe can't be read: it is a pipe, socket or device",
    "--init-image /dev/zero": "/dev/zero can't be read: it is a pipe, socket or device",
    f"--output-dir {'x' * 300}": "--output-dir x+ can't be the name of a file or folder",
    "--output-dir official.safetensors": r"--output-dir official\.safetensors is a file; give a folder",
    "--output-dir official.safetensors/out": "--output-dir .* can't be written",
    "--device cuda:99": "--device cuda:99: there is no such device here; try --device cpu",
}


@pytest.mark.parametrize("flags", SAMPLE, ids=lambda flags: flags[:60])
def test_sample_py_refuses_wrong_flags(flags, refused, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "million.txt").write_text("a" * 1_000_000)
    (tmp_path / "lines.txt").write_text("a\n" * 100_000)
    (tmp_path / "large.txt").write_text("a cat\n" * 2_000_000)
    refused(sample, flags, SAMPLE[flags])


def test_sample_py_without_a_prompt_is_refused(refused, tmp_path):
    refused(sample, "", 'nothing to show: give --prompt "a photo of a cat", or --prompts-file', "--prompt dog")
    (tmp_path / "prompts.txt").write_text("\n  \n")
    refused(sample, "--prompts-file prompts.txt", "nothing to show: give --prompt", "--prompt dog")


@pytest.mark.slow
@pytest.mark.parametrize(
    "command, words",
    [
        (["train.py", "--model", "CompVis/stable-diffusion-v1-4"], "nothing is downloaded by this program"),
        (["sample.py", "--prompt", "a\nb", "--model", "two\nlines"], "no such model"),
    ],
)
def test_the_programs_print_one_line_and_end_with_status_2(command, words, root, photographs, tmp_path):
    argv = [sys.executable, str(root / command[0]), *command[1:]]
    if command[0] == "train.py":
        argv += ["--instance-data-dir", photographs, "--instance-prompt", "sks", "--class-prompt", "dog"]
    before = listing(tmp_path)
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1 and words in done.stderr
    assert listing(tmp_path) == before


@pytest.mark.parametrize("kind", [InputError, RunError])
def test_a_message_is_one_line_of_500_printable_letters_with_its_start_and_its_end(kind):
    assert str(kind("path: wrong; give another")) == "path: wrong; give another"
    assert str(kind("two\nlines\r\nand \x1b[31mred\0 \udc80")) == r"two lines and \x1b[31mred\x00 \udc80"
    for middle in ("x" * 10_000, "\0" * 10_000, "\n" * 10_000, "\U000e0001" * 10_000, "é" * 10_000):
        message = str(kind(f"path: {middle}; give another"))
        assert message.startswith("path: ") and message.endswith("; give another")
        assert len(message) <= MAX_MESSAGE and message.isprintable()
        assert one_line(message) == message  # another process that passes it on changes nothing
        assert str(pickle.loads(pickle.dumps(kind(message)))) == message


def test_a_warning_is_printed_as_one_such_line(capsys):
    with cli.reported("sample.py"):
        warnings.warn("about\n" + "x" * 10_000 + "\x1b; do this", stacklevel=1)
    said = capsys.readouterr().err
    assert said.startswith("sample.py: warning: about x") and said.endswith("\\x1b; do this\n") and len(said) < 520
