"""Trains the UNet on latents, with the autoencoder and the text encoder frozen, and writes the whole model.

The official SD1 (LDM, section 3) was trained on 2 billion captioned pictures of LAION, at 256 px and then at 512, on
256 A100s for about a month: AdamW, batch 2048, learning rate 1e-4 after a warm-up, an average of the weights with decay
0.9999, and 10 % of the captions empty, so that guidance works. Ours sees the same 48,000 drawings many times, each time
with a new caption and new noise. Two things differ besides size. First, it predicts v, like SD2's 768-v: colour is
decided at the noisiest steps, and there eps says almost nothing about the picture. Second, beta ends at 0.02: with SD's
0.012 the last step still shows the picture's mean colour, and a sampler that starts from pure noise gets it wrong.

    python weights/tiny/unet.py [--resume]
"""

import itertools
import json
import random
from collections import deque

import dataset
import judge
import numpy as np
import score
import torch
import torch.nn.functional as F
import world
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from training import Budget, flags, need, save, set_rate, to_tensor

from ldm import InputError, StableDiffusion
from ldm.config import ModelConfig, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from ldm.runtime import cli
from ldm.tokenizer import Tokenizer
from ldm.training.ema import EMA

UNET = UNetConfig(
    channels=(64, 96, 128), attention=(False, True, False), blocks=1, heads=4, context_dim=128, norm_groups=16
)
SCHEDULE = ScheduleConfig(prediction="v", beta_end=0.02)
BATCH, PEAK_RATE, EMPTY, DECAY = 48, 1e-3, 0.1, 0.999
SAVE_EVERY, LOOK_EVERY = 2 * 60, 15 * 60  # seconds


def assemble(folder):
    """Returns the model with a new UNet and the trained autoencoder, text encoder and tokenizer.

    Raises InputError if one of them is missing.
    """
    vae = json.loads(need(folder / "autoencoder.json", "autoencoder.py").read_text())
    vae = VAEConfig(**vae | {"channels": tuple(vae["channels"])})
    text = TextConfig(**json.loads(need(folder / "text_encoder.json", "text_encoder.py").read_text()))
    config = ModelConfig(unet=UNET, vae=vae, text=text, schedule=SCHEDULE, sample_size=world.SIZE // vae.factor)
    sd = StableDiffusion(config, Tokenizer.from_folder(folder / "tokenizer"))
    sd.vae.load_state_dict(load_file(folder / "autoencoder.safetensors"))
    sd.text_encoder.load_state_dict(load_file(folder / "text_encoder.safetensors"))
    sd.vae.requires_grad_(False)
    sd.text_encoder.requires_grad_(False)
    return sd


@torch.no_grad()
def encode_all(sd, images):
    """Mean and standard deviation of every picture's scaled latents: (N, 8, 16, 16) float16."""
    moments = []
    for i in tqdm(range(0, len(images), 100), desc="encoding"):
        with torch.autocast("cpu", torch.bfloat16):
            posterior = sd.vae.encode(to_tensor(images[i : i + 100]).contiguous(memory_format=torch.channels_last))
        both = torch.cat([posterior.mean, posterior.std], 1).float() * sd.config.vae.scale_factor
        moments.append(both.half())
    return torch.cat(moments)


@torch.no_grad()
def training_batch(sd, moments, pictures, step):
    """Returns noisy latents, steps, contexts and targets. They depend on the step number only."""
    rng, generator = random.Random(f"unet {step}"), torch.Generator().manual_seed(step)
    rows = rng.sample(range(len(pictures)), BATCH)
    mean, std = moments[rows].float().chunk(2, dim=1)
    x0 = mean + std * torch.randn(mean.shape, generator=generator)
    noise = torch.randn(x0.shape, generator=generator)
    # Logit-normal, as in SD3 (Esser et al. 2024, section 3.1): most steps lie where shapes are decided. SD1 drew steps
    # uniformly. One step comes from each 1/48th of the distribution: less variance than independent draws.
    u = (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH
    t = (torch.sigmoid(1.2 * torch.special.ndtri(u.clamp(1e-4, 1 - 1e-4)) - 0.6) * SCHEDULE.timesteps).long()
    captions = ["" if rng.random() < EMPTY else world.caption(pictures[row], rng) for row in rows]
    return sd.schedule.add_noise(x0, noise, t), t, sd.encode_prompt(captions), sd.schedule.target(x0, noise, t)


@torch.no_grad()
def look(sd, eye, folder, step):
    """Scores 64 pictures of the model, saves them as a sheet, and saves the model as a diffusers folder in float16."""
    shipped = score.settings()
    right, images, _ = score.score(sd, eye, 64, shipped["sample_steps"], shipped["guidance_scale"])
    print(f"{step:6d}  {right}", flush=True)
    world.sheet(images).save(folder / f"sheet_{step:06d}.png")
    sd.save(folder / "base", layout="diffusers", dtype=torch.float16)


def main():
    parser = flags("Train the UNet and write the model.", minutes=70)
    parser.add_argument("--resume", action="store_true", help="continue an interrupted training")
    args = parser.parse_args()

    torch.manual_seed(0)
    sd, eye = assemble(args.work_dir), judge.load(args.work_dir)
    images, pictures = dataset.read(args.work_dir / "world")
    base = sd.source_fingerprint()
    sd.unet.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(sd.unet.parameters(), lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    ema = EMA(dict(sd.unet.named_parameters()), DECAY)
    first, spent, checkpoint = 0, 0.0, args.work_dir / "unet.pt"
    if args.resume:
        state = torch.load(need(checkpoint, "unet.py without --resume"))
        if state["base"] != base:
            raise InputError(f"{checkpoint} is for another autoencoder or text encoder; start again without --resume")
        sd.unet.load_state_dict(state["unet"])
        optimizer.load_state_dict(state["optimizer"])
        ema.averages, ema.updates = state["averages"], state["step"]
        first, spent = state["step"], state["spent"]

    moments = encode_all(sd, images)
    budget, losses = Budget(args.minutes, spent), deque(maxlen=300)
    saved = looked = budget.elapsed
    for step in itertools.count(first):
        set_rate(optimizer, budget.learning_rate(PEAK_RATE))
        x, t, context, target = training_batch(sd, moments, pictures, step)
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):  # faster on CPUs than flash attention
            prediction = sd.unet(x.contiguous(memory_format=torch.channels_last), t, context)
        loss = F.mse_loss(prediction.float(), target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sd.unet.parameters(), 1.0)
        optimizer.step()
        ema.update()
        losses.append(loss.item())

        done = budget.fraction == 1
        if step % 100 == 0 or done:
            print(f"{step:6d}  {budget.elapsed / 60:5.1f} min  loss {np.mean(losses):.4f}", flush=True)
        if budget.elapsed - saved > SAVE_EVERY or done:
            saved = budget.elapsed
            networks = {"unet": sd.unet.state_dict(), "optimizer": optimizer.state_dict(), "averages": ema.averages}
            save(checkpoint, networks | {"base": base, "step": step + 1, "spent": saved})
        if budget.elapsed - looked > LOOK_EVERY or done:
            looked = budget.elapsed
            with ema.applied():
                look(sd, eye, args.work_dir, step)
        if done:
            break


if __name__ == "__main__":
    with cli.reported("unet.py"):
        main()
