"""LoRA (Hu et al. 2021): the change that fine-tuning makes to a weight has a low rank, so only that much is trained.

A layer that computes W x computes W x + alpha / rank * up(down(x)) instead, eq. 3 of the paper. W stays as it is.
`down` maps x to `rank` numbers, and `up` maps those to the layer's output. At rank 16 a layer of 320 x 320 has 10,240
trained numbers instead of 102,400; gradients, the optimizer's moments and the saved file shrink with them.

`up` begins at zero, so that training begins at the base model. alpha / rank is a factor on the change, and so on the
learning rate of `up`: with alpha = rank it is 1.

Layers are named as kohya's programs name them (formats/lora_names.py), so that the `state_dict` of a `ModuleDict` of
adapters is, up to alpha, the file that other programs read.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init
from torch.utils.hooks import RemovableHandle

from ldm import rng
from ldm.config import ModelConfig
from ldm.errors import InputError
from ldm.formats import MAX_RANK, Adapter, Pair, official_to_kohya, read_lora

Layer = nn.Linear | nn.Conv2d
Layers = dict[str, Layer]  # by kohya's names

# The layers that train, by what is in their names. Each set contains those before it.
TARGETS = {
    "attention": ("attn1", "attn2", "self_attn"),  # queries, keys, values and outputs
    "transformer": ("attentions", "text_model"),  # also feed-forward networks, and projections into a transformer
    "all": ("attentions", "text_model", "resnets", "samplers"),  # also the convolutions between the transformers
}


class LoRA(nn.Module):
    """What an adapter adds to a layer's output: alpha / rank * up(down(x)), of the shape of the output."""

    def __init__(self, layer: Layer, rank: int, alpha: float):
        """Uninitialised fp32 weights on the layer's device. Of a convolution, `down` has its kernel and stride."""
        super().__init__()
        self.alpha, self.scale, self.enabled = alpha, alpha / rank, True
        like = {"bias": False, "device": layer.weight.device, "dtype": torch.float32}
        if isinstance(layer, nn.Conv2d):
            geometry = (layer.kernel_size, layer.stride, layer.padding)
            self.lora_down = skip_init(nn.Conv2d, layer.in_channels, rank, *geometry, **like)
            self.lora_up = skip_init(nn.Conv2d, rank, layer.out_channels, 1, **like)
        else:
            self.lora_down = skip_init(nn.Linear, layer.in_features, rank, **like)
            self.lora_up = skip_init(nn.Linear, rank, layer.out_features, **like)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.lora_up(self.lora_down(x))

    @torch.no_grad()
    def draw(self, seed: int, name: str) -> "LoRA":
        """Initial weights: `down` random, a function of seed and name; `up` zero."""
        down = self.lora_down.weight
        if not down.is_meta:
            values, generator = torch.empty(down.shape), rng.generator(seed, "lora", name)
            down.copy_(nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator))  # as a new nn.Linear
            self.lora_up.weight.zero_()
        return self

    @torch.no_grad()
    def adopt(self, pair: Pair) -> "LoRA":
        """Weights from a file."""
        self.lora_down.weight.copy_(pair.down)
        self.lora_up.weight.copy_(pair.up)
        return self

    def pair(self) -> Pair:
        """The weights, detached, for a file."""
        return Pair(self.lora_down.weight.detach(), self.lora_up.weight.detach(), self.alpha)


def attach(layer: Layer, lora: LoRA, scale: float = 1.0) -> RemovableHandle:
    """Until `remove` of the handle is called, the layer returns W x + scale * lora(x). Its weights stay as they are."""

    def add(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output + scale * lora(inputs[0]) if lora.enabled else output

    return layer.register_forward_hook(add)


@contextmanager
def disabled(loras: Iterable[LoRA]) -> Iterator[None]:
    """Inside, the model computes as without these, to the bit."""
    loras = list(loras)
    for lora in loras:
        lora.enabled = False
    try:
        yield
    finally:
        for lora in loras:
            lora.enabled = True


def layers_of(networks: dict[str, nn.Module], config: ModelConfig) -> Layers:
    """All layers that a LoRA can change: matrices and convolutions of UNet and text encoder, by kohya's names.

    networks: by the prefix of their official names, as `StableDiffusion.networks` returns them.
    """
    found = {}
    for prefix, network in networks.items():
        for name, layer in network.named_modules():
            if isinstance(layer, Layer) and (kohya := official_to_kohya(prefix + name, config.unet)):
                found[kohya] = layer
    return found


def chosen(layers: Layers, targets: str) -> Layers:
    """The layers of "attention", "transformer" or "all"."""
    return {name: layer for name, layer in layers.items() if any(word in name for word in TARGETS[targets])}


class Adaptable:
    """The part of `StableDiffusion` that knows LoRAs: apply, remove, merge."""

    config: ModelConfig
    _applied: tuple[RemovableHandle, ...] = ()

    def lora_layers(self) -> Layers:
        """All layers that a LoRA can change, by kohya's names."""
        return layers_of(self.networks(), self.config)

    def read_lora(self, path: str | Path) -> Adapter:
        """A LoRA for this model. Raises InputError if it is damaged, or is for another kind of model."""
        shapes = {name: layer.weight.shape for name, layer in self.lora_layers().items()}
        return read_lora(path, self.config.unet).check_fits(shapes)

    def apply_lora(self, path: str | Path, scale: float = 1.0) -> Adapter:
        """From now on the model computes with `scale` times this LoRA, and with all others that are applied.

        The weights stay as they are, also in what `save` writes. Raises InputError as `read_lora` does. Tokens that lie
        in its file are the caller's to add: see `tokens.add_bundled`.
        """
        adapter, layers = self.read_lora(path), self.lora_layers()
        for name, pair in adapter.pairs.items():
            layer = layers[name]
            lora = LoRA(layer, pair.rank, pair.alpha).adopt(pair).to(layer.weight.dtype).requires_grad_(False)
            self._applied += (attach(layer, lora, scale),)
        return adapter

    def adopt_schedule(self, adapters: Iterable[Adapter]) -> None:
        """Samples with zero terminal SNR from now on, if a LoRA was trained so and the model predicts v."""
        if self.config.schedule.prediction == "v" and any(adapter.has_zero_terminal_snr for adapter in adapters):
            self.reschedule(zero_terminal_snr=True, spacing="trailing")

    def remove_lora(self) -> None:
        """Removes all applied LoRAs: the model computes what it did before, to the bit."""
        for handle in self._applied:
            handle.remove()
        self._applied = ()

    def merge_lora(self, path: str | Path, scale: float = 1.0) -> Adapter:
        """Adds `scale` times this LoRA to the weights: W + scale * alpha / rank * up @ down.

        Raises InputError as `read_lora` does.
        """
        return self.merge_loras([(path, scale)])[0]

    @torch.no_grad()
    def merge_loras(self, scaled: Sequence[tuple[str | Path, float]]) -> list[Adapter]:
        """Adds several LoRAs with their scales. The sum is made in fp32, and rounded once to the weight's type."""
        adapters, layers = [self.read_lora(path) for path, _ in scaled], self.lora_layers()
        for name in dict.fromkeys(name for adapter in adapters for name in adapter.pairs):
            weight = layers[name].weight
            total = weight.float()
            for adapter, (_, scale) in zip(adapters, scaled, strict=True):
                if name in adapter.pairs:
                    total = total + scale * adapter.pairs[name].change().to(weight.device)
            weight.data = total.to(weight.dtype)  # a new tensor: the old one may be mapped
        return adapters


def extract(changes: dict[str, Tensor], rank: int | None, energy: float) -> tuple[Adapter, float]:
    """The LoRA that is nearest to the changes of a model's weights (Eckart & Young 1936).

    changes: by kohya's names. rank: of each pair, where the weight has as many; if None, the lowest rank that keeps
    this share, `energy`, of the sum of each change's squares, but at most MAX_RANK. Returns the LoRA, and the share
    that it keeps of all.
    Raises InputError if nothing has changed.
    """
    pairs, kept, total = {}, 0.0, 0.0
    for name, change in changes.items():
        if not change.any():
            continue
        matrix = change.double().flatten(1)  # (out, in)
        is_wide = matrix.shape[0] < matrix.shape[1]
        values, vectors = torch.linalg.eigh(matrix @ matrix.T if is_wide else matrix.T @ matrix)
        values, vectors = values.clamp(min=0).flip(0), vectors.flip(1)  # squares of the singular values, largest first
        count = rank or int((values.cumsum(0) < energy * values.sum()).sum()) + 1
        best = vectors[:, : min(count, len(values), MAX_RANK)]  # singular vectors: left ones if wide, else right ones
        down, up = (best.T @ matrix, best) if is_wide else (best.T, matrix @ best)
        up = up.view(*up.shape, *[1] * (change.ndim - 2))
        pairs[name] = down.reshape(-1, *change.shape[1:]).float(), up.float()
        kept, total = kept + values[: len(down)].sum().item(), total + values.sum().item()
    if not pairs:
        raise InputError("no weight that a LoRA can hold differs between the two models")
    # Programs expect one alpha for all pairs, so `up` makes up for the pairs of other ranks.
    alpha = max(len(down) for down, _ in pairs.values())
    pairs = {name: Pair(down, up * (len(down) / alpha), float(alpha)) for name, (down, up) in pairs.items()}
    return Adapter(pairs), kept / total
