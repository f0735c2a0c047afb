"""A run loses nothing when its terminal, its inputs or its disk fail, or when other runs work beside it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import (
    LATEST,
    LORA,
    PROCESS,
    ROOT,
    SMALL,
    call,
    check_same,
    checkpoints,
    command,
    finish,
    leftovers,
    losses,
    metrics,
    photograph,
    refused,
    result,
    run,
    slow_after,
    start,
    until,
)

import train
from ldm import StableDiffusion
from ldm.clip import TextEncoder
from ldm.config import ModelConfig
from ldm.runtime import Stop, Stopped
from ldm.training import TrainingState, class_pictures, parse, tuning_of
from ldm.training.claim import DEFAULT
from ldm.training.precision import Precision

STEPS = ("--max-train-steps", 30, "--checkpointing-steps", 100)


@pytest.fixture(scope="module", params=[(), pytest.param(LORA, marks=pytest.mark.slow)], ids=["full", "lora"])
def base(request, saved, tmp_path_factory) -> tuple:
    folder = photograph(tmp_path_factory.mktemp("a") / "b")
    return ("--model", saved["official"], "--instance-data-dir", folder, *SMALL, *request.param)


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory) -> Path:
    """The folder of a run without any fault. Tests must not write to it."""
    folder = tmp_path_factory.mktemp("run")
    run(command([*base, *STEPS, "--output-dir", folder / "whole"]), folder)
    return folder / "whole"


def shell(line: str, folder: Path, status: int | None = 0) -> str:
    """Runs a line of bash to its end. Returns its output."""
    done = subprocess.run(["bash", "-c", line], cwd=folder, env=os.environ | PROCESS, capture_output=True, text=True)
    assert status is None or done.returncode == status, done.stderr
    return done.stdout + done.stderr


def quoted(words: list) -> str:
    return " ".join(f"'{word}'" for word in map(str, words))


# The last step


@pytest.mark.slow
def test_a_run_killed_after_its_last_step_can_be_finished(base, whole, tmp_path):
    """A kill between the last step and the final model leaves only the checkpoint."""
    assert checkpoints(whole) == [30]
    folder = shutil.copytree(whole, tmp_path / "killed")
    result(folder).unlink()
    for name in ("after", "before_after"):
        (folder / "sheets" / f"{name}.png").unlink()
    run(command([*base, *STEPS, "--output-dir", folder, *LATEST]), tmp_path)
    check_same(whole, folder)
    assert leftovers(folder) == []


# Output that nobody reads


WATCHERS = {
    "head": "{line} 2>&1 | head -1",
    "a closed stdout and stderr": "{line} >&- 2>&-",
    "a closed stderr": "{line} 2>&-",
    "a full disk under the log": "{line} >/dev/full 2>&1",
    "ascii": "PYTHONIOENCODING=ascii {line}",
}


@pytest.mark.parametrize("watcher", slow_after(0, WATCHERS))
def test_a_run_does_not_depend_on_its_output_streams(watcher, base, whole, tmp_path):
    line = command([*base, *STEPS, "--output-dir", tmp_path / "run"])
    shell(WATCHERS[watcher].format(line=quoted(line)), tmp_path, status=None)
    check_same(whole, tmp_path / "run")
    assert leftovers(tmp_path / "run") == []
    notes = [note for line in metrics(tmp_path / "run") for note in line.get("not_shown", ())]
    assert bool(notes) == (watcher != "ascii")


@pytest.mark.slow
def test_two_processes_do_not_depend_on_their_output_streams(base, tmp_path):
    line = command([*base, *STEPS, "--output-dir", tmp_path / "run"], 2)
    shell(f"{quoted(line)} >/dev/full 2>&1", tmp_path, status=None)
    assert len(losses(tmp_path / "run")) == 30 and result(tmp_path / "run")


@pytest.mark.slow
def test_a_closed_terminal_stops_the_run_with_its_step_saved(base, whole, tmp_path):
    folder = tmp_path / "run"
    process = start(command([*base, *STEPS, "--output-dir", folder]), tmp_path)
    until(lambda: (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").read_bytes(), process)
    process.send_signal(signal.SIGHUP)
    done = finish(process, tmp_path)
    assert done.status == 0 and "stopped after step" in done.out
    step = checkpoints(folder)[-1]
    assert step < 30
    run(command([*base, *STEPS, "--output-dir", folder, *LATEST]), tmp_path)
    check_same(whole, folder)


@pytest.mark.slow
def test_a_run_under_nohup_ignores_a_closed_terminal(base, whole, tmp_path):
    folder = tmp_path / "run"
    process = start(["nohup", *command([*base, *STEPS, "--output-dir", folder])], tmp_path)
    until(lambda: (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").read_bytes(), process)
    process.send_signal(signal.SIGHUP)
    assert finish(process, tmp_path).status == 0
    check_same(whole, folder)


@pytest.mark.slow
def test_a_run_goes_on_without_a_tracker_that_fails(base, whole, tmp_path):
    """The tracker's folder disappears and can't be created again."""
    pytest.importorskip("tensorboard", reason="needs the tracking extra")
    folder = tmp_path / "run"
    process = start(command([*base, *STEPS, "--report-to", "tensorboard", "--output-dir", folder]), tmp_path)
    until(lambda: (folder / "tensorboard").exists(), process)
    shutil.rmtree(folder / "tensorboard")
    (folder / "tensorboard").write_text("no folder")
    assert finish(process, tmp_path).status == 0
    check_same(whole, folder)


# Inputs that change


@pytest.mark.slow
def test_truncating_the_base_model_during_training_changes_nothing(base, saved, whole, tmp_path):
    """A file that is mapped into memory would end the process without a message when its missing part is read."""
    model, folder = shutil.copy(saved["official"], tmp_path / "base.safetensors"), tmp_path / "run"
    process = start(command([*base, "--model", model, *STEPS, "--output-dir", folder]), tmp_path)
    until(lambda: (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").read_bytes(), process)
    os.truncate(model, 100)
    assert finish(process, tmp_path).status == 0
    check_same(whole, folder)


@pytest.mark.slow
def test_class_pictures_that_change_between_stop_and_resume_are_named(base, tmp_path):
    folder = tmp_path / "run"
    run(command([*base, "--max-train-steps", 2, "--output-dir", folder]), tmp_path)
    picture = folder / "class" / "class-00002.png"
    content = picture.read_bytes()
    shutil.copy(folder / "class" / "class-00001.png", picture)
    message = refused(*base, "--max-train-steps", 4, "--output-dir", folder, *LATEST)
    assert message.endswith("belongs to another run: class picture class-00002.png has changed")
    picture.unlink()  # the picture is made again with the same bits
    run(command([*base, "--max-train-steps", 4, "--output-dir", folder, *LATEST]), tmp_path)
    assert picture.read_bytes() == content and len(losses(folder)) == 4


def test_an_autoencoder_that_makes_nan_is_refused(random_model, base, tmp_path):
    sd = random_model()
    for layer in (sd.vae.encoder.conv_out, sd.vae.quant_conv):
        layer.weight.data.mul_(1e30)
    sd.save(tmp_path / "wide.safetensors")
    flags = ("--model", tmp_path / "wide.safetensors", "--no-with-prior-preservation", "--output-dir", tmp_path / "run")
    assert "the model's autoencoder makes NaN or infinity of" in refused(*base, *flags)


# Two runs at once


@pytest.mark.slow
def test_runs_without_output_dir_take_different_folders(base, tmp_path):
    flags = [*base, "--no-with-prior-preservation", "--max-train-steps", 2]
    lines = [command(flags) for _ in range(3)]
    environment = os.environ | PROCESS
    processes = [subprocess.Popen(line, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL) for line in lines]
    assert [process.wait(100) for process in processes] == [0, 0, 0]
    made = sorted(path.name for path in (tmp_path / DEFAULT.parent).iterdir())
    assert made == ["dreambooth", "dreambooth-2", "dreambooth-3"]
    for name in made:
        assert len(losses(tmp_path / DEFAULT.parent / name)) == 2


def test_a_refused_run_leaves_no_numbered_folder(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    refused(*base, "--model", "nowhere.safetensors")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_two_runs_can_fill_one_class_folder(base, tmp_path):
    """Every picture is whole and equals the picture that a single run makes."""
    flags = [*base, "--num-class-images", 24, "--sample-steps", 4, "--max-train-steps", 2]
    run(command([*flags, "--class-data-dir", tmp_path / "alone", "--output-dir", tmp_path / "0"]), tmp_path)
    lines = [command([*flags, "--class-data-dir", tmp_path / "class", "--output-dir", tmp_path / n]) for n in "12"]
    processes = [start(line, tmp_path / f"log{i}") for i, line in enumerate(lines)]
    for i, process in enumerate(processes):
        done = finish(process, tmp_path / f"log{i}")
        assert done.status == 0, done.err
    alone, shared = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("alone", "class"))
    assert shared == alone
    assert losses(tmp_path / "1") == losses(tmp_path / "2") == losses(tmp_path / "0")


@pytest.mark.slow
def test_a_class_folder_that_another_run_fills_differently_is_refused(base, tmp_path):
    flags = [*base, "--class-data-dir", tmp_path / "class", "--max-train-steps", 1]
    run(command([*flags, "--output-dir", tmp_path / "1"]), tmp_path)
    manifest = json.loads((tmp_path / "class" / "manifest.json").read_text())
    assert "was generated with seed 0" in refused(*flags, "--seed", 1, "--output-dir", tmp_path / "2")
    assert json.loads((tmp_path / "class" / "manifest.json").read_text()) == manifest


# Signals


def two_seconds() -> float:
    """Of a machine whose cores are idle; longer where other processes share them."""
    return 2.0 * max(1.0, os.getloadavg()[0] / os.cpu_count())


PHASES = {
    "the import": lambda folder: True,
    "the sheet": lambda folder: "sheet before" in (folder / "err.txt").read_text(),
    "class pictures": lambda folder: "class pictures" in (folder / "err.txt").read_text(),
    "training": lambda folder: "training:" in (folder / "err.txt").read_text(),
    "the last sheet": lambda folder: "sheet after" in (folder / "err.txt").read_text(),
}
LONG = {
    "the import": (),
    "the sheet": ("--sample-steps", 400, "--num-validation-images", 40),
    "class pictures": ("--sample-steps", 400, "--num-class-images", 40),
    "training": (),
    "the last sheet": ("--sample-steps", 200, "--num-validation-images", 8, "--max-train-steps", 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_ends_every_phase_within_two_seconds(phase, name, base, tmp_path):
    """The end is clean: no traceback and no half-written file. Five signals have the effect of one."""
    flags = [*base, "--max-train-steps", 10**6, *LONG[phase], "--output-dir", tmp_path / "run"]
    process = start(command(flags), tmp_path)
    if phase == "the import":
        time.sleep(0.7)
    until(lambda: PHASES[phase](tmp_path), process)
    began = time.monotonic()
    for _ in range(5 if name != "SIGINT" else 1):
        process.send_signal(getattr(signal, name))
    done = finish(process, tmp_path)
    assert time.monotonic() - began < two_seconds()
    assert "Traceback" not in done.err
    if phase != "the import":
        assert done.status == 0 and "stopped" in done.out, done.err
        assert leftovers(tmp_path / "run") == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_ends_sample_py_and_every_picture_is_whole(name, saved, tmp_path):
    flags = ["--model", saved["official"], "--prompt", "a dog", "--num-images", 1000, "--batch-size", 2, "--steps", 4]
    process = start(command([*flags, "--output-dir", tmp_path / "out"], script="sample.py"), tmp_path)
    until(lambda: (tmp_path / "out").is_dir() and len(list((tmp_path / "out").glob("*.png"))) > 4, process)
    began = time.monotonic()
    process.send_signal(getattr(signal, name))
    done = finish(process, tmp_path)
    assert time.monotonic() - began < two_seconds() and done.status == 130 and "Traceback" not in done.err
    assert "stopped; the pictures that were complete are in" in done.out
    names = [path.name for path in (tmp_path / "out").iterdir()]
    assert not [name for name in names if name.startswith(".")]
    assert all((tmp_path / "out" / name).stat().st_size > 100 for name in names)


# How a program is started


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, and RANK is not set: start with torchrun, or unset WORLD_SIZE"),
        ({"WORLD_SIZE": "two"}, "the environment variable WORLD_SIZE is 'two', and should be a number"),
    ],
)
def test_an_incomplete_environment_of_torchrun_is_refused(environment, words, base, tmp_path):
    done = run(command([*base, "--output-dir", tmp_path / "run"]), tmp_path, status=2, **environment)
    assert words in done.complaint and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_link_to_train_py_trains(base, root, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "train").symlink_to(root / "train.py")
    line = [sys.executable, str(tmp_path / "bin" / "train"), "--num-class-images", "0"]
    done = run(line, tmp_path, status=2)
    assert "--num-class-images" in done.err and "Traceback" not in done.err  # it has found its own settings


# What a review found


@pytest.mark.slow
def test_three_processes_resume_to_the_same_bits(base, tmp_path):
    """With three, unlike two, the order in which gradients are summed matters."""
    flags = [*base, "--max-train-steps", 6, "--checkpointing-steps", 3]
    run(command([*flags, "--output-dir", tmp_path / "whole"], 3), tmp_path)
    run(command([*flags, "--max-train-steps", 3, "--output-dir", tmp_path / "parts"], 3), tmp_path)
    run(command([*flags, "--output-dir", tmp_path / "parts", *LATEST], 3), tmp_path)
    check_same(tmp_path / "whole", tmp_path / "parts")


ENDS = """
import atexit, os, sys, time
from ldm.runtime import processes

class Abort:
    def __del__(self):
        os.abort()  # as a thread of gloo may do while the interpreter ends

world = processes.start("cpu")
abort = Abort()
atexit.register(lambda: open(f"{sys.argv[1]}/{world.rank}", "x").close())
world.close()
"""


@pytest.mark.slow
def test_an_abort_at_the_very_end_does_not_fail_a_finished_run_of_two_processes(tmp_path):
    """What waits for the exit of Python, as trackers do, is still called."""
    script = tmp_path / "ends.py"
    script.write_text(ENDS)
    run(command([tmp_path], 2, script=script), tmp_path, PYTHONPATH=str(ROOT))
    assert (tmp_path / "0").exists() and (tmp_path / "1").exists()


def test_a_signal_is_not_taken_for_a_damaged_file(saved, monkeypatch):
    """While a file is read, what a damaged one raises is an InputError; a signal is not."""
    stop = Stop()

    def stopped(*_):
        with stop.at_once():
            stop._note(signal.SIGTERM, None)

    monkeypatch.setattr(ModelConfig, "check_fits", stopped)
    with pytest.raises(Stopped):
        StableDiffusion.load(saved["official"])


@pytest.mark.parametrize("layout", ["official", "diffusers"])
@pytest.mark.parametrize("openclip", [False, True])
def test_a_checkpoint_is_no_larger_than_the_space_kept_for_it(layout, openclip, saved, base, random_model, tmp_path):
    model = saved[layout]
    if openclip:
        sd = random_model()
        sd.config = replace(sd.config, text=replace(sd.config.text, activation="gelu", pad_id=0))
        sd.text_encoder = TextEncoder(sd.config.text)
        sd.save(model := tmp_path / "sd2.safetensors")
    flags = parse([str(w) for w in (*base, "--model", model, "--use-ema", "--output-dir", tmp_path / "x")], train.TINY)
    trainable = tuning_of(StableDiffusion.load(model), flags)
    state = TrainingState(trainable, flags, Precision("no", torch.device("cpu")), "")
    call(*base, "--model", model, "--use-ema", "--max-train-steps", 3, "--output-dir", tmp_path / "run")
    files = (tmp_path / "run" / "checkpoints" / "checkpoint-000003").iterdir()
    assert sum(path.stat().st_size for path in files) <= state.bytes_saved


def test_files_of_the_users_stay_in_a_class_folder(base, tmp_path):
    folder = tmp_path / "class"
    folder.mkdir()
    mine = [".upload.tmp", ".draft.psd.tmp", ".a.png.host-1.tmp"]
    for name in mine:
        (folder / name).write_bytes(b"mine")
    (folder / ".class-00001.png.tmp").write_bytes(b"half a picture")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for pid in (ended.pid, 10**20):
        (folder / f".class-00002.png.{socket.gethostname()}-{pid}.tmp").write_bytes(b"half a picture")
    mine.append(f".class-00003.png.{socket.gethostname()}-{os.getppid()}.tmp")  # of a process that runs
    (folder / mine[-1]).write_bytes(b"half a picture")
    call(*base, "--max-train-steps", 1, "--class-data-dir", folder, "--output-dir", tmp_path / "run")
    assert {path.name for path in folder.iterdir() if path.name.startswith(".")} == set(mine)


def test_a_run_goes_on_where_the_system_can_t_keep_space(base, tmp_path, monkeypatch):
    """As on macOS."""
    monkeypatch.delattr(os, "posix_fallocate")
    call(*base, "--max-train-steps", 2, "--checkpointing-steps", 1, "--output-dir", tmp_path / "run")
    assert checkpoints(tmp_path / "run")[-1] == 2


def test_a_picture_that_another_run_has_made_stays(random_model, tmp_path):
    """Only the recipe decides which pictures a folder holds, so a run of another precision finds them, too."""
    path = tmp_path / "class-00000.png"
    class_pictures._write(path, b"the first")
    class_pictures._write(path, b"the second")
    assert path.read_bytes() == b"the first" and list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_a_signal_to_all_processes_of_a_loader_finishes_the_step(base, tmp_path):
    folder = tmp_path / "run"
    line = ["setsid", *command([*base, "--random-crop", "--max-train-steps", 10**6, "--output-dir", folder])]
    process = start(line, tmp_path)
    until(lambda: (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").read_bytes(), process)
    os.killpg(os.getpgid(process.pid), signal.SIGTERM)
    done = finish(process, tmp_path)
    assert done.status == 0 and "stopped after step" in done.out and "Traceback" not in done.err, done.err


@pytest.mark.slow
def test_processes_with_other_photographs_are_refused(base, tmp_path):
    other = photograph(tmp_path / "other", [(32, 32)])
    script = tmp_path / "by_rank.py"
    script.write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train\nfrom ldm.runtime import cli\n"
        f"more = ['--instance-data-dir', {str(other)!r}] if os.environ['RANK'] == '1' else []\n"
        "with cli.reported('train.py'):\n    train.main(sys.argv[1:] + more)\n"
    )
    line = command([*base, "--output-dir", tmp_path / "run"], 2)
    line[line.index(str(ROOT / "train.py"))] = str(script)
    done = run(line, tmp_path, status=1)
    assert "is not as in the main process; give all processes the same input" in done.err
    assert not (tmp_path / "run").exists()
