"""What to do with a run next: commands to sample from it, resume it, repeat it, and open it in other programs."""

import json
import os
import re
import shlex
from pathlib import Path
from typing import NamedTuple

from ldm import formats
from ldm.errors import InputError
from ldm.report.record import Record

BRACKET = re.compile(r"[][()]")  # with which A1111 weighs words, unless a backslash stands before it


class Command(NamedTuple):
    """what: when to use it, a phrase. code: lines for a shell or for Python; None if `what` says everything."""

    what: str
    code: str | None = None


def commands(record: Record) -> list[Command]:
    """The commands that fit what the folder holds. Paths are as seen from where the report is made."""
    found = _sampling(record)
    if (config := record.folder / "config.toml").is_file():
        launcher = _launcher(record)
        repeat = f"{launcher} {shlex.quote(record.program)} --config {_quoted(config)}"
        if not record.is_finished:
            found.append(Command("Resume the run", f"{repeat} --resume-from-checkpoint latest"))
        found.append(Command("Repeat it in a new folder", repeat))
    elif not record.is_finished:
        folder = _quoted(record.folder)
        text = "Resume the run, with the flags that it was started with"
        program = shlex.quote(record.program)
        found.append(Command(text, f"python {program} ... --output-dir {folder} --resume-from-checkpoint latest"))
    return found + _elsewhere(record)


def _launcher(record: Record) -> str:
    """How the run was started: with torchrun if its batch was larger than one process makes it."""
    one = (record.count("train_batch_size") or 1) * (record.count("gradient_accumulation_steps") or 1)
    total = record.identity.get("global_batch")
    size = total // one if type(total) is int and 0 < total < 2**31 else 1
    return f"torchrun --nproc-per-node {size}" if size > 1 else "python"


def _sampling(record: Record) -> list[Command]:
    prompt = f"--prompt {shlex.quote(_prompt(record))} --num-images 4 --grid"
    result = record.result
    if result is None:
        if not record.checkpoints or record.identity.get("tuning", "FullTuning") != "FullTuning":
            return []
        path = record.folder / "checkpoints" / record.checkpoints[-1]
        return [Command("Sample from its newest checkpoint", f"python sample.py --model {_quoted(path)} {prompt}")]
    if (flags := _flags(result, record)) is None:
        return []
    found = [Command("Make pictures", f"python sample.py {flags}{prompt}")]
    best = record.folder / "best" / result.name
    if record.best and record.best["step"] != record.steps and best.exists():
        what = f"Make pictures with the best step, {record.best['step']}"
        found.append(Command(what, f"python sample.py {_flags(best, record)}{prompt}"))
    return found


def _flags(result: Path, record: Record) -> str | None:
    """The flags of sample.py that take a result; None if there are none."""
    base = f"--model {_quoted(record.text('model') or 'BASE')} "
    token = _token_of(result, record)
    flags = {"model": f"--model {_quoted(result)} ", "lora": f"{base}--lora {_quoted(result)} "}
    flags |= {"token": f"{base}--embedding {_quoted(result)} "}
    flags["lora"] += f"--embedding {_quoted(token)} " if token else ""
    return flags.get(kind_of(result, record))


def _token_of(result: Path, record: Record) -> Path | None:
    """The file of the token that has trained with a LoRA: it lies beside the LoRA's."""
    return result.with_name(record.token.name) if record.token and result.name == "lora.safetensors" else None


def kind_of(result: Path, record: Record) -> str:
    """What a result is: a model, a lora, a token, or the tensors of another way of training ("trained")."""
    if result.name in ("model", "model.safetensors"):
        return "model"
    if result.name in ("lora.safetensors", "trained.safetensors"):
        return result.stem
    return "token" if record.settings.get("placeholder_token") else "trained"


def _elsewhere(record: Record) -> list[Command]:
    result = record.result
    if result is None:
        return []
    kind, path = kind_of(result, record), json.dumps(shown(result), ensure_ascii=False)
    prompt = json.dumps(_prompt(record), ensure_ascii=False)
    start, end = "from diffusers import StableDiffusionPipeline\n", f"pipe({prompt}).images[0]"
    if kind == "model":
        return _model_elsewhere(result, start, end)
    if kind not in ("lora", "token"):
        return []
    base = json.dumps(shown(record.text("model") or "BASE"), ensure_ascii=False)
    loader = "from_single_file" if base.endswith(('.safetensors"', '.ckpt"')) else "from_pretrained"
    start += f"pipe = StableDiffusionPipeline.{loader}({base})\n"
    name = result.stem
    if kind == "lora":
        folder = f"{json.dumps(shown(result.parent), ensure_ascii=False)}, weight_name={json.dumps(result.name)}"
        code = f"pipe.load_lora_weights({folder})\n"
        if token := _token_of(result, record):
            code += f"pipe.load_textual_inversion({json.dumps(shown(token), ensure_ascii=False)})\n"
        text = (
            f"ComfyUI: copy {result.name} to models/loras, and put the node Load LoRA after the base model's loader. "
        )
        text += f"A1111: copy it to models/Lora, and write <lora:{name}:1> in the prompt."
    else:
        code = f"pipe.load_textual_inversion({path})\n"
        text = f"ComfyUI: copy {result.name} to models/embeddings, and write embedding:{name} in the prompt. "
        escaped = BRACKET.sub(r"\\\g<0>", name)
        text += f"A1111: copy it to embeddings, and write {escaped} in the prompt."
    text += " Both programs load base models of the official sizes only."
    return [Command("Open it in diffusers", start + code + end), Command(text)]


def _model_elsewhere(result: Path, start: str, end: str) -> list[Command]:
    try:
        family = formats.family(formats.read(result).config)
    except InputError as error:
        return [Command(f"{result.name} can't be read: {error}")]
    path = result
    found = []
    if result.is_file():
        path = result.with_name("diffusers")
        code = f"python -m ldm weights convert {_quoted(result)} {_quoted(path)} --layout diffusers"
        found.append(Command("Write it as a diffusers folder", code))
    where = json.dumps(shown(path), ensure_ascii=False)
    loader = f"pipe = StableDiffusionPipeline.from_pretrained({where})\n"
    found.append(Command("Open it in diffusers", start + loader + end))
    if family is None:
        text = "ComfyUI and A1111 know only the official sizes of networks; this model has its own, and stays here."
        return [*found, Command(text)]
    if result.is_file():
        return [
            *found,
            Command(
                f"ComfyUI: copy {result.name} to models/checkpoints, and choose it in the node Load Checkpoint. "
                "A1111: copy it to models/Stable-diffusion, and choose it at the top of the page."
            ),
        ]
    code = f"python -m ldm weights convert {_quoted(result)} {_quoted(result.with_name('model.safetensors'))}"
    return [*found, Command("Write it as one file, for the folder of checkpoints of ComfyUI or A1111", code)]


def _prompt(record: Record) -> str:
    return next(iter(record.of_subjects("instance_prompt")), "a photo")


def _quoted(path: str | Path) -> str:
    return shlex.quote(shown(path))


def shown(path: str | Path) -> str:
    """A path as seen from here: relative if it lies below the current folder, else whole."""
    whole = os.path.abspath(path)
    here = os.path.join(os.getcwd(), "")
    return whole.removeprefix(here) if path != "BASE" else path
