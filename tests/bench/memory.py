"""Compares the peak memory of sampling and of training here and in diffusers, each measured in a process of its own.

    python tests/bench/memory.py                                                 the embedded model on the CPU
    python tests/bench/memory.py --work training --random sd1 --rows 1 --gradient-checkpointing --use-8bit-adam

Each process loads the model and does the work twice. The peak includes the weights. On a GPU it is
torch.cuda.max_memory_allocated. On the CPU it is what resident memory grows by, up to VmHWM, after the process has done
such work on the embedded model, so that imports do not count.
sampling.py and training.py check that both sides compute the same.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import measure
import sampling
import torch
import training


def main(argv: Sequence[str] | None = None) -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--work", choices=WORK, help="measure this alone")
    parser.add_argument("--peer", choices=("default", "best"), default="default", help="as in training.py")
    sampling.add_flags(parser)
    training.add_flags(parser)
    parser.add_argument("--child", nargs=3, metavar=("WHO", "MODEL", "DATA"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        print(peak(*args.child, args))
        return
    kinds = [args.work] if args.work else list(WORK)
    with measure.opened(args) as folder, tempfile.TemporaryDirectory() as data:
        training.make_pictures(Path(data), args.size)
        peaks = {kind: {who: measured(kind, who, folder, data, args) for who in WORK[kind]} for kind in kinds}
    record = measure.header("memory", args) | {"peak": peaks}
    measure.print_header(record)
    rows = [("", "ours MB", "diffusers MB", "ours / diffusers")]
    for kind, peak_by in peaks.items():
        a, b = peak_by.values()
        rows.append((kind, f"{a / 1e6:.0f}", f"{b / 1e6:.0f}", f"{a / b:.3f}"))
    measure.print_rows(rows)
    measure.append(args, record)


def measured(kind: str, who: str, folder: Path, data: str, args: argparse.Namespace) -> int:
    command = [sys.executable, *sys.argv, "--work", kind, f"--size={args.size}", "--child", who, str(folder), data]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{kind} of {who} ended with status {done.returncode}")
    return int(done.stdout.splitlines()[-1])


def peak(who: str, folder: str, data: str, args: argparse.Namespace) -> int:
    """Loads, does the work twice and returns the peak in bytes."""
    make = WORK[args.work][who]
    small = {"size": 64, "pictures": 1, "rows": 1, "steps": 1}
    make(measure.TINY / "base", Path(data), argparse.Namespace(**vars(args) | small))()

    def work() -> None:
        unit = make(Path(folder), Path(data), args)
        unit()
        unit()

    return measure.peak_of(work, args.device)


def sample(side: type) -> Callable[[Path, Path, argparse.Namespace], Callable]:
    def make(folder: Path, data: Path, args: argparse.Namespace) -> Callable:
        return torch.no_grad()(partial(side(folder, args, measure.dtype_of(args)), "tensor"))

    return make


def train_ours(folder: Path, data: Path, args: argparse.Namespace) -> Callable:
    return partial(training.Ours(folder, data, args, args.dtype), 1)


def train_theirs(folder: Path, data: Path, args: argparse.Namespace) -> Callable:
    return partial(training.Script(folder, data, args, args.peer), 1)


# Kind of work -> side -> make(folder, data, args), which loads the model and returns the work.
WORK = {
    "sampling": {who: sample(side) for who, side in sampling.SIDES.items()},
    "training": {"ours": train_ours, "diffusers": train_theirs},
}


if __name__ == "__main__":
    main()
