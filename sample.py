"""Pictures from prompts.

    python sample.py --prompt "a photo of a red cat on the beach" --num-images 4 --grid

Picture i of each prompt has the seed --seed + i, so that the pictures in a column of a grid share their seed. Each PNG
file says how its picture was made, for people, for other programs and for --from-picture, which makes it again.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported ends without a traceback

import re
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from ldm import formats, images, samplers, sampling, tokens
from ldm.errors import InputError, RunError
from ldm.formats import Adapter
from ldm.guidance import Canvas
from ldm.model import StableDiffusion
from ldm.runtime import (
    Stop,
    Stopped,
    World,
    cli,
    compile_blocks,
    list_folder,
    out_of_memory_named,
    processes,
    read_toml,
    replacing,
    written,
)
from ldm.unet import ResBlock, TransformerBlock

MAX_COPIES = 64  # of one picture, computed at once only for the same bits
TINY = Path(__file__).parent / "weights" / "tiny"


class Job(NamedTuple):
    """A picture to make."""

    path: Path
    prompt: str
    seed: int


def main(argv: Sequence[str] | None = None) -> None:
    args = sampling.parse(argv)
    if args.sampler == "help":
        print(samplers.listing())
        return
    prompts = sampling.read_prompts(args)
    try:
        sampling.check_flags(args)
    except InputError as error:
        of = f" (flags that are not given are those of {args.from_picture})" if args.from_picture else ""
        raise InputError(f"{error}{of}") from None
    world = processes.start(args.device)
    with Stop() as stop:
        try:
            sample(args, prompts, world, stop)
        except Stopped:
            world.print_main(f"stopped; the pictures that were complete are in {args.output_dir}")
    world.close()
    if stop.asked:
        raise SystemExit(130)


def sample(args: Namespace, prompts: list[str], world: World, stop: Stop) -> None:
    """Makes all pictures; every process its share. Raises Stopped when a signal comes, with no picture half-written."""
    with world.agreed(), stop.at_once():
        sd = load(args, world.device)
        adapters = [sd.apply_lora(path, scale) for path, scale in args.lora]
        for adapter in adapters:
            tokens.add_bundled(sd, adapter)
        sd.adopt_schedule(adapters)
        from_run = fill_in(args, sd, adapters)
        if args.grid:
            sampling.contact_sheet.check_size(len(prompts), args.num_images, args.width, args.height)
        canvas = load_canvas(args, sd)
        how = sampling.recipe(args, sd)
        sampling.check_same(args, how)
    jobs = world.on_main(lambda: make_jobs(args, prompts))
    batches = [jobs[i : i + args.batch_size] for i in range(0, len(jobs), args.batch_size)]
    batches = batches[world.rank :: world.size]  # torchrun's processes share them
    steps = args.steps if canvas is None else samplers.steps_for_strength(args.steps, canvas.strength)
    total = len(batches) * samplers.find(args.sampler).evaluations(steps)

    if world.main:
        print(sd.summary)
        if from_run:
            print(f"sampling as in the model's training run: {', '.join(from_run)}")
        if canvas is not None:
            tell_size(args)
    with world.agreed(), tqdm(total=total, desc="sampling", unit="step", disable=not world.main) as bar:
        for batch in batches:
            with stop.at_once():
                pictures = make(args, sd, canvas, batch, bar.update)
            for row, (job, picture) in enumerate(zip(batch, pictures, strict=True)):
                facts = {"prompt": job.prompt, "seed": job.seed, "width": picture.width, "height": picture.height}
                facts |= how | batch_place(args, batch, row)
                write_png(job.path, picture, formats.picture_text.to_text(facts))
    if world.main:
        if args.grid:
            write_grid(prompts, jobs, how["model"])
        print(f"{len(jobs)} pictures in {args.output_dir}")


def load(args: Namespace, device: torch.device) -> StableDiffusion:
    """The model of --model, or the embedded one. Raises InputError if it is damaged or does not suit the flags."""
    sd = StableDiffusion.load(args.model or TINY / "base", device, cli.DTYPES[args.dtype], **cli.source_options(args))
    sd.check_finite()
    args.tokens = [tokens.add_embedding(sd, path) for path in args.embedding]
    if args.zero_terminal_snr:
        sd.reschedule(zero_terminal_snr=True, spacing="trailing")
    sd.prefer_device_layout()
    if args.compile:
        compile_blocks(sd.unet, ResBlock, TransformerBlock)
    sd.tiling = args.vae_tiling
    return sd


def fill_in(args: Namespace, sd: StableDiffusion, adapters: Sequence[Adapter]) -> list[str]:
    """Fills in the flags that were not given: as in the training run of the model, or of its first LoRA that says it,
    else the usual values.

    Returns what was taken from the training run, in words. Raises InputError for values that do not suit the model.
    """
    values = {"sampler": "ddim", "steps": 50, "guidance_scale": 7.5, "resolution": sd.config.resolution}
    if args.model is None:  # the embedded model is best at other values
        tiny = read_toml(TINY / "train.toml")
        values |= {"steps": tiny["sample_steps"], "guidance_scale": tiny["guidance_scale"]}
    sources = [sd.source, *(replace(sd.source, metadata=adapter.metadata, path=adapter.path) for adapter in adapters)]
    run, from_run = next(filter(None, (source.sampling() for source in sources)), {}), []
    words = {"sampler": "{}", "steps": "{} steps", "guidance_scale": "guidance {}", "resolution": "{} px"}
    for name, value in (values | run).items():
        flags = ("height", "width") if name == "resolution" else (name,)
        absent = [flag for flag in flags if getattr(args, flag) is None]
        for flag in absent:
            setattr(args, flag, value)
        if absent and name in run:
            from_run.append(words[name].format(value))
    sd.schedule.check_steps(args.steps)
    for name in ("height", "width"):
        if (side := getattr(args, name)) > images.MAX_SIDE:
            raise InputError(f"--{name} {side} is too much: it should be at most {images.MAX_SIDE} pixels")
    sd.check_size(args.height, args.width)
    return from_run


def load_canvas(args: Namespace, sd: StableDiffusion) -> Canvas | None:
    """The picture to start from and its mask, resized and cut to the size to sample; None if there is none.

    Raises InputError for files that can't be used.
    """
    if args.init_image is None:
        return None
    size, mask = (args.width, args.height), None
    picture = images.read_picture(Path(args.init_image))
    image = images.to_tensor(images.fit(picture, *size))
    if args.mask is not None:
        mask = images.load_mask(args.mask, images.upright_size(picture), *size)
    canvas = Canvas.of(image, mask, args.strength)
    args.strength = canvas.strength
    try:
        canvas.latent_mask(sd.latent_shape(args.height, args.width)[1:])
    except InputError as error:
        raise InputError(f"--mask {args.mask}: {error}") from None
    return canvas


def tell_size(args: Namespace) -> None:
    """Prints that --init-image has another size than the pictures, if it has."""
    size = images.upright_size(images.read_picture(Path(args.init_image)))
    if size != (args.width, args.height):
        sizes = "{} x {} to {} x {} pixels".format(*size, args.width, args.height)
        print(f"{args.init_image} is resized and cut from {sizes}; --width and --height give another size")


def make_jobs(args: Namespace, prompts: list[str]) -> list[Job]:
    """A job for each prompt and seed, with file names that are free in the output folder. Makes the folder."""
    folder = Path(args.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output-dir {folder} can't be made: {error.strerror}") from None
    first = first_free_index(folder)
    pairs = [(prompt, args.seed + i) for prompt in prompts for i in range(args.num_images)]
    return [Job(folder / f"{first + k:05d}-{seed}.png", prompt, seed) for k, (prompt, seed) in enumerate(pairs)]


def batch_place(args: Namespace, batch: list[Job], row: int) -> dict[str, int]:
    """The size of the batch that is computed, and the job's row in it.

    The last bits of a picture depend on the batch's size. --from-picture fills a batch of the same size with copies.
    """
    size, place = (args.picture.get(name, -1) for name in ("batch_size", "batch_row"))
    if len(batch) == 1 and size == args.batch_size <= MAX_COPIES and 0 <= place < size:
        return {"batch_size": size, "batch_row": place}
    return {"batch_size": len(batch), "batch_row": row}


def make(
    args: Namespace,
    sd: StableDiffusion,
    canvas: Canvas | None,
    batch: list[Job],
    progress: Callable[[], object],
) -> list[Image.Image]:
    """The pictures of a batch of jobs. Raises RunError if the device has too little memory for the batch."""
    place = batch_place(args, batch, 0)
    if len(batch) < place["batch_size"]:
        again = make(args, sd, canvas, batch * place["batch_size"], progress)
        return [again[place["batch_row"]]]
    with out_of_memory_named(
        sd.device, "while it made pictures", "lower --batch-size, or give --dtype bf16 or --vae-tiling"
    ):
        return sd.generate(
            [job.prompt for job in batch],
            negative_prompt=args.negative_prompt,
            steps=args.steps,
            guidance=args.guidance_scale,
            guidance_rescale=args.guidance_rescale,
            sampler=args.sampler,
            eta=args.eta,
            seeds=[job.seed for job in batch],
            height=args.height,
            width=args.width,
            init_image=None if canvas is None else canvas.image,
            mask=None if canvas is None else canvas.mask,
            strength=args.strength,
            progress=progress,
        )


def write_grid(prompts: list[str], jobs: list[Job], fingerprint: str) -> None:
    """One sheet: a row for each prompt, a column for each seed."""
    n = len(jobs) // len(prompts)
    pictures = [
        images.open_picture(job.path).convert("RGB") for job in jobs
    ]  # converted at once, so that one file is open at a time
    rows = [(prompt, pictures[i * n : (i + 1) * n]) for i, prompt in enumerate(prompts)]
    folder = jobs[0].path.parent
    number = first_free_index(folder, "grid-")
    write_png(folder / f"grid-{number:05d}.png", sampling.contact_sheet.grid(rows), {"ldm.model": fingerprint})


def first_free_index(folder: Path, prefix: str = "") -> int:
    """One more than the highest number that follows the prefix in the name of a picture in the folder."""
    found = (re.match(rf"{prefix}(\d{{1,9}})\b.*\.png$", path.name) for path in list_folder(folder))
    return max((int(match[1]) for match in found if match), default=-1) + 1


def write_png(path: Path, picture: Image.Image, text: dict[str, str]) -> None:
    """Writes a new file, in one step. Raises RunError if there is a file of that name already."""
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    with written(path), replacing(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=info)
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            raise RunError(f"{path} has come up meanwhile; give each run an --output-dir of its own") from None


if __name__ == "__main__":
    with cli.reported("sample.py"):
        main()
