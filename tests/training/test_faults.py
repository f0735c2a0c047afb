"""A run survives the faults of real machines: signals, kills, full and read-only disks, two runs in one folder."""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import (
    LATEST,
    LORA,
    SMALL,
    check_same,
    checkpoints,
    children,
    command,
    finish,
    leftovers,
    losses,
    refused,
    run,
    send,
    start,
    until,
)

from ldm.training import checkpoint

PLAIN = ("--no-with-prior-preservation", "--no-train-text-encoder")


@pytest.fixture(params=[(), pytest.param(LORA, marks=pytest.mark.slow)], ids=["full", "lora"])
def base(request, saved, photographs) -> tuple:
    return ("--model", saved["official"], "--instance-data-dir", photographs, *SMALL, *request.param)


def logged(run: Path) -> int:
    """The number of steps that a run has logged so far."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


# Signals


def stopped(base, folder: Path, name: str, to: str, processes: int = 1) -> None:
    """Sends a signal during accumulation; checks that the step is saved and resumes to the same result."""
    processes_ = ("--gradient-accumulation-steps", 24 // processes, *PLAIN, "--max-train-steps")
    base = (*base, *processes_)
    process = start(command([*base, 1000, "--output-dir", folder / "run"], processes), folder)
    until(lambda: logged(folder / "run") >= 2, process)
    send({"main": process.pid, "rank 1": children(process.pid)[-1] if processes > 1 else 0}[to], name)
    done = finish(process, folder)
    step = len(losses(folder / "run"))
    assert 2 <= step < 1000 and checkpoints(folder / "run") == [step]
    if to != "main" or processes == 1:  # after a signal to itself torchrun has its own status
        assert done.status == 0 and f"stopped after step {step}" in done.out and "Traceback" not in done.err
    call_ = [*base, step + 2, "--output-dir"]
    run(command([*call_, folder / "run", *LATEST], processes), folder)
    run(command([*call_, folder / "whole"], processes), folder)
    check_same(folder / "run", folder / "whole")


@pytest.mark.slow
def test_a_signal_finishes_the_step_and_saves(base, tmp_path):
    stopped(base, tmp_path, "SIGTERM", "main")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGUSR1"])
def test_other_signals_finish_the_step_and_save_too(name, base, tmp_path):
    stopped(base, tmp_path, name, "main")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "to"), [("SIGTERM", "rank 1"), ("SIGTERM", "main"), ("SIGINT", "main"), ("SIGUSR1", "rank 1")]
)
def test_a_signal_to_one_process_or_to_torchrun_stops_all(name, to, base, tmp_path):
    stopped(base, tmp_path, name, to, processes=2)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "to"), [("SIGINT", "main"), ("SIGUSR1", "rank 1")])
def test_a_signal_before_training_keeps_the_class_pictures_made_so_far(name, to, base, tmp_path):
    """All processes finish their current batch, and the next start makes the remaining pictures of the same set."""
    base = (*base, "--num-class-images", 60, "--sample-steps", 50, "--max-train-steps", 1)
    folder, processes = tmp_path / "run", 1 if to == "main" else 2
    process = start(command([*base, "--output-dir", folder], processes), tmp_path)
    until(lambda: any(folder.glob("class/class-*.png")), process)
    send(process.pid if to == "main" else children(process.pid)[1], name)
    done = finish(process, tmp_path)
    assert done.status == 0 and "stopped before training" in done.out and "Traceback" not in done.err
    made = {path.name: path.read_bytes() for path in folder.glob("class/*.png")}
    assert 0 < len(made) < 60 and losses(folder) == []
    run(command([*base, "--output-dir", folder, *LATEST], processes), tmp_path)
    run(command([*base, "--output-dir", tmp_path / "whole"]), tmp_path)
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "whole").glob("class/*.png")}
    assert len(pictures) == 60 and made.items() < pictures.items()
    assert {path.name: path.read_bytes() for path in folder.glob("class/*.png")} == pictures


@pytest.mark.slow
def test_a_second_interrupt_stops_at_once(base, tmp_path):
    long = ("--gradient-accumulation-steps", 10000, "--output-dir", tmp_path / "run")
    process = start(command([*base, *PLAIN, *long]), tmp_path)
    until((tmp_path / "run" / "sheets" / "before.png").exists, process)
    until(lambda: "training" in (tmp_path / "err.txt").read_text(), process)
    send(process.pid, "SIGINT")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.0)
    send(process.pid, "SIGINT")
    done = finish(process, tmp_path, seconds=10)
    assert done.status == -signal.SIGINT and "Traceback" not in done.err
    assert checkpoints(tmp_path / "run") == []


# Kills


def kills_of(base: tuple) -> int:
    """Thirty; fewer for a LoRA, whose run differs in what it saves alone."""
    return 10 if LORA[0] in base else 30


@pytest.mark.slow
def test_a_run_killed_thirty_times_equals_the_run_that_was_never_killed(base, tmp_path):
    """The kills come at random moments, also during starts and saves."""
    folder, drawn, done, in_saves = tmp_path / "run", random.Random(0), 0, 0
    saves = folder / "checkpoints"
    base = (*base, "--num-class-images", 2)
    often = ("--checkpointing-steps", 2, "--checkpoints-total-limit", 3, "--max-train-steps", 10**6)
    for kill in range(kills := kills_of(base)):
        process = start(command([*base, *often, "--output-dir", folder, *LATEST]), tmp_path)
        if kill % 3 == 0:
            time.sleep(drawn.uniform(0.5, 6.0))  # while it starts
        else:
            until(lambda enough=done: max(checkpoints(folder), default=0) > enough, process)
            time.sleep(drawn.uniform(0.0, 0.3))
        if kill % 3 == 2:
            until(lambda: any(saves.glob(".tmp-*")), process)
            time.sleep(drawn.uniform(0.0, 0.02))
        process.kill()
        assert finish(process, tmp_path).status == -signal.SIGKILL
        in_saves += kill % 3 != 0 and any(saves.glob(".*"))
        if found := checkpoint.all_in(saves):
            assert [checkpoint.damaged(path) for path in found] == [None] * len(found)
            done = checkpoint.load_state(found[-1])["step"]
    print(f"{in_saves} of {kills} kills fell into a save; {done} steps were done")
    assert in_saves >= kills // 10 and done >= kills
    steps = ("--max-train-steps", done + 3, "--checkpointing-steps", 10**6, "--output-dir")
    run(command([*base, *steps, folder, *LATEST]), tmp_path)
    assert leftovers(folder) == []
    run(command([*base, *steps, tmp_path / "whole"]), tmp_path)
    check_same(folder, tmp_path / "whole")


@pytest.mark.slow
def test_thirty_kills_in_every_phase_of_a_short_run(base, tmp_path):
    """From the start over class pictures and steps to the last write; what was finished is finished again."""
    folder, drawn, phases = tmp_path / "run", random.Random(1), set()
    flags = (*base, "--num-class-images", 12, "--sample-steps", 10, "--max-train-steps", 40, "--checkpointing-steps", 5)
    flags = (*flags, "--num-validation-images", 2)
    run(command([*flags, "--output-dir", tmp_path / "whole"]), tmp_path)
    for _ in range(kills_of(base)):
        before = max(checkpoints(folder), default=0)
        process = start(command([*flags, "--output-dir", folder, *LATEST]), tmp_path)
        try:
            assert process.wait(drawn.uniform(1.5, 7.0)) == 0
            check_same(folder, tmp_path / "whole")
            shutil.rmtree(folder)  # and from the beginning
        except subprocess.TimeoutExpired:
            process.kill()
            bars = re.findall(
                r"(sheet before|class pictures|encoding|training|sheet after)", finish(process, tmp_path).err
            )
            phases.add(bars[-1] if bars else "start")
            assert max(checkpoints(folder), default=0) >= before
    print(f"killed in {sorted(phases)}")
    run(command([*flags, "--output-dir", folder, *LATEST]), tmp_path)
    check_same(folder, tmp_path / "whole")
    assert leftovers(folder) == []


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_torchrun_restarts_a_killed_worker_in_the_folder_of_its_run(victim, base, tmp_path):
    """The run has no --output-dir, and the folder of another run lies beside its own."""
    base = (*base, "--max-train-steps", 40, "--checkpointing-steps", 3, "--checkpoints-total-limit", 2)
    run(command([*base], 2), tmp_path)
    process = start(command([*base], 2, ["--max-restarts", "2"]), tmp_path)
    folder = tmp_path / "runs" / "dreambooth-2"
    until(lambda: logged(folder) >= 5, process)
    os.kill(children(process.pid)[victim], signal.SIGKILL)
    done = finish(process, tmp_path)
    assert done.status == 0, done.err
    assert "resuming from" in done.out
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["dreambooth", "dreambooth-2"]
    check_same(folder, tmp_path / "runs" / "dreambooth")
    assert leftovers(folder) == []


@pytest.mark.slow
def test_torchrun_does_not_restart_a_refused_run_in_the_folder_of_another(base, tmp_path):
    """The second attempt is refused like the first."""
    run(command([*base, "--output-dir", "run"]), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    done = run(command([*base, "--output-dir", "run"], 2, ["--max-restarts", "1"]), tmp_path, status=1)
    said = [line for line in done.err.splitlines() if line.startswith("train.py: error:")]
    assert said and all("--output-dir run is not empty" in line for line in said)
    assert {path: path.stat().st_mtime_ns for path in before} == before


# Disks and folders


@pytest.fixture
def mounted(tmp_path):
    """mounted(options...) mounts a tmpfs with these options and returns its folder; skips where that is forbidden."""
    folders = []

    def mount(*options: str) -> Path:
        folder = tmp_path / f"disk{len(folders)}"
        folder.mkdir()
        line = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
        done = subprocess.run(line, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"can't mount a tmpfs here: {done.stderr.strip()}")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_too_small_is_refused_before_anything_is_written(base, mounted):
    size = 1 if LORA[0] in base else 2
    disk = mounted(f"size={size}m")
    done = run(command([*base, *PLAIN, "--output-dir", disk / "run"]), disk.parent, status=1)
    assert re.search(rf"needs \d MB for a save, and its disk has {size} MB left", done.complaint)
    assert not (disk / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["in a save", "between saves"])
def test_a_run_whose_disk_fills_up_keeps_its_checkpoints(moment, base, mounted):
    """The run ends with one line that says so. Its earlier checkpoints are whole, and it resumes from them."""
    disk = mounted("size=48m")
    base = (*base, *PLAIN, "--output-dir", disk / "run", "--checkpointing-steps", 2, "--checkpoints-total-limit", 2)
    process = start(command([*base, "--max-train-steps", 100000]), disk.parent)
    saves = disk / "run" / "checkpoints"
    until(lambda: checkpoints(disk / "run"), process)
    if moment == "in a save":
        while not any(saves.glob(".tmp-*")):
            pass
    with (disk / "others").open("wb") as others:
        size, part = 0, 2**24
        while part >= 4096:
            try:
                os.posix_fallocate(others.fileno(), size, part)
                size += part
            except OSError:  # not enough space left: try half of this part
                part //= 2
    done = finish(process, disk.parent)
    print(done.complaint)
    assert done.status == 1
    step = checkpoints(disk / "run")[-1]
    assert all(checkpoint.damaged(path) is None for path in checkpoint.all_in(saves))
    (disk / "others").unlink()
    run(command([*base, "--max-train-steps", step + 2, *LATEST]), disk.parent)
    assert len(losses(disk / "run")) == step + 2 and leftovers(disk / "run") == []


@pytest.mark.slow
def test_two_processes_report_a_mistake_once(base, tmp_path):
    done = run(command([*base, "--instance-data-dir", "nowhere", "--output-dir", "run"], 2), tmp_path, status=1)
    assert "nowhere is not a folder" in done.complaint and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_error_of_the_main_process_reaches_the_others(random_model, base, tmp_path):
    """Only the main process makes sheets. When it fails, the other process ends by itself and does not wait for it.

    The test starts the processes without torchrun, which would end them all.
    """
    sd = random_model()
    with torch.no_grad():  # exceeds the range of fp16: the sheet becomes NaN
        sd.unet.out[2].weight.mul_(1e9)
        sd.unet.out[0].weight.mul_(1e-9)
        sd.unet.out[0].bias.mul_(1e-9)
    sd.save(tmp_path / "wide.safetensors")
    flags = ("--model", tmp_path / "wide.safetensors", "--mixed-precision", "fp16", "--output-dir", tmp_path / "run")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = {}
    for rank in ("0", "1"):
        own = {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}
        started[rank] = start(command([*base, *flags]), tmp_path / rank, **world, **own)
    for rank, process in started.items():
        done = finish(process, tmp_path / rank, seconds=100)
        assert done.status == 1 and "fp16 is too narrow" in done.complaint, (rank, done.err)


def test_a_folder_that_cannot_be_written_is_refused_at_once(base, mounted):
    disk = mounted("ro")
    message = refused(*base, "--output-dir", disk / "run")
    assert f"--output-dir {disk / 'run'} can't be written" in message


@pytest.mark.slow
def test_two_runs_do_not_share_a_folder(base, tmp_path):
    folder = tmp_path / "run"
    forever = ("--max-train-steps", 10**6, "--checkpointing-steps", 1, "--checkpoints-total-limit", 1)
    process = start(command([*base, *PLAIN, *forever, "--output-dir", folder]), tmp_path)
    try:
        until(lambda: checkpoints(folder), process)
        assert "not empty" in refused(*base, *PLAIN, "--output-dir", folder)
        assert "another run is at work there" in refused(*base, *PLAIN, *forever, "--output-dir", folder, *LATEST)
        count = logged(folder)
        until(lambda: logged(folder) > count, process)  # the first run goes on
    finally:
        process.kill()
        process.wait()


# Inputs that are refused


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_base_model_with_a_weight_that_is_not_finite_is_refused(number, random_model, base, tmp_path):
    sd = random_model()
    with torch.no_grad():
        sd.unet.out[2].weight.view(-1)[3] = number
    sd.save(tmp_path / "bad.safetensors")
    message = refused(*base, "--model", tmp_path / "bad.safetensors", "--output-dir", tmp_path / "run")
    assert "model.diffusion_model.out.2.weight holds NaN or infinity" in message
    assert not (tmp_path / "run").exists()


def test_eight_bit_adam_names_the_extra_that_it_needs(base, tmp_path, monkeypatch):
    for name in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    message = refused(*base, "--use-8bit-adam", "--output-dir", tmp_path / "run")
    assert message == '--use-8bit-adam needs bitsandbytes: pip install -e ".[bitsandbytes]"'
    assert not (tmp_path / "run").exists()
