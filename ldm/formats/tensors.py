"""Reads tensor files (.safetensors, pickles, shards with an index) and writes .safetensors files.

Tensors are memory-mapped where the file allows it: nothing is copied until somebody casts or moves it.
"""

import hashlib
import json
import os
import re
import struct
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from ldm.errors import InputError
from ldm.formats import ckpt
from ldm.formats.modelspec import HASH_KEY
from ldm.runtime import check_file, list_folder, read_json

Tensors = dict[str, Tensor]

MAX_TENSOR_NAME = 1000  # letters
MAX_TENSORS = 1 << 14  # a full training checkpoint has 2,000
MAX_HEADER = 16 << 20  # bytes of a .safetensors header
PICKLE_SUFFIXES = (".ckpt", ".bin", ".pt", ".pth")

# The format's words for types, in the order in which the safetensors library writes them: larger elements come first,
# so that every tensor begins at a multiple of its element's size.
STORED_DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def open_tensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a .safetensors or pickled file by name, and its metadata. Raises InputError if it is damaged.

    Of a pickled training checkpoint only the `state_dict` is used.
    """
    check_file(path)
    if path.suffix in PICKLE_SUFFIXES:
        tree = ckpt.read_pickle(path)
        if isinstance(tree, dict) and isinstance(tree.get("state_dict"), dict):
            tree = tree["state_dict"]
        if not isinstance(tree, dict):
            raise InputError(f"{path} holds no state_dict")
        _check_names(path, tree)
        return {name: tensor for name, tensor in tree.items() if isinstance(tensor, Tensor)}, {}
    try:
        _check_header(path)
        with safe_open(path, framework="pt") as file:
            _check_names(path, file.keys())
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    except InputError:
        raise
    except Exception as error:  # the library, and torch on an absurd shape, raise no narrower class
        raise InputError(f"{path} is not a whole .safetensors file: {error}") from None


def _check_header(path: Path) -> None:
    """Raises InputError if the header of a .safetensors file is too large: the library reads it whole."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if MAX_HEADER < length < path.stat().st_size:
        raise InputError(f"{path} has a header of {length} bytes, and should have at most {MAX_HEADER}")


def _check_names(path: Path, keys: Collection[Any]) -> None:
    """Raises InputError unless there are not too many names, and all are text of one line: they are printed."""
    if len(keys) > MAX_TENSORS:
        raise InputError(f"{path} holds {len(keys)} tensors, and should hold at most {MAX_TENSORS}")
    if not all(isinstance(key, str) and key.isprintable() and len(key) <= MAX_TENSOR_NAME for key in keys):
        raise InputError(f"{path} holds something under a name that is no text, or too long; no model has that")


def open_part(folder: Path, stem: str, variant: str | None = None) -> tuple[Tensors, dict[str, str]]:
    """The tensors of one network in a diffusers folder, and their files' metadata.

    A network is one file, or shards with an index; .safetensors is taken before .bin. variant: a word in the files'
    names, "fp16" for example. Raises InputError if there is no such file, or it is damaged.
    """
    stems = [stem, "pytorch_model"] if stem == "model" else [stem]  # transformers' older name
    dot = f".{variant}" if variant else ""
    found = list_folder(folder) if os.path.exists(folder) else []
    for name in stems:
        for kind in ("safetensors", "bin"):
            if (whole := folder / f"{name}{dot}.{kind}") in found:
                return open_tensors(whole)
            if (index := folder / f"{name}.{kind}.index{dot}.json") in found:
                return _open_shards(index)
    matches = (re.match(r"[a-z_]+\.(\w+)[.-].*(safetensors|bin)$", path.name) for path in found)
    variants = sorted({match[1] for match in matches if match})
    if variant is None and variants:
        raise InputError(f"{folder} has its weights as variant {variants[0]} only; give variant {variants[0]}")
    raise InputError(f"{folder / f'{stem}{dot}.safetensors'} is missing; a diffusers folder has it")


def _open_shards(index: Path) -> tuple[Tensors, dict[str, str]]:
    tree = read_json(index)
    shards = tree.get("weight_map") if isinstance(tree, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise InputError(f"{index} is damaged: its weight_map does not name a file for each tensor")
    names = sorted(set(shards.values()))
    beside = {path.name for path in list_folder(index.parent)}
    if strange := [name for name in names if name not in beside]:
        raise InputError(f"{index} names a shard {strange[0]!r} that is not beside it")
    tensors, metadata = {}, {}
    for name in names:
        found, said = open_tensors(index.parent / name)
        if differ := found.keys() ^ {tensor for tensor, shard in shards.items() if shard == name}:
            raise InputError(f"{index} and its shard {name} differ in tensor {min(differ)}")
        tensors |= found
        metadata |= said
    return tensors, metadata


def save_tensors(path: Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    """Writes a .safetensors file: the same tensors and metadata always give the same bytes.

    The safetensors library can't be used for this: its order of metadata changes from run to run. Tensors that share
    memory are written one by one. An entry HASH_KEY of the metadata is set to the SHA-256 of all that follows the
    header. Raises InputError for a type that the format does not have.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in STORED_DTYPES:
            raise InputError(f"{name} holds {tensor.dtype}, which a .safetensors file can't hold")
    rank = {dtype: i for i, dtype in enumerate(STORED_DTYPES)}
    names = sorted(tensors, key=lambda name: (rank[tensors[name].dtype], name))
    if HASH_KEY in metadata:
        digest = hashlib.sha256()
        for name in names:
            digest.update(raw_bytes(tensors[name]))
        metadata = metadata | {HASH_KEY: "0x" + digest.hexdigest()}
    header, end = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}, 0
    for name in names:
        dtype, shape = tensors[name].dtype, list(tensors[name].shape)
        header[name] = {
            "dtype": STORED_DTYPES[dtype],
            "shape": shape,
            "data_offsets": [end, end + tensors[name].nbytes],
        }
        end += tensors[name].nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            file.write(raw_bytes(tensors[name]))


def file_hash(path: Path, behind_header: bool = False) -> str:
    """SHA-256 of a file, in hexadecimal digits, by which other programs know it.

    behind_header: without the header of a .safetensors file, as kohya's programs and A1111 know a LoRA. Raises
    InputError if it can't be read.
    """
    check_file(path)
    try:
        with path.open("rb") as file:
            if behind_header:
                file.seek(8 + int.from_bytes(file.read(8), "little"))
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}") from None


def raw_bytes(tensor: Tensor) -> np.ndarray:
    """The tensor's numbers as a flat array of bytes, in row-major order."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
