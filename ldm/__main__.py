"""Tools for model files, LoRAs and runs.

python -m ldm weights inspect|convert|verify PATH         describes, converts and verifies a model
python -m ldm lora inspect|merge|extract|convert ...      describes, merges, extracts and converts a LoRA
python -m ldm report RUN [RUN ...]                        writes the report of a run, or compares several
"""

import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ldm import formats, report, tokens
from ldm.config import SD1, SD2
from ldm.data import widen
from ldm.errors import InputError, one_line
from ldm.lora import TARGETS, chosen, extract
from ldm.model import StableDiffusion
from ldm.runtime import check_path, check_writable, cli, list_folder, read_text, written

OFFICIAL_SUMS = Path(__file__).parent.parent / "weights" / "SHA256SUMS"

NAMES = {"kohya": formats.Adapter.tensors, "diffusers": formats.Adapter.tensors_of_diffusers}
# What is shown of a LoRA's header: kohya's and our own entries.
SHOWN = {"ss_output_name", "ss_sd_model_name", "ss_base_model_version", "ss_steps"}
SHOWN |= {"ldm.step", "ldm.instance_prompt", "ldm.class_prompt", "ldm.sampling"}


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    args.run(args)


def parser() -> cli.Parser:
    top = cli.Parser(prog="python -m ldm", description="Tools for model files and runs.")
    subjects = top.add_subparsers(required=True, metavar="weights|lora|report")
    weights = subjects.add_parser("weights", help="inspect, convert and verify model files").add_subparsers(
        required=True, metavar="inspect|convert|verify", parser_class=cli.Parser
    )
    lora = subjects.add_parser("lora", help="inspect, merge, extract and convert LoRA files").add_subparsers(
        required=True, metavar="inspect|merge|extract|convert", parser_class=cli.Parser
    )
    _add_weights(weights)
    _add_lora(lora)
    _add_report(subjects)
    return top


def _add_weights(actions: Any) -> None:
    path = ("path", "official .safetensors or .ckpt file, or diffusers folder")
    text = "describe a model and list its problems; status 1 if there are any"
    cli.add_source_flags(_action(actions, "inspect", inspect, text, path))
    text, output = "write the same model in another layout or type", ("output", "new file or folder to write")
    p = _action(actions, "convert", convert, text, path, output)
    _add_output_flags(p)
    what = "add the five input channels of a model for painting in, at 0: train.py then trains them with random masks"
    p.add_argument("--inpaint", action="store_true", help=what)
    text = "compare a file's SHA-256 with the official files' in weights/SHA256SUMS"
    _action(actions, "verify", verify, text, path)


def _add_lora(actions: Any) -> None:
    path, output = ("path", "LoRA, a .safetensors file"), ("output", "new .safetensors file to write")
    p = _action(actions, "inspect", inspect_lora, "describe a LoRA", path)
    p.add_argument("--model", help="model that it should fit")

    model = ("path", "model: official .safetensors or .ckpt file, or diffusers folder")
    text = "add LoRAs to a model's weights, and write it"
    p = _action(actions, "merge", convert, text, model, ("output", "new file or folder to write"))
    what = "LoRA to add, and how much of it; repeatable"
    p.add_argument("--lora", action="append", required=True, type=cli.scaled_path, metavar="FILE[:SCALE]", help=what)
    _add_output_flags(p)

    text = "make the LoRA that comes nearest to the difference between two models"
    base, tuned = ("base", "model before training"), ("tuned", "model after training")
    p = _action(actions, "extract", extract_lora, text, base, tuned, output)
    size = p.add_mutually_exclusive_group(required=True)
    size.add_argument("--rank", type=cli.positive, help="rank of every pair")
    size.add_argument("--energy", type=float, help="share of each weight's squared change to keep, 0 to 1")
    p.add_argument(
        "--targets", choices=tuple(TARGETS), default="all", help="layers to take, as train.py --lora-targets"
    )
    _add_file_flags(p)

    p = _action(
        actions, "convert", convert_lora, "write the same LoRA under other names or in another type", path, output
    )
    p.add_argument("--names", choices=tuple(NAMES), default="kohya", help="names to write; every program reads kohya's")
    p.add_argument("--model", help="model that it is for; only needed where names are official and the model is small")
    _add_file_flags(p)


def _add_report(subjects: Any) -> None:
    p = _action(subjects, "report", write_report, "write the report of a run, or compare several runs")
    p.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, also of one that goes on or was killed")
    what = "HTML file to write; if not given, report.html in the run, or comparison.html beside the first of several"
    p.add_argument("--output", metavar="FILE", help=what)


def _action(
    actions: Any, name: str, run: Callable[[Namespace], None], text: str, *positional: tuple[str, str]
) -> cli.Parser:
    """Adds a command with these positional arguments, pairs of name and help."""
    p = actions.add_parser(name, help=text, description=text)
    for argument, what in positional:
        p.add_argument(argument, help=what)
    p.set_defaults(run=run, lora=[], names="kohya", inpaint=False)
    return p


def _add_output_flags(p: cli.Parser) -> None:
    """Adds the flags that say which model to read, and how to write one."""
    cli.add_source_flags(p)
    _add_file_flags(p)
    what = "layout to write; if not given, official for a name that ends in .safetensors, else diffusers"
    p.add_argument("--layout", choices=formats.LAYOUTS, help=what)


def _add_file_flags(p: cli.Parser) -> None:
    what = "replace a file or model of the same kind that is there; a folder with any other file in it is left as it is"
    p.add_argument("--overwrite", action="store_true", help=what)
    what = "type of the written weights; unchanged if not given"
    p.add_argument("--dtype", choices=cli.DTYPES, help=what)


def inspect(args: Namespace) -> None:
    """Describes a model and lists its problems. Exits with status 1 if there are any."""
    source = formats.read(args.path, **cli.source_options(args))
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
    """Writes a model, with LoRAs added, in a layout and type, and prints which tensors are left out."""
    output = Path(args.output)
    layout = args.layout or ("official" if output.suffix == ".safetensors" else "diffusers")
    _check_output(output, args.overwrite)
    dtype = cli.DTYPES[args.dtype] if args.dtype else None
    # LoRAs are added in fp32 and the sum is rounded once, if it is written in another type than it is stored in.
    sd = StableDiffusion.load(
        args.path, dtype=torch.float32 if args.lora and dtype else None, **cli.source_options(args)
    )
    sd.check_finite()
    print(sd.summary)
    metadata = dict(sd.source.metadata)
    if args.inpaint:
        widen(sd)
        print("added the input channels for painting in, which are still to be trained")
    for (path, scale), adapter in zip(args.lora, sd.merge_loras(args.lora), strict=True):
        sd.adopt_schedule([adapter])
        metadata = {key: text for key, text in adapter.metadata.items() if key == formats.SAMPLING_KEY} | metadata
        words = "".join(f", token {token}" for token in tokens.add_bundled(sd, adapter))
        print(f"added {scale:g} x {path}: {len(adapter.pairs)} modules{words}")
    if args.lora and (bad := [name for name, t in sd.state().items() if formats.not_finite({name: t.to(dtype)})]):
        raise InputError(f"{bad[0]} becomes too large for its type with the LoRA; take a lower scale")
    with written(output):
        left_out = sd.save(output, layout, dtype, metadata)
    print(f"wrote {output}")
    if left_out:
        print(f"not in it: {formats.abbreviate(left_out)}")


def _check_output(output: Path, overwrite: bool) -> None:
    """Raises InputError unless a new file or folder can be written there."""
    if output.suffix in formats.PICKLE_SUFFIXES:
        raise InputError(f"{output}: pickled files are read, never written; give a name that ends in .safetensors")
    check_path(output, "output")
    check_writable(output.parent, "output")
    if os.path.lexists(output) and not overwrite and not (output.is_dir() and not list_folder(output)):
        raise InputError(f"{output} is there already; give a new name, or --overwrite to replace it")


def verify(args: Namespace) -> None:
    """Prints which official file this is. Raises InputError if it is none of those in OFFICIAL_SUMS."""
    path = Path(args.path)
    if not os.path.isfile(path):
        raise InputError(f"{path} is no file; verify takes the official single files")
    lines, found = read_text(OFFICIAL_SUMS).splitlines(), formats.file_hash(path)
    known = {line[:64]: line[66:] for line in lines if not line.startswith("#")}
    if found not in known:
        raise InputError(f"{path}: SHA-256 {found} is none of the official files in {OFFICIAL_SUMS}")
    print(f"{path} is {known[found]} (SHA-256 {found})")


def inspect_lora(args: Namespace) -> None:
    """Describes a LoRA."""
    adapter = _read_lora(args.path, args.model)
    pairs = adapter.pairs
    ranks, scales = ([getattr(pair, name) for pair in pairs.values()] for name in ("rank", "scale"))
    print(f"{args.path}: LoRA of {len(pairs)} modules, rank {_range(ranks)}, alpha / rank {_range(scales)}")
    for part, prefix in {"UNet": formats.LORA_UNET, "text encoder": formats.LORA_TEXT}.items():
        found = [pair for name, pair in pairs.items() if name.startswith(prefix)]
        print(f"{part}: {sum(p.down.numel() + p.up.numel() for p in found):,} parameters in {len(found)} modules")
    for token, vectors in adapter.tokens.items():
        print(f"token {token}: {len(vectors)} vectors")
    for key in sorted(adapter.metadata.keys() & SHOWN):
        print(f"{key}: {one_line(adapter.metadata[key])}")
    if args.model:
        print(f"fits {args.model}")


def _range(numbers: list[float]) -> str:
    """Numbers as one phrase: the only one, or the least and the largest."""
    least, most = f"{min(numbers):g}", f"{max(numbers):g}"
    return least if least == most else f"{least} to {most}"


def _read_lora(path: str, model: str | None) -> formats.Adapter:
    """A LoRA; checked against a model if one is given."""
    return StableDiffusion.without_weights(formats.read(model)).read_lora(path) if model else formats.read_lora(path)


def convert_lora(args: Namespace) -> None:
    """Writes a LoRA under other names or in another type."""
    output = Path(args.output)
    _check_output(output, args.overwrite)
    formats.check_lora_name(output)
    adapter = _read_lora(args.path, args.model)
    kept = ("ldm.", formats.modelspec.PREFIX, formats.ZERO_SNR_KEY)
    about = {key: text for key, text in adapter.metadata.items() if key.startswith(kept)}
    about |= dict.fromkeys({formats.modelspec.HASH_KEY} & about.keys(), "")  # computed again
    if args.names == "kohya":
        kohyas = {key: text for key, text in adapter.metadata.items() if key.startswith("ss_")}
        about |= formats.kohya_metadata(SD2 if adapter.reads_text_of(SD2.text) else SD1, adapter) | kohyas
    _write_lora(output, adapter, about, args)
    for token in adapter.tokens:
        print(f"not in it: token {token}")


def extract_lora(args: Namespace) -> None:
    """Makes a LoRA of the difference between two models, and prints what is lost."""
    output = Path(args.output)
    _check_output(output, args.overwrite)
    formats.check_lora_name(output)
    if args.rank and args.rank > formats.MAX_RANK:
        raise InputError(f"--rank {args.rank} is too much: it should be at most {formats.MAX_RANK}")
    if args.energy is not None and not 0 < args.energy <= 1:
        raise InputError(f"--energy {args.energy} is not a share, above 0 and up to 1")
    base, tuned = (StableDiffusion.load(path) for path in (args.base, args.tuned))
    for sd in (base, tuned):
        sd.check_finite()
    old, new = base.state(), tuned.state()
    new = {
        name: tensor for name, tensor in new.items() if name in old or not name.startswith(formats.LEARNED.format(""))
    }
    if problems := formats.differences(new, old):
        raise InputError(f"{args.tuned} was not tuned from {args.base}: {problems[0]}")
    before, after = (chosen(sd.lora_layers(), args.targets) for sd in (base, tuned))
    with torch.no_grad():
        changes = {name: after[name].weight - before[name].weight for name in before}
        whole = sum((tensor - old[name]).double().square().sum().item() for name, tensor in new.items())
        inside = sum(change.double().square().sum().item() for change in changes.values())
    adapter, kept = extract(changes, args.rank, args.energy or 1.0)
    print(f"kept {kept:.1%} of the squared change of {len(adapter.pairs)} weights")
    print(f"not in the LoRA: {1 - inside / whole:.1%} of the squared change of the whole model, in other tensors")
    names = {"sd_model_name": Path(args.base).name, "output_name": output.stem}
    title = f"LoRA of {tuned.source.title()}, for {base.source.title()}"
    about = tuned.source.metadata | formats.modelspec.describe(tuned.config, title, "lora")
    about |= formats.kohya_metadata(tuned.config, adapter, **names)
    _write_lora(output, adapter, about, args)
    for token in tuned.tokenizer.added:
        if token not in base.tokenizer.added:
            print(f"not in it: token {token}")


def _write_lora(output: Path, adapter: formats.Adapter, about: dict[str, str], args: Namespace) -> None:
    adapter = adapter.to(cli.DTYPES[args.dtype]) if args.dtype else adapter
    tensors = NAMES[args.names](adapter)
    if bad := formats.not_finite(tensors):
        raise InputError(f"{bad[0]} is too large for {args.dtype or 'its type'}; take --dtype bf16")
    with written(output):
        formats.write_lora(output, tensors, about)
    print(f"wrote {output}")


def write_report(args: Namespace) -> None:
    """Writes a report, and prints its path."""
    print(report.write(args.runs, args.output))


if __name__ == "__main__":
    with cli.reported("python -m ldm"):
        main()
