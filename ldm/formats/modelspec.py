"""`modelspec.*`: the header entries by which other programs list and recognise a model file.

The Stability AI Model Metadata Standard, github.com/Stability-AI/ModelSpec, as of version 1.0.1, whose names of
adapters end in "/lora" and the like. A file says what it is (`describe`) and how it is used (`usage`).
"""

import os
from collections.abc import Mapping
from datetime import UTC, datetime

from ldm.config import ModelConfig
from ldm.errors import InputError

PREFIX = "modelspec."
VERSION = "1.0.1"
HASH_KEY = PREFIX + "hash_sha256"  # `save_tensors` computes it
TITLE_KEY = PREFIX + "title"

# The code that names and shapes the tensors as the file does. For single files of both families this is the address
# that kohya's sd-scripts writes, so that equal files are described equally.
SINGLE_FILE, DIFFUSERS = "https://github.com/Stability-AI/generative-models", "diffusers"

# What follows from the model itself. All other entries of a file are its author's words, and are kept.
COMPUTED = {
    PREFIX + key
    for key in (
        "sai_model_spec architecture implementation implementation_version date hash_sha256 resolution "
        "prediction_type predict_key"
    ).split()
}


def describe(config: ModelConfig, title: str, adapter: str | None = None) -> dict[str, str]:
    """The entries of a single file of this model, or of an adapter for it, that follow from what it is.

    title: a name for people. adapter: "lora" or "textual-inversion" for a file that changes a model.
    The entry of HASH_KEY is empty: `save_tensors` fills it in. The date is that of the environment variable
    SOURCE_DATE_EPOCH (reproducible-builds.org) and is left out without it, since the same run writes the same bytes.
    """
    prediction = config.schedule.prediction
    architecture = "stable-diffusion-v1"
    if config.text.openclip:
        architecture = {"eps": "stable-diffusion-v2-512", "v": "stable-diffusion-v2-768-v"}[prediction]
    if config.unet.paints_in and adapter is None:  # the names in SwarmUI's list
        architecture = "stable-diffusion-v2-inpainting" if config.text.openclip else "stable-diffusion-v1/inpaint"
    entries = {
        "sai_model_spec": VERSION,
        "architecture": f"{architecture}/{adapter}" if adapter else architecture,
        "implementation": DIFFUSERS if adapter == "lora" else SINGLE_FILE,
        "title": title,
        "resolution": f"{config.resolution}x{config.resolution}",
        "prediction_type": {"eps": "epsilon", "v": "v"}[prediction],
        "hash_sha256": "",
    }
    if date := _date():
        entries["date"] = date
    return {PREFIX + key: text for key, text in entries.items()}


def usage(prompt: str) -> dict[str, str]:
    """The entries that tell people how to use a tuned model. prompt: the one that brings the subject."""
    entries = {"title": prompt, "trigger_phrase": prompt, "usage_hint": f"The subject's prompt: {prompt}"}
    return {PREFIX + key: text for key, text in entries.items()}


def kept(metadata: Mapping[str, str]) -> dict[str, str]:
    """Those entries of a file that its author wrote: title, description, license and so on."""
    return {key: text for key, text in metadata.items() if key.startswith(PREFIX) and key not in COMPUTED}


def _date() -> str | None:
    seconds = os.environ.get("SOURCE_DATE_EPOCH")
    if not seconds:
        return None
    try:
        return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        raise InputError(f"SOURCE_DATE_EPOCH is {seconds!r}, and should be a number of seconds since 1970") from None
