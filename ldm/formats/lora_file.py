"""The .safetensors file of a LoRA, read in every scheme of names and written in kohya's or peft's."""

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.config import ModelConfig, UNetConfig
from ldm.errors import InputError
from ldm.formats import lora_names
from ldm.formats.checks import WEIGHT_DTYPES, not_finite
from ldm.formats.embedding import checked_vectors
from ldm.formats.names import BUNDLED
from ldm.formats.tensors import PICKLE_SUFFIXES, Tensors, open_tensors, save_tensors
from ldm.runtime import exists, parse_json, read_json, replacing

MAX_RANK = 1024
METADATA_KEY = "lora_adapter_metadata"  # diffusers: peft's configuration of each network, as JSON
PEFT_CONFIG = "adapter_config.json"  # peft: the same, beside the file


class Pair(NamedTuple):
    """What a LoRA holds of one module. It adds alpha / rank * up @ down to the module's weight."""

    down: Tensor  # (rank, in) of a Linear, (rank, in, k, k) of a convolution
    up: Tensor  # (out, rank), or (out, rank, 1, 1)
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def change(self) -> Tensor:
        """What it adds to the module's weight, in fp32: (out, in), or (out, in, k, k) of a convolution."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return self.scale * product.view(len(self.up), *self.down.shape[1:])


@dataclass
class Adapter:
    """A LoRA: a pair for each module that it changes, by kohya's module names."""

    pairs: dict[str, Pair]
    metadata: dict[str, str] = field(default_factory=dict)
    path: Path | None = None
    tokens: Tensors = field(default_factory=dict)  # vectors (N, D) of learned tokens that are in its file, by token

    @property
    def has_zero_terminal_snr(self) -> bool:
        """Whether it was trained on a schedule with zero terminal SNR, as its file says under kohya's name."""
        return self.metadata.get("ss_zero_terminal_snr") == "True"

    def tensors(self) -> Tensors:
        """The tensors under kohya's names."""
        tensors = {}
        for module, pair in self.pairs.items():
            tensors |= {f"{module}.lora_down.weight": pair.down, f"{module}.lora_up.weight": pair.up}
            tensors[f"{module}.alpha"] = torch.tensor(pair.alpha)  # fp32: fp16 would make 0 of 1e-9
        return tensors

    def bundle(self) -> Tensors:
        """The tensors under kohya's names, and its tokens' vectors as A1111 puts them into a LoRA's file."""
        return self.tensors() | {BUNDLED.format(token): vectors for token, vectors in self.tokens.items()}

    def tensors_of_diffusers(self) -> Tensors:
        """The tensors under peft's names, which diffusers reads: without alpha, so that the scale is in `up`."""
        tensors = {}
        for module, pair in self.pairs.items():
            name = lora_names.diffusers_name(module)
            tensors[f"{name}.lora_A.weight"] = pair.down
            tensors[f"{name}.lora_B.weight"] = (pair.up.float() * pair.scale).to(pair.up.dtype)
        return tensors

    def to(self, dtype: torch.dtype) -> "Adapter":
        """The same with its numbers in another type."""
        pairs = {name: Pair(p.down.to(dtype), p.up.to(dtype), p.alpha) for name, p in self.pairs.items()}
        return replace(self, pairs=pairs)

    def check_fits(self, shapes: dict[str, torch.Size]) -> "Adapter":
        """The same, its tensors with as many dimensions as the model's. shapes: of the weights, by kohya's names.

        Raises InputError, which names the module, unless the model has every module with this shape.
        """
        pairs = {}
        for name, pair in self.pairs.items():
            if name not in shapes:
                raise InputError(f"{self.path}: the model has no module {name}; the LoRA is for another kind of model")
            found, due = (len(pair.up), *pair.down.shape[1:]), tuple(shapes[name])
            if _trimmed(found) != _trimmed(due):  # a Linear and a 1x1 convolution are one to some programs
                said = f"{self.path}: {name} changes a weight of {found}, and the model's is {due}"
                raise InputError(f"{said}; the LoRA is for another kind of model")
            inner = [1] * (len(due) - 2)
            pairs[name] = Pair(pair.down.view(-1, *due[1:]), pair.up.view(due[0], -1, *inner), pair.alpha)
        return replace(self, pairs=pairs)


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A weight's shape without the trailing ones of a 1x1 convolution."""
    return shape[:2] if all(side == 1 for side in shape[2:]) else shape


def read_lora(path: str | Path, config: UNetConfig = UNetConfig()) -> Adapter:  # noqa: B008, frozen
    """Reads a LoRA whose names are kohya's, diffusers', peft's or official, of all modules or of some.

    config: of the UNet, for official names. Alpha is taken from the file's tensors, or from what peft and diffusers
    say in the header or in adapter_config.json; where nothing says it, it is the rank.
    Raises InputError, which names the tensor, for an unknown name, half of a pair, shapes that are no pair, a rank
    above MAX_RANK, an alpha that is not a positive number, and NaN or infinity. Pickled files are not read.
    """
    path = Path(path)
    if path.suffix in PICKLE_SUFFIXES:
        raise InputError(f"{path} is pickled; a LoRA is read from a .safetensors file")
    tensors, metadata = open_tensors(path)
    tokens = _take_tokens(path, tensors)
    parts = _sorted_out(path, tensors, config)
    if bad := not_finite(tensors):
        raise InputError(f"{path}: {bad[0]} holds NaN or infinity")
    stated = _stated(path, tensors, metadata)
    pairs = {}
    for module, found in sorted(parts.items()):
        down, up = _checked_pair(path, module, found)
        alpha = _alpha(module, len(down), found, stated)
        if not 0 < torch.tensor(alpha) < math.inf:  # in fp32, the type that alphas are written in
            raise InputError(f"{path}: alpha of {module} is {alpha:g}, and should be a positive number")
        pairs[module] = Pair(down, up, alpha)
    if not pairs:
        raise InputError(f"{path} holds no LoRA: it has no tensors")
    return Adapter(pairs, metadata, path, tokens)


def _take_tokens(path: Path, tensors: Tensors) -> Tensors:
    """Removes the vectors of learned tokens from a file's tensors. Returns them by token."""
    head, tail = BUNDLED.split("{}")
    names = [key for key in tensors if key.startswith(head) and key.endswith(tail)]
    return {key.removeprefix(head).removesuffix(tail): checked_vectors(path, tensors.pop(key)) for key in names}


def _sorted_out(path: Path, tensors: Tensors, config: UNetConfig) -> dict[str, Tensors]:
    """{kohya's module name: {"down", "up", "alpha": tensor}}."""
    parts: dict[str, Tensors] = {}
    for key, tensor in tensors.items():
        named = lora_names.split(key)
        module = lora_names.kohya_name(named[0], config) if named else None
        if module is None:
            raise InputError(f"{path}: {key} is no part of a LoRA for Stable Diffusion 1 or 2 that this program knows")
        if named[1] in parts.setdefault(module, {}):
            raise InputError(f"{path}: {key} is in it twice, under two names")
        parts[module][named[1]] = tensor
    return parts


def _checked_pair(path: Path, module: str, found: Tensors) -> tuple[Tensor, Tensor]:
    if missing := [part for part in ("down", "up") if part not in found]:
        raise InputError(f"{path}: {module} lacks its tensor {missing[0]}, one half of a pair")
    down, up = found["down"], found["up"]
    for tensor in (down, up):
        if tensor.dtype not in WEIGHT_DTYPES:
            raise InputError(f"{path}: {module} holds {tensor.dtype}, and should hold fp32, fp16 or bf16 numbers")
    alpha = found.get("alpha")  # a whole number in what kohya's tools write
    if alpha is not None and (alpha.numel() != 1 or alpha.dtype not in (*WEIGHT_DTYPES, torch.int64, torch.int32)):
        what = f"{tuple(alpha.shape)} {alpha.dtype}"
        raise InputError(f"{path}: alpha of {module} is {what}, and should be one number")
    is_pair = {down.ndim, up.ndim} <= {2, 4} and len(down) == up.shape[1] and set(up.shape[2:]) <= {1}
    if not is_pair or 0 in (*down.shape, *up.shape):
        shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
        raise InputError(f"{path}: down and up of {module} are {shapes}, and should be (rank, in) and (out, rank)")
    if len(down) > MAX_RANK:
        raise InputError(f"{path}: {module} has rank {len(down)}, and should have at most {MAX_RANK}")
    return down, up


def _stated(path: Path, tensors: Tensors, metadata: dict[str, str]) -> dict[str, Any]:
    """What diffusers says in the header, or peft beside the file, of all networks: "unet.lora_alpha" and so on."""
    if METADATA_KEY in metadata:
        tree = parse_json(metadata[METADATA_KEY], f"{path}: its metadata {METADATA_KEY}")
    elif exists(path.parent / PEFT_CONFIG) and all(key.startswith("base_model.model.") for key in tensors):
        tree = read_json(path.parent / PEFT_CONFIG)
    else:
        return {}
    if not isinstance(tree, dict):
        raise InputError(f"{path}: what peft says of it is no JSON object")
    return tree


def _alpha(module: str, rank: int, found: Tensors, stated: dict[str, Any]) -> float:
    """The module's alpha; NaN if what the file says is not a number."""
    if "alpha" in found:
        return float(found["alpha"])
    network, _, inner = lora_names.diffusers_name(module).partition(".")

    def said(name: str, default: Any) -> Any:
        return stated.get(f"{network}.{name}", stated.get(name, default))

    alpha, own = said("lora_alpha", rank), said("alpha_pattern", {})
    if isinstance(own, dict):  # modules with an alpha of their own, by the ends of their names
        alpha = next((value for end, value in own.items() if f".{inner}".endswith(f".{end}")), alpha)
    alpha = alpha if type(alpha) in (int, float) and abs(alpha) < 1e9 else math.nan
    return alpha * math.sqrt(rank) if said("use_rslora", False) is True else float(alpha)


def write_lora(path: Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    """Writes a LoRA's file. What is at `path` stays until it is whole."""
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: the name of a LoRA to save should end in .safetensors")
    with replacing(path) as temporary:
        save_tensors(temporary, tensors, {"format": "pt"} | metadata)


def kohya_metadata(config: ModelConfig, adapter: Adapter, **names: str) -> dict[str, str]:
    """What kohya's and A1111's programs read in a LoRA's header: the kind of base model, the rank and alpha.

    names: other entries, without `ss_`, output_name and sd_model_name for example.
    """
    pairs = list(adapter.pairs.values())
    kernels = [pair for pair in pairs if pair.down.shape[2:].numel() > 1]
    linear = [pair for pair in pairs if pair.down.shape[2:].numel() == 1] or kernels
    is_v = config.schedule.prediction == "v"
    facts = {
        "v2": str(config.text.openclip),
        "base_model_version": ("sd_v2_v" if is_v else "sd_v2") if config.text.openclip else "sd_v1",
        "network_module": "networks.lora",
        "network_dim": _common_number({pair.rank for pair in linear}),
        "network_alpha": _common_number({pair.alpha for pair in linear}),
    }
    if config.schedule.zero_terminal_snr:
        facts["zero_terminal_snr"] = "True"
    if kernels:
        ranks, alphas = ({getattr(pair, name) for pair in kernels} for name in ("rank", "alpha"))
        facts["network_args"] = json.dumps({"conv_dim": _common_number(ranks), "conv_alpha": _common_number(alphas)})
    return {f"ss_{name}": text for name, text in (facts | names).items()}


def _common_number(numbers: set[float]) -> str:
    """The number that all pairs have, or kohya's word where they differ."""
    return f"{min(numbers):g}" if len(numbers) == 1 else "Dynamic"
