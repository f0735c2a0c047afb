"""What a run did, in sentences and in the few numbers that tell most."""

import math
from pathlib import Path

from ldm.preflight import counted
from ldm.report.record import Record


def story(record: Record) -> list[str]:
    """A few sentences: what was trained on what, and how far it came. Leaves out what the folder does not say."""
    parts = _subject, _prior, _training, _held_out, _progress
    return [text for part in parts if (text := part(record))]


def quoted(record: Record, name: str) -> str:
    """The prompts of this name in quotation marks."""
    return ", ".join(f"“{text}”" for text in record.of_subjects(name)) or "an unknown prompt"


def _subject(record: Record) -> str:
    model, photographs = record.text("model"), record.identity.get("photographs")
    base = f"The base model {'/'.join(Path(model).parts[-2:])}" if model else "The base model"
    subjects = len(record.of_subjects("instance_prompt"))
    taught = f"{subjects} subjects" if subjects > 1 else "a subject"
    count = len(photographs) if isinstance(photographs, dict) and photographs else None
    what = counted(count, "photograph") if count else "photographs"
    prompts = f" of {quoted(record, 'instance_prompt')}" if subjects else ""
    return f"{base} learned {taught} from {what}{prompts}."


def _prior(record: Record) -> str | None:
    has_prior = record.settings.get("with_prior_preservation")
    if has_prior is False or record.settings.get("train") == "token":
        return "It trained without prior preservation."
    if not has_prior or not record.of_subjects("class_prompt"):
        return None
    prompts, count = quoted(record, "class_prompt"), record.count("num_class_images")
    if record.settings.get("prior") == "prediction":
        return f"The base model's own predictions for {prompts} kept the meaning of the class."
    number = "Some class pictures" if count is None else counted(count, "class picture")
    return f"{number} of {prompts} kept the meaning of the class."


def _training(record: Record) -> str | None:
    token, own = record.text("placeholder_token"), record.own_tuning
    beside = f", with a new token {token}" if token else ""
    if own:
        what = f"{own} trained"
    elif record.settings.get("train") == "token":
        what = f"Only the vectors of the new token {token or ''} trained"
    elif rank := record.count("lora_rank"):
        conv = record.count("lora_conv_rank")
        what = f"A LoRA of rank {rank}{f', {conv} in the 3x3 convolutions,' if conv else ''} trained{beside}"
    elif "train_text_encoder" in record.settings:
        text = record.settings["train_text_encoder"] is True
        what = "All weights of the UNet" + (" and of the text encoder" if text else "") + f" trained{beside}"
    else:
        return None
    rate = record.settings.get("token_learning_rate" if record.settings.get("train") == "token" else "learning_rate")
    return what + (f", at a learning rate of {rate:g}." if isinstance(rate, float) and math.isfinite(rate) else ".")


def _held_out(record: Record) -> str | None:
    held_out, every = record.identity.get("held_out"), record.count("validation_steps")
    if not every or not isinstance(held_out, dict) or not held_out:
        return None
    return f"Every {every:,} steps it was validated on {counted(len(held_out), 'held-out picture')}."


def _progress(record: Record) -> str:
    planned = record.planned
    if record.is_finished:
        names = dict.fromkeys(path.name for path in (record.result, record.token) if path)
        return f"It ran all {record.steps:,} steps and wrote {' and '.join(names)}."
    if record.steps == 0:
        return "It has not trained a step yet."
    whole = f" of {planned:,}" if planned else ""
    return f"It is not finished: step {record.steps:,}{whole} is the last one known."


def key_numbers(record: Record) -> list[tuple[str, str]]:
    """Name and value of the numbers at the top of the page."""
    planned, batch = record.planned, record.identity.get("global_batch")
    found = [
        ("steps", f"{record.steps:,}" + (f" of {planned:,}" if planned and planned != record.steps else "")),
        ("photographs a step", f"{batch:,}" if type(batch) is int else None),
        ("resolution", f"{record.count('resolution')} px" if record.count("resolution") else None),
        ("training time", _duration(record)),
        ("step to take", f"{record.advised:,}" if record.advised is not None else None),
    ]
    return [(name, value) for name, value in found if value]


def _duration(record: Record) -> str | None:
    """The time of all steps; estimated from the lines that were read."""
    seconds = [line["seconds"] for line in record.metrics if isinstance(line.get("seconds"), int | float)]
    seconds = [value for value in seconds if 0 <= value < 1e9]
    if not seconds:
        return None
    total = sum(seconds) / len(seconds) * record.metrics[-1]["step"]
    if total < 90:
        return f"{total:.0f} s"
    return f"{total / 60:.0f} min" if total < 5400 else f"{total / 3600:.1f} h"
