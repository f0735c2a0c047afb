"""Scores a base model: the share of its pictures that show the kind, colour, pattern and scene of their prompt.

python weights/tiny/score.py                                # 216 pictures with the shipped model and settings
python weights/tiny/score.py --guidance-scale 3 --steps 50  # with other settings
python weights/tiny/score.py --sheet runs/sheet.jpg         # also writes 64 of the pictures as a sheet
"""

import random
import tomllib
from pathlib import Path

import judge
import numpy as np
import world

from ldm import StableDiffusion
from ldm.runtime import cli

HERE = Path(__file__).parent


def questions(count, seed=0):
    """`count` dicts of kind, colour, pattern and scene. All values are equally frequent; combinations are random."""
    rng = random.Random(seed)
    columns = {}
    for name, values in (
        ("kind", world.KINDS),
        ("colour", world.COLOURS),
        ("pattern", world.PATTERNS),
        ("scene", world.SCENES),
    ):
        column = [tuple(values)[i % len(values)] for i in range(count)]
        rng.shuffle(column)
        columns[name] = column
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def prompt(question):
    """The prompt, such as "a photo of a red striped cat in the snow". It does not mention the pattern "plain"."""
    pattern = "" if question["pattern"] == "plain" else question["pattern"] + " "
    return f"a photo of a {question['colour']} {pattern}{question['kind']} {question['scene']}"


def pictures(sd, prompts, seeds, steps, guidance, batch=36):
    """Generated pictures as (len(prompts), 64, 64, 3) uint8."""
    made = []
    for i in range(0, len(prompts), batch):
        made += sd.generate(prompts[i : i + batch], seeds=seeds[i : i + batch], steps=steps, guidance=guidance)
    return np.stack([np.asarray(image) for image in made])


def score(sd, eye, count, steps, guidance, seed=0):
    """Returns ({"kind": share that the judge `eye` finds right, ...}, pictures, prompts)."""
    asked = questions(count, seed)
    prompts = [prompt(question) for question in asked]
    images = pictures(sd, prompts, [seed * count + i for i in range(count)], steps, guidance)
    given = eye.answers(images)
    right = {name: sum(g[name] == q[name] for g, q in zip(given, asked, strict=True)) / count for name in asked[0]}
    return right, images, prompts


def settings():
    """Reads train.toml, which sets the sampling steps and the guidance scale of the shipped model."""
    return tomllib.loads((HERE / "train.toml").read_text(encoding="utf-8"))


def main():
    shipped = settings()
    parser = cli.Parser(description="Score a base model with the judge.")
    parser.add_argument("--model", type=Path, default=HERE / "base", help="base model to score")
    parser.add_argument("--count", type=cli.positive, default=216, help="number of pictures")
    parser.add_argument("--steps", type=cli.positive, default=shipped["sample_steps"], help="sampling steps")
    parser.add_argument("--guidance-scale", type=float, default=shipped["guidance_scale"], help="1 turns guidance off")
    parser.add_argument("--seed", type=int, default=1, help="random seed of the prompts and the pictures")
    parser.add_argument("--sheet", type=Path, help="write 64 of the pictures to this file")
    args = parser.parse_args()

    sd, eye = StableDiffusion.load(args.model), judge.load()
    right, images, prompts = score(sd, eye, args.count, args.steps, args.guidance_scale, args.seed)
    print(
        f"{args.steps} steps, guidance {args.guidance_scale:g}; share of {args.count} pictures that match the prompt:"
    )
    print("  ".join(f"{name} {share:.1%}" for name, share in right.items()))

    rng = random.Random("fresh")
    drawn = [world.sample(rng) for _ in range(1000)]
    given = eye.answers(np.stack([world.draw(picture, rng) for picture in drawn]))
    itself = {name: np.mean([g[name] == getattr(p, name) for g, p in zip(given, drawn, strict=True)]) for name in right}
    print("the judge's own accuracy on 1000 drawings:")
    print("  ".join(f"{name} {share:.1%}" for name, share in itself.items()))
    if args.sheet:
        args.sheet.parent.mkdir(parents=True, exist_ok=True)
        world.sheet(images[:64]).save(args.sheet, quality=90)
        print("\n".join(f"row {i // 8 + 1}, column {i % 8 + 1}: {text}" for i, text in enumerate(prompts[:64])))


if __name__ == "__main__":
    with cli.reported("score.py"):
        main()
