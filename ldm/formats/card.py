"""The model card of a diffusers folder: README.md, with the entries in front that the Hugging Face hub reads."""

import json
from pathlib import Path

from ldm.errors import InputError, one_line
from ldm.formats import modelspec
from ldm.formats.source import SAMPLING_KEY, TRAINING_KEY, Source, family
from ldm.runtime import parse_json, replacing

CARD, SAMPLES = "README.md", "samples.png"
MARK = "<!-- written by dreambooth-ldm -->"  # a card without it is someone's own, and is never replaced

FRONT = """---
library_name: diffusers
pipeline_tag: text-to-image
tags:
- stable-diffusion
# license: the licenses of the base model and of your photographs decide; state yours here
---
"""


def model_card(source: Source) -> str:
    """What the model is, where it comes from and how it is used, as Markdown. All of it comes from the source."""
    said, schedule = source.metadata, source.config.schedule
    lines = [f"{FRONT}{MARK}", f"# {_plain(said.get(modelspec.TITLE_KEY) or source.title())}", ""]
    kind = family(source.config) or "Stable Diffusion of its own size"
    lines += [f"{kind}, {source.config.resolution} px, predicts {schedule.prediction}.", ""]
    rows: dict[str, object] = {
        "prompt of the subject": said.get("ldm.instance_prompt"),
        "prompt of its class": said.get("ldm.class_prompt"),
        "training steps": said.get("ldm.step"),
        "base model's fingerprint": said.get("ldm.base"),
    }
    for key in (TRAINING_KEY, SAMPLING_KEY):
        rows |= {name.replace("_", " "): value for name, value in _table(said.get(key)).items()}
    rows = {name: value for name, value in rows.items() if value is not None}
    if rows:
        lines += ["Tuned by DreamBooth (Ruiz et al. 2023).", "", "| | |", "|---|---|"]
        lines += [f"| {_plain(name)} | {_plain(value)} |" for name, value in rows.items()]
        lines.append("")
    prompt = said.get("ldm.instance_prompt", "a photo of a cat")
    paints_in = source.config.unet.paints_in
    pipeline = "StableDiffusionInpaintPipeline" if paints_in else "StableDiffusionPipeline"
    pictures = ", image=picture, mask_image=mask" if paints_in else ""
    lines += [
        f"    from diffusers import {pipeline}",
        "",
        f'    pipe = {pipeline}.from_pretrained("path/of/this/folder")',
        f"    pipe({one_line(json.dumps(prompt, ensure_ascii=False), 10_000)}{pictures}).images[0]",
    ]
    return "\n".join(lines) + "\n"


def illustrate(path: Path, picture: Path) -> None:
    """Adds a picture of samples to the card of a diffusers folder that was just written; nothing for a single file."""
    if not path.is_dir():
        return
    with replacing(path / SAMPLES) as temporary:
        temporary.write_bytes(picture.read_bytes())
    with replacing(path / CARD) as temporary:
        card = (path / CARD).read_text(encoding="utf-8")
        temporary.write_text(f"{card}\n![Samples, before and after training]({SAMPLES})\n", encoding="utf-8")


def replaceable(folder: Path) -> set[str]:
    """The card's files that may be replaced in a folder: those that this program has written."""
    try:
        return {CARD, SAMPLES} if MARK in (folder / CARD).read_text(encoding="utf-8") else set()
    except (OSError, UnicodeDecodeError):
        return set()


def _table(text: str | None) -> dict[str, object]:
    """The entries of a JSON object in the metadata; none if there is none, or it is damaged."""
    try:
        tree = parse_json(text, "metadata") if text else {}
    except InputError:
        return {}
    return tree if isinstance(tree, dict) else {}


def _plain(value: object) -> str:
    """A value as one line of a table, whatever it holds: no Markdown or HTML in it has a meaning."""
    text = one_line(value, 300)
    return "".join(f"&#{ord(letter)};" if letter in "|`*_<>[]&#\\!~$" else letter for letter in text)
