"""python -m ldm weights inspect|convert|verify PATH: what a file is; the same in another layout; is it official."""

import hashlib
import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from ldm.errors import InputError
from ldm.formats import names, weights
from ldm.formats.tensors import PICKLED
from ldm.model import StableDiffusion
from ldm.runtime import cli
from ldm.runtime.files import check_writable, written

SUMS = Path(__file__).parent.parent / "weights" / "SHA256SUMS"


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.Parser(prog="python -m ldm", description="Tools beside train.py and sample.py.")
    rooms = parser.add_subparsers(required=True, metavar="weights")
    actions = rooms.add_parser("weights", help="look at, convert and check model files").add_subparsers(
        required=True, metavar="inspect|convert|verify", parser_class=cli.Parser
    )

    def action(name: str, run, text: str) -> cli.Parser:
        p = actions.add_parser(name, help=text, description=text)
        p.add_argument("path", help="official .safetensors or .ckpt file, or diffusers folder")
        p.set_defaults(run=run)
        return p

    for p in (
        action("inspect", inspect, "family, layout, types, parameters, EMA, missing and unknown tensors"),
        convert_parser := action("convert", convert, "the same model in another layout or type"),
    ):
        cli.add_source_flags(p)
    convert_parser.add_argument("output", help="file or folder to write")
    convert_parser.add_argument(
        "--layout", choices=weights.WRITERS, help="official for a name that ends in .safetensors"
    )
    convert_parser.add_argument(
        "--dtype", choices=cli.DTYPES, help="type of the written weights; as they are if not given"
    )
    action("verify", verify, "compare a file's SHA-256 with the official files' in weights/SHA256SUMS")
    args = parser.parse_args(argv)
    args.run(args)


def inspect(args: Namespace) -> None:
    source = weights.read(args.path, ema=args.ema, prediction=args.prediction_type, variant=args.variant)
    sd = StableDiffusion.without_weights(args.path, source)
    print(f"{args.path}: {weights.describe(source)}")
    for part, prefix in (("UNet", names.UNET), ("autoencoder", names.VAE), ("text encoder", names.TEXT)):
        tensors = [tensor for name, tensor in source.tensors.items() if name.startswith(prefix)]
        print(f"{part}: {sum(t.numel() for t in tensors):,} parameters in {len(tensors)} tensors")
    print(f"EMA weights: {'yes' if source.has_ema else 'no'}; tensors carried along: {len(source.extra)}")
    problems = sd.differences(source.tensors)
    problems += [f"{name} holds NaN or infinity" for name in weights.not_finite(source.tensors)]
    for problem in problems:
        print(problem)
    print(
        f"{len(problems)} problems"
        if problems
        else "complete: every tensor is there with its shape, and all numbers are finite"
    )


def convert(args: Namespace) -> None:
    output = Path(args.output)
    layout = args.layout or ("official" if output.suffix == ".safetensors" else "diffusers")
    if output.suffix in PICKLED:
        raise InputError(f"{output}: pickled files are read, never written; give a name that ends in .safetensors")
    check_writable(output.parent, "output")
    sd = StableDiffusion.load(
        args.path, dtype=None, ema=args.ema, prediction=args.prediction_type, variant=args.variant
    )
    sd.check_finite()
    print(sd.summary)
    with written(output):
        left_out = sd.save(output, layout, cli.DTYPES[args.dtype] if args.dtype else None)
    print(f"wrote {output}")
    if left_out:
        print(f"not in it: {weights.listed(left_out)}")


def verify(args: Namespace) -> None:
    path = Path(args.path)
    if not os.path.isfile(path):
        raise InputError(f"{path} is no file; verify takes the official single files")
    try:
        lines = SUMS.read_text(encoding="utf-8").splitlines()
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{error.filename or path} can't be read: {error.strerror}") from None
    known = dict(line.split(maxsplit=1) for line in lines if line and not line.startswith("#"))
    if found not in known:
        raise InputError(f"{path}: SHA-256 {found} is none of the official files in {SUMS}")
    print(f"{path} is {known[found]} (SHA-256 {found})")


if __name__ == "__main__":
    with cli.reported("python -m ldm"):
        main()
