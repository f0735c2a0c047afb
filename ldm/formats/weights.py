"""Files <-> tensors under their official names: the official single file and the diffusers folder.

Nothing here knows a network: `read` gives whatever names and shapes a file holds, `StableDiffusion.load` insists on
the right ones. Inside the program the text encoder has the names of SD1's file for both families; OpenCLIP's, in the
official files of SD2, are translated here.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ldm.config import SD1, SD2, SD2_V, ModelConfig
from ldm.errors import InputError
from ldm.formats import folder, names
from ldm.formats.tensors import PICKLED, Tensors, open_metadata, open_part, open_tensors, save_tensors
from ldm.runtime.files import replacing
from ldm.schedule import Schedule
from ldm.tokenizer import Tokenizer

# In official files beside the three networks: known, and never computed with. Rule 2.
CARRIED = re.compile(
    r"(sqrt_|log_)?(one_minus_|recipm?1?_)?alphas_cumprod(_prev)?|betas|posterior_\w+"
    r"|.*\.position_ids|first_stage_model\.loss\..*"
    r"|cond_stage_model\.model\.(text_projection|logit_scale|attn_mask)"
)
EMA = "model_ema."  # belongs to a training run, not to the tuned model: may be read from, is never written

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # of weights, as files hold them
PREDICTIONS = ("eps", "v")
CONFIG, TOKENIZER = "ldm.config", "ldm.tokenizer"  # in the metadata of the files that we write
MODELSPEC_PREDICTIONS = folder.PREDICTIONS | {"v": "v"}  # it says epsilon or v; some write diffusers' word
CHECKPOINT_MODEL = "model.safetensors"  # in a checkpoint folder of train.py


@dataclass
class Source:
    """What a file or folder holds."""

    config: ModelConfig
    tensors: Tensors  # the three networks
    tokenizer: Tokenizer
    extra: Tensors = field(default_factory=dict)  # known, not computed with, saved again in the official layout
    dropped: list[str] = field(default_factory=list)  # names of EMA tensors, which are not saved again
    layout: str = "official"
    has_ema: bool = False
    prediction_from: str = "the configuration"  # what said whether the model predicts eps or v
    origin: dict[str, str] = field(default_factory=dict)  # metadata that say where a tuned model comes from


def read(path: str | Path, *, ema: bool = False, prediction: str | None = None, variant: str | None = None) -> Source:
    """Reads an official .safetensors or .ckpt file, or a diffusers folder. Raises InputError if it is none of them.

    ema: take the averaged UNet of a full training checkpoint instead of the last one.
    prediction: "eps" or "v", over what the file says. variant: "fp16" for the folder's files of that name.
    """
    path = Path(path)
    prediction = folder.PREDICTIONS.get(prediction, prediction)
    if prediction not in (None, *PREDICTIONS):
        raise InputError(f"--prediction-type {prediction} is neither eps nor v")
    if not os.path.exists(path):  # unlike Path.exists, also for a name that no disk could hold
        if re.fullmatch(r"https?:.*|[\w.-]+/[\w.-]+", str(path)):
            raise InputError(
                f"{path} is no file or folder here; if it is a name on a model hub: nothing is downloaded by this "
                "program, so fetch the model first (weights/README.md says what and where) and give its path"
            )
        raise InputError(f"{path}: no such model; give a .safetensors or .ckpt file, or a diffusers folder")
    if not os.access(path, os.R_OK | os.X_OK if path.is_dir() else os.R_OK):
        raise InputError(f"{path} is not for this user to read; chmod gives the permission")
    if path.is_dir() and not (path / "model_index.json").exists() and (path / CHECKPOINT_MODEL).exists():
        path = path / CHECKPOINT_MODEL
    if path.is_dir():
        if ema:
            raise InputError(f"{path} is a diffusers folder, which has no EMA weights; leave --ema out")
        source = _read_folder(path, variant)
    elif path.suffix in (".safetensors", *PICKLED):
        if variant:
            raise InputError(f"{path} is one file; --variant {variant} is for diffusers folders")
        source = _read_single(path, ema, prediction)
    else:
        raise InputError(f"{path} is neither a .safetensors or .ckpt file nor a diffusers folder")
    if prediction is not None:
        source.config = predicting(source.config, prediction)
        source.prediction_from = "--prediction-type"
    return source


def predicting(config: ModelConfig, prediction: str) -> ModelConfig:
    return replace(config, schedule=replace(config.schedule, prediction=prediction))


def _read_single(path: Path, ema: bool, prediction: str | None) -> Source:
    tensors, metadata = open_tensors(path)
    config, tokenizer, prediction_from = _family(path, tensors, metadata, prediction)
    averaged = _take(tensors, EMA)
    unet = [key for key in tensors if key.startswith(names.UNET)]
    flat = {key: key.removeprefix("model.").replace(".", "") for key in unet}  # LitEma drops the dots
    has_ema = any(name in averaged for name in flat.values())
    taken = flat if ema else {}
    if absent := [key for key, name in taken.items() if name not in averaged]:
        raise InputError(f"{path} has no EMA weights for {listed(absent, 1)}; leave --ema out")
    tensors |= {key: averaged[name] for key, name in taken.items()}
    dropped = [EMA + name for name in averaged.keys() - set(taken.values())]

    extra = {key: tensors.pop(key) for key in list(tensors) if CARRIED.fullmatch(key)}
    if config.text.openclip:
        last = f"{names.OPENCLIP}transformer.resblocks.{config.text.layers}."
        extra |= {key: tensors.pop(key) for key in list(tensors) if key.startswith(last)}
        text = names.from_openclip(_take(tensors, names.OPENCLIP), config.text)
        tensors |= {names.TEXT + key: tensor for key, tensor in text.items()}
    origin = _origin(metadata)
    return Source(config, tensors, tokenizer, extra, dropped, "official", has_ema, prediction_from, origin)


def _family(
    path: Path, tensors: Tensors, metadata: dict[str, str], prediction: str | None
) -> tuple[ModelConfig, Tokenizer, str]:
    """Whose file this is: our own metadata says it, or the text encoder's names do."""
    if CONFIG in metadata:
        try:
            config = ModelConfig.from_dict(json.loads(metadata[CONFIG]))
            return config, Tokenizer.from_metadata(metadata[TOKENIZER]), "the file's metadata"
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{path}: its metadata is damaged: {error!r}") from None
    named = MODELSPEC_PREDICTIONS.get(metadata.get("modelspec.prediction_type"))
    if names.TEXT + "text_model.embeddings.token_embedding.weight" in tensors:
        config, said = predicting(SD1, named or "eps"), "SD 1.x always does"
    elif names.OPENCLIP + "token_embedding.weight" in tensors:
        config = {"eps": SD2, "v": SD2_V}[prediction or named or "v"]
        said = "assumed of SD 2.x; for a 512-base model give --prediction-type eps"
    else:
        raise InputError(f"{path} does not look like Stable Diffusion 1 or 2: no text encoder that we know is in it")
    tokenizer = Tokenizer.clip(config.text.context_length, config.text.pad_id)
    return config, tokenizer, "the file's metadata" if named else said


def _read_folder(path: Path, variant: str | None) -> Source:
    try:
        config, tokenizer = folder.read_config(path)
        unet_table, vae_table = (names.invert(t) for t in (names.unet_table(config.unet), names.vae_table(config.vae)))
    except InputError:
        raise
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise InputError(f"{path}: its JSON files describe no model: {error}") from None
    tensors: Tensors = {}
    for key, tensor in open_part(path / "unet", folder.PARTS["unet"], variant).items():
        tensors[names.UNET + (names.rename(key, unet_table) or key)] = tensor
    for key, tensor in open_part(path / "vae", folder.PARTS["vae"], variant).items():
        for old, new in names.OLD_VAE_ATTENTION.items():
            key = key.replace(f"attentions.0.{old}.", f"attentions.0.{new}.")
        name = names.rename(key, vae_table) or key
        tensors[names.VAE + name] = tensor[:, :, None, None] if _is_matrix(name, tensor) else tensor
    for key, tensor in open_part(path / "text_encoder", folder.PARTS["text_encoder"], variant).items():
        if not key.endswith("position_ids"):
            tensors[names.TEXT + (key if key.startswith("text_model.") else "text_model." + key)] = tensor
    origin = _origin(open_metadata(path / "unet" / f"{folder.PARTS['unet']}.safetensors"))
    said = "the scheduler's JSON"
    return Source(config, tensors, tokenizer, layout="diffusers", prediction_from=said, origin=origin)


def _origin(metadata: dict[str, str]) -> dict[str, str]:
    """Of a file's metadata our own lines, but those that describe the model."""
    return {key: text for key, text in metadata.items() if key.startswith("ldm.") and key not in (CONFIG, TOKENIZER)}


def describe(source: Source) -> str:
    """Family, layout, type and what the model predicts, and how that is known: one line."""
    types = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in source.tensors.values()})
    name = family(source.config) or "a model of its own size"
    layout = {"official": "official single file", "diffusers": "diffusers folder"}[source.layout]
    predicts = f"predicts {source.config.schedule.prediction} ({source.prediction_from})"
    return f"{name}, {layout}, {'/'.join(types)}, {predicts}"


FAMILIES = {"Stable Diffusion 1": SD1, "Stable Diffusion 2": SD2}


def family(config: ModelConfig) -> str | None:
    """The family whose sizes a model has; None if it has its own."""
    ours = config.unet, config.vae, config.text
    return next((name for name, it in FAMILIES.items() if ours == (it.unet, it.vae, it.text)), None)


def listed(names: Sequence[str], most: int = 3) -> str:
    """Names of tensors in a phrase: averages by their number, of others `most` in full, and how many more."""
    others = [name for name in names if not name.startswith(EMA)]
    words = [f"{count} EMA tensors"] if (count := len(names) - len(others)) else []
    return ", ".join(words + others[:most]) + (f" and {len(others) - most} more" if len(others) > most else "")


def not_finite(tensors: Tensors) -> list[str]:
    """The names of tensors that hold NaN or infinity."""
    return sorted(name for name, tensor in tensors.items() if not _is_finite(tensor))


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers are finite; the sum, which is quick, tells unless it overflows by itself."""
    if not tensor.is_floating_point():
        return True  # no weight, and said to be none elsewhere
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())


def official(source: Source) -> Tensors:
    """The three networks as an official file names and shapes them."""
    if not source.config.text.openclip:
        return source.tensors
    tensors = dict(source.tensors)
    text = names.to_openclip(_take(tensors, names.TEXT), source.config.text)
    return tensors | {names.OPENCLIP + key: tensor for key, tensor in text.items()}


def write_single(path: str | Path, source: Source, metadata: dict[str, str] | None = None) -> list[str]:
    """Writes an official single file whose header carries the configuration, so that any width loads back.

    Tables that the original's classes expect and a source (a diffusers folder) lacks are computed; what of OpenCLIP
    lies beyond the layers that run is filled with zeros. Returns the names of the source's tensors that are not in it.
    Raises InputError for a name that `read` would not know.
    """
    if Path(path).suffix != ".safetensors":
        raise InputError(f"{path}: the name of a single file to save should end in .safetensors")
    filled = Schedule(source.config.schedule).official_buffers() | names.unused_text(source.config.text)
    header = {
        "format": "pt",
        CONFIG: json.dumps(source.config.to_dict()),
        TOKENIZER: source.tokenizer.to_metadata(),
    }
    header |= source.origin if metadata is None else metadata
    with replacing(Path(path)) as temporary:
        save_tensors(temporary, filled | source.extra | official(source), header)
    return sorted(source.dropped)


def write_folder(path: str | Path, source: Source, metadata: dict[str, str] | None = None) -> list[str]:
    """Writes a diffusers folder. Returns the names of the source's tensors that it has no place for, `extra` too."""
    if Path(path).is_file():
        raise InputError(f"{path} is a file, and a diffusers model is a folder; give another name")
    config, tokenizer = source.config, source.tokenizer
    tensors = dict(source.tensors)
    unet, vae, text = (_take(tensors, prefix) for prefix in (names.UNET, names.VAE, names.TEXT))
    unet_table, vae_table = names.unet_table(config.unet), names.vae_table(config.vae)
    parts = {
        "unet": {names.rename(key, unet_table): tensor for key, tensor in unet.items()},
        "vae": {
            names.rename(key, vae_table): tensor[:, :, 0, 0] if _is_matrix(key, tensor) else tensor
            for key, tensor in vae.items()
        },
        "text_encoder": text,
    }
    with replacing(Path(path)) as temporary:
        temporary.mkdir()
        for name, tree in folder.config_files(config, tokenizer.eos_id, tokenizer.bos_id).items():
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
        for part, part_tensors in parts.items():
            file = temporary / part / f"{folder.PARTS[part]}.safetensors"
            save_tensors(file, part_tensors, {"format": "pt"} | (source.origin if metadata is None else metadata))
        tokenizer.save(temporary / "tokenizer")
    return sorted([*source.dropped, *source.extra])


WRITERS = {"official": write_single, "diffusers": write_folder}


def fingerprint(source: Source) -> str:
    """SHA-256 over names, types, shapes and bytes of the tensors as stored, in the order of their official names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(official(source).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _take(tensors: Tensors, prefix: str) -> Tensors:
    """Moves the tensors whose name begins with the prefix out of `tensors`, and cuts it off."""
    return {key[len(prefix) :]: tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}


def _is_matrix(name: str, tensor: torch.Tensor) -> bool:
    """The autoencoder's attention: 1x1 convolutions in the official file, matrices in a diffusers folder."""
    return ".attn_1." in name and tensor.ndim > 1
