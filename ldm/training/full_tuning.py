"""Trains the networks themselves, as DreamBooth was published (Ruiz et al. 2023); a learned token with them."""

from pathlib import Path
from typing import Any

from ldm import formats
from ldm.dreambooth import Trainable
from ldm.formats import Tensors
from ldm.model import StableDiffusion
from ldm.settings import Settings
from ldm.tokens import LearnedToken

RESULTS = {"official": "model.safetensors", "diffusers": "model"}  # names of the final model by its layout


class FullTuning(Trainable):
    """Trains the whole UNet and, if the settings say so, the whole text encoder: DreamBooth as it was published."""

    weights_file = formats.CHECKPOINT_MODEL  # a whole model, so that sample.py takes a checkpoint folder as --model

    def __init__(self, sd: StableDiffusion, settings: Settings, token: LearnedToken | None = None):
        """token: one to train too."""
        networks = (formats.UNET_PREFIX, formats.TEXT_PREFIX) if settings.train_text_encoder else (formats.UNET_PREFIX,)
        trained = {n: p for n, p in sd.parameters().items() if n.startswith(networks)}
        super().__init__(sd, settings, trained | ({token.name: token.vectors} if token else {}), token)

    def parameter_groups(self, settings: Settings) -> list[dict[str, Any]]:
        return self.groups_of(formats.UNET_PREFIX, formats.TEXT_PREFIX, settings, settings.learning_rate)

    def bytes_saved(self) -> int:
        extra = self.sd.source.extra.values() if self.sd.source is not None else ()
        added = formats.unused_text(self.sd.config.text).values()
        return sum(4 * tensor.numel() for tensor in (*self.sd.state().values(), *extra, *added))

    def save(self, path: Path, metadata: dict[str, str]) -> list[str]:
        """Writes the whole model as an official single file."""
        return self.sd.save(path, "official", metadata=metadata)

    def read(self, path: Path) -> Tensors:
        return formats.read(path).tensors

    def expected(self) -> Tensors:
        return self.sd.state()

    def result_path(self, folder: Path, settings: Settings) -> Path:
        return folder / RESULTS[settings.layout]

    def result(self, path: Path, settings: Settings, metadata: dict[str, str]) -> list[str]:
        if self.token is not None:  # beside the model: for programs that know the token only by its file
            self.token.save(path.parent, metadata)
        return self.sd.save(path, settings.layout, metadata=metadata)
