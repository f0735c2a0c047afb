"""Draws the training pictures once and keeps them on disk: 48,000 of the world, and 8,000 of a wider one.

The wider world has what the captioned one has not: hats, leaves, and stripes of any colour. The autoencoder and the
judge see it too, as the real autoencoder (OpenImages) and CLIP saw far more than any one data set: they must be able
to show, and tell apart, things that the UNet has not met. The UNet sees only the captioned world.

    python weights/tiny/dataset.py
"""

import json
import random
from dataclasses import asdict
from multiprocessing import Pool

import numpy as np
import world
from training import flags, need

from ldm.runtime import cli


def draw_one(job):
    """(whether of the wider world, its seed) -> (Picture, (64, 64, 3) uint8)"""
    wide, seed = job
    rng = random.Random(f"{'wide' if wide else 'world'} {seed}")
    picture = world.sample(rng, **(widen(rng) if wide else {}))
    return picture, world.draw(picture, rng)


def widen(rng):
    """Attributes outside the captioned world."""
    rare = {"crown": rng.choice(world.CROWNS + world.RARE_CROWNS + world.RARE_CROWNS)}
    rare["second"] = rng.choice(("white", *world.RARE_SECONDS))
    if rng.random() < 0.6:
        rare["kind"] = "monster"
    return rare


def write(folder, count, wide):
    """folder/{images.npy, pictures.json}: (count, 64, 64, 3) uint8 and what each Picture is."""
    folder.mkdir(parents=True, exist_ok=True)
    with Pool() as pool:
        drawn = pool.map(draw_one, [(wide, i) for i in range(count)], chunksize=200)
    np.save(folder / "images.npy", np.stack([image for _, image in drawn]))
    (folder / "pictures.json").write_text(json.dumps([asdict(picture) for picture, _ in drawn]))


def read(folder):
    """(images, memory-mapped; Pictures). Raises InputError if there are none yet."""
    rows = json.loads(need(folder / "pictures.json", "dataset.py").read_text())
    return np.load(folder / "images.npy", mmap_mode="r"), [world.Picture(**row) for row in rows]


def main():
    args = flags("Draw the training pictures.").parse_args()
    write(args.work_dir / "world", 48_000, wide=False)
    write(args.work_dir / "wide", 8_000, wide=True)


if __name__ == "__main__":
    with cli.reported("dataset.py"):
        main()
