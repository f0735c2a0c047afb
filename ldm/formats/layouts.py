"""`read` and `write`: one pair of functions for both layouts, "official" and "diffusers"."""

import os
import re
from pathlib import Path

from ldm.errors import InputError
from ldm.formats.folder import read_folder, write_folder
from ldm.formats.folder_config import DIFFUSERS_PREDICTIONS
from ldm.formats.single import read_single, write_single
from ldm.formats.source import PREDICTIONS, Source, predicting
from ldm.formats.tensors import PICKLE_SUFFIXES
from ldm.runtime import check_file, exists

WRITERS = {"official": write_single, "diffusers": write_folder}
LAYOUTS = tuple(WRITERS)
CHECKPOINT_MODEL = "model.safetensors"  # the model in a checkpoint folder of a training run


def read(path: str | Path, *, ema: bool = False, prediction: str | None = None, variant: str | None = None) -> Source:
    """Reads an official .safetensors or .ckpt file, a diffusers folder, or a checkpoint folder of a training run.

    ema: take the averaged UNet of a full training checkpoint instead of the last one.
    prediction: "eps" or "v", which overrides what the file says. variant: a word in the names of a diffusers folder's
    weight files, "fp16" for example.
    Raises InputError if there is no such model, it can't be read, or an argument does not apply to it.
    """
    given, path = Path(path), Path(path)
    options = {"ema": ema, "prediction": prediction, "variant": variant}
    prediction = DIFFUSERS_PREDICTIONS.get(prediction, prediction)
    if prediction not in (None, *PREDICTIONS):
        raise InputError(f"prediction {prediction!r} is neither eps nor v")
    _check_readable(path)
    if path.is_dir() and not os.path.exists(path / "model_index.json") and os.path.exists(path / CHECKPOINT_MODEL):
        path = path / CHECKPOINT_MODEL
        check_file(path)
    if path.is_dir():
        if ema:
            raise InputError(f"{path} is a diffusers folder, which has no EMA weights; load it without ema")
        source = read_folder(path, variant)
    elif path.suffix in (".safetensors", *PICKLE_SUFFIXES):
        if variant:
            raise InputError(f"{path} is one file, and variant {variant} is for diffusers folders")
        source = read_single(path, ema, prediction)
    else:
        raise InputError(f"{path} is neither a .safetensors or .ckpt file nor a diffusers folder")
    source.path, source.options = given, options
    if prediction is not None:
        source.config, source.prediction_from = predicting(source.config, prediction), "as requested"
    return source


def _check_readable(path: Path) -> None:
    if not exists(path):
        if re.fullmatch(r"https?:.*|[\w.-]+/[\w.-]+", str(path)):
            raise InputError(
                f"{path} is no file or folder here; if it is a name on a model hub: nothing is downloaded by this "
                "program, so fetch the model first (weights/README.md says what and where) and give its path"
            )
        raise InputError(f"{path}: no such model; give a .safetensors or .ckpt file, or a diffusers folder")
    if not path.is_dir():
        check_file(path)
    elif not os.access(path, os.R_OK | os.X_OK):
        raise InputError(f"{path} is not for this user to read; chmod gives the permission")


def write(path: str | Path, source: Source, layout: str = "official") -> list[str]:
    """Writes a source as an official single file or as a diffusers folder. What is at `path` stays until it is whole.

    Returns the names of the source's tensors that are not written: EMA tensors, and `extra` in a folder, which has no
    place for them. Raises InputError for an unknown layout, or a path that can't be of this layout.
    """
    if layout not in WRITERS:
        raise InputError(f"unknown layout {layout!r}; there are {' and '.join(LAYOUTS)}")
    return WRITERS[layout](Path(path), source)
