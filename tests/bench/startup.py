"""Compares the time and memory from the start of a process to its first picture: `sample.py` and a script on diffusers.

    python tests/bench/startup.py                                       one picture of the embedded model, 25 steps

Each run is a new process that loads the model, samples one picture and writes it. Rounds are in ABBA order. The memory
is the process's largest resident size. First both make one picture each, which must be equal within one level of 255.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import measure
import numpy as np
from measure import ROOT, Side
from PIL import Image

PROMPT = "a photo of a red cat on the beach"
SEED = 3
SCRIPT = """
import sys
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
folder, path, steps, guidance, size, device, dtype, prompt, seed = sys.argv[1:]
pipe = StableDiffusionPipeline.from_pretrained(folder).to(device, getattr(torch, dtype))
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
how = {"num_inference_steps": int(steps), "guidance_scale": float(guidance), "height": int(size), "width": int(size)}
pipe(prompt, generator=torch.Generator().manual_seed(int(seed)), **how).images[0].save(path)
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--steps", type=int, default=25, help="DDIM steps")
    parser.add_argument("--guidance", type=float, default=4.0, help="guidance scale")
    args = parser.parse_args(argv)
    with measure.opened(args) as folder, tempfile.TemporaryDirectory() as scratch:
        commands = {who: command(folder, Path(scratch, who), args) for who, command in COMMANDS.items()}
        pictures = []
        for who, command in commands.items():
            run(command)  # also warms up: the files are in memory afterwards
            pictures.append(np.asarray(Image.open(next(Path(scratch, who).glob("*.png")))).astype(int))
        if args.dtype == "fp32" and (apart := np.abs(pictures[0] - pictures[1]).max()) > 1:
            measure.fail(f"the pictures differ by up to {apart} levels")
        sides = {who: Side() for who in commands}
        for _ in range(args.rounds):
            for who in [*commands, *reversed(commands)]:
                seconds, peak = run(commands[who])
                sides[who].seconds.append(seconds)
                sides[who].peak = max(sides[who].peak or 0, peak)
        measure.report("startup", args, sides)


def run(command: list[str]) -> tuple[float, int]:
    """Runs a command to its end. Returns its seconds and its largest resident size in bytes."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        measure.fail(f"{' '.join(command[:2])} ended with status {process.returncode}: {error.strip()[-2000:]}")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def ours(folder: Path, out: Path, args: argparse.Namespace) -> list[str]:
    flags = {
        "model": folder,
        "prompt": PROMPT,
        "seed": SEED,
        "steps": args.steps,
        "guidance-scale": args.guidance,
        "height": args.size,
        "width": args.size,
        "dtype": args.dtype,
        "device": args.device,
        "output-dir": out,
    }
    return [sys.executable, str(ROOT / "sample.py"), *(f"--{name}={value}" for name, value in flags.items())]


def theirs(folder: Path, out: Path, args: argparse.Namespace) -> list[str]:
    out.mkdir()
    dtype = str(measure.dtype_of(args)).removeprefix("torch.")
    values = (folder, out / "picture.png", args.steps, args.guidance, args.size, args.device, dtype, PROMPT, SEED)
    return [sys.executable, "-c", SCRIPT, *map(str, values)]


COMMANDS = {"ours": ours, "diffusers": theirs}


if __name__ == "__main__":
    main()
