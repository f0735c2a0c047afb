"""Files <-> tensors under their official names: the official single file and the diffusers folder.

Nothing here knows a network: `read` gives whatever names and shapes a file holds, `StableDiffusion.load` insists on
the right ones. Tensors come memory-mapped; nothing is copied until somebody casts or moves it.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm import folder, names
from ldm.config import SD1, ModelConfig
from ldm.errors import InputError
from ldm.schedule import Schedule
from ldm.tokenizer import Tokenizer

Tensors = dict[str, Tensor]

# In official files beside the three networks: known, and never computed with.
CARRIED = re.compile(
    r"(sqrt_|log_)?(one_minus_|recipm?1?_)?alphas_cumprod(_prev)?|betas|posterior_\w+"
    r"|.*\.position_ids|first_stage_model\.loss\..*"
)
DROPPED = re.compile(r"model_ema\..*")  # belongs to a training run, not to the tuned model


@dataclass
class Source:
    """What a file or folder holds."""

    config: ModelConfig
    tensors: Tensors  # the three networks, under their official names
    tokenizer: Tokenizer
    extra: Tensors = field(default_factory=dict)  # known, not computed with, saved again in the official layout


def read(path: str | Path) -> Source:
    """Reads an official .safetensors file or a diffusers folder. Raises InputError if it is neither."""
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
            raise InputError(
                f"{path} is no file or folder here; if it is a name on a model hub: nothing is downloaded by this "
                "program, so fetch the model first (weights/README.md says what and where) and give its path"
            )
        raise InputError(f"{path}: no such model; give a .safetensors file or a diffusers folder")
    if path.suffix != ".safetensors":
        raise InputError(f"{path} is neither a .safetensors file nor a diffusers folder")
    return _read_single(path)


def _read_single(path: Path) -> Source:
    tensors, metadata = _open(path)
    if "ldm.config" in metadata:
        config = ModelConfig.from_dict(json.loads(metadata["ldm.config"]))
        tokenizer = Tokenizer.from_metadata(metadata["ldm.tokenizer"])
    elif names.TEXT + "text_model.embeddings.token_embedding.weight" in tensors:
        config = SD1
        tokenizer = Tokenizer.clip(config.text.context_length, config.text.pad_id)
    else:
        raise InputError(f"{path} does not look like Stable Diffusion 1: it has no {names.TEXT}text_model...")
    ours = (names.UNET, names.VAE, names.TEXT)
    extra, dropped = _take(tensors, CARRIED), _take(tensors, DROPPED)
    del dropped
    unknown = sorted(key for key in tensors if not key.startswith(ours))
    if unknown:
        raise InputError(f"{path}: unknown tensor {_some(unknown)}")
    return Source(config, tensors, tokenizer, extra)


def _read_folder(path: Path) -> Source:
    if not (path / "model_index.json").exists():
        raise InputError(f"{path} is not a diffusers folder: it has no model_index.json")
    text = json.loads((path / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_folder(path / "tokenizer", context_length=text["max_position_embeddings"])
    config = folder.read_config(path, tokenizer.pad_id)
    tensors: Tensors = {}
    for key, tensor in _part(path, "unet").items():
        tensors[names.UNET + _known(path, key, names.invert(names.unet_table(config.unet)))] = tensor
    for key, tensor in _part(path, "vae").items():
        for old, new in names.OLD_VAE_ATTENTION.items():
            key = key.replace(f"attentions.0.{old}.", f"attentions.0.{new}.")
        name = _known(path, key, names.invert(names.vae_table(config.vae)))
        tensors[names.VAE + name] = tensor[:, :, None, None] if _is_matrix(name, tensor) else tensor
    for key, tensor in _part(path, "text_encoder").items():
        if not key.endswith("position_ids"):
            tensors[names.TEXT + (key if key.startswith("text_model.") else "text_model." + key)] = tensor
    return Source(config, tensors, tokenizer)


def write_single(path: str | Path, source: Source) -> None:
    """Writes an official single file whose header carries the configuration, so that any width loads back."""
    schedule = Schedule(source.config.schedule)
    positions = torch.arange(source.config.text.context_length)[None]
    made = schedule.official_buffers() | {names.TEXT + "text_model.embeddings.position_ids": positions}
    metadata = {
        "format": "pt",
        "ldm.config": json.dumps(source.config.to_dict()),
        "ldm.tokenizer": source.tokenizer.to_metadata(),
    }
    with replacing(Path(path)) as temporary:
        _save(temporary, made | source.extra | source.tensors, metadata)


def write_folder(path: str | Path, source: Source) -> None:
    """Writes a diffusers folder. What such a folder has no place for (`extra`) is left out."""
    config, tokenizer = source.config, source.tokenizer
    unet, vae, text = (_take(dict(source.tensors), p) for p in (names.UNET, names.VAE, names.TEXT))
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
        for part, tensors in parts.items():
            _save(temporary / part / f"{folder.PARTS[part]}.safetensors", tensors, {"format": "pt"})
        tokenizer.save(temporary / "tokenizer")


def fingerprint(tensors: Tensors) -> str:
    """SHA-256 over names, types, shapes and bytes of the tensors as stored, in the order of their official names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place when the block ends well, and is removed when it does not.

    An older file or model folder of that name stays whole until then; a folder that holds anything else is refused.
    """
    if path.is_dir() and any(path.iterdir()) and not (path / "model_index.json").exists():
        raise InputError(f"{path} is a folder with other things in it; give a new name to save a model to")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        temporary = Path(scratch, "new")
        yield temporary
        if path.is_dir():
            os.replace(path, Path(scratch, "old"))
        os.replace(temporary, path)


def _open(path: Path) -> tuple[Tensors, dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a whole .safetensors file: {error}") from None


def _part(path: Path, part: str) -> Tensors:
    file = path / part / f"{folder.PARTS[part]}.safetensors"
    if not file.exists():
        raise InputError(f"{file} is missing; a diffusers folder has it")
    return _open(file)[0]


def _save(path: Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)


def _take(tensors: Tensors, which: str | re.Pattern) -> Tensors:
    """Moves those out of `tensors` whose name begins with a prefix (and cuts it off), or matches a pattern."""
    if isinstance(which, str):
        return {key[len(which) :]: tensors.pop(key) for key in list(tensors) if key.startswith(which)}
    return {key: tensors.pop(key) for key in list(tensors) if which.fullmatch(key)}


def _is_matrix(name: str, tensor: Tensor) -> bool:
    """The autoencoder's attention: 1x1 convolutions in the official file, matrices in a diffusers folder."""
    return ".attn_1." in name and tensor.ndim > 1


def _known(path: Path, key: str, table: names.Table) -> str:
    name = names.rename(key, table)
    if name is None:
        raise InputError(f"{path}: unknown tensor {key}")
    return name


def _some(keys: list[str]) -> str:
    return keys[0] + (f" (and {len(keys) - 1} more)" if len(keys) > 1 else "")
