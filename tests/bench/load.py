"""Compares the time and memory that this package and diffusers need to load a single file.

    python tests/bench/load.py v1-5-pruned-emaonly.safetensors
    python tests/bench/load.py --random sd1

Each round loads the file once with each of the two, each time in a new process. The first round reads the file from the
disk and does not count. The time ends when a model in fp32 is ready; the memory is the process's peak (VmHWM).
diffusers loads with `StableDiffusionPipeline.from_single_file` and a local folder as its `config`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

from ldm import StableDiffusion  # noqa: E402
from ldm.config import SD1, SD2, SD2_V, ModelConfig  # noqa: E402
from ldm.formats import read  # noqa: E402
from ldm.formats.folder_config import config_files  # noqa: E402
from ldm.tokenizer import Tokenizer  # noqa: E402

PRESETS = {"sd1": SD1, "sd2": SD2, "sd2_v": SD2_V}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, help="official .safetensors or .ckpt file")
    parser.add_argument("--random", choices=PRESETS, help="load a file of this family with random weights instead")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count")
    parser.add_argument("--child", choices=LOADERS, help=argparse.SUPPRESS)
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(load(args.child, args.file, args.config)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        file = args.file
        if args.random:
            file = Path(scratch, f"{args.random}.safetensors")
            write_random(file, PRESETS[args.random])
        config = Path(scratch, "config")
        source = read(file)
        write_config(config, source.config, source.tokenizer)
        del source
        runs = {who: [] for who in LOADERS}
        for i in range(args.rounds + 1):
            for who in LOADERS:
                run = measure(who, file, config)
                print(f"round {i} {who:<10}{run['seconds']:8.2f} s{run['peak'] / 1e9:8.2f} GB", flush=True)
                runs[who] += [run] if i else []
        seconds = {who: statistics.median(run["seconds"] for run in runs[who]) for who in LOADERS}
        print(f"ours / diffusers: {seconds['ours'] / seconds['diffusers']:.2f} of the time")
        for who in LOADERS:
            peak = max(run["peak"] for run in runs[who])
            print(f"{who}: peak memory {peak / file.stat().st_size:.3f} of the file's size")


def measure(who: str, file: Path, config: Path) -> dict[str, float]:
    """Loads the file in a new process. Returns its seconds and its peak memory in bytes."""
    command = [sys.executable, __file__, str(file), "--child", who, "--config", str(config)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def load(who: str, file: Path, config: Path) -> dict[str, float]:
    loader = LOADERS[who]()
    start, busy = time.perf_counter(), time.process_time()
    loader(file, config)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    return {"seconds": seconds, "busy": busy, "peak": peak}


def ours():
    return lambda file, config: StableDiffusion.load(file)


def diffusers():
    from diffusers import StableDiffusionPipeline

    return lambda file, config: StableDiffusionPipeline.from_single_file(file, config=str(config))


LOADERS = {"ours": ours, "diffusers": diffusers}


def write_config(folder: Path, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Writes a diffusers folder without weights."""
    for name, tree in config_files(config, tokenizer.eos_id, tokenizer.bos_id).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(tree))
    tokenizer.save(folder / "tokenizer")


def write_random(path: Path, config: ModelConfig) -> None:
    """Writes an official file in fp32 in which no weight is zero."""
    with torch.device("meta"):
        sd = StableDiffusion(config)
    for network in sd.networks().values():
        randomise(network.to_empty(device="cpu"))
    sd.save(path)


@torch.no_grad()
def randomise(network: torch.nn.Module) -> torch.nn.Module:
    """Draws all weights at random, also those initialised to zero, so that activations keep their scale."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.normal_(float(name.endswith("weight")), 0.1, generator=generator)
    return network.eval()


if __name__ == "__main__":
    main()
