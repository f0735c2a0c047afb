"""The .safetensors file of a LoRA, read in every scheme of names and written in kohya's or peft's."""

import json
import math
import re
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.config import ModelConfig, TextConfig, UNetConfig
from ldm.errors import InputError
from ldm.formats import lora_names
from ldm.formats.checks import WEIGHT_DTYPES, not_finite
from ldm.formats.embedding import checked_vectors
from ldm.formats.names import BUNDLED
from ldm.formats.tensors import PICKLE_SUFFIXES, Tensors, open_tensors, save_tensors
from ldm.runtime import exists, parse_json, read_json, replacing

MAX_RANK = 1024
METADATA_KEY = "lora_adapter_metadata"  # diffusers: peft's configuration of each network, as JSON
# A learned token in the file of a LoRA, as A1111 names it (`BUNDLED`) and as OneTrainer does.
BUNDLED_KEY = re.compile(r"bundle_emb\.(.+)\.(?:string_to_param\.\*|clip_l)")
ZERO_SNR_KEY = "ss_zero_terminal_snr"  # kohya's
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
        return self.metadata.get(ZERO_SNR_KEY) == "True"

    def reads_text_of(self, config: TextConfig) -> bool:
        """Whether it changes layers that read vectors of this text encoder's width."""
        readers = ("attn2_to_k", "attn2_to_v", "q_proj", "k_proj", "v_proj", "out_proj", "mlp_fc1")
        return any(p.down.shape[1] == config.width for name, p in self.pairs.items() if name.endswith(readers))

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
    say in the header or in adapter_config.json; where nothing says it, it is the rank, with a warning for a file of
    peft's, which has it there.
    Raises InputError, which names the tensor, for an unknown name, half of a pair, shapes that are no pair, a rank
    above MAX_RANK, an alpha that is not a positive number, one that is stated by a regular expression, and NaN or
    infinity. Pickled files are not read.
    """
    path = Path(path)
    if path.suffix in PICKLE_SUFFIXES:
        raise InputError(f"{path} is pickled; a LoRA is read from a .safetensors file")
    tensors, metadata = open_tensors(path)
    tokens = _take_tokens(path, tensors)
    parts = {
        module: _checked_pair(path, module, found)
        for module, found in sorted(_sorted_out(path, tensors, config).items())
    }
    if bad := not_finite(tensors):
        raise InputError(f"{path}: {bad[0]} holds NaN or infinity")
    stated = _stated(path, tensors, metadata)
    pairs = {}
    for module, found in parts.items():
        down, up = found["down"], found["up"]
        try:
            alpha = _alpha(module, len(down), found, stated)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        if not 0 < torch.tensor(alpha) < math.inf:  # in fp32, the type that alphas are written in
            raise InputError(f"{path}: alpha of {module} is {alpha:g}, and should be a positive number")
        pairs[module] = Pair(down, up, alpha)
    if not pairs:
        raise InputError(f"{path} holds no LoRA: it has no tensors")
    return Adapter(pairs, metadata, path, tokens)


def _take_tokens(path: Path, tensors: Tensors) -> Tensors:
    """Removes the vectors of learned tokens from a file's tensors. Returns them by token."""
    tokens: Tensors = {}
    for key, match in [(key, BUNDLED_KEY.fullmatch(key)) for key in tensors]:
        if match and match[1] in tokens:
            raise InputError(f"{path}: {key} is in it twice, under two names")
        if match:
            tokens[match[1]] = checked_vectors(path, tensors.pop(key))
    return tokens


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


def _checked_pair(path: Path, module: str, found: Tensors) -> Tensors:
    """The tensors of one module. Raises InputError unless they are a pair of halves, and an alpha or none."""
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
    return found


def _stated(path: Path, tensors: Tensors, metadata: dict[str, str]) -> dict[str, Any]:
    """What diffusers says in the header, or peft beside the file, of all networks: "unet.lora_alpha" and so on."""
    if METADATA_KEY in metadata:
        tree = parse_json(metadata[METADATA_KEY], f"{path}: its metadata {METADATA_KEY}")
    elif all(key.startswith("base_model.model.") for key in tensors):
        if not exists(path.parent / PEFT_CONFIG):
            if tensors and not any(key.endswith(".alpha") for key in tensors):
                warnings.warn(
                    f"{path}: {PEFT_CONFIG} is not beside it; its alpha is taken to be the rank", stacklevel=3
                )
            return {}
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
    if isinstance(own, dict):  # modules with an alpha of their own
        alpha = next((value for pattern, value in own.items() if _is_named(pattern, inner)), alpha)
    alpha = alpha if type(alpha) in (int, float) and abs(alpha) < 1e9 else math.nan
    return alpha * math.sqrt(rank) if said("use_rslora", False) is True else float(alpha)


def _is_named(pattern: str, module: str) -> bool:
    """Whether a pattern of peft's names a module: by the end of its name, or by all of it after a ^.

    Raises InputError for any other regular expression: one from a stranger's file could take for ever to match.
    """
    name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
    if not re.fullmatch(r"[\w.]+", name):
        raise InputError(f"its alpha_pattern {pattern!r} is a regular expression, and only names of modules are read")
    return module == name or (pattern[0] != "^" and module.endswith(f".{name}"))


def check_lora_name(path: Path) -> None:
    """Raises InputError unless a LoRA's file can have this name."""
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: the name of a LoRA to save should end in .safetensors")


def write_lora(path: Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    """Writes a LoRA's file. What is at `path` stays until it is whole. Raises as `check_lora_name`."""
    check_lora_name(path)
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
        facts[ZERO_SNR_KEY.removeprefix("ss_")] = "True"
    if kernels:
        ranks, alphas = ({getattr(pair, name) for pair in kernels} for name in ("rank", "alpha"))
        facts["network_args"] = json.dumps({"conv_dim": _common_number(ranks), "conv_alpha": _common_number(alphas)})
    return {f"ss_{name}": text for name, text in (facts | names).items()}


def _common_number(numbers: set[float]) -> str:
    """The number that all pairs have, or kohya's word where they differ."""
    return f"{min(numbers):g}" if len(numbers) == 1 else "Dynamic"
