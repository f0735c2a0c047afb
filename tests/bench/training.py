"""Compares the time of a DreamBooth step of UNet and text encoder here and in diffusers' train_dreambooth.py.

    python tests/bench/training.py                                               4 + 4 rows, embedded model
    python tests/bench/training.py --random sd1 --rows 1 --dtype bf16 --peer best
    python tests/bench/training.py --whole --steps 100                           whole processes, step by step

Ours is `train.train` itself, without checkpoints. The peer is the loop of diffusers' script, written here on diffusers'
modules and accelerate: it reads and encodes its pictures and encodes its prompts at every step. It has two forms:

    default   the script with --train_text_encoder --with_prior_preservation alone: fp32
    best      also --mixed_precision (of --dtype), --allow_tf32, --set_grads_to_none, and on a GPU
              --dataloader_num_workers 4. The script has no flags for cached latents, fused AdamW or channels_last, and
              refuses --pre_compute_text_embeddings with --train_text_encoder.

Ours runs with --mixed-precision of --dtype and --allow-tf32. First both make three steps in fp32 on the same rows, and
their losses must agree.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
import torch.nn.functional as F
from measure import Side
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import train
from ldm import training
from ldm.dreambooth import Batch
from ldm.runtime import processes
from ldm.training import FullTuning, Run
from ldm.validation import Validation

PROMPTS = ("a photo of sks monster", "a photo of a monster")  # of the subject and of its class
RATE = 2e-6
CHECKED = 3  # steps whose losses are compared


def main(argv: Sequence[str] | None = None) -> None:
    parser = measure.parser(__doc__)
    add_flags(parser)
    parser.add_argument("--peer", choices=("default", "best"), default="default", help="flags of diffusers' script")
    parser.add_argument("--steps", type=int, default=5, help="steps in one timing")
    parser.add_argument("--whole", action="store_true", help="time the loops of train.py and the script as processes")
    parser.add_argument("--child", nargs=3, metavar=("WHO", "MODEL", "DATA"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        who, *paths = args.child
        print(LOOPS[who](*map(Path, paths), args))
        return
    with measure.opened(args) as folder, tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch)
        make_pictures(data, args.size)
        check(folder, data, args)
        if args.whole:
            measure.report("training_whole", args, time_processes(folder, data, args))
            return
        works = {"ours": Ours(folder, data, args, args.dtype), "diffusers": Script(folder, data, args, args.peer)}
        step = partial(works["ours"], 1)
        sd = works["ours"].state.trainable.sd
        # Bytes of a weight in fp32: read forward and backward, its gradient written; AdamW reads both and writes the
        # weight; it reads and writes two moments.
        each = 3 * 4 + 3 * 4 + 4 * (1 if args.use_8bit_adam else 4)
        moved = each * measure.weight_bytes(sd.unet, sd.text_encoder) // 4
        least = measure.floor(measure.flop_of(step), moved, args.device, measure.dtype_of(args))
        sides = measure.time_sides({who: partial(w, args.steps) for who, w in works.items()}, args.rounds, args.device)
        for side in sides.values():
            side.seconds = [seconds / args.steps for seconds in side.seconds]
        measure.report("training", args, sides, least)


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=4, help="rows of the subject, and as many of the class")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="in both")
    parser.add_argument("--use-8bit-adam", action="store_true", help="in both; needs bitsandbytes")
    parser.add_argument("--ours", default="", help="more flags of train.py, for ours alone, in one string")


def make_pictures(folder: Path, size: int) -> None:
    """Four photographs and eight class pictures of this size."""
    random = np.random.default_rng(0)
    for kind, count in (("subject", 4), ("class", 8)):
        (folder / kind).mkdir()
        for i in range(count):
            small = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            small.resize((size, size), Image.Resampling.BICUBIC).save(folder / kind / f"{i}.png")


def check(folder: Path, data: Path, args: argparse.Namespace) -> None:
    """Ends the script unless both sides have the same losses on the same rows, in fp32."""
    plain = argparse.Namespace(**vars(args) | {"use_8bit_adam": False, "gradient_checkpointing": False, "ours": ""})
    ours = Ours(folder, data, plain, "fp32", exact=True)
    batches = ours.record(CHECKED)
    theirs = Script(folder, data, plain, "default")
    torch.backends.cudnn.allow_tf32 = False
    losses = [theirs.step(*theirs.rows_of(batch)) for batch in batches]
    for step, (a, b) in enumerate(zip(ours.losses(), losses, strict=True), 1):
        if not abs(a - b) <= 1e-5 * abs(b):
            measure.fail(f"the losses of step {step} are {a!r} and {b!r}")


class Ours:
    """`ours(n)` makes n steps as train.py does."""

    def __init__(self, folder: Path, data: Path, args: argparse.Namespace, dtype: str, exact: bool = False):
        words = [*arguments(folder, data, args, dtype), "--output-dir", tempfile.mkdtemp(dir=data)]
        words += ["--no-allow-tf32"] if exact else []
        self.settings = training.parse(words, train.TINY)
        self.run = Run(self.settings, processes.start(self.settings.device))
        self.state, *pictures = train.begin(self.run, FullTuning)
        self.validation = Validation(self.run, self.state, *pictures)
        self.batches = train.prepare(self.run, self.state, *pictures)
        self.run.save_if_due = lambda state: None

    def __call__(self, steps: int) -> None:
        training.set_exactness(self.settings.allow_tf32, self.settings.deterministic)
        self.run.settings = self.state.settings = replace(self.settings, max_train_steps=self.state.step + steps)
        self.state._wrapped = False  # `train` is called again, and wraps the model again
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
            train.train(self.run, self.state, self.batches, self.validation)

    def record(self, steps: int) -> list[Batch]:
        """Makes steps, and returns copies of their batches."""
        batches, plain = [], train.dreambooth_step

        def recording(run: Run, state: Any, model: nn.Module, batch: Batch):
            copies = {name: getattr(batch, name).clone() for name in ("latents", "noise", "t", "is_class")}
            batches.append(replace(batch, **copies))
            return plain(run, state, model, batch)

        train.dreambooth_step = recording
        try:
            self(steps)
        finally:
            train.dreambooth_step = plain
        return batches

    def losses(self) -> list[float]:
        return [json.loads(line)["loss"] for line in (self.run.folder / "metrics.jsonl").read_text().splitlines()]


def arguments(folder: Path, data: Path, args: argparse.Namespace, dtype: str) -> list[str]:
    """The command line of train.py."""
    flags = {
        "model": folder,
        "instance-data-dir": data / "subject",
        "class-data-dir": data / "class",
        "num-class-images": 8,
        "instance-prompt": PROMPTS[0],
        "class-prompt": PROMPTS[1],
        "resolution": args.size,
        "train-batch-size": args.rows,
        "learning-rate": RATE,
        "mixed-precision": {"fp32": "no"}.get(dtype, dtype),
        "num-validation-images": 1,
        "sample-steps": 1,
        "device": args.device,
    }
    more = shlex.split(args.ours)
    switches = ["allow-tf32"] + [name for name in ("gradient-checkpointing", "use-8bit-adam") if switched(args, name)]
    return [*(f"--{name}={value}" for name, value in flags.items()), *(f"--{name}" for name in switches), *more]


def switched(args: argparse.Namespace, name: str) -> bool:
    return getattr(args, name.replace("-", "_"))


class Script:
    """`script(n)` makes n steps as diffusers' train_dreambooth.py does. peer: "default" or "best"."""

    def __init__(self, folder: Path, data: Path, args: argparse.Namespace, peer: str):
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
        from diffusers.optimization import get_scheduler
        from transformers import CLIPTextModel, CLIPTokenizer

        AcceleratorState._reset_state(True)  # a process may have several, one after the other
        self.best, cuda = peer == "best", args.device.startswith("cuda")
        mixed = args.dtype if self.best and args.dtype != "fp32" else "no"
        self.accelerator = Accelerator(cpu=not cuda, mixed_precision=mixed)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
        self.scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        self.vae = AutoencoderKL.from_pretrained(folder, subfolder="vae").requires_grad_(False)
        self.vae.to(self.accelerator.device, measure.DTYPES[args.dtype] if mixed != "no" else torch.float32)
        unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
        text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")
        if args.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
            text_encoder.gradient_checkpointing_enable()
        kind = torch.optim.AdamW
        if args.use_8bit_adam:
            from bitsandbytes.optim import AdamW8bit as kind
        optimizer = kind([*unet.parameters(), *text_encoder.parameters()], lr=RATE, weight_decay=1e-2)
        loader = DataLoader(
            Pairs(data, args.size, self.tokenizer),
            batch_size=args.rows,
            shuffle=True,
            collate_fn=collate,
            num_workers=4 if self.best and cuda else 0,
        )
        parts = (unet.train(), text_encoder.train(), optimizer, loader, get_scheduler("constant", optimizer))
        self.unet, self.text_encoder, self.optimizer, self.loader, self.rates = self.accelerator.prepare(*parts)
        self.batches = self.endless()

    def endless(self) -> Iterator[dict[str, Tensor]]:
        while True:
            yield from self.loader

    def __call__(self, steps: int) -> None:
        torch.backends.cuda.matmul.allow_tf32 = self.best
        torch.backends.cudnn.allow_tf32 = True  # torch's default
        torch.use_deterministic_algorithms(False)
        with open(os.devnull, "w") as nowhere, tqdm(total=steps, desc="Steps", file=nowhere) as bar:
            for _ in range(steps):
                batch = next(self.batches)
                latents = self.vae.encode(batch["pixels"].to(self.vae.dtype)).latent_dist.sample()
                latents = latents * self.vae.config.scaling_factor
                noise = torch.randn_like(latents)
                t = torch.randint(self.scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
                loss = self.step(latents, noise, t, batch["ids"])
                bar.update()
                bar.set_postfix(loss=loss, lr=self.rates.get_last_lr()[0])

    def step(self, latents: Tensor, noise: Tensor, t: Tensor, ids: Tensor) -> float:
        """One update on rows of the subject and as many of the class, (B, 4, h, w). Returns the loss."""
        with self.accelerator.accumulate(self.unet):
            noisy = self.scheduler.add_noise(latents, noise, t)
            context = self.text_encoder(ids, attention_mask=None, return_dict=False)[0]
            prediction = self.unet(noisy, t, context, return_dict=False)[0].float()
            is_v = self.scheduler.config.prediction_type == "v_prediction"
            target = (self.scheduler.get_velocity(latents, noise, t) if is_v else noise).float()
            halves = zip(prediction.chunk(2), target.chunk(2), strict=True)
            subject, prior = (F.mse_loss(a, b) for a, b in halves)
            loss = subject + 1.0 * prior
            self.accelerator.backward(loss)
            trained = [*self.unet.parameters(), *self.text_encoder.parameters()]
            self.accelerator.clip_grad_norm_(trained, 1.0)
            self.optimizer.step()
            self.rates.step()
            self.optimizer.zero_grad(set_to_none=self.best)
        return loss.detach().item()

    def rows_of(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The arguments of `step` for one of our batches: its rows of the subject first."""
        order = batch.is_class.int().argsort(stable=True)
        ids = torch.cat([tokens(self.tokenizer, batch.prompts[i]) for i in order.tolist()])
        return batch.latents[order], batch.noise[order], batch.t[order], ids.to(batch.latents.device)


class Pairs(Dataset):
    """A photograph and a class picture a row, read, cut and tokenized each time, as the script does."""

    def __init__(self, data: Path, size: int, tokenizer: Any):
        self.kinds = [sorted((data / kind).iterdir()) for kind in ("subject", "class")]
        self.kinds = [[path for path in paths if path.suffix == ".png"] for paths in self.kinds]
        self.size, self.tokenizer = size, tokenizer

    def __len__(self) -> int:
        return max(map(len, self.kinds))

    def __getitem__(self, index: int) -> list[tuple[Tensor, Tensor]]:
        paths = [paths[index % len(paths)] for paths in self.kinds]
        return [(self.read(path), tokens(self.tokenizer, p)) for path, p in zip(paths, PROMPTS, strict=True)]

    def read(self, path: Path) -> Tensor:
        picture = Image.open(path).convert("RGB").resize((self.size, self.size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1.0


def tokens(tokenizer: Any, prompt: str) -> Tensor:
    options = {"truncation": True, "padding": "max_length", "max_length": tokenizer.model_max_length}
    return tokenizer(prompt, return_tensors="pt", **options).input_ids


def collate(rows: list[list[tuple[Tensor, Tensor]]]) -> dict[str, Tensor]:
    """All photographs, then all class pictures."""
    pairs = [row[kind] for kind in (0, 1) for row in rows]
    return {"pixels": torch.stack([image for image, _ in pairs]), "ids": torch.cat([ids for _, ids in pairs])}


# Whole processes


def time_processes(folder: Path, data: Path, args: argparse.Namespace) -> dict[str, Side]:
    """Seconds per step of the two loops, each time in a new process, in ABBA order."""
    sides = {who: Side() for who in LOOPS}
    for _ in range(args.rounds):
        for who in [*LOOPS, *reversed(LOOPS)]:
            command = [sys.executable, *sys.argv, f"--size={args.size}", "--child", who, str(folder), str(data)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{who} ended with status {done.returncode}: {done.stderr.strip()[-2000:]}")
            sides[who].seconds.append(float(done.stdout.splitlines()[-1]) / args.steps)
    return sides


def our_loop(folder: Path, data: Path, args: argparse.Namespace) -> float:
    """Runs train.py. Returns the seconds of its loop, the checkpoint after the last step included."""
    plain, seconds = train.train, []

    def timed(*everything: Any) -> None:
        seconds.append(measure.seconds_of(partial(plain, *everything), args.device))

    train.train = timed
    out = Path(tempfile.mkdtemp(dir=data), "run")
    train.main([*arguments(folder, data, args, args.dtype), f"--max-train-steps={args.steps}", f"--output-dir={out}"])
    return seconds[0]


def their_loop(folder: Path, data: Path, args: argparse.Namespace) -> float:
    script = Script(folder, data, args, args.peer)
    return measure.seconds_of(partial(script, args.steps), args.device)


LOOPS = {"ours": our_loop, "diffusers": their_loop}


if __name__ == "__main__":
    main()
