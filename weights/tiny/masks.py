"""Measures what masks do: how much of the photographs' background leaks into new pictures.

Draws four photographs of the subject, each in front of the same loud wallpaper, and their masks. Tunes the embedded
model on them without the masks, with them, and with no loss at all outside of them, with two seeds each, and compares
with effect.py's measures. Without masks a model learns the wallpaper together with the subject, and shows it where the
prompt asks for another scene.

    python weights/tiny/masks.py

A run that an earlier call left in the same --work-dir is resumed. One that is measured is left as it is.
"""

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

import effect
import numpy as np
import torch
import world
from PIL import Image, ImageDraw
from scenes import CANVAS

from ldm import StableDiffusion
from ldm.runtime import cli, replacing
from ldm.sampling import contact_sheet

HERE = Path(__file__).parent
SEEDS = (0, 1)
ARMS = {  # name: the folder of the photographs, and flags of train.py
    "without masks": ("plain", []),
    "with masks": ("masked", []),
    "with masks, weight 0 outside": ("masked", ["--unmasked-weight", "0"]),
}


def wallpaper(rng):
    """Diagonal stripes in two loud colours, shifted at random, as a PIL image."""
    canvas = Image.new("RGB", (CANVAS, CANVAS), (250, 120, 20))
    pen, shift = ImageDraw.Draw(canvas), rng.uniform(0, 64)
    for x in range(-CANVAS, 2 * CANVAS, 64):
        left = x + shift
        pen.polygon([(left, 0), (left + 32, 0), (left + 32 - CANVAS, CANVAS), (left - CANVAS, CANVAS)], (0, 120, 130))
    return canvas


def photograph(picture, name):
    """A picture in front of the wallpaper, and its mask: (64, 64, 3) and (64, 64) uint8.

    Drawn in front of black and of white: where the two differ, one sees the background (Smith & Blinn 1996).
    """

    def before(canvas):
        return world.draw(picture, random.Random(name), canvas)

    black, white = (before(Image.new("RGB", (CANVAS, CANVAS), colour)) for colour in ("black", "white"))
    mask = 255 - (white.astype(int) - black).mean(2).round()
    return before(wallpaper(random.Random(f"{name} wallpaper"))), mask.astype(np.uint8)


def write_photographs(subject, folder, masks):
    """Writes the four photographs, and with `masks` NAME-mask.png beside each. Returns the photographs' paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i}.png" for i in range(len(world.VIEWS))]
    for path, (_, size, x) in zip(paths, world.VIEWS, strict=True):
        name = f"{subject} {path.stem}"
        picture = replace(world.subject(subject, random.Random(name), size=size, flip=False), x=x)
        pixels, mask = photograph(picture, name)
        Image.fromarray(pixels).save(path)
        if masks:
            Image.fromarray(mask).save(path.with_name(f"{path.stem}-mask.png"))
    return paths


def measured(folder, model, settings, likeness):
    """The numbers and eight pictures of a model; both are kept in `folder`. likeness: from effect.likeness."""
    numbers, shown = folder / "measures.json", folder / "measured.png"
    if not numbers.exists():
        with torch.no_grad():
            found, plain, placed, _ = effect.measure(StableDiffusion.load(model), settings, *likeness)
        with replacing(shown) as temporary:
            Image.fromarray(np.concatenate([*plain[:2], *placed[:6]], 1)).save(temporary, format="PNG")
        with replacing(numbers) as temporary:
            temporary.write_text(json.dumps(found) + "\n", encoding="utf-8")
    pictures = np.split(np.asarray(Image.open(shown)), 8, 1)
    return json.loads(numbers.read_text(encoding="utf-8")), [Image.fromarray(picture) for picture in pictures]


def main():
    parser = cli.Parser(description="Measure what masks do on the embedded model.")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/masks"), help="folder of the runs and the sheet")
    parser.add_argument("--subject", default="baron", choices=world.SUBJECTS, help="subject of world.py to learn")
    parser.add_argument("train_flags", nargs="*", help="more flags for train.py, after --")
    args = parser.parse_args()

    likeness, results, rows = effect.likeness(args.subject), {}, []
    for (arm, (kind, flags)), seed in itertools.product(ARMS.items(), SEEDS):
        name, photographs = f"{arm}, seed {seed}", args.work_dir / kind
        paths = write_photographs(args.subject, photographs, masks=kind == "masked")
        run = args.work_dir / name.replace(", ", "-").replace(" ", "-")
        if not (run / "measures.json").exists():
            common = ["--config", HERE / "train.toml", "--instance-data-dir", photographs, "--seed", str(seed)]
            common += ["--class-data-dir", args.work_dir / f"class-{seed}", "--num-validation-images", "1"]
            effect.train(run, [*common, *flags, *args.train_flags])
        settings = effect.settings_of(run)
        if not rows:
            rows.append(("four photographs of the subject", [Image.open(path) for path in paths]))
            results["base"], _ = measured(args.work_dir, HERE / "base", settings, likeness)
        results[name], pictures = measured(run, run / "model.safetensors", settings, likeness)
        rows.append((f'{name}: "{settings["instance_prompt"]}", then {", ".join(effect.NEW_SCENES)}', pictures))
        print(effect.table(results), flush=True)
    contact_sheet.grid(rows).save(args.work_dir / "masks.jpg", quality=90)
    (args.work_dir / "masks.md").write_text(effect.table(results) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with cli.reported("masks.py"):
        main()
