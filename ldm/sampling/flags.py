"""The flags of sample.py: what they are, what a picture says of them, and which values can't be."""

import math
import warnings
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from ldm import formats, samplers
from ldm.errors import InputError
from ldm.runtime import check_path, check_writable, cli, read_text
from ldm.tokenizer import check_prompt

MAX_PICTURES, MAX_BATCH = 100_000, 4096  # in one call, and computed at once


def parse(argv: Sequence[str] | None) -> Namespace:
    """The flags. With --from-picture, those that are not given are the picture's; `picture` has all that it says."""
    p = parser()
    args = p.parse_args(argv)
    if args.from_picture is None:
        return args
    try:
        said = formats.picture_text.read_text(args.from_picture)
    except InputError as error:
        raise InputError(f"--from-picture {error}") from None
    flags = vars(args).keys() - {"prompt", "init_image", "mask", "lora", "model", "tokens"}
    p.set_defaults(picture=said, **{name: value for name, value in said.items() if name in flags})
    args = p.parse_args(argv)
    if not args.prompt and args.prompts_file is None:
        args.prompt = [said["prompt"]]
    if "init_image" in said and args.init_image is None:
        raise InputError(f"{args.from_picture} was made from a picture {said['init_image']}: give it as --init-image")
    if "mask" in said and args.mask is None:
        raise InputError(f"{args.from_picture} was painted in a mask {said['mask']}: give it as --mask")
    if "strength" in said and args.init_image is None:  # A1111's text does not name the picture
        warnings.warn(
            f"{args.from_picture} has a strength: if it was made from a picture, give that as --init-image",
            stacklevel=2,
        )
    if "lora" in said and not args.lora:
        raise InputError(f"{args.from_picture} was made with {said['lora']}: give it as --lora")
    if "tokens" in said and not args.embedding:
        raise InputError(f"{args.from_picture} was made with learned tokens {said['tokens']}: give their --embedding")
    return args


def parser() -> cli.Parser:
    """The command line of sample.py. A flag that is not given may be None: see `fill_in` there."""
    p = cli.Parser(prog="sample.py", description="Makes pictures from prompts.")
    _add_model_flags(p)
    _add_picture_flags(p)
    _add_start_flags(p)
    _add_machine_flags(p)
    return p


def _add_model_flags(p: cli.Parser) -> None:
    """What to sample from."""
    p.add_argument(
        "--model", help="official .safetensors or .ckpt file or diffusers folder; the embedded tiny model if not given"
    )
    cli.add_source_flags(p)
    p.add_argument(
        "--lora",
        action="append",
        default=[],
        type=cli.scaled_path,
        metavar="FILE[:SCALE]",
        help="LoRA to apply, of this or any other program, and how much of it, 1 if not given; repeatable",
    )
    p.add_argument(
        "--embedding",
        action="append",
        default=[],
        metavar="FILE",
        help="learned token to add, of this or any other program; repeatable. Its word in a prompt is the name in a "
        "file of diffusers, and the name of the file itself in those of A1111 and kohya",
    )


def _add_picture_flags(p: cli.Parser) -> None:
    """What to show, and how to get there."""
    as_run = "as in the model's training run, else"
    p.add_argument("--prompt", action="append", default=[], help="text that the picture should show; repeatable")
    p.add_argument("--prompts-file", help="text file with one prompt per line")
    p.add_argument("--negative-prompt", default="", help="text that the picture should not show")
    p.add_argument("--num-images", type=cli.positive, default=1, help="pictures per prompt")
    p.add_argument("--steps", type=int, help=f"sampling steps, 1 to 999; if not given, {as_run} 50")
    p.add_argument(
        "--guidance-scale", type=float, help=f"classifier-free guidance; 1 is off; if not given, {as_run} 7.5"
    )
    p.add_argument(
        "--guidance-rescale", type=float, default=0.0, help="reduces the contrast that guidance adds, 0 to 1"
    )
    p.add_argument(
        "--zero-terminal-snr", action="store_true", help="start at pure noise; for models trained to predict v that way"
    )
    p.add_argument(
        "--sampler",
        help=f"{', '.join(samplers.SAMPLERS)}; or help, which describes them; if not given, {as_run} ddim",
    )
    p.add_argument("--eta", type=float, default=0.0, help="noise that DDIM adds, 0 to 1")
    p.add_argument("--seed", type=int, default=0, help="seed of each prompt's first picture; the i-th has seed + i")
    p.add_argument("--height", type=int, help=f"pixels; if not given, {as_run} the size that the model was trained at")
    p.add_argument("--width", type=int, help=f"pixels; if not given, {as_run} the size that the model was trained at")


def _add_start_flags(p: cli.Parser) -> None:
    """Pictures to begin with."""
    p.add_argument(
        "--from-picture",
        metavar="FILE.png",
        help="make this picture again: flags that are not given are as its text says, ours or A1111's; --model is not "
        "in it",
    )
    p.set_defaults(picture={})
    p.add_argument("--init-image", help="picture to start from instead of noise; resized and cut to the size to sample")
    p.add_argument(
        "--mask",
        help="picture as large as --init-image that says which part of it to paint: white; where it is black, "
        "--init-image keeps its bits",
    )
    p.add_argument(
        "--strength",
        type=float,
        help="fraction of the steps to run from --init-image: 0 returns it, 1 ignores what is there; if not given, "
        "0.8, and 1 with --mask",
    )


def _add_machine_flags(p: cli.Parser) -> None:
    """What to compute with, and where the pictures go."""
    p.add_argument("--batch-size", type=cli.positive, default=4, help="pictures computed at once")
    p.add_argument("--device", help="cuda, cpu, ...; the best one on this machine if not given")
    p.add_argument("--dtype", choices=cli.DTYPES, default="fp32", help="type that the networks compute in")
    p.add_argument(
        "--compile",
        action="store_true",
        help="compile the UNet first: takes seconds to minutes, pays for many pictures",
    )
    p.add_argument(
        "--vae-tiling", action="store_true", help="decode one picture at a time, in strips: less memory for large ones"
    )
    p.add_argument("--output-dir", default="samples", help="folder for the pictures; no file in it is overwritten")
    p.add_argument("--grid", action="store_true", help="also write one sheet: a row per prompt, a column per seed")


def check_flags(args: Namespace) -> None:
    """Raises InputError for flags that are wrong whatever the model is."""
    if args.sampler is not None:
        samplers.find(args.sampler)
    if args.guidance_scale is not None and not math.isfinite(args.guidance_scale):
        raise InputError(f"--guidance-scale {args.guidance_scale} is not a number; 7.5 is usual")
    if not 0.0 <= args.guidance_rescale <= 1.0:
        raise InputError(f"--guidance-rescale {args.guidance_rescale} is not between 0 and 1")
    try:
        samplers.steps_for_strength(args.steps or 1, 1.0 if args.strength is None else args.strength)
    except InputError as error:
        raise InputError(f"--{error}") from None
    if args.mask is not None and args.init_image is None:
        raise InputError(f"--mask {args.mask} needs --init-image: the picture of which a part is painted")
    if not 0.0 <= args.eta <= 1.0:
        raise InputError(f"--eta {args.eta} is not between 0 and 1")
    if args.batch_size > MAX_BATCH:
        raise InputError(f"--batch-size {args.batch_size} is too much: it should be at most {MAX_BATCH}")
    if not 0 <= args.seed < 2**63 - args.num_images:
        raise InputError(f"--seed {args.seed} is not a whole number from 0 to 2**63")
    check_path(args.output_dir, "--output-dir")
    check_writable(Path(args.output_dir), "--output-dir")


def read_prompts(args: Namespace) -> list[str]:
    """The prompts of both flags. Raises InputError if there is none, or the file can't be read."""
    prompts = list(args.prompt)
    if args.prompts_file is not None:
        try:
            lines = read_text(args.prompts_file).split("\n")
        except InputError as error:
            raise InputError(f"--prompts-file {error}") from None
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError('nothing to show: give --prompt "a photo of a cat", or --prompts-file')
    for prompt in (*prompts, args.negative_prompt):
        check_prompt(prompt)
    if len(prompts) * args.num_images > MAX_PICTURES:
        raise InputError(
            f"{len(prompts) * args.num_images} pictures are too many: at most {MAX_PICTURES} are made in one call; "
            "lower --num-images, or give fewer prompts"
        )
    return prompts
