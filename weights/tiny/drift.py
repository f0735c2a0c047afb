"""Compares train.py's drift and diversity with the judge's class likeness and variety, over runs of different strength.

train.py measures drift and diversity in the features of the base model's UNet, from 16 rough pictures
(ldm/validation/drift.py). The judge sees 64 good pictures of each checkpoint, and was trained on drawings (effect.py).
If the two rank the checkpoints alike, train.py's numbers can say when to stop.

    python weights/tiny/drift.py            # an interrupted call goes on
"""

import json
from pathlib import Path

import effect
import torch

from ldm import StableDiffusion
from ldm.runtime import cli, replacing

HERE = Path(__file__).parent
SUBJECT = "baron"
FREE = ["--no-with-prior-preservation"]
RUNS = {  # flags, steps between the checkpoints that are compared, number of steps
    "no prior": (FREE, 10, 30),
    "no prior, longer": (FREE, 50, 100),
    "no prior, longest": (FREE, 200, 200),
    "prior": ([], 100, 500),
}


def checkpoints(work):
    """Trains all runs. Yields (run, step, train.py's numbers, the checkpoint) of each checkpoint."""
    for name, (flags, every, steps) in RUNS.items():
        output = work / name.replace(",", "").replace(" ", "-")
        common = ["--config", HERE / "train.toml", "--class-data-dir", work / "class", "--num-validation-images", "1"]
        common += ["--max-train-steps", str(steps)]
        effect.train(output, [*common, "--checkpointing-steps", str(every), "--validation-steps", str(every), *flags])
        for line in (output / "validation.jsonl").read_text(encoding="utf-8").splitlines():
            if step := (numbers := json.loads(line))["step"]:
                yield name, step, numbers, output / "checkpoints" / f"checkpoint-{step:06d}"


def judged(path, settings, *judge):
    """Class likeness ("drift") and variety ("diversity") of a model by the judge. They are kept beside a checkpoint."""
    kept = path / "judged.json"
    if not kept.exists():
        with torch.no_grad():
            _, numbers = effect.measure_class(StableDiffusion.load(path), settings, *judge)
        with replacing(kept) as temporary:
            temporary.write_text(json.dumps(numbers) + "\n", encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8"))


def spearman(a, b):
    """The correlation of the ranks of two lists without equal values (Spearman 1904)."""
    ranks = [torch.tensor(column).argsort().argsort().double() for column in (a, b)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def main():
    parser = cli.Parser(description="Compare train.py's drift and diversity with the judge's numbers.")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/drift"), help="folder of the runs")
    args = parser.parse_args()

    judge = effect.likeness(SUBJECT)
    rows = ["| run | step | drift | class likeness | diversity | variety |", "|---|---|---|---|---|---|"]
    ours, theirs = [], []
    for name, step, numbers, path in checkpoints(args.work_dir):
        settings = effect.settings_of(path.parent.parent)
        if not ours:
            with torch.no_grad():
                _, base = effect.measure_class(StableDiffusion.load(HERE / "base"), settings, *judge)
        seen = judged(path, settings, *judge)
        ours.append((numbers["drift"], numbers["diversity"]))
        theirs.append((seen["drift"], seen["diversity"] / base["diversity"]))
        cells = f"{ours[-1][0]:.0%} | {theirs[-1][0]:.0%} | {ours[-1][1]:.0%} | {theirs[-1][1]:.0%}"
        rows.append(f"| {name} | {step} | {cells} |")
        print(rows[-1], flush=True)
    text = "\n".join(rows)
    for i, what in enumerate(("drift and class likeness", "diversity and variety")):
        text += f"\nrank correlation of {what}: {spearman([n[i] for n in ours], [n[i] for n in theirs]):.2f}"
    (args.work_dir / "drift.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    with cli.reported("drift.py"):
        main()
