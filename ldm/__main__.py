"""python -m ldm weights inspect|convert|verify PATH: describes, converts and verifies a model."""

import hashlib
import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

from ldm import formats
from ldm.errors import InputError
from ldm.model import StableDiffusion
from ldm.runtime import check_path, check_writable, cli, list_folder, read_text, written

OFFICIAL_SUMS = Path(__file__).parent.parent / "weights" / "SHA256SUMS"


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    args.run(args)


def parser() -> cli.Parser:
    top = cli.Parser(prog="python -m ldm", description="Tools for model files.")
    subjects = top.add_subparsers(required=True, metavar="weights")
    actions = subjects.add_parser("weights", help="inspect, convert and verify model files").add_subparsers(
        required=True, metavar="inspect|convert|verify", parser_class=cli.Parser
    )

    def action(name: str, run: Callable[[Namespace], None], text: str) -> cli.Parser:
        p = actions.add_parser(name, help=text, description=text)
        p.add_argument("path", help="official .safetensors or .ckpt file, or diffusers folder")
        p.set_defaults(run=run)
        return p

    inspect_parser = action("inspect", inspect, "describe a model and list its problems; status 1 if there are any")
    convert_parser = action("convert", convert, "write the same model in another layout or type")
    action("verify", verify, "compare a file's SHA-256 with the official files' in weights/SHA256SUMS")
    cli.add_source_flags(inspect_parser)
    cli.add_source_flags(convert_parser)
    convert_parser.add_argument("output", help="new file or folder to write")
    convert_parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a model of the same layout that is there; a folder with any other file in it is left as it is",
    )
    convert_parser.add_argument(
        "--layout",
        choices=formats.LAYOUTS,
        help="layout to write; if not given, official for a name that ends in .safetensors, else diffusers",
    )
    convert_parser.add_argument(
        "--dtype", choices=cli.DTYPES, help="type of the written weights; unchanged if not given"
    )
    return top


def inspect(args: Namespace) -> None:
    """Describes a model and lists its problems. Exits with status 1 if there are any."""
    source = formats.read(args.path, ema=args.ema, prediction=args.prediction_type, variant=args.variant)
    sd = StableDiffusion.without_weights(source)
    print(sd.summary)
    parts = {"UNet": formats.UNET_PREFIX, "autoencoder": formats.VAE_PREFIX, "text encoder": formats.TEXT_PREFIX}
    for part, prefix in parts.items():
        tensors = [tensor for name, tensor in source.tensors.items() if name.startswith(prefix)]
        print(f"{part}: {sum(t.numel() for t in tensors):,} parameters in {len(tensors)} tensors")
    print(f"EMA weights: {'yes' if source.has_ema else 'no'}; tensors carried along: {len(source.extra)}")
    problems = formats.differences(source.tensors, sd.state())
    problems += [f"{name} holds NaN or infinity" for name in formats.not_finite(source.tensors)]
    for problem in problems:
        print(problem)
    if problems:
        print(f"{len(problems)} problem{'s' if len(problems) > 1 else ''}")
        raise SystemExit(1)
    print("complete: every tensor is there with its shape, and all numbers are finite")


def convert(args: Namespace) -> None:
    """Writes a model in another layout or type, and prints which tensors are left out."""
    output = Path(args.output)
    layout = args.layout or ("official" if output.suffix == ".safetensors" else "diffusers")
    if output.suffix in formats.PICKLE_SUFFIXES:
        raise InputError(f"{output}: pickled files are read, never written; give a name that ends in .safetensors")
    check_path(output, "output")
    check_writable(output.parent, "output")
    if os.path.lexists(output) and not args.overwrite and not (output.is_dir() and not list_folder(output)):
        raise InputError(f"{output} is there already; give a new name, or --overwrite to replace it")
    options = {"ema": args.ema, "prediction": args.prediction_type, "variant": args.variant}
    sd = StableDiffusion.load(args.path, dtype=None, **options)
    sd.check_finite()
    print(sd.summary)
    with written(output):
        left_out = sd.save(output, layout, cli.DTYPES[args.dtype] if args.dtype else None)
    print(f"wrote {output}")
    if left_out:
        print(f"not in it: {formats.abbreviate(left_out)}")


def verify(args: Namespace) -> None:
    """Prints which official file this is. Raises InputError if it is none of those in OFFICIAL_SUMS."""
    path = Path(args.path)
    if not os.path.isfile(path):
        raise InputError(f"{path} is no file; verify takes the official single files")
    lines = read_text(OFFICIAL_SUMS).splitlines()
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{error.filename or path} can't be read: {error.strerror}") from None
    known = {line[:64]: line[66:] for line in lines if not line.startswith("#")}
    if found not in known:
        raise InputError(f"{path}: SHA-256 {found} is none of the official files in {OFFICIAL_SUMS}")
    print(f"{path} is {known[found]} (SHA-256 {found})")


if __name__ == "__main__":
    with cli.reported("python -m ldm"):
        main()
