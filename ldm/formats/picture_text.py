"""How a picture was made <-> the text in its PNG file, as A1111's web UI writes it and as ours.

The facts are a dictionary whose keys are the flags of sample.py, and tokens (the learned ones), model, model_name,
model_hash, lora_hashes, token_hashes, batch_size and batch_row. A file holds them twice: exactly, each under "ldm." and
its name, and under "parameters" in the form that A1111, ComfyUI, Forge, Civitai and others show:

    a photo of sks dog
    Negative prompt: fog
    Steps: 25, Sampler: DDIM, CFG scale: 4.0, Seed: 42, Size: 512x512, Model hash: 6ce0161689, Model: v1-5, RNG: CPU

No key is "prompt" or "workflow": ComfyUI takes those for its own JSON.
"""

import json
import re
import warnings
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.errors import InputError, one_line
from ldm.images import MAX_PIXELS, read_picture
from ldm.runtime import cli

Facts = dict[str, Any]

PREFIX, PARAMETERS, NEGATIVE = "ldm.", "parameters", "Negative prompt:"
MAX_LETTERS = 1 << 20  # of a text in a picture
SHORT_HASH = 10  # hexadecimal digits of a file's SHA-256 by which A1111 and Civitai know a model
PROGRAM = "dreambooth-ldm"  # without a number: A1111 would take it for its own version

SAMPLER_NAMES = {
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "plms": "PLMS",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_karras": "DPM++ 2M Karras",  # A1111's name until 1.8; later versions and Forge read it too
}
# From 1.9 on A1111 has a sampler's schedule apart, and its own choice, Automatic, is Karras for this one.
KARRAS_BY_ITSELF = "DPM++ 2M"

# A field of A1111's last line: a name, and a value up to the next comma or between quotes.
FIELD = re.compile(r'\s*(\w[\w /-]{1,99}):\s*("(?:\\.|[^\\"])+"(?=,|$)|[^,]*)(?:,|$)')


def to_text(facts: Mapping[str, Any]) -> dict[str, str]:
    """The text entries of a picture's file."""
    exact = {PREFIX + name: str(value) for name, value in facts.items() if value is not None}
    return {PARAMETERS: _to_parameters(facts)} | exact


def _to_parameters(facts: Mapping[str, Any]) -> str:
    """The facts that have a name in A1111's form."""
    fields = {
        "Steps": facts["steps"],
        "Sampler": (sampler := SAMPLER_NAMES[facts["sampler"]]),
        "Schedule type": "Uniform" if sampler == KARRAS_BY_ITSELF else None,
        "CFG scale": facts["guidance_scale"],
        "Seed": facts["seed"],
        "Size": f"{facts['width']}x{facts['height']}",
        "Model hash": (facts.get("model_hash") or "")[:SHORT_HASH] or None,
        "Model": facts.get("model_name"),
        "Denoising strength": facts.get("strength"),
        "Eta DDIM": facts["eta"] if facts["sampler"] == "ddim" and facts["eta"] else None,
        "Lora hashes": facts.get("lora_hashes"),
        "TI hashes": facts.get("token_hashes"),
        "RNG": "CPU",  # our noise is that of torch's CPU generator for the seed, as A1111's with this setting
        "Version": PROGRAM,
    }
    negative = f"\n{NEGATIVE} {facts['negative_prompt']}" if facts["negative_prompt"] else ""
    last = ", ".join(f"{name}: {_quote(value)}" for name, value in fields.items() if value is not None)
    return f"{facts['prompt']}{negative}\n{last}"


def _quote(value: object) -> str:
    """A value as A1111 writes it: as a JSON string if it holds what separates fields."""
    text = str(value)
    plain = text == text.strip() and not set(text) & set(',:\n"')
    return text if plain else json.dumps(text, ensure_ascii=False)


def read_text(path: str | Path) -> Facts:
    """How the picture in a PNG file was made: our own entries, or what A1111's form says where there are none.

    Entries that this program does not know are ignored with a warning. Raises InputError, which names the file, if it
    is no PNG, is damaged, does not say how it was made, or says it with impossible values.
    """
    text = _entries(path)
    own = {key.removeprefix(PREFIX): value for key, value in text.items() if key.startswith(PREFIX)}
    if "prompt" in own:
        facts, unknown = _checked(path, own)
    elif PARAMETERS in text:
        facts, unknown = _checked(path, _from_parameters(text[PARAMETERS]))
    else:
        raise InputError(f"{path} does not say how it was made: it has no text {PREFIX}prompt or {PARAMETERS}")
    if unknown:
        warnings.warn(one_line(f"{path}: its {', '.join(unknown)} can't be followed here"), stacklevel=2)
    return facts


def _entries(path: str | Path) -> dict[str, str]:
    picture = read_picture(Path(path))
    try:
        with Image.open(BytesIO(picture.content), formats=["PNG"]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
            text = {key: str(value) for key, value in image.text.items()}
    except Exception as error:  # Pillow can raise anything on a damaged picture
        raise InputError(f"{path} can't be read as a PNG picture: {error}") from None
    if long := [key for key, value in text.items() if len(value) > MAX_LETTERS]:
        raise InputError(f"{path}: its text {long[0]} is longer than {MAX_LETTERS} letters")
    return text


def _from_parameters(text: str) -> dict[str, str]:
    """A1111's form -> facts, still as text; fields without a counterpart keep A1111's names."""
    *lines, last = text.strip().split("\n")
    fields = _fields(last)
    if len(fields) < 3:  # a text without settings
        lines, fields = [*lines, last], {}
    lines = [line.strip() for line in lines]
    first = next((i for i, line in enumerate(lines) if line.startswith(NEGATIVE)), len(lines))
    negative = "\n".join(line.removeprefix(NEGATIVE).strip() for line in lines[first:])
    found = {"prompt": "\n".join(lines[:first]), "negative_prompt": negative}
    name, kind = fields.get("Sampler", ""), fields.pop("Schedule type", "Uniform")
    if kind == "Automatic":
        kind = "Karras" if name == KARRAS_BY_ITSELF else "Uniform"
    if kind != "Uniform":
        fields["Sampler"] = name if name.endswith(kind) else f"{name} {kind}"
    if "Size" in fields:
        found["width"], _, found["height"] = fields.pop("Size").partition("x")
    ours = {theirs: name for name, theirs in SAMPLER_NAMES.items()}
    for theirs, name in A1111_NAMES.items():
        if theirs in fields:
            value = fields.pop(theirs)
            found[name] = ours.get(value, value) if name == "sampler" else value
    if fields and fields.pop("RNG", "GPU") != "CPU":
        fields["noise (RNG is not CPU)"] = ""
    fields.pop("Version", None)
    return found | fields


A1111_NAMES = {
    "Steps": "steps",
    "Sampler": "sampler",
    "CFG scale": "guidance_scale",
    "Seed": "seed",
    "Model hash": "model_hash",
    "Model": "model_name",
    "Denoising strength": "strength",
    "Eta DDIM": "eta",
}


def _fields(line: str) -> dict[str, str]:
    """The fields of A1111's last line by name."""
    found, place = {}, 0
    while place < len(line):
        if match := FIELD.match(line, place):
            name, value = match.groups()
            found[name], place = _unquote(value), match.end()
        else:  # no field: goes on behind the next comma
            place = line.find(",", place) + 1 or len(line)
    return found


def _unquote(value: str) -> str:
    if len(value) < 2 or value[0] != '"' or value[-1] != '"':
        return value
    try:
        return str(json.loads(value))
    except (ValueError, RecursionError):
        return value


def _whole(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,19}", text):
        raise ValueError("a whole number")
    return int(text)


def _positive(text: str) -> int:
    if (number := _whole(text)) < 1:
        raise ValueError("1 or more")
    return number


def _number(text: str) -> float:
    try:
        return float(text[:100])
    except ValueError:
        raise ValueError("a number") from None


def _one_of(*words: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(f"one of {', '.join(words)}")
        return text

    return parse


TEXTS = ("prompt", "negative_prompt", "sampler", "init_image", "mask", "lora", "tokens", "model", "model_name")
TEXTS += ("model_hash", "lora_hashes", "token_hashes")
# How a fact is read from its text. A parser raises ValueError, whose message says what the text should be.
PARSERS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(TEXTS, str),
    **dict.fromkeys(("seed", "steps", "width", "height", "batch_row"), _whole),
    "batch_size": _positive,
    **dict.fromkeys(("guidance_scale", "guidance_rescale", "eta", "strength"), _number),
    "zero_terminal_snr": lambda text: _one_of("True", "False")(text) == "True",
    "prediction_type": _one_of("eps", "v"),
    "dtype": _one_of(*cli.DTYPES),
}


def _checked(path: str | Path, found: Mapping[str, str]) -> tuple[Facts, list[str]]:
    """The facts with their types, and the names that this program does not know."""
    facts, unknown = {}, []
    for name, text in found.items():
        if name not in PARSERS:
            unknown.append(name)
            continue
        try:
            facts[name] = PARSERS[name](text)
        except ValueError as error:
            raise InputError(f"{path}: its text says {name} {text[:80]!r}, which should be {error}") from None
    return facts, unknown
