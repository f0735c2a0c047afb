"""Trains the judge, a small classifier of the drawn world that scores generated pictures without an outside network.

It plays the part that CLIP and DINO play in the DreamBooth paper (section 4): its answers say whether a picture
shows what the prompt asks for, and its features say how alike two things are. It learns from drawings only, never
from generated pictures. Heads: kind, colour, pattern, scene; for monsters also shape, eyes, crown, mouth and the
second colour. Training adds blur and noise, so that the autoencoder's errors do not change the answers.

    python weights/tiny/judge.py
"""

import itertools
import random
from pathlib import Path

import dataset
import numpy as np
import torch
import torch.nn.functional as F
import world
from safetensors.torch import load_file
from torch import nn
from training import Budget, flags, need, set_rate, to_tensor

from ldm.formats import save_tensors
from ldm.runtime import cli

HEADS = {
    "kind": world.KINDS,
    "colour": tuple(world.COLOURS),
    "pattern": world.PATTERNS,
    "scene": world.SCENES,
    "shape": world.SHAPES,
    "eyes": world.EYES,
    "crown": world.CROWNS + world.RARE_CROWNS,
    "mouth": world.MOUTHS,
    "second": ("white", *world.RARE_SECONDS),
}
FILE = "judge.safetensors"
BATCH, PEAK_RATE = 96, 2e-3


class Judge(nn.Module):
    """(B, 3, 64, 64) in [-1, 1] -> features of the thing (B, 64), and {head: logits (B, classes)}."""

    def __init__(self):
        super().__init__()

        def layer(width, out, stride):
            return nn.Sequential(nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU())

        self.trunk = nn.Sequential(
            layer(3, 32, 2), layer(32, 48, 2), layer(48, 96, 1), layer(96, 128, 2), layer(128, 128, 1)
        )
        self.thing = nn.Linear(256, 64)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(128 if name == "scene" else 64, len(HEADS[name])) for name in HEADS}
        )
        self.register_buffer("centre", torch.zeros(64))  # the mean of drawn monsters

    def forward(self, x):
        h = self.trunk(x)  # (B, 128, 8, 8)
        mean, peak = h.mean((2, 3)), h.amax((2, 3))
        thing = self.thing(torch.cat([mean, peak], 1))  # (B, 64)
        return thing, {name: head(mean if name == "scene" else thing) for name, head in self.heads.items()}

    @torch.no_grad()
    def features(self, images):
        """(B, 64, 64, 3) uint8 -> (B, 64) of unit length: describes the thing, not the scene.

        The mean of drawn monsters is subtracted first.
        """
        return F.normalize(self(to_tensor(images))[0] - self.centre, dim=1)

    @torch.no_grad()
    def answers(self, images):
        """(B, 64, 64, 3) uint8 -> one dict for each picture, such as {"kind": "cat", "colour": "red", ...}."""
        best = {name: logits.argmax(1).tolist() for name, logits in self(to_tensor(images))[1].items()}
        return [{name: HEADS[name][best[name][i]] for name in HEADS} for i in range(len(images))]


def load(folder=Path(__file__).parent):
    """Loads the judge of a folder, by default the shipped one. Raises InputError if the folder has none."""
    judge = Judge()
    judge.load_state_dict(load_file(need(folder / FILE, "judge.py")))
    return judge.eval()


def blur(x):
    """Imitates the errors of the autoencoder and the sampler: blur, noise and a change of contrast."""
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.lerp(x, soft, torch.rand(len(x), 1, 1, 1) * 1.2)
    x = x * (1 + 0.12 * (torch.rand(len(x), 1, 1, 1) - 0.5)) + 0.08 * (torch.rand(len(x), 3, 1, 1) - 0.5)
    return x + torch.rand(len(x), 1, 1, 1) * 0.12 * torch.randn_like(x)


def labels(pictures):
    """Class numbers (N, heads); -1 where a head does not apply: a ball has no eyes, a plain thing no second colour."""
    rows = []
    for p in pictures:
        row = {name: choices.index(getattr(p, name)) for name, choices in HEADS.items()}
        if p.kind != "monster":
            row.update(shape=-1, eyes=-1, crown=-1, mouth=-1)
        if p.pattern == "plain":
            row["second"] = -1
        rows.append(list(row.values()))
    return torch.tensor(rows)


@torch.no_grad()
def accuracy(judge, images, pictures):
    """Returns {head: share of right answers}. Leaves the judge in training mode."""
    judge.eval()
    logits, truth = judge(to_tensor(images))[1], labels(pictures)
    judge.train()
    return {
        n: round(float((logits[n].argmax(1) == truth[:, i])[truth[:, i] >= 0].float().mean()), 4)
        for i, n in enumerate(HEADS)
    }


def main():
    args = flags("Train the judge.", minutes=3).parse_args()

    torch.manual_seed(0)
    folders = [dataset.read(args.work_dir / name) for name in ("world", "wide")]
    images = np.concatenate([images for images, _ in folders])
    truth = labels([p for _, pictures in folders for p in pictures])
    held = [dataset.draw_one((False, f"held {i}")) for i in range(1000)]
    held_images, held_pictures = np.stack([image for _, image in held]), [picture for picture, _ in held]

    judge = Judge().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=PEAK_RATE, weight_decay=1e-2)
    budget = Budget(args.minutes)
    for step in itertools.count():
        rng = random.Random(f"judge {step}")
        set_rate(optimizer, budget.learning_rate(PEAK_RATE))
        rows = sorted(rng.sample(range(len(images)), BATCH))
        x, y = blur(to_tensor(images[rows])), truth[rows]
        logits = judge(x.contiguous(memory_format=torch.channels_last))[1]
        loss = sum(F.cross_entropy(logits[name], y[:, i], ignore_index=-1) for i, name in enumerate(HEADS))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 300 == 0:
            right = accuracy(judge, held_images, held_pictures)
            print(f"{step:5d}  {budget.elapsed / 60:.1f} min  loss {loss:.3f}  {right}", flush=True)
        if budget.fraction == 1:
            break

    judge.eval()
    monsters = np.array([image for image, p in zip(held_images, held_pictures, strict=True) if p.kind == "monster"])
    with torch.no_grad():
        judge.centre.copy_(judge(to_tensor(monsters))[0].mean(0))
    state = {name: t.half() if t.is_floating_point() else t for name, t in judge.state_dict().items()}
    save_tensors(args.work_dir / FILE, state, {})
    print(f"{step} steps, as saved: {accuracy(load(args.work_dir), held_images, held_pictures)}")


if __name__ == "__main__":
    with cli.reported("judge.py"):
        main()
