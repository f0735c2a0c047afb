"""Measures the effect of DreamBooth and of prior preservation (DreamBooth, sections 4.2 and 4.3).

Tunes the embedded model twice on the same four pictures for the same number of steps, with and without prior
preservation, and compares both with the base model:

    likeness                pictures of "a photo of sks monster": cosine of their features to the mean of 48 drawings
                            of the subject that training has not seen; other drawings of the subject reach 100 %
    scene right             pictures of "a photo of sks monster at night", and of two more scenes that the four
                            pictures do not show: the share that shows the scene
    likeness in new scenes  the likeness of these pictures
    variety                 pictures of "a photo of a monster": mean cosine distance between the features of 64
                            pictures; the base model has 100 %
    class likeness          the likeness of the same 64 pictures; it should stay at the base model's value

In this order, `measure` and measures.json call them fidelity, right, placed, diversity and drift.

    python weights/tiny/effect.py      # about ten minutes on two cores

A run that an earlier call left in the same --work-dir is resumed. train.py refuses it if its settings differ.
"""

import json
import random
import subprocess
import sys
from pathlib import Path

import judge
import numpy as np
import score
import torch
import world
from PIL import Image

from ldm import StableDiffusion
from ldm.runtime import cli
from ldm.sampling import contact_sheet

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
NEW_SCENES = [scene for scene in world.SCENES if scene not in {where for where, _, _ in world.VIEWS}]


def drawings(name, count, seed):
    """Draws the subject at random places, in random sizes and scenes: (count, 64, 64, 3) uint8."""
    rng = random.Random(f"{name} {seed}")
    return np.stack([world.draw(world.subject(name, rng), rng) for _ in range(count)])


def train(output, flags):
    """Runs train.py, which resumes where it stopped. Ends the program if train.py fails."""
    resume = ["--output-dir", output, "--resume-from-checkpoint", "latest"]
    if status := subprocess.run([sys.executable, ROOT / "train.py", *resume, *flags]).returncode:
        raise SystemExit(status)  # train.py has printed the reason


def settings_of(output):
    """The settings of a run."""
    return json.loads((output / "config.json").read_text(encoding="utf-8"))


def likeness(name):
    """How to judge a likeness: the judge, the mean feature (64,) of drawings of the subject, and the cosine to it
    that other drawings of the subject reach."""
    eye = judge.load()
    mean = eye.features(drawings(name, 48, "mean")).mean(0)
    mean = mean / mean.norm()
    return eye, mean, float((eye.features(drawings(name, 48, "real")) @ mean).mean())


def measure(sd, settings, eye, subject, real):
    """Returns ({measure: number}, pictures of the subject, of the subject in new scenes, of the class).

    settings: prompts and sampling; eye, subject, real: from `likeness`.
    """
    sampling = dict(steps=settings["sample_steps"], guidance=settings["guidance_scale"])

    def likeness_of(images):
        return float((eye.features(images) @ subject).mean()) / real

    name = settings["instance_prompt"]
    plain = score.pictures(sd, [name] * 24, range(1000, 1024), **sampling)
    scenes = NEW_SCENES * (24 // len(NEW_SCENES))
    placed = score.pictures(sd, [f"{name} {scene}" for scene in scenes], range(2000, 2024), **sampling)
    crowd, of_class = measure_class(sd, settings, eye, subject, real)
    numbers = {
        "fidelity": likeness_of(plain),
        "right": sum(a["scene"] == s for a, s in zip(eye.answers(placed), scenes, strict=True)) / len(scenes),
        "placed": likeness_of(placed),
        **of_class,
    }
    return numbers, plain, placed, crowd


def measure_class(sd, settings, eye, subject, real):
    """Returns (pictures of the class prompt, {"diversity": variety, "drift": class likeness}); see `measure`."""
    sampling = dict(steps=settings["sample_steps"], guidance=settings["guidance_scale"])
    crowd = score.pictures(sd, [settings["class_prompt"]] * 64, range(3000, 3064), **sampling)
    features = eye.features(crowd)
    distance = 1 - features @ features.T
    return crowd, {
        "diversity": float(distance.sum()) / (64 * 63),
        "drift": float((features @ subject).mean()) / real,
    }


def table(results):
    """The results, {model: numbers}, as a Markdown table."""
    base = results["base"]["diversity"]
    lines = [
        "| model | likeness | scene right | likeness in new scenes | variety | class likeness |",
        "|---|---|---|---|---|---|",
    ]
    for model, n in results.items():
        cells = [n["fidelity"], n["right"], n["placed"], n["diversity"] / base, n["drift"]]
        lines.append(f"| {model} | " + " | ".join(f"{cell:.0%}" for cell in cells) + " |")
    return "\n".join(lines)


def main():
    parser = cli.Parser(description="Measure the effect of DreamBooth on the embedded model.")
    parser.add_argument(
        "--work-dir", type=Path, default=Path("runs/effect"), help="folder of the two runs and the sheet"
    )
    parser.add_argument("--subject", default="baron", choices=world.SUBJECTS, help="subject of world.py to learn")
    parser.add_argument("--model", type=Path, default=HERE / "base", help="base model to tune")
    parser.add_argument("train_flags", nargs="*", help="more flags for train.py, after --")
    args = parser.parse_args()

    photographs = world.write_subject(args.subject, args.work_dir / "subject")
    world.write_held_out(args.subject, args.work_dir / "validation")
    eye, subject, real = likeness(args.subject)
    common = ["--config", HERE / "train.toml", "--model", args.model]
    common += ["--instance-data-dir", args.work_dir / "subject"]
    common += ["--validation-data-dir", args.work_dir / "validation", *args.train_flags]
    train(args.work_dir / "with", common)
    train(args.work_dir / "without", [*common, "--no-with-prior-preservation"])
    models = {
        "base": StableDiffusion.load(args.model),
        "with prior preservation": StableDiffusion.load(args.work_dir / "with" / "model.safetensors"),
        "without": StableDiffusion.load(args.work_dir / "without" / "model.safetensors"),
    }
    settings = settings_of(args.work_dir / "with")
    results, rows = {}, [("four photographs of the subject", [Image.open(path) for path in photographs])]
    for model, sd in models.items():
        with torch.no_grad():
            results[model], plain, placed, crowd = measure(sd, settings, eye, subject, real)
        rows.append(
            (f'{model}: "{settings["instance_prompt"]}", then {", ".join(NEW_SCENES)}', [*plain[:2], *placed[:6]])
        )
        rows += [(f'{model}: "{settings["class_prompt"]}"', crowd[:8]), ("", crowd[8:16])]
    pictures = [(label, [Image.fromarray(np.asarray(image)) for image in images]) for label, images in rows]
    contact_sheet.grid(pictures).save(args.work_dir / "effect.jpg", quality=90)
    print(f"cosine of real drawings of the subject to their mean: {real:.3f}\n{table(results)}")
    (args.work_dir / "effect.md").write_text(table(results) + "\n")


if __name__ == "__main__":
    with cli.reported("effect.py"):
        main()
