"""Compares the ways of training: all weights, a LoRA, a learned token, and both of these together.

Each way learns the same four pictures of "baron" in 500 steps or fewer: with class pictures, with the base model's own
prediction as prior, and without a prior. The measures are those of effect.py. Each cell has one number for each seed.

    python weights/tiny/ways.py            # 30 runs, one on each core; an interrupted call goes on
    python weights/tiny/ways.py --only LoRA --seeds 2 3

A run's folder keeps its measures. Delete the folder to repeat it.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import effect
import score
import torch
import world

from ldm import StableDiffusion, tokens
from ldm.runtime import cli, replacing

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SUBJECT = "baron"

NEW_TOKEN = ["--placeholder-token", "[V]", "--initializer-token", "monster"]
NEW_TOKEN += ["--instance-prompt", "a photo of [V] monster"]
TOKEN = [*NEW_TOKEN, "--token-learning-rate", "2e-4"]
# Rates, prior weight and steps of a LoRA were chosen on this subject, among some sixty runs.
LORA = ["--lora-rank", "4", "--learning-rate", "3e-3", "--text-encoder-learning-rate", "1e-3"]
LORA += ["--prior-loss-weight", "0.5"]
WIDE = ["--lora-rank", "16", "--learning-rate", "2e-3", "--text-encoder-learning-rate", "1e-3"]
WIDE += ["--prior-loss-weight", "0.5"]
EVERYWHERE = ["--lora-rank", "4", "--lora-targets", "all", "--lora-conv-rank", "1", "--learning-rate", "2e-3"]
EVERYWHERE += ["--text-encoder-learning-rate", "5e-4", "--prior-loss-weight", "0.5", "--max-train-steps", "400"]
WAYS = {
    "all weights": [],
    "LoRA, rank 4": LORA,
    "LoRA, rank 16": WIDE,
    "LoRA, rank 4, token": [*LORA, "--text-encoder-learning-rate", "5e-4", *TOKEN],
    "LoRA, rank 4, convolutions too, 400 steps": EVERYWHERE,
    "all weights, token": TOKEN,
    "token alone": [*NEW_TOKEN, "--num-vectors", "4", "--train", "token"],
}
PRIORS = {"class pictures": [], "prediction": ["--prior", "prediction"], "none": ["--no-with-prior-preservation"]}
COMPARED = list(WAYS)[:4]  # with each prior; the others with class pictures, and the token without, as it has no prior


def jobs(only, seeds):
    """(way, prior, seed) of each run. The first ones of each seed make the class pictures that the others take."""
    found = [
        (way, prior, seed)
        for prior in PRIORS
        for way in WAYS
        for seed in seeds
        if way in COMPARED or prior == ("none" if way == "token alone" else "class pictures")
    ]
    return [job for job in found if only in job[0]]


def folder(work, job):
    way, prior, seed = job
    return work / f"{way}, {prior}, {seed}".replace(", ", "-").replace(" ", "_")


def run(work, job):
    """Trains one way and measures it, in this process. Its measures are kept in its folder."""
    way, prior, seed = job
    output = folder(work, job)
    flags = ["--config", HERE / "train.toml", "--instance-data-dir", work / "subject", "--seed", str(seed)]
    flags += ["--validation-steps", "500", "--num-drift-images", "0"]  # saves minutes
    flags += ["--class-data-dir", work / f"class-{seed}"] if prior == "class pictures" else []
    effect.train(output, [*flags, *WAYS[way], *PRIORS[prior]])
    with torch.no_grad():
        numbers, *_ = effect.measure(load(output), effect.settings_of(output), *effect.likeness(SUBJECT))
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    numbers["minutes"] = sum(json.loads(line)["seconds"] for line in lines) / 60
    with replacing(output / "measures.json") as path:
        path.write_text(json.dumps(numbers) + "\n", encoding="utf-8")


def load(output):
    """The model that a run has made, of whatever kind: a model, a LoRA, a token, or the last two together."""
    if (output / "model.safetensors").exists():
        return StableDiffusion.load(output / "model.safetensors")
    sd = StableDiffusion.load(HERE / "base")
    for path in sorted(output.glob("*.safetensors")):
        if path.name == "lora.safetensors":
            sd.apply_lora(path)
        else:
            tokens.add_embedding(sd, path)
    return sd


def row(label, measures, base):
    """A line of the table. measures: of each seed."""
    cells = [
        [n["fidelity"] for n in measures],
        [n["right"] for n in measures],
        [n["placed"] for n in measures],
        [n["diversity"] / base["diversity"] for n in measures],
        [n["drift"] for n in measures],
    ]
    text = [", ".join(f"{value:.0%}" for value in cell) for cell in cells]
    minutes = ", ".join(f"{n['minutes']:.1f}" for n in measures) if "minutes" in measures[0] else ""
    return f"| {label} | " + " | ".join([*text, minutes]) + " |"


def main():
    parser = cli.Parser(description="Compare the ways of training on the embedded model.")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/ways"), help="folder of all runs")
    parser.add_argument("--only", default="", help="only the ways whose name has this")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="seeds of each way")
    parser.add_argument("--jobs", type=cli.positive, default=os.cpu_count(), help="runs at once, of one thread each")
    parser.add_argument("--one", type=int, help="only the run of this number, in this process")
    args = parser.parse_args()
    todo = jobs(args.only, args.seeds)
    if args.one is not None:
        run(args.work_dir, todo[args.one])
        return

    world.write_subject(SUBJECT, args.work_dir / "subject")

    def start(number):
        output = folder(args.work_dir, todo[number])
        if not (output / "measures.json").exists():
            output.parent.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, __file__, "--work-dir", args.work_dir, "--only", args.only, "--one", str(number)]
            command += ["--seeds", *map(str, args.seeds)]
            with (args.work_dir / f"{output.name}.log").open("w") as log:
                kept = {**os.environ, "OMP_NUM_THREADS": "1"}
                if subprocess.run(command, env=kept, stdout=log, stderr=subprocess.STDOUT).returncode:
                    print(f"{output.name} failed: see {log.name}", flush=True)
                    return
        print(output.name, (output / "measures.json").read_text(), end="", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(start, range(len(todo))))
    with torch.no_grad():
        base, *_ = effect.measure(StableDiffusion.load(HERE / "base"), score.settings(), *effect.likeness(SUBJECT))
    table = [
        "| trained | prior | likeness | scene right | likeness in new scenes | variety | class likeness | minutes |",
        "|---|---|---|---|---|---|---|---|",
        row("base | ", [base], base),
    ]
    order = [*WAYS, *PRIORS]
    for way, prior in sorted({job[:2] for job in todo}, key=lambda pair: (order.index(pair[0]), order.index(pair[1]))):
        paths = [folder(args.work_dir, (way, prior, seed)) / "measures.json" for seed in args.seeds]
        if measures := [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]:
            table.append(row(f"{way} | {prior}", measures, base))
    text = "\n".join(table)
    (args.work_dir / "ways.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    with cli.reported("ways.py"):
        main()
