"""How pictures are made: the facts in their files, and whether they are those of --from-picture."""

import warnings
from argparse import Namespace
from pathlib import Path

from ldm.errors import one_line
from ldm.formats import file_hash
from ldm.model import StableDiffusion

SHORT_HASH = 12  # hexadecimal digits of a SHA-256 by which A1111 and Civitai know a LoRA or an embedding


def recipe(args: Namespace, sd: StableDiffusion) -> dict[str, object]:
    """The facts that all pictures of a call have in common; see formats/picture_text.py."""
    how = {
        "negative_prompt": args.negative_prompt,
        "sampler": args.sampler,
        "eta": args.eta,
        "steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "guidance_rescale": args.guidance_rescale,
        "zero_terminal_snr": sd.config.schedule.zero_terminal_snr,
        "prediction_type": sd.config.schedule.prediction,
        "dtype": args.dtype,
        "model": sd.source_fingerprint(),
        "model_name": sd.source.title(),
        "model_hash": sd.source.file_hash(),
    }
    if args.lora:
        paths = [Path(path) for path, _ in args.lora]
        how["lora"] = ", ".join(f"{path.name}:{scale:g}" for path, (_, scale) in zip(paths, args.lora, strict=True))
        how["lora_hashes"] = ", ".join(
            f"{path.stem}: {file_hash(path, behind_header=True)[:SHORT_HASH]}" for path in paths
        )
    if args.init_image is not None:
        how |= {"init_image": Path(args.init_image).name, "strength": args.strength}
    if args.mask is not None:
        how["mask"] = Path(args.mask).name
    if args.tokens:
        files = zip(args.tokens, args.embedding, strict=True)
        how["tokens"] = " ".join(args.tokens)
        how["token_hashes"] = ", ".join(f"{token}: {file_hash(Path(path))[:SHORT_HASH]}" for token, path in files)
    return how


def check_same(args: Namespace, how: dict[str, object]) -> None:
    """Warns if the picture of --from-picture was made with another model, other LoRAs or other tokens."""
    for name in ("model", "model_hash"):
        said, found = args.picture.get(name), how[name]
        if said is not None and found is not None and not str(found).startswith(str(said)):
            what = args.picture.get("model_name", "a model")
            _warn(f"{args.from_picture} was made with another model, {what} ({said}); this one is {found}")
            break
    if "model" not in args.picture:  # not ours: it names what else it was made with in other ways
        return
    for what, names in {"LoRA": ("lora", "lora_hashes"), "learned token": ("tokens", "token_hashes")}.items():
        said, found = ([str(facts[name]) for name in names if name in facts] for facts in (args.picture, how))
        known = found[: len(said) or None]  # a picture of an older version has no hashes
        if _contents(said) != _contents(known):
            then, now = (" = ".join(facts) or f"no {what}" for facts in (said, found))
            _warn(f"{args.from_picture} was made with {then}, and this one with {now}")


def _contents(facts: list[str]) -> list[list[str]]:
    """Scales and hashes without the names of the files, which may have changed; without hashes, the facts as they are.

    facts: as in `recipe`, "NAME:SCALE, ..." or words, and "NAME: HASH, ..." if it is known.
    """
    if len(facts) < 2:
        return [facts]
    return [[part.rpartition(":")[2].strip() for part in fact.split(",")] for fact in facts]


def _warn(text: str) -> None:
    warnings.warn(one_line(text), stacklevel=3)
