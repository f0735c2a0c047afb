"""Pictures from prompts.

    python sample.py --prompt "a photo of a red cat on the beach" --num-images 4 --grid

Picture i of each prompt has the seed --seed + i, so that a grid's columns share their seeds. A picture's file carries
its prompt, seed, sampler, steps, guidance and the model's fingerprint as PNG text.
"""

import io
import math
import os
import re
import tomllib
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from ldm import cli, data, distributed, files, samplers, sheet
from ldm.errors import InputError, RunError
from ldm.model import StableDiffusion

TINY = Path(__file__).parent / "weights" / "tiny"


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    settle(args)
    if args.sampler == "help":
        print(samplers.listing())
        return
    prompts = read_prompts(args)
    check(args)
    folder = Path(args.output_dir)
    files.insist_writable(folder, "--output-dir")
    world = distributed.start(args.device)
    with world.agreed():
        sd = load(args, world.device)
        _, height, width = (side * sd.config.vae.factor for side in sd.latent_shape(args.height, args.width))
        sd.schedule.spaced(args.steps)
        init_image, steps = None, args.steps
        if args.init_image is not None:
            init_image = data.to_tensor(data.fit(args.init_image, width, height))
            steps = samplers.taken(args.steps, args.strength)
        fingerprint = sd.fingerprint()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--output-dir {folder} can't be made: {error.strerror}") from None

    if world.main:
        print(sd.about)
    index = world.share(first_free_index(folder))
    jobs = [(prompt, args.seed + i) for prompt in prompts for i in range(args.num_images)]
    jobs = [(folder / f"{index + k:05d}-{seed}.png", prompt, seed) for k, (prompt, seed) in enumerate(jobs)]
    batches = [jobs[i : i + args.batch_size] for i in range(0, len(jobs), args.batch_size)]
    batches = batches[world.rank :: world.size]  # torchrun's processes share them
    total = len(batches) * samplers.evaluations(args.sampler, steps)
    with tqdm(total=total, desc="sampling", unit="step", disable=not world.main) as bar:
        for batch in batches:
            made = sd.generate(
                [prompt for _, prompt, _ in batch],
                negative_prompt=args.negative_prompt,
                steps=args.steps,
                guidance=args.guidance_scale,
                guidance_rescale=args.guidance_rescale,
                sampler=args.sampler,
                eta=args.eta,
                seeds=[seed for _, _, seed in batch],
                height=args.height,
                width=args.width,
                init_image=init_image,
                strength=args.strength,
                progress=bar.update,
            )
            for (path, prompt, seed), picture in zip(batch, made, strict=True):
                text = {
                    "prompt": prompt,
                    "negative_prompt": args.negative_prompt,
                    "seed": seed,
                    "sampler": args.sampler,
                    "eta": args.eta,
                    "steps": args.steps,
                    "guidance_scale": args.guidance_scale,
                    "guidance_rescale": args.guidance_rescale,
                    "size": f"{picture.width}x{picture.height}",
                    "model": fingerprint,
                }
                if init_image is not None:
                    text |= {"init_image": Path(args.init_image).name, "strength": args.strength}
                write_png(path, picture, text)
    world.wait()
    if world.main and args.grid:
        n, pictures = args.num_images, [Image.open(path) for path, _, _ in jobs]
        rows = [(prompt, pictures[i * n : (i + 1) * n]) for i, prompt in enumerate(prompts)]
        number = first_free_index(folder, "grid-")
        write_png(folder / f"grid-{number:05d}.png", sheet.grid(rows), {"model": fingerprint})
    if world.main:
        print(f"{len(jobs)} pictures in {folder}")
    world.close()


def load(args: Namespace, device: torch.device) -> StableDiffusion:
    source = {"ema": args.ema, "prediction": args.prediction_type, "variant": args.variant}
    return StableDiffusion.load(args.model, device, cli.DTYPES[args.dtype], **source)


def settle(args: Namespace) -> None:
    """Fills in the model and what depends on it: the embedded one is best at steps and guidance of its own."""
    usual = {"sample_steps": 50, "guidance_scale": 7.5}
    if args.model is None:
        args.model = str(TINY / "base")
        usual |= tomllib.loads((TINY / "train.toml").read_text(encoding="utf-8"))
    args.steps = usual["sample_steps"] if args.steps is None else args.steps
    args.guidance_scale = usual["guidance_scale"] if args.guidance_scale is None else args.guidance_scale


def parser() -> cli.Parser:
    p = cli.Parser(prog="sample.py", description="Pictures from prompts.")
    p.add_argument("--model", help="official .safetensors or .ckpt file or diffusers folder; the tiny one if not given")
    cli.add_source_flags(p)
    p.add_argument("--prompt", action="append", default=[], help="what to show; repeatable")
    p.add_argument("--prompts-file", help="a file with one prompt a line")
    p.add_argument("--negative-prompt", default="", help="what guidance leads away from")
    p.add_argument("--num-images", type=cli.positive, default=1, help="pictures for each prompt")
    p.add_argument("--steps", type=int, help="sampling steps, 1 to 999; 50 if not given")
    p.add_argument("--guidance-scale", type=float, help="how strongly to follow the prompt; 1 is off, 7.5 if not given")
    p.add_argument("--guidance-rescale", type=float, default=0.0, help="undoes its excess of contrast, 0 to 1")
    p.add_argument("--sampler", default="ddim", help=f"{', '.join(samplers.SAMPLERS)}; or help, for a line on each")
    p.add_argument("--eta", type=float, default=0.0, help="noise in DDIM, from 0 to 1")
    p.add_argument("--seed", type=int, default=0, help="of each prompt's first picture; the i-th has seed + i")
    p.add_argument("--height", type=int, help="pixels; the size that the model was trained at if not given")
    p.add_argument("--width", type=int, help="pixels; the size that the model was trained at if not given")
    p.add_argument("--init-image", help="a picture to start from instead of noise")
    p.add_argument("--strength", type=float, default=0.8, help="how much of that picture is redone, 0 to 1")
    p.add_argument("--batch-size", type=cli.positive, default=4, help="pictures computed at once")
    p.add_argument("--device", help="cuda, cpu, ...; the best one here if not given")
    p.add_argument("--dtype", choices=cli.DTYPES, default="fp32", help="what the networks compute in")
    p.add_argument("--output-dir", default="samples", help="folder for the pictures; nothing in it is overwritten")
    p.add_argument("--grid", action="store_true", help="also one sheet: a row for each prompt, a column for each seed")
    return p


def check(args: Namespace) -> None:
    """Raises InputError for what can be seen to be wrong before the model is read."""
    samplers.find(args.sampler)
    if not math.isfinite(args.guidance_scale):
        raise InputError(f"--guidance-scale {args.guidance_scale} is not a number; 7.5 is usual")
    if not 0.0 <= args.guidance_rescale <= 1.0:
        raise InputError(f"--guidance-rescale {args.guidance_rescale} is not between 0 and 1")
    samplers.taken(args.steps, args.strength)
    if not 0.0 <= args.eta <= 1.0:
        raise InputError(f"--eta {args.eta} is not between 0 and 1")
    if not 0 <= args.seed < 2**63 - args.num_images:
        raise InputError(f"--seed {args.seed} is not a whole number from 0 to 2**63")


def read_prompts(args: Namespace) -> list[str]:
    prompts = list(args.prompt)
    if args.prompts_file is not None:
        try:
            lines = Path(args.prompts_file).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--prompts-file {args.prompts_file} can't be read: {error}") from None
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError('nothing to show: give --prompt "a photo of a cat", or --prompts-file')
    return prompts


def first_free_index(folder: Path, prefix: str = "") -> int:
    """One more than the highest number that a picture's name in the folder has after the prefix."""
    found = (re.match(rf"{prefix}(\d+)\b", path.name) for path in folder.glob("*.png"))
    return max((int(match[1]) for match in found if match), default=-1) + 1


def write_png(path: Path, picture: Image.Image, text: dict[str, object]) -> None:
    """Writes a new file, all of it at once; an existing one is an error, never overwritten."""
    info = PngInfo()
    for key, value in text.items():
        info.add_itxt(key, str(value))
    content = io.BytesIO()
    picture.save(content, format="PNG", pnginfo=info)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content.getvalue())
        os.link(temporary, path)  # unlike a rename, it fails where something of that name has come up meanwhile
    except OSError as error:
        raise RunError(f"{path} can't be written: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    with cli.reported("sample.py"):
        main()
