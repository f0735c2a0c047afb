"""Embedding files: the vectors of one learned token (textual inversion), in the forms that other programs write.

    program      file                                   holds
    diffusers    .safetensors, .bin                     one tensor, whose name is the token
    A1111        .pt                                    string_to_param, a dictionary of one tensor
    kohya        .safetensors, .pt                      emb_params; .pt as A1111
    OneTrainer   .safetensors                           emp_params, as it is spelled there

In all but the first the token is the name of the file. A1111 and ComfyUI take the name of the file in any case: a file
that is named as its one tensor is understood by all.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.errors import InputError
from ldm.formats.checks import WEIGHT_DTYPES, not_finite
from ldm.formats.ckpt import read_pickle
from ldm.formats.tensors import PICKLE_SUFFIXES, open_tensors, save_tensors
from ldm.formats.unpickle import Stub
from ldm.runtime import check_file, exists, replacing

NAMELESS = ("emb_params", "emp_params", "clip_l")  # names of tensors that do not say the token
WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 1280: "SDXL"}
MAX_VECTORS = 75  # as many as a prompt has room for


def read_embedding(path: str | Path) -> tuple[str, Tensor]:
    """A token and its vectors, (N, D) fp32, from a file. Nothing that a pickled file carries is run.

    Raises InputError if the file is missing or damaged, holds something else, or holds NaN or infinity.
    """
    path = Path(path)
    if not exists(path):
        raise InputError(f"{path}: no such embedding file")
    check_file(path)
    if path.suffix in PICKLE_SUFFIXES:
        token, vectors = _of_pickle(path, read_pickle(path))
    elif path.suffix == ".safetensors":
        token, vectors = _of_tensors(path, open_tensors(path)[0])
    else:
        raise InputError(f"{path} is no embedding: the name of one ends in .safetensors, .pt or .bin")
    return token, checked_vectors(path, vectors)


def checked_vectors(path: Path, vectors: Tensor) -> Tensor:
    """A token's vectors from a file as (N, D) fp32. Raises InputError for another shape or type, NaN and infinity."""
    vectors = vectors[None] if vectors.ndim == 1 else vectors
    if vectors.ndim != 2 or 0 in vectors.shape or vectors.dtype not in WEIGHT_DTYPES or len(vectors) > MAX_VECTORS:
        what = f"{tuple(vectors.shape)} {vectors.dtype}"
        raise InputError(f"{path} holds {what}, and an embedding is 1 to {MAX_VECTORS} vectors")
    if not_finite({"": vectors}):
        raise InputError(f"{path} holds NaN or infinity; the file is damaged, or its training has diverged")
    return vectors.detach().float().clone()


def _of_tensors(path: Path, tensors: dict[str, Any]) -> tuple[str, Tensor]:
    """The token and its tensor, among tensors by name."""
    for name in NAMELESS:
        if name in tensors and "clip_g" not in tensors:
            return path.stem, tensors[name]
    if len(tensors) != 1:
        said = "is for SDXL" if "clip_g" in tensors else f"holds {len(tensors)} tensors"
        raise InputError(f"{path} {said}, and an embedding of Stable Diffusion 1 or 2 is one tensor")
    return next(iter(tensors.items()))


def _of_pickle(path: Path, tree: Any) -> tuple[str, Tensor]:
    """The token and its tensor, in an object that torch.save has written."""
    tree = {path.stem: tree} if isinstance(tree, Tensor) else tree
    is_a1111 = isinstance(tree, dict) and "string_to_param" in tree
    if is_a1111:
        tree = tree["string_to_param"]
        if isinstance(tree, Stub) and isinstance(tree.state, dict):  # the first versions saved a ParameterDict
            tree = tree.state.get("_parameters")
    if not isinstance(tree, dict):
        raise InputError(f"{path} holds no embedding")
    tensors = {name: value for name, value in tree.items() if isinstance(name, str) and isinstance(value, Tensor)}
    token, vectors = _of_tensors(path, tensors)
    return path.stem if is_a1111 else token, vectors


def write_embedding(path: Path, token: str, vectors: Tensor, metadata: dict[str, str]) -> None:
    """Writes vectors (N, D) as the one tensor of a .safetensors file, under the token's name, in fp32."""
    with replacing(path) as temporary:
        save_tensors(temporary, {token: vectors.detach().cpu().float()}, {"format": "pt"} | metadata)


def kind_of(width: int) -> str:
    """What a vector of this width is for, in words."""
    return WIDTHS.get(width, f"a text encoder of width {width}")
