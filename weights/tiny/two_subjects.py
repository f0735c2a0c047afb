"""Teaches the embedded model two subjects, in one run and one after the other, and measures whether they mix.

Trains three times with the settings of train.toml, each subject on as many rows:

    one run      [[subjects]]: rows of both subjects in every batch, twice the steps
    first        a run of the first subject alone
    then         a run of the second subject alone, which begins with the model of the run before; so does its prior

For each model it prints the likeness of the pictures of each prompt to each subject: the cosine of their features to
the mean of 48 drawings of the subject (see effect.py); other drawings of the subject reach 100 %. A subject is learned
if the pictures of its prompt are like it. The subjects stay apart if those pictures are no more like the other subject
than drawings of the first one are: both are striped monsters, and share that.

    python weights/tiny/two_subjects.py

A run that an earlier call left in the same --work-dir is resumed.
"""

import json
import tomllib
from pathlib import Path

import effect
import score
import torch
import world

from ldm import StableDiffusion
from ldm.runtime import cli

HERE = Path(__file__).parent
PROMPTS = {"baron": "a photo of sks monster", "pip": "a photo of vuk monster"}
COUNT = 24  # pictures for each prompt
SUBJECT = """
[[subjects]]
name = "{name}"
instance_data_dir = {folder}
instance_prompt = "{prompt}"
"""


def write_config(path, prompts, usual):
    """Writes the settings of a run of these subjects, {name: prompt}; their photographs lie beside the file."""
    steps = usual["max_train_steps"] * len(prompts)
    lines = [f"{key} = {json.dumps(value)}" for key, value in (usual | {"max_train_steps": steps}).items()]
    lines.append("validation_prompt = [" + ", ".join(f'"{prompt}"' for prompt in PROMPTS.values()) + "]")
    for name, prompt in prompts.items():
        lines.append(SUBJECT.format(name=name, prompt=prompt, folder=json.dumps(str((path.parent / name).resolve()))))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@torch.no_grad()
def likenesses(model, usual, judged):
    """{prompt's subject: {subject: likeness of the prompt's pictures to it}} of a model's file or folder.

    judged: {subject: what `effect.likeness` returns}.
    """
    sd, found = StableDiffusion.load(model), {}
    for prompted, prompt in PROMPTS.items():
        sampling = dict(steps=usual["sample_steps"], guidance=usual["guidance_scale"])
        pictures = score.pictures(sd, [prompt] * COUNT, range(1000, 1000 + COUNT), **sampling)
        found[prompted] = compare(pictures, judged)
    return found


@torch.no_grad()
def compare(pictures, judged):
    """{subject: likeness of the pictures to it}."""
    return {name: float((eye.features(pictures) @ mean).mean()) / real for name, (eye, mean, real) in judged.items()}


def table(results):
    """The results, {model: likenesses}, as a Markdown table."""
    pairs = [(prompted, name) for prompted in PROMPTS for name in PROMPTS]
    lines = ["| model | " + " | ".join(f"`{PROMPTS[prompted]}`, like {name}" for prompted, name in pairs) + " |"]
    lines.append("|---" * (len(pairs) + 1) + "|")
    for model, found in results.items():
        lines.append(f"| {model} | " + " | ".join(f"{found[a][b]:.0%}" for a, b in pairs) + " |")
    return "\n".join(lines)


def main():
    parser = cli.Parser(description="Measure whether two subjects of one run mix.")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/two_subjects"), help="folder of the three runs")
    parser.add_argument("--model", type=Path, default=HERE / "base", help="base model to tune")
    parser.add_argument("train_flags", nargs="*", help="more flags for train.py, after --")
    args = parser.parse_args()

    work = args.work_dir
    ours = ("model", "instance_data_dir", "instance_prompt", "validation_prompt", "validation_steps")
    ours += ("validation_data_dir",)
    usual = tomllib.loads((HERE / "train.toml").read_text(encoding="utf-8"))
    usual = {key: value for key, value in usual.items() if key not in ours}
    for name in PROMPTS:
        world.write_subject(name, work / name)
    first, second = PROMPTS
    runs = {
        "one run": (PROMPTS, args.model),
        "first": ({first: PROMPTS[first]}, args.model),
        "then": ({second: PROMPTS[second]}, work / "first" / "model.safetensors"),
    }
    for run, (prompts, model) in runs.items():
        write_config(work / f"{run}.toml", prompts, usual)
        effect.train(work / run, ["--config", work / f"{run}.toml", "--model", model, *args.train_flags])
    models = {
        "base": args.model,
        "both in one run": work / "one run" / "model.safetensors",
        f"{first} alone": work / "first" / "model.safetensors",
        f"{first}, then {second}": work / "then" / "model.safetensors",
    }
    judged = {name: effect.likeness(name) for name in PROMPTS}
    results = {"drawings of the subjects": {n: compare(effect.drawings(n, 48, "real"), judged) for n in PROMPTS}}
    results |= {model: likenesses(path, usual, judged) for model, path in models.items()}
    print(table(results))
    (work / "two_subjects.md").write_text(table(results) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with cli.reported("two_subjects.py"):
        main()
