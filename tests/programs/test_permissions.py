"""What this user may not read, list or write is one line that names it.

Root may read everything, so the tests run in a child without root's rights.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from runs import SMALL, call, photograph

NOBODY = 65534
TRAIN = "train --model official.safetensors --instance-data-dir photographs --output-dir out --max-train-steps 1"
SAMPLE = "sample --model official.safetensors --prompt dog --steps 1 --output-dir out"

# the flags after good ones -> what is said. Folders and files named "dark" are those that nobody may read.
CASES = {
    f"{TRAIN} --instance-data-dir dark": "dark can't be listed: Permission denied",
    f"{TRAIN} --instance-data-dir dark/inner": "dark/inner can't be read: Permission denied",
    f"{TRAIN} --instance-data-dir one_dark": "one_dark/0.png is not for this user to read; chmod gives the permission",
    f"{TRAIN} --class-data-dir dark": "dark can't be listed: Permission denied",
    f"{TRAIN} --class-data-dir dark/inner": "dark/inner can't be read: Permission denied",
    f"{TRAIN} --class-data-dir one_dark": "one_dark/0.png is not for this user to read",
    f"{TRAIN} --class-data-dir dark_manifest": "dark_manifest/manifest.json is not for this user to read",
    f"{TRAIN} --class-data-dir listed": "--class-data-dir listed can't be written",
    f"{TRAIN} --output-dir dark": "--output-dir dark can't be written",
    f"{TRAIN} --output-dir dark/inner": "--output-dir dark/inner can't be written",
    f"{TRAIN} --output-dir unlisted": "unlisted can't be listed: Permission denied",
    f"{TRAIN} --output-dir run --resume-from-checkpoint latest": "run/checkpoints can't be listed: Permission denied",
    f"{TRAIN} --output-dir dark_config --resume-from-checkpoint latest": "dark_config/config.json is not for this user",
    f"{TRAIN} --resume-from-checkpoint dark/inner": "dark/inner can't be read: Permission denied",
    f"{TRAIN} --resume-from-checkpoint dark_state": "dark_state is damaged: state.json is not for this user to read",
    f"{TRAIN} --config dark.toml": "--config dark.toml is not for this user to read",
    f"{TRAIN} --model dark": "dark is not for this user to read; chmod gives the permission",
    f"{TRAIN} --model dark/model.safetensors": "dark/model.safetensors can't be read: Permission denied",
    f"{SAMPLE} --model dark.safetensors": "dark.safetensors is not for this user to read",
    f"{SAMPLE} --model dark.ckpt": "dark.ckpt is not for this user to read",
    f"{SAMPLE} --model dark_unet": "dark_unet/unet/config.json can't be read: Permission denied",
    f"{SAMPLE} --model dark_weights": "dark_weights/unet/diffusion_pytorch_model.safetensors is not for this user",
    f"{SAMPLE} --model dark_tokenizer": "dark_tokenizer/tokenizer/tokenizer.json can't be read: Permission denied",
    f"{SAMPLE} --prompts-file dark.toml": "--prompts-file dark.toml is not for this user to read",
    f"{SAMPLE} --init-image one_dark/0.png": "one_dark/0.png is not for this user to read",
    f"{SAMPLE} --output-dir dark": "--output-dir dark can't be written",
    f"{SAMPLE} --output-dir unlisted": "unlisted can't be listed: Permission denied",
    "ldm weights verify dark.safetensors": "dark.safetensors is not for this user to read",
    "ldm weights inspect dark.safetensors": "dark.safetensors is not for this user to read",
    "ldm weights convert official.safetensors dark/a.safetensors": "output dark can't be written",
    "ldm weights convert official.safetensors dark_unet --overwrite": "can't be listed: Permission denied",
}

CHILD = """
import contextlib, io, json, os, sys
sys.path.insert(0, {root!r})
import ldm.__main__, sample, train
from ldm.runtime import cli
import codecs, torch._dynamo
from PIL import Image
# What is imported late would be imported as nobody, who may not read every folder that Python is installed in.
codecs.lookup("utf-8-sig"), Image.init()
folder, nobody, commands = json.load(sys.stdin)
os.chdir(folder)
os.environ["HOME"] = folder
if os.getuid() == 0:
    os.setgroups([]), os.setresgid(nobody, nobody, nobody), os.setresuid(nobody, nobody, nobody)
programs = {{"train": train.main, "sample": sample.main, "ldm": ldm.__main__.main}}
for command in commands:
    said, status = io.StringIO(), 0
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            with cli.reported(command[0]):
                programs[command[0]](command[1:])
        except SystemExit as end:
            status = end.code
        except BaseException as error:
            status = repr(error)
    print(json.dumps([status, said.getvalue()]), flush=True)
"""


@pytest.fixture(scope="module")
def folder(saved, tmp_path_factory):
    """A folder that all users may enter, with much in it that they may not read."""
    there = Path(tempfile.mkdtemp(prefix="permissions-"))
    shutil.copy(saved["official"], there / "official.safetensors")
    photograph(there / "photographs")
    (there / "dark" / "inner").mkdir(parents=True)
    for name in ("dark.safetensors", "dark.ckpt", "dark.toml"):
        (there / name).write_bytes(b"secret")
    for name in ("one_dark", "listed"):
        shutil.copytree(there / "photographs", there / name)
    for name in ("dark_manifest", "unlisted"):
        (there / name).mkdir()
    (there / "dark_manifest" / "manifest.json").write_text("{}")
    for name in ("dark_unet", "dark_weights", "dark_tokenizer"):
        shutil.copytree(saved["diffusers"], there / name)
    call(*flags(TRAIN, there)[1:], *SMALL, "--output-dir", there / "run", "--checkpointing-steps", 1)
    shutil.copytree(there / "run", there / "dark_config")
    shutil.copytree(there / "run" / "checkpoints" / "checkpoint-000001", there / "dark_state")
    for path in (there, *there.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)
    (there / "listed").chmod(0o444)
    (there / "unlisted").chmod(0o333)
    dark = "dark dark.safetensors dark.ckpt dark.toml one_dark/0.png dark_manifest/manifest.json dark_unet/unet "
    dark += "dark_weights/unet/diffusion_pytorch_model.safetensors dark_tokenizer/tokenizer run/checkpoints "
    dark += "dark_config/config.json dark_state/state.json"
    for name in dark.split():
        (there / name).chmod(0)
    yield there
    for path in (there, *there.rglob("*")):
        path.chmod(0o777)
    shutil.rmtree(there)


def flags(command: str, folder: Path) -> list[str]:
    """The words of a command, its model and photographs as whole paths."""
    words = command.split()
    return [str(folder / word) if word in ("official.safetensors", "photographs") else word for word in words]


@pytest.fixture(scope="module")
def answers(folder, root) -> dict[str, list]:
    """What each command says to a user who may not."""
    small = [word for word in SMALL if not word.startswith("--max-train-steps")]
    commands = [
        [words[0], *(small if words[0] == "train" else []), *words[1:]]
        for words in (command.split() for command in CASES)
    ]
    script = CHILD.format(root=str(root))
    given = json.dumps([str(folder), NOBODY, commands])
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], input=given, env=environment, capture_output=True, text=True, timeout=300
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(CASES), done.stderr
    return dict(zip(CASES, map(json.loads, lines), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("command", CASES)
def test_what_this_user_may_not_do_is_one_line(command, answers):
    status, said = answers[command]
    errors = [line for line in said.splitlines() if "warning: skipped" not in line]
    assert status == 2 and len(errors) == 1, (status, said)
    assert CASES[command] in errors[0] and errors[0].startswith(f"{command.split()[0]}: error: ")
