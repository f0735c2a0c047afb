"""Trains the text encoder with CLIP's loss: each caption must match its picture among all pictures of the batch.

CLIP (Radford et al. 2021) was trained on 400 million pairs from the web, with a large image tower. Stable Diffusion
uses its text encoder and keeps it frozen. Ours has 2 layers instead of 12 and a byte-pair vocabulary learned from our
own captions. Its image tower has four convolutions and is discarded after training. As in CLIP, the vector at the
end-of-text token represents the whole text.

    python weights/tiny/text_encoder.py
"""

import itertools
import json
import random
from collections import Counter
from dataclasses import asdict

import dataset
import torch
import torch.nn.functional as F
import world
from torch import nn
from training import Budget, flags, set_rate, to_tensor

from ldm.clip import TextEncoder
from ldm.config import TextConfig
from ldm.formats import save_tensors
from ldm.runtime import cli
from ldm.tokenizer import Tokenizer

CONTEXT_LENGTH, VECTOR = 32, 64
BATCH, PEAK_RATE = 256, 1.5e-3


def learn_merges(words):
    """Byte-pair encoding (Sennrich et al. 2016): merges the most frequent neighbours until every word is one token.

    words: Counter of words. Returns the merges in the order in which they are learned. "</w>" marks the end of a word.
    """
    pieces = {word: (*word[:-1], word[-1] + "</w>") for word in words}
    merges = []
    while any(len(p) > 1 for p in pieces.values()):
        pairs = Counter()
        for word, p in pieces.items():
            for pair in itertools.pairwise(p):
                pairs[pair] += words[word]
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for word, p in pieces.items():
            merged, i = [], 0
            while i < len(p):
                step = 2 if p[i : i + 2] == best else 1
                merged.append("".join(p[i : i + step]))
                i += step
            pieces[word] = tuple(merged)
    return merges


def learn_tokenizer(captions):
    """A tokenizer of CLIP's 512 byte tokens, our merges and the two special tokens, in this order.

    It encodes any text. Each word of the captions is one token.
    """
    counts = Counter(word for caption in captions for word in caption.split())
    merges = learn_merges(Counter({word: n for word, n in counts.items() if n > 100}))  # leaves out the invented words
    clip = Tokenizer.clip().vocab
    tokens = [*sorted(clip, key=clip.get)[:512], *("".join(m) for m in merges), "<|startoftext|>", "<|endoftext|>"]
    return Tokenizer({token: i for i, token in enumerate(tokens)}, merges, CONTEXT_LENGTH, pad_id=len(tokens) - 1)


class ImageTower(nn.Module):
    """(B, 3, 64, 64) -> (B, VECTOR). Used only while the text encoder trains."""

    def __init__(self):
        super().__init__()

        def layer(width, out):
            return nn.Sequential(nn.Conv2d(width, out, 3, 2, 1), nn.GroupNorm(8, out), nn.ReLU())

        self.convolutions = nn.Sequential(layer(3, 32), layer(32, 64), layer(64, 96), layer(96, 128))
        self.project = nn.Linear(2048, VECTOR)

    def forward(self, x):
        return self.project(self.convolutions(x).flatten(1))


class Clip(nn.Module):
    """The text encoder and the image tower, with the projection and the temperature that compare them."""

    def __init__(self, config):
        super().__init__()
        self.text, self.image = TextEncoder(config), ImageTower()
        self.text_projection = nn.Linear(config.width, VECTOR, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.66))  # log(1 / 0.07), CLIP's initial value

    def forward(self, ids, images, end):
        """ids (B, L), images (B, 3, 64, 64), end (B,) index of end-of-text -> similarities (B texts, B images)."""
        text = self.text(ids)[torch.arange(len(ids)), end]
        text, image = F.normalize(self.text_projection(text), dim=1), F.normalize(self.image(images), dim=1)
        return self.logit_scale.exp().clamp(max=100) * text @ image.T


def main():
    args = flags("Train the text encoder.", minutes=4).parse_args()

    torch.manual_seed(0)
    images, pictures = dataset.read(args.work_dir / "world")
    tokenizer = learn_tokenizer([world.caption(p, random.Random(i)) for i, p in enumerate(pictures)])
    tokenizer.save(args.work_dir / "tokenizer")
    config = TextConfig(
        vocab_size=tokenizer.vocab_size,
        context_length=CONTEXT_LENGTH,
        width=128,
        mlp_width=512,
        layers=2,
        heads=4,
        pad_id=tokenizer.pad_id,
    )
    model = Clip(config)
    model.image.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    budget = Budget(args.minutes)
    for step in itertools.count():
        rng = random.Random(f"text {step}")
        set_rate(optimizer, budget.learning_rate(PEAK_RATE))
        rows = sorted(rng.sample(range(len(images)), BATCH))
        ids = tokenizer([world.caption(pictures[row], rng) for row in rows])
        end = (ids == tokenizer.eos_id).int().argmax(1)  # the first one: padding is end-of-text too
        x = to_tensor(images[rows]).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids[:, : int(end.max()) + 1], x, end)
        truth = torch.arange(BATCH)
        loss = (F.cross_entropy(logits.float(), truth) + F.cross_entropy(logits.float().T, truth)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        done = budget.fraction == 1
        if step % 100 == 0 or done:
            minutes, found = budget.elapsed / 60, (logits.argmax(1) == truth).float().mean()
            print(f"{step:5d}  {minutes:.1f} min  loss {loss:.3f}  matched among {BATCH}: {found:.2f}", flush=True)
        if done:
            break

    save_tensors(args.work_dir / "text_encoder.safetensors", model.text.state_dict(), {})
    (args.work_dir / "text_encoder.json").write_text(json.dumps(asdict(config)))


if __name__ == "__main__":
    with cli.reported("text_encoder.py"):
        main()
