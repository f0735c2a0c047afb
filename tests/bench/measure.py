"""What the scripts of this folder share: times in ABBA order, peak memory, floors, the table, and the JSON line.

A script gives `measure` its two sides as functions of no arguments that do the same work. README.md beside this file
says what each column means.
"""

import argparse
import ctypes
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from load import PRESETS, randomise  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from ldm import StableDiffusion  # noqa: E402
from ldm.formats import read  # noqa: E402
from ldm.runtime.cli import DTYPES  # noqa: E402

TINY = ROOT / "weights" / "tiny"
Work = Callable[[], object]

# The command line


def parser(text: str, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with the flags that all scripts share. defaults: other defaults than those here."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", type=Path, default=TINY / "base", help="model file or folder; the embedded one")
    made.add_argument("--random", choices=PRESETS, help="a full-size model of this family with random weights instead")
    made.add_argument("--size", type=int, help="side of the pictures in pixels; the model's training size")
    made.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="type that both compute in")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--rounds", type=int, default=5, help="rounds of four timings, ours, theirs, theirs, ours")
    made.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder for the JSON")
    made.set_defaults(**defaults)
    return made


@contextmanager
def opened(args: argparse.Namespace) -> Iterator[Path]:
    """The model as a diffusers folder, which both sides read. Sets `args.size` if it was not given."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model
        if args.random or not folder.is_dir():
            folder = Path(scratch, "model")
            if args.random:
                with torch.device("meta"):
                    sd = StableDiffusion(PRESETS[args.random])
                for network in sd.networks().values():
                    randomise(network.to_empty(device="cpu"))
            else:
                sd = StableDiffusion.load(args.model)
            sd.save(folder, "diffusers")
            del sd
        args.size = args.size or StableDiffusion.without_weights(read(folder)).config.resolution
        yield folder


def model_name(args: argparse.Namespace) -> str:
    is_embedded = args.model.resolve() == TINY / "base"
    return f"random {args.random}" if args.random else "embedded" if is_embedded else args.model.name


def dtype_of(args: argparse.Namespace) -> torch.dtype:
    return DTYPES[args.dtype]


# Equality


def fail(text: str) -> NoReturn:
    """Ends the script with status 1: the sides do not compute the same, so there is nothing to time."""
    raise SystemExit(f"not equal, and not timed: {text}")


def check_close(what: str, ours: Tensor, theirs: Tensor, most: float) -> None:
    """Ends the script unless the largest difference is at most `most`."""
    if ours.shape != theirs.shape:
        fail(f"{what} are {tuple(ours.shape)} and {tuple(theirs.shape)}")
    apart = (ours.double() - theirs.double()).abs().max().item()
    if not apart <= most:  # also NaN
        fail(f"{what} differ by up to {apart:.3g}, and {most:.3g} is allowed")


# Time and memory


@dataclass
class Side:
    """seconds: of each timing, in the order of time, two a round. peak: bytes beyond those held before the work."""

    seconds: list[float] = field(default_factory=list)
    peak: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def percentiles(self) -> tuple[float, float]:
        """The 10th and the 90th."""
        tenths = statistics.quantiles(self.seconds, n=10, method="inclusive")
        return tenths[0], tenths[-1]

    @property
    def spread(self) -> float:
        """A/A: by how much the two timings of a round differ, as a fraction, in the median over rounds."""
        pairs = zip(self.seconds[::2], self.seconds[1::2], strict=True)
        return statistics.median(abs(a - b) / (a + b) * 2 for a, b in pairs)


def time_sides(works: dict[str, Work], rounds: int, device: str) -> dict[str, Side]:
    """Times the two pieces of work in ABBA order: a machine that slows down hits both alike. Each warms up once."""
    sides = {who: Side() for who in works}
    for who, work in works.items():
        work()
        sides[who].peak = peak_of(work, device)
    names = list(works)
    for _ in range(rounds):
        for who in [*names, *reversed(names)]:
            sides[who].seconds.append(seconds_of(works[who], device))
    return sides


def seconds_of(work: Work, device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def peak_of(work: Work, device: str) -> int | None:
    """Bytes that the work takes at its peak beyond those held before. On the CPU: of resident memory, on Linux."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # gives freed memory back, so that new memory counts
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak, to the present size
    except OSError:
        return None
    before = resident("VmRSS")
    work()
    return max(0, resident("VmHWM") - before)


def resident(name: str) -> int:
    """VmRSS, resident memory, or VmHWM, its peak, in bytes."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024


# Floors


@dataclass
class Floor:
    """The least work that gives the result, and what the device was measured to do per second."""

    flop: int
    bytes: int
    flop_rate: float
    byte_rate: float

    @property
    def seconds(self) -> float:
        return max(self.flop / self.flop_rate, self.bytes / self.byte_rate)


def floor(flop: int, moved: int, device: str, dtype: torch.dtype) -> Floor:
    """Measures the device: its best of several large matrix products and copies."""
    side = 8192 if device.startswith("cuda") else 1024
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    product = min(seconds_of(lambda: a @ b, device) for _ in range(5))
    source = torch.ones(2**28 if device.startswith("cuda") else 2**25, device=device)
    target = torch.empty_like(source)
    copy = min(seconds_of(lambda: target.copy_(source), device) for _ in range(5))
    return Floor(flop, moved, 2 * side**3 / product, 2 * source.nbytes / copy)


def flop_of(work: Work) -> int:
    """Counts the floating point operations of the matrix products and convolutions, attention's as two products."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def weight_bytes(*networks: nn.Module) -> int:
    return sum(parameter.nbytes for network in networks for parameter in network.parameters())


# Output


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    names = [device]
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")] or names
    return f"{names[0]}, {torch.get_num_threads()} threads"


def report(script: str, args: argparse.Namespace, sides: dict[str, Side], least: Floor | None = None) -> None:
    """Prints the table of two sides, ours first, and appends a line to `args.results`/SCRIPT.jsonl.

    Times are per unit of work, whatever the script counts: a call, a step, a process.
    """
    (ours, a), (theirs, b) = sides.items()
    ratio = statistics.median(x / y for x, y in zip(a.seconds, b.seconds, strict=True))
    record = header(script, args) | {
        "sides": {
            who: {
                "median": side.median,
                "p10": side.percentiles[0],
                "p90": side.percentiles[1],
                "spread": side.spread,
                "peak": side.peak,
                "seconds": side.seconds,
            }
            for who, side in sides.items()
        },
        "ratio": ratio,
        "floor": asdict(least) | {"seconds": least.seconds} if least else None,
    }
    print_header(record)
    rows = [("", "median s", "p10", "p90", "A/A", "of peak rate", "x floor", "peak memory")]
    for who, side in sides.items():
        shown = [f"{seconds:.4f}" for seconds in (side.median, *side.percentiles)]
        share, distance = "-", "-"
        if least is not None:
            share = f"{least.flop / side.median / least.flop_rate:.1%}"
            distance = f"{side.median / least.seconds:.2f}"
        memory = "-" if side.peak is None else f"{side.peak / 1e6:.0f} MB"
        rows.append((who, *shown, f"{side.spread:.1%}", share, distance, memory))
    print_rows(rows)
    if least is not None:
        print(f"floor: {least.flop:.3g} FLOP at {least.flop_rate:.3g} a second, {least.bytes:.3g} bytes at", end=" ")
        print(f"{least.byte_rate:.3g} a second")
    print(f"{ours} takes {ratio:.3f} of the time of {theirs}: {1 / ratio:.3f} times as fast")
    append(args, record)


def header(script: str, args: argparse.Namespace) -> dict[str, Any]:
    """What was measured, and where."""
    case = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    case["model"] = model_name(args)
    return {
        "script": script,
        "when": time.strftime("%Y-%m-%d %H:%M:%S"),
        "device": device_name(args.device),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        "case": {name: value for name, value in case.items() if name != "results"},
    }


def print_header(record: dict[str, Any]) -> None:
    print(f"{record['script']}: {', '.join(f'{name} {value}' for name, value in record['case'].items() if value)}")
    print(f"{record['device']}; {', '.join(f'{name} {value}' for name, value in record['versions'].items())}")


def print_rows(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        print("  ".join([first.ljust(widths[0]), *(o.rjust(w) for o, w in zip(others, widths[1:], strict=True))]))


def append(args: argparse.Namespace, record: dict[str, Any]) -> None:
    args.results.mkdir(parents=True, exist_ok=True)
    with (args.results / f"{record['script']}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
