"""Helpers that run train.py and sample.py, in this process or in new ones, and read the files of a run."""

import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import default_collate

import train
from ldm import InputError
from ldm.data import Example
from ldm.data.latents import Latents
from ldm.data.mixture import Mixture
from ldm.data.rows import LatentDraws, Rows
from ldm.data.sorting import Bucket, Collection
from ldm.images import Picture

ROOT = Path(__file__).resolve().parent.parent
SMALL = """--instance-prompt=a sks dog|--class-prompt=a dog|--resolution=16|--sample-steps=1|--guidance-scale=1
--num-validation-images=1|--num-class-images=4|--sample-batch-size=2|--learning-rate=1e-4|--max-train-steps=4"""
SMALL = tuple(SMALL.replace("\n", "|").split("|"))
LORA = ("--lora-rank", 2)
BOTH = [pytest.param((), id="full"), pytest.param(LORA, id="lora", marks=pytest.mark.slow)]  # of a fault test
LATEST = ("--resume-from-checkpoint", "latest")
PROCESS = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def slow_after(count: int, cases: Sequence) -> list:
    """The cases of a parametrised test, all but the first `count` marked slow."""
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*value, marks=[pytest.mark.slow] if i >= count else []) for i, value in enumerate(values)]


@dataclass
class Done:
    """The exit status and the output of a command."""

    status: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line that reports the error. Checks that there is no other, and no traceback except torchrun's."""
        lines = [line for line in self.err.splitlines() if line.startswith("train.py: error:")]
        assert len(lines) == 1, self.err
        assert self.err.count("Traceback") <= self.err.count("ChildFailedError"), self.err
        return lines[0]


def photograph(folder: Path, sizes: Sequence[tuple[int, int]] = ((32, 32),) * 3) -> Path:
    """Makes a folder with pictures of these sizes that differ clearly."""
    folder.mkdir(parents=True)
    for i, size in enumerate(sizes):
        noise = torch.randint(256, (4, 4, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).resize(size).save(folder / f"{i}.png")
    return folder


def call(*arguments: object, **options: object) -> None:
    """Runs train.py with these arguments in this process, which saves the seconds of starting a new one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more threads do not speed up so small a model
    try:
        train.main([str(argument) for argument in arguments], **options)
    finally:
        torch.set_num_threads(threads)


def refused(*arguments: object) -> str:
    """Runs train.py, which has to raise InputError. Returns its message, which is one line."""
    with pytest.raises(InputError) as error:
        call(*arguments)
    message = str(error.value)
    assert "\n" not in message
    del error
    gc.collect()  # frees the traceback and with it the run, which has locked its folder
    return message


def command(
    arguments: Sequence[object], processes: int = 1, torchrun: Sequence[str] = (), script: str | Path = "train.py"
) -> list[str]:
    """The command line of a script with these arguments, under torchrun for several processes or torchrun flags."""
    program = [str(ROOT / script), *map(str, arguments)]
    if processes == 1 and not torchrun:
        return [sys.executable, *program]
    where = () if any(flag.startswith("--rdzv") for flag in torchrun) else ("--standalone",)
    launcher = [sys.executable, "-m", "torch.distributed.run", *where, "--nproc-per-node", str(processes)]
    return [*launcher, *torchrun, *program]


def start(line: Sequence[str], folder: Path, **environment: str) -> subprocess.Popen:
    """Starts a command in a folder. Its output goes to files there, because a full pipe would block it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "out.txt").open("w") as out, (folder / "err.txt").open("w") as err:
        return subprocess.Popen(line, cwd=folder, env=os.environ | PROCESS | environment, stdout=out, stderr=err)


def finish(process: subprocess.Popen, folder: Path, seconds: float = 300) -> Done:
    """Waits for the end of a process. Kills it after this time: a run that hangs is a failure, not a long wait."""
    try:
        status = process.wait(seconds)
    finally:
        process.kill()
    return Done(status, (folder / "out.txt").read_text(), (folder / "err.txt").read_text())


def run(line: Sequence[str], folder: Path, status: int | None = 0, **environment: str) -> Done:
    """Runs a command to its end. Checks its exit status, unless `status` is None."""
    done = finish(start(line, folder, **environment), folder)
    assert status is None or done.status == status, f"status {done.status}\n{done.out}\n{done.err}"
    return done


def collection(pictures: Sequence[Picture], size: tuple[int, int], shape: tuple[int, int, int]) -> Collection:
    """Pictures of one subject, all cut to one size. shape: (C, h, w) of their latents."""
    examples = tuple(Example(picture, "") for picture in pictures)
    return Collection((Bucket(size, shape, examples, (tuple(range(len(pictures))),)),), Mixture())


def latent_rows(kind: str, mean: torch.Tensor, std: torch.Tensor, seed: int = 0, prompt: str = "") -> Rows:
    """Rows of pictures with these latents, mean and std (N, views, C, h, w), for a schedule of 1000 steps."""
    pictures = collection([Picture(Path(), b"")] * len(mean), (0, 0), tuple(mean.shape[2:]))
    draws = LatentDraws(seed, kind, pictures, range(1000), prompts=(prompt,), views=mean.shape[1])
    return Rows(draws, mean.device, (Latents(mean, std),), is_class=kind == "class")


def sample_rows(rows: Rows, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, noise and t of the rows first ... first + count - 1."""
    return rows.sample(default_collate([rows.draws[index] for index in range(first, first + count)]))[:3]


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def timeless(lines: list[dict]) -> list[dict]:
    """The lines without what depends on the machine: seconds and memory."""
    times = {"seconds", "pictures_per_second", "memory_gb"}
    return [{name: value for name, value in line.items() if name not in times} for line in lines]


def losses(run: Path) -> list[float]:
    """The losses of all steps. Checks that each step is there once and in order."""
    lines = [line for line in metrics(run) if not line.get("skipped")]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def results(run: Path) -> list[Path]:
    """The files that a run, or a checkpoint, has its weights in: a model or a LoRA, a learned token [V]."""
    networks, token = ("model.safetensors", "lora.safetensors"), ("token.safetensors", "[V].safetensors")
    found = [[run / name for name in names if (run / name).exists()] for names in (networks, token)]
    assert any(found) and max(map(len, found)) == 1, found
    return [path for paths in found for path in paths]


def result(run: Path) -> Path:
    return results(run)[0]


def weights(run: Path) -> dict:
    return {name: tensor for path in results(run) for name, tensor in load_file(path).items()}


def check_same(a: Path, b: Path) -> None:
    """Checks that two runs have the same losses, weights and before/after sheets, bit for bit."""
    assert losses(a) == losses(b)
    pairs = [(a, b)]
    if (steps := checkpoints(a)) and steps[-1] == max(checkpoints(b), default=0):  # with numbers that no file rounds
        pairs.append(tuple(run / "checkpoints" / f"checkpoint-{steps[-1]:06d}" for run in (a, b)))
    for one, other in (map(weights, pair) for pair in pairs):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert (a / "sheets" / "before_after.png").read_bytes() == (b / "sheets" / "before_after.png").read_bytes()


def pixels(path: Path) -> np.ndarray:
    """The pixels of a picture as signed integers."""
    return np.asarray(Image.open(path)).astype(int)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def checkpoints(run: Path) -> list[int]:
    """The steps of the checkpoints that a run has."""
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in (run / "checkpoints").glob("checkpoint-*"))


def leftovers(run: Path) -> list[str]:
    """The files and folders of a run that have a temporary name."""
    return sorted(str(path.relative_to(run)) for path in run.rglob(".*"))


def until(condition: Callable[[], object], process: subprocess.Popen | None = None, seconds: float = 300) -> None:
    """Waits until the condition holds. Fails when the process ends first, or after this time."""
    end = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, "the process ended before the condition held"
        assert time.monotonic() < end, "the condition did not hold in time"
        time.sleep(0.005)


def children(pid: int) -> list[int]:
    """The child processes of a process. Those of torchrun are its workers, rank 0 first."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return sorted(int(child) for child in text.split())


def send(pid: int, name: str) -> None:
    os.kill(pid, getattr(signal, name))
