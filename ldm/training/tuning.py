"""Which parameters train: LoRA as a `Trainable`, also with a learned token, and the choice that the settings make."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.dreambooth import Base, Prompts, Trainable
from ldm.formats import (
    BUNDLED,
    LORA_TEXT,
    LORA_UNET,
    Adapter,
    Tensors,
    kohya_metadata,
    modelspec,
    not_finite,
    write_lora,
)
from ldm.lora import Layer, LoRA, attach, chosen, disabled
from ldm.model import StableDiffusion
from ldm.settings import Settings
from ldm.tokens import LearnedToken
from ldm.training.full_tuning import FullTuning
from ldm.training.token_tuning import TokenTuning, begin_token


class LoRATuning(Trainable):
    """Trains a LoRA of the UNet and, if the settings say so, of the text encoder (Hu et al. 2021; see ldm/lora.py).

    The base model is frozen in the type that autocast computes in, without gradients and moments. A run and its
    checkpoints hold the adapter alone, under kohya's names. A learned token can train with it ("pivotal tuning"): then
    a checkpoint's file holds its vectors too, and the run's result is two files.
    """

    weights_file = "lora.safetensors"

    def __init__(self, sd: StableDiffusion, settings: Settings, token: LearnedToken | None = None):
        """token: one to train too."""
        layers = chosen(sd.lora_layers(), settings.lora_targets)
        if not settings.train_text_encoder:
            layers = {name: layer for name, layer in layers.items() if name.startswith(LORA_UNET)}
        loras = {name: _new(layer, settings).draw(settings.seed, name) for name, layer in layers.items()}
        adapters = nn.ModuleDict(loras)
        vectors = {BUNDLED.format(token.token): token.vectors} if token else {}
        super().__init__(sd, settings, dict(adapters.named_parameters()) | vectors, token)
        self.adapters = adapters  # registered, so that DistributedDataParallel averages their gradients
        self.base_name = Path(settings.model or "").name
        for name, layer in layers.items():
            attach(layer, adapters[name])

    @property
    def text_encoder_trains(self) -> bool:
        with_adapter = any(p.requires_grad for name, p in self.trained.items() if name.startswith(LORA_TEXT))
        return with_adapter or super().text_encoder_trains  # which a token does too

    def prepare(self, prompts: Prompts, dtype: torch.dtype) -> None:
        self.compile_networks()
        self.keep_prompts(prompts)
        for parameter in (*self.sd.unet.parameters(), *self.sd.text_encoder.parameters()):
            if not parameter.requires_grad:  # a token's vectors stay fp32
                parameter.data = parameter.to(dtype)  # not `sd.freeze`, which keeps a copy to save: no base is saved

    @torch.no_grad()
    def keep_base(self, prompts: Prompts, dtype: torch.dtype) -> None:
        """The base is the model without the adapter: only the prompts are encoded once."""
        with disabled(self.adapters.values()):
            self._base = Base(self.sd.unet, dict(zip(prompts, self.sd.encode_prompt(prompts), strict=True)))

    def base(self, noisy: Tensor, t: Tensor, prompts: Sequence[str]) -> Tensor:
        with disabled(self.adapters.values()):
            return super().base(noisy, t, prompts)

    def parameter_groups(self, settings: Settings) -> list[dict[str, Any]]:
        return self.groups_of(LORA_UNET, LORA_TEXT, settings, settings.learning_rate / 2)

    def adapter(self) -> Adapter:
        """The LoRA and the token as they are now."""
        tokens = {self.token.token: self.token.vectors.detach()} if self.token else {}
        return Adapter({name: lora.pair() for name, lora in self.adapters.items()}, tokens=tokens)

    def save(self, path: Path, metadata: dict[str, str]) -> list[str]:
        self._write(path, metadata, self.adapter())
        return []

    def _write(self, path: Path, metadata: dict[str, str], adapter: Adapter, **names: str) -> None:
        """names: more entries of kohya's metadata."""
        about = kohya_metadata(self.sd.config, adapter, sd_model_name=self.base_name, **names)
        about |= modelspec.describe(self.sd.config, f"LoRA for {self.base_name or 'a Stable Diffusion'}", "lora")
        write_lora(path, adapter.bundle(), about | metadata)  # the metadata's title says more

    def expected(self) -> Tensors:
        return self.adapter().bundle()

    def result(self, path: Path, settings: Settings, metadata: dict[str, str]) -> list[str]:
        """Writes the LoRA in fp16, half the size of a checkpoint's; in fp32 if a number is too large for fp16.

        A token becomes a file of its own beside it, since not every program takes one that lies in a LoRA's file.
        """
        half = self.adapter().to(torch.float16)
        adapter = self.adapter() if not_finite(half.tensors()) else half
        self._write(path, metadata, replace(adapter, tokens={}), output_name=path.parent.name)
        if self.token is not None:
            self.token.save(path.parent, metadata)
        return []


def _new(layer: Layer, settings: Settings) -> LoRA:
    """A new LoRA for a layer, with the rank of the settings; a 3x3 convolution can have its own, at the same scale."""
    rank, alpha = settings.lora_rank, settings.lora_alpha or float(settings.lora_rank)
    if settings.lora_conv_rank and isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1):
        rank, alpha = settings.lora_conv_rank, alpha * settings.lora_conv_rank / rank
    return LoRA(layer, rank, alpha)


def tuning_of(sd: StableDiffusion, settings: Settings) -> Trainable:
    """What trains: a token alone, or a LoRA or the whole networks, and a token with them if the settings say so.

    The token is added to the model.
    """
    token = begin_token(sd, settings)
    if settings.train == "token":
        return TokenTuning(sd, settings, token)
    return (LoRATuning if settings.lora_rank else FullTuning)(sd, settings, token)
