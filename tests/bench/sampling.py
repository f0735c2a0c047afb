"""Compares the time that this package and diffusers take to sample pictures.

    python tests/bench/sampling.py --dtype bf16                                  the embedded model on the CPU
    python tests/bench/sampling.py --random sd1 --steps 50 --guidance 7.5 --pictures 1 --dtype bf16 --compile whole

diffusers runs `StableDiffusionPipeline` with `DDIMScheduler`. Both get the same weights, latents and prompts, and end
with pictures as tensors on the device. First both sample in fp32, and their latents and pictures must agree. In another
type, ours must then be as close to those latents as diffusers'.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import measure
import torch
from measure import StableDiffusion
from torch import Tensor

PROMPT = "a photo of a red cat on the beach"
BLOCKS = ("ResBlock", "TransformerBlock")  # of our UNet, repeated often; each is compiled once
Sample = Callable[[str], Tensor]  # "latent" or "tensor", pictures in [-1, 1] -> (B, C, H, W)


def main(argv: Sequence[str] | None = None) -> None:
    parser = measure.parser(__doc__)
    add_flags(parser)
    parser.add_argument("--compile", choices=("blocks", "whole"), help="compile both UNets: block by block, or whole")
    args = parser.parse_args(argv)
    with measure.opened(args) as folder, torch.no_grad():
        sides = checked(folder, args)
        sd = sides["ours"].sd
        flop = measure.flop_of(partial(sides["ours"], "tensor"))
        once = measure.weight_bytes(sd.text_encoder, sd.vae.decoder)
        moved = once + args.steps * measure.weight_bytes(sd.unet)
        least = measure.floor(flop, moved, args.device, measure.dtype_of(args))
        if args.compile:
            for side in sides.values():
                side.compile(args.compile)
        works = {who: partial(side, "tensor") for who, side in sides.items()}
        measure.report("sampling", args, measure.time_sides(works, args.rounds, args.device), least)


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pictures", type=int, default=16, help="pictures in the batch")
    parser.add_argument("--steps", type=int, default=25, help="DDIM steps")
    parser.add_argument("--guidance", type=float, default=4.0, help="guidance scale")


def checked(folder: Path, args: argparse.Namespace) -> dict[str, "Ours | Diffusers"]:
    """Both sides in `args.dtype`, if they compute the same."""
    exact = {who: side(folder, args, torch.float32) for who, side in SIDES.items()}
    torch.backends.cudnn.allow_tf32 = False
    truth = exact["ours"]("latent")
    measure.check_close("latents", truth, exact["diffusers"]("latent"), 1e-4 * truth.abs().max().item())
    pictures = [side("tensor").clamp(-1, 1) for side in exact.values()]
    measure.check_close("pictures", *pictures, 2 / 255)
    if args.dtype == "fp32":
        return exact
    del exact
    sides = {who: side(folder, args, measure.dtype_of(args)) for who, side in SIDES.items()}
    off = {who: (side("latent").float() - truth).square().mean().sqrt().item() for who, side in sides.items()}
    print(f"latents, away from fp32's: ours {off['ours']:.4f}, diffusers' {off['diffusers']:.4f}")
    if not off["ours"] <= 1.5 * off["diffusers"]:
        measure.fail(f"in {args.dtype} our latents are {off['ours'] / off['diffusers']:.2f} times as far from fp32's")
    return sides


class Ours:
    def __init__(self, folder: Path, args: argparse.Namespace, dtype: torch.dtype):
        self.sd, self.args = StableDiffusion.load(folder, args.device, dtype, mapped=False), args
        config = self.sd.config
        self.latents = draw(args, config.unet.in_channels, config.vae.factor)

    def __call__(self, output: str) -> Tensor:
        how = {"steps": self.args.steps, "guidance": self.args.guidance, "sampler": "ddim"}
        return self.sd.generate(PROMPT, latents=self.latents, output=output, **how)

    def compile(self, how: str) -> None:
        for module in [self.sd.unet] if how == "whole" else self.sd.unet.modules():
            if how == "whole" or type(module).__name__ in BLOCKS:
                module.compile(fullgraph=True)


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
