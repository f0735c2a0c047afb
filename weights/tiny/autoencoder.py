"""Trains the autoencoder: 64 x 64 x 3 pictures <-> 16 x 16 x 4 latents.

The official autoencoder (LDM, section 3.1; kl-f8) was trained on 256 x 256 crops of OpenImages with L1 + LPIPS, a small
KL term (weight 1e-6) and, from step 50,001, a patch discriminator. After that it stayed frozen. Ours is trained on
drawings in flat colours, for which L1, L2 and the L1 of the picture's gradients (edges) are enough. Its KL weight is
larger, because smooth latents are easier to learn. The first half of the training uses 32 x 32 crops, four times as
many for the same work; the second half uses whole pictures.

    python weights/tiny/autoencoder.py [--resume]
"""

import itertools
import json
import random
from dataclasses import asdict, replace

import dataset
import numpy as np
import torch
import torch.nn.functional as F
from training import Budget, flags, need, save, set_rate, to_tensor

from ldm.config import VAEConfig
from ldm.formats import save_tensors
from ldm.runtime import cli
from ldm.vae import Autoencoder

CONFIG = VAEConfig(channels=(32, 64, 64), blocks=1, latent_channels=4, norm_groups=8, scale_factor=1.0)
KL_WEIGHT = 2e-3  # of the KL per latent number; the reconstruction loss is a mean over pixels
PEAK_RATE = 8e-4
KEPT_BACK = 500  # the last pictures are held out of training


def reconstruction_loss(made, true):
    """L1 + L2 + L1 of the horizontal and vertical differences; all (B, 3, H, W) in [-1, 1]."""
    edges = F.l1_loss(made.diff(dim=3), true.diff(dim=3)) + F.l1_loss(made.diff(dim=2), true.diff(dim=2))
    return F.l1_loss(made, true) + F.mse_loss(made, true) + 0.5 * edges


def batch(images, wide, rng, crop):
    """Random pictures: some come from the wider world, and half of those have their colour channels swapped.

    Returns (16, 3, 64, 64), or (32, 3, 32, 32) crops, in [-1, 1].
    """
    size, n_wide = (32, 12) if crop else (16, 4)
    rows = sorted(rng.sample(range(len(images) - KEPT_BACK), size - n_wide))
    wide_rows = sorted(rng.sample(range(len(wide)), n_wide))
    x = np.concatenate([images[rows], wide[wide_rows]])
    x[-n_wide // 2 :] = x[-n_wide // 2 :][..., rng.sample(range(3), 3)]
    if crop:
        top, left = rng.randint(0, 32), rng.randint(0, 32)
        x = x[:, top : top + 32, left : left + 32]
    return to_tensor(x).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def psnr(model, images):
    """Peak signal-to-noise ratio in dB on 100 held-out pictures."""
    x = to_tensor(images[-KEPT_BACK:][:100])
    error = (model.decode(model.encode(x).mode()).clamp(-1, 1) - x).square().mean((1, 2, 3)) / 4
    return float((-10 * error.log10()).mean())


def main():
    parser = flags("Train the autoencoder.", minutes=18)
    parser.add_argument("--resume", action="store_true", help="continue an interrupted training")
    args = parser.parse_args()

    torch.manual_seed(0)
    images, wide = dataset.read(args.work_dir / "world")[0], dataset.read(args.work_dir / "wide")[0]
    model = Autoencoder(CONFIG).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=1e-3)
    first, spent, checkpoint = 0, 0.0, args.work_dir / "autoencoder.pt"
    if args.resume:
        state = torch.load(need(checkpoint, "autoencoder.py without --resume"))
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, spent = state["step"], state["spent"]

    budget = Budget(args.minutes, spent)
    for step in itertools.count(first):
        rng = random.Random(f"autoencoder {step}")
        set_rate(optimizer, budget.learning_rate(PEAK_RATE))
        x = batch(images, wide, rng, crop=budget.fraction < 0.5)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = model.encode(x)
            made = model.decode(posterior.sample())
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        loss = reconstruction_loss(made.float(), x) + KL_WEIGHT * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        done = budget.fraction == 1
        if step % 200 == 0 or done:
            minutes, quality = budget.elapsed / 60, psnr(model, images)
            print(f"{step:6d}  {minutes:5.1f} min  loss {loss:.4f}  kl {kl:.2f}  {quality:.2f} dB", flush=True)
            both = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save(checkpoint, {**both, "spent": budget.elapsed, "step": step + 1})
        if done:
            break

    # scale_factor = 1 / standard deviation of the latents, so that the UNet sees latents of about unit variance
    with torch.no_grad():
        std = model.encode(to_tensor(images[:512])).sample().std()
    config = replace(CONFIG, scale_factor=round(float(1 / std), 5))
    (args.work_dir / "autoencoder.json").write_text(json.dumps(asdict(config)))
    save_tensors(args.work_dir / "autoencoder.safetensors", model.state_dict(), {})
    print(config)


if __name__ == "__main__":
    with cli.reported("autoencoder.py"):
        main()
