"""Draws the training pictures once and keeps them on disk: 48,000 of the captioned world and 8,000 of a wider world.

The wider world adds hats, leaves and stripes of any colour. The autoencoder and the judge are trained on both worlds,
because the autoencoder must reproduce, and the judge must tell apart, things that the UNet has never seen. In the same
way the official autoencoder (OpenImages) and CLIP saw far more than any one data set. The UNet is trained on the
captioned world only.

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
    """job: (wide, seed), where wide is True for the wider world. Returns (Picture, (64, 64, 3) uint8)."""
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
    """Writes folder/images.npy, (count, 64, 64, 3) uint8, and folder/pictures.json, the Picture of each image."""
    folder.mkdir(parents=True, exist_ok=True)
    with Pool() as pool:
        drawn = pool.map(draw_one, [(wide, i) for i in range(count)], chunksize=200)
    np.save(folder / "images.npy", np.stack([image for _, image in drawn]))
    (folder / "pictures.json").write_text(json.dumps([asdict(picture) for picture, _ in drawn]))


def read(folder):
    """Returns (memory-mapped images, Pictures). Raises InputError if dataset.py has not written them yet."""
    rows = json.loads(need(folder / "pictures.json", "dataset.py").read_text())
    return np.load(folder / "images.npy", mmap_mode="r"), [world.Picture(**row) for row in rows]


def main():
    args = flags("Draw the training pictures.").parse_args()
    write(args.work_dir / "world", 48_000, wide=False)
    write(args.work_dir / "wide", 8_000, wide=True)


if __name__ == "__main__":
    with cli.reported("dataset.py"):
        main()
