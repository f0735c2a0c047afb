"""Which parameters train: LoRA as a `Trainable`, and the choice that the settings make."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.dreambooth import FullTuning, Prompts, Trainable
from ldm.formats import LORA_TEXT, LORA_UNET, Adapter, Tensors, kohya_metadata, modelspec, not_finite, write_lora
from ldm.lora import LoRA, attach, chosen, disabled
from ldm.model import StableDiffusion
from ldm.training.settings import Settings
from ldm.training.token_tuning import TokenTuning, begin_token


class LoRATuning(Trainable):
    """Trains a LoRA of the UNet and, if the settings say so, of the text encoder (Hu et al. 2021; see ldm/lora.py).

    The base model is frozen in the type that autocast computes in, without gradients and moments. A run and its
    checkpoints hold the adapter alone, under kohya's names.
    """

    weights_file = "lora.safetensors"

    def __init__(self, sd: StableDiffusion, settings: Settings):
        rank, alpha = settings.lora_rank, settings.lora_alpha or float(settings.lora_rank)
        layers = chosen(sd.lora_layers(), settings.lora_targets)
        if not settings.train_text_encoder:
            layers = {name: layer for name, layer in layers.items() if name.startswith(LORA_UNET)}
        loras = {name: LoRA(layer, rank, alpha).draw(settings.seed, name) for name, layer in layers.items()}
        adapters = nn.ModuleDict(loras)
        super().__init__(sd, settings, dict(adapters.named_parameters()))
        self.adapters = adapters  # registered, so that DistributedDataParallel averages their gradients
        self.base_name = Path(settings.model or "").name
        for name, layer in layers.items():
            attach(layer, adapters[name])

    @property
    def text_encoder_trains(self) -> bool:
        return any(p.requires_grad for name, p in self.trained.items() if name.startswith(LORA_TEXT))

    def prepare(self, prompts: Prompts, dtype: torch.dtype) -> None:
        self.compile_networks()
        self.keep_prompts(prompts)
        for network in (self.sd.unet, self.sd.text_encoder):
            network.to(dtype)  # not `sd.freeze`, which keeps a copy to save: no base model is saved here

    def keep_base(self, prompt: str, dtype: torch.dtype) -> None:
        """The base is the model without the adapter: only the prompt is encoded once."""
        with torch.no_grad(), disabled(self.adapters.values()):
            self._base = [self.sd.unet, self.sd.encode_prompt(prompt)]

    def base(self, noisy: Tensor, t: Tensor) -> Tensor:
        with disabled(self.adapters.values()):
            return super().base(noisy, t)

    def parameter_groups(self, settings: Settings) -> list[dict[str, Any]]:
        unet, text = (
            [parameter for name, parameter in self.trained.items() if name.startswith(prefix)]
            for prefix in (LORA_UNET, LORA_TEXT)
        )
        groups = [{"name": "unet", "params": unet, "lr": settings.learning_rate, "stop": None}]
        if text:
            rate = settings.text_encoder_learning_rate or settings.learning_rate / 2
            stop = settings.text_encoder_stop_step
            groups.append({"name": "text encoder", "params": text, "lr": rate, "stop": stop})
        return groups

    def adapter(self) -> Adapter:
        """The LoRA as it is now."""
        return Adapter({name: lora.pair() for name, lora in self.adapters.items()})

    def save(self, path: Path, metadata: dict[str, str]) -> list[str]:
        self._write(path, metadata, self.adapter())
        return []

    def _write(self, path: Path, metadata: dict[str, str], adapter: Adapter, **names: str) -> None:
        """names: more entries of kohya's metadata."""
        about = kohya_metadata(self.sd.config, adapter, sd_model_name=self.base_name, **names)
        about |= modelspec.describe(self.sd.config, f"LoRA for {self.base_name or 'a Stable Diffusion'}", "lora")
        write_lora(path, adapter.tensors(), about | metadata)  # the metadata's title says more

    def expected(self) -> Tensors:
        return self.adapter().tensors()

    def result(self, path: Path, settings: Settings, metadata: dict[str, str]) -> list[str]:
        """Writes the LoRA in fp16, half the size of a checkpoint's; in fp32 if a number is too large for fp16."""
        half = self.adapter().to(torch.float16)
        adapter = self.adapter() if not_finite(half.tensors()) else half
        self._write(path, metadata, adapter, output_name=path.parent.name)
        return []


def tuning_of(sd: StableDiffusion, settings: Settings) -> Trainable:
    """What trains: a token alone, a LoRA, or the whole networks and with them a token, as the settings say.

    The token is added to the model.
    """
    token = begin_token(sd, settings)
    if settings.train == "token":
        return TokenTuning(sd, settings, token)
    return LoRATuning(sd, settings) if settings.lora_rank else FullTuning(sd, settings, token)
