"""Tensor files, whatever wrote them, and replacing a file or folder in one step.

Tensors come memory-mapped where the file allows it: nothing is copied until somebody casts or moves it.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm.errors import InputError
from ldm.formats import ckpt

Tensors = dict[str, Tensor]

MAX_NAME = 1000  # letters of a tensor's name

PICKLED = (".ckpt", ".bin", ".pt", ".pth")


def open_tensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a .safetensors or pickled file by name, and its metadata. Raises InputError if it is damaged.

    Of a pickled training checkpoint only the `state_dict` counts; what else it holds is not looked at.
    """
    if path.suffix in PICKLED:
        tree = ckpt.read(path)
        if isinstance(tree, dict) and isinstance(tree.get("state_dict"), dict):
            tree = tree["state_dict"]
        if not isinstance(tree, dict):
            raise InputError(f"{path} holds no state_dict")
        _check_named(path, tree)
        return {name: tensor for name, tensor in tree.items() if isinstance(tensor, Tensor)}, {}
    try:
        with safe_open(path, framework="pt") as file:
            _check_named(path, file.keys())
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a whole .safetensors file: {error}") from None


def _check_named(path: Path, keys: Iterable[Any]) -> None:
    """Names of tensors are shown to people, so they have to be text of one line."""
    if not all(isinstance(key, str) and key.isprintable() and len(key) <= MAX_NAME for key in keys):
        raise InputError(f"{path} holds something under a name that is no text, or too long; no model has that")


def open_metadata(path: Path) -> dict[str, str]:
    """The metadata of a .safetensors file, nothing if there is no such file. Raises InputError if it is damaged."""
    if not path.exists():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a whole .safetensors file: {error}") from None


def open_part(folder: Path, stem: str, variant: str | None = None) -> Tensors:
    """The tensors of one network in a diffusers folder: one file or shards with an index, .safetensors before .bin.

    variant "fp16" means the files that are so named beside the full ones, or instead of them.
    """
    stems = [stem, "pytorch_model"] if stem == "model" else [stem]  # transformers' older name
    dot = f".{variant}" if variant else ""
    for name in stems:
        for kind in ("safetensors", "bin"):
            if (whole := folder / f"{name}{dot}.{kind}").exists():
                return open_tensors(whole)[0]
            if (index := folder / f"{name}.{kind}.index{dot}.json").exists():
                return _open_shards(index)
    there = sorted(
        {m[1] for p in folder.glob("*") if (m := re.match(r"[a-z_]+\.(\w+)[.-].*(safetensors|bin)$", p.name))}
    )
    if variant is None and there:
        raise InputError(f"{folder} has its weights as variant {there[0]} only; give --variant {there[0]}")
    raise InputError(f"{folder / f'{stem}{dot}.safetensors'} is missing; a diffusers folder has it")


def _open_shards(index: Path) -> Tensors:
    try:
        shards = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_once)["weight_map"]
        names = sorted(set(shards.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{index} is damaged: {error!r}") from None
    beside = {path.name for path in index.parent.iterdir()}
    if strange := [name for name in names if name not in beside]:
        raise InputError(f"{index} names a shard {strange[0]!r} that is not beside it")
    tensors: Tensors = {}
    for name in names:
        found = open_tensors(index.parent / name)[0]
        if differ := found.keys() ^ {tensor for tensor, shard in shards.items() if shard == name}:
            raise InputError(f"{index} and its shard {name} differ in tensor {min(differ)}")
        tensors |= found
    return tensors


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which no name stands twice."""
    tree = dict(pairs)
    if len(tree) < len(pairs):
        raise ValueError(f"{Counter(name for name, _ in pairs).most_common(1)[0][0]} is in it twice")
    return tree


def save_tensors(path: Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    """Writes a .safetensors file. Tensors that share memory, which the format does not know, are written apart."""
    apart, end = {name: tensor.contiguous() for name, tensor in tensors.items()}, 0
    for name, tensor in sorted(apart.items(), key=lambda item: item[1].data_ptr()):
        if tensor.data_ptr() < end:
            apart[name] = tensor.clone()
        end = max(end, tensor.data_ptr() + tensor.nbytes)
    path.touch()
    mode = path.stat().st_mode  # any new file's; safetensors makes its files for the owner's eyes only
    save_file(apart, path, metadata)
    path.chmod(mode)
