"""The diffusers folder: a file for each network, JSON that describes them, and a tokenizer."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ldm.errors import InputError
from ldm.formats import card, names
from ldm.formats.folder_config import config_files, read_config
from ldm.formats.source import Source, own_metadata
from ldm.formats.tensors import Tensors, open_part, save_tensors
from ldm.runtime import replacing
from ldm.tokenizer import Tokenizer

PARTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}  # file stems


def read_folder(path: Path, variant: str | None = None) -> Source:
    """Reads a diffusers folder. variant: a word in the weight files' names, "fp16" for example.

    Raises InputError if a file is missing or damaged, or the model is no Stable Diffusion 1 or 2.
    """
    try:
        config, tokenizer = read_config(path)
        unet_table, vae_table = (names.invert(t) for t in (names.unet_table(config.unet), names.vae_table(config.vae)))
    except InputError:
        raise
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise InputError(f"{path}: its JSON files describe no model: {error}") from None
    tensors: Tensors = {}
    unet, metadata = open_part(path / "unet", PARTS["unet"], variant)
    for key, tensor in unet.items():
        tensors[names.UNET_PREFIX + (names.rename(key, unet_table) or key)] = tensor
    for key, tensor in open_part(path / "vae", PARTS["vae"], variant)[0].items():
        for old, new in names.OLD_VAE_ATTENTION.items():
            key = key.replace(f"attentions.0.{old}.", f"attentions.0.{new}.")
        name = names.rename(key, vae_table) or key
        tensors[names.VAE_PREFIX + name] = tensor[:, :, None, None] if _is_matrix(name, tensor) else tensor
    for key, tensor in open_part(path / "text_encoder", PARTS["text_encoder"], variant)[0].items():
        if not key.endswith("position_ids"):
            tensors[names.TEXT_PREFIX + (key if key.startswith("text_model.") else "text_model." + key)] = tensor
    _split_table(tensors, tokenizer)
    about = {"metadata": own_metadata(metadata), "prediction_from": "the scheduler's JSON"}
    return Source(config, tokenizer, tensors, layout="diffusers", **about)


def write_folder(path: Path, source: Source) -> list[str]:
    """Writes a diffusers folder. Returns the names of the source's tensors that it has no place for.

    Raises InputError if there is a folder already that holds any file but those that are written.
    """
    if path.is_file():
        raise InputError(f"{path} is a file, and a diffusers model is a folder; give another name")
    tokenizer, tensors = source.tokenizer, _whole_table(source)
    text = replace(source.config.text, vocab_size=len(tensors[names.TABLE]))
    config, prefixes = replace(source.config, text=text), (names.UNET_PREFIX, names.VAE_PREFIX, names.TEXT_PREFIX)
    unet, vae, text = (names.take_prefixed(tensors, prefix) for prefix in prefixes)
    unet_table, vae_table = names.unet_table(config.unet), names.vae_table(config.vae)
    parts = {
        "unet": {names.rename(key, unet_table): tensor for key, tensor in unet.items()},
        "vae": {
            names.rename(key, vae_table): tensor[:, :, 0, 0] if _is_matrix(key, tensor) else tensor
            for key, tensor in vae.items()
        },
        "text_encoder": text,
    }
    configs = config_files(config, tokenizer.eos_id, tokenizer.bos_id)
    own = {f"{part}/{stem}.safetensors" for part, stem in PARTS.items()} | configs.keys()
    own |= {f"tokenizer/{name}" for name in Tokenizer.FILES} | card.replaceable(path)
    with replacing(path, own) as temporary:
        temporary.mkdir()
        (temporary / card.CARD).write_text(card.model_card(source), encoding="utf-8")
        for name, tree in configs.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
        for part, part_tensors in parts.items():
            file = temporary / part / f"{PARTS[part]}.safetensors"
            save_tensors(file, part_tensors, {"format": "pt"} | source.metadata)
        tokenizer.save(temporary / "tokenizer")
    return sorted([*source.dropped, *source.extra])


def _split_table(tensors: Tensors, tokenizer: Tokenizer) -> None:
    """Moves the table's last rows, of the tokens that the tokenizer adds, into tensors of their own."""
    table = tensors.get(names.TABLE)
    if not tokenizer.added or table is None or table.ndim != 2:
        return
    tensors[names.TABLE], rest = table[: len(tokenizer.vocab)], table[len(tokenizer.vocab) :]
    if len(rest) == sum(tokenizer.added.values()):  # else the loader finds that they are missing
        rows = rest.split(list(tokenizer.added.values()))
        tensors |= {names.LEARNED.format(i): row for i, row in enumerate(rows)}


def _whole_table(source: Source) -> Tensors:
    """The source's tensors, with those of learned tokens as the last rows of the table."""
    tensors = dict(source.tensors)
    learned = [tensors.pop(name) for name in source.learned_names().values()]
    return tensors | {names.TABLE: torch.cat([tensors[names.TABLE], *learned])} if learned else tensors


def _is_matrix(name: str, tensor: Tensor) -> bool:
    """Whether this is a matrix in a diffusers folder and a 1x1 convolution in an official file: VAE attention."""
    return ".attn_1." in name and tensor.ndim > 1
