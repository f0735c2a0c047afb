"""Compares the time that this package and diffusers take to sample pictures.

    python tests/bench/sampling.py --dtype bf16                                  the embedded model on the CPU
    python tests/bench/sampling.py --random sd1 --steps 50 --guidance 7.5 --pictures 1 --dtype bf16 --compile whole

Ours is `generate` of the model that sample.py loads. diffusers runs `StableDiffusionPipeline` with `DDIMScheduler`.
Both get the same weights, latents and prompts, and end with pictures as tensors on the device. First both sample in
fp32, and their latents and pictures must agree. In another type, and compiled, ours must be as close to those latents
as diffusers'.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import measure
import torch
from torch import Tensor

import sample
from ldm import sampling

PROMPT = "a photo of a red cat on the beach"
BLOCKS = ("ResBlock", "TransformerBlock")  # of our UNet, repeated often; each is compiled once
Sample = Callable[[str], Tensor]  # "latent" or "tensor", pictures in [-1, 1] -> (B, C, H, W)


def main(argv: Sequence[str] | None = None) -> None:
    parser = measure.parser(__doc__)
    add_flags(parser)
    parser.add_argument("--compile", choices=("blocks", "whole"), help="compile both UNets: block by block, or whole")
    args = parser.parse_args(argv)
    with measure.opened(args) as folder, torch.no_grad():
        truth = exact_latents(folder, args)
        sides = {who: side(folder, args, measure.dtype_of(args)) for who, side in SIDES.items()}
        check(sides, truth, args)
        sd = sides["ours"].sd
        once = measure.weight_bytes(sd.text_encoder, sd.vae.decoder)
        moved = once + args.steps * measure.weight_bytes(sd.unet)
        least = measure.floor(sides["ours"].flop(), moved, args.device, measure.dtype_of(args))
        if args.compile:
            for side in sides.values():
                side.compile(args.compile)
            check(sides, truth, args)
        works = {who: partial(side, "tensor") for who, side in sides.items()}
        measure.report("sampling", args, measure.time_sides(works, args.rounds, args.device), least)


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pictures", type=int, default=16, help="pictures in the batch")
    parser.add_argument("--steps", type=int, default=25, help="DDIM steps")
    parser.add_argument("--guidance", type=float, default=4.0, help="guidance scale")


def exact_latents(folder: Path, args: argparse.Namespace) -> Tensor:
    """The latents that both sides sample in fp32. Ends the script unless these and the pictures agree."""
    sides = {who: side(folder, args, torch.float32) for who, side in SIDES.items()}
    torch.backends.cudnn.allow_tf32 = False
    latents = [side("latent") for side in sides.values()]
    measure.check_close("latents", *latents, 1e-4 * latents[0].abs().max().item())
    pictures = [side("tensor").clamp(-1, 1) for side in sides.values()]
    measure.check_close("pictures", *pictures, 2 / 255)
    return latents[0]


def check(sides: dict[str, "Ours | Diffusers"], truth: Tensor, args: argparse.Namespace) -> None:
    """Ends the script unless our latents are as close to `truth` as diffusers' are."""
    off = {who: (side("latent").float() - truth).square().mean().sqrt().item() for who, side in sides.items()}
    if args.dtype != "fp32":
        print(f"latents, away from fp32's: ours {off['ours']:.4f}, diffusers' {off['diffusers']:.4f}")
    most = 1e-5 * truth.abs().max().item() if args.dtype == "fp32" else 0.0
    if not off["ours"] <= max(most, 1.5 * off["diffusers"]):
        measure.fail(f"our latents are {off['ours']:.3g} away from those in fp32, diffusers' {off['diffusers']:.3g}")


class Ours:
    def __init__(self, folder: Path, args: argparse.Namespace, dtype: torch.dtype):
        flags = ["--model", folder, "--prompt", PROMPT, "--dtype", str(dtype).removeprefix("torch.")]
        self.sd, self.args = sample.load(sampling.parser().parse_args(flags), torch.device(args.device)), args
        config = self.sd.config
        self.latents = draw(args, config.unet.in_channels, config.vae.factor)

    def __call__(self, output: str) -> Tensor:
        how = {"steps": self.args.steps, "guidance": self.args.guidance, "sampler": "ddim"}
        return self.sd.generate(PROMPT, latents=self.latents, output=output, **how)

    def flop(self) -> int:
        """Counted network by network: steps that a CUDA graph replays would not count."""
        rows = self.latents.repeat(1 if self.args.guidance == 1 else 2, 1, 1, 1).to(
            next(self.sd.unet.parameters()).dtype
        )
        context, t = self.sd.encode_prompt([PROMPT] * len(rows)), torch.zeros(len(rows), device=rows.device)
        evaluation = measure.flop_of(lambda: self.sd.unet(rows, t, context))
        prompts = measure.flop_of(lambda: self.sd.encode_prompt(["", PROMPT]))
        return prompts + self.args.steps * evaluation + measure.flop_of(lambda: self.sd.decode_latents(self.latents))

    def compile(self, how: str) -> None:
        torch._dynamo.config.recompile_limit = 64  # blocks of one class have many sizes
        for module in [self.sd.unet] if how == "whole" else self.sd.unet.modules():
            if how == "whole" or type(module).__name__ in BLOCKS:
                module.compile(fullgraph=True, dynamic=False)


class Diffusers:
    def __init__(self, folder: Path, args: argparse.Namespace, dtype: torch.dtype):
        from diffusers import DDIMScheduler, StableDiffusionPipeline

        self.pipe, self.args = StableDiffusionPipeline.from_pretrained(folder).to(args.device, dtype), args
        self.pipe.scheduler = DDIMScheduler.from_config(self.pipe.scheduler.config)
        self.pipe.set_progress_bar_config(disable=True)
        latents = draw(args, self.pipe.unet.config.in_channels, self.pipe.vae_scale_factor)
        self.latents = latents.to(dtype)  # the pipeline keeps them in the networks' type

    def __call__(self, output: str) -> Tensor:
        how = {"num_inference_steps": self.args.steps, "guidance_scale": self.args.guidance}
        kind = {"latent": "latent", "tensor": "pt"}[output]
        images = self.pipe([PROMPT] * len(self.latents), latents=self.latents, output_type=kind, **how).images
        return images if output == "latent" else images * 2 - 1

    def compile(self, how: str) -> None:
        """As diffusers' page on speed says."""
        if how == "blocks":
            self.pipe.unet.compile_repeated_blocks(fullgraph=True)
        else:
            self.pipe.unet.to(memory_format=torch.channels_last)
            self.pipe.unet.compile(mode="max-autotune", fullgraph=True)


SIDES = {"ours": Ours, "diffusers": Diffusers}


def draw(args: argparse.Namespace, channels: int, factor: int) -> Tensor:
    """The standard normal noise that both start from, (B, 4, h, w)."""
    shape = (args.pictures, channels, args.size // factor, args.size // factor)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(args.device)


if __name__ == "__main__":
    main()
