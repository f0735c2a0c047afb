"""Trains a learned token alone (Textual Inversion, Gal et al. 2022; see ldm/tokens.py)."""

from pathlib import Path
from typing import Any

import torch

from ldm import tokens
from ldm.dreambooth import Prompts, Trainable
from ldm.errors import InputError
from ldm.model import StableDiffusion
from ldm.settings import Settings


class TokenTuning(Trainable):
    """Trains the vectors of one token; nothing else of the model gets a gradient or a moment.

    A run writes them as the one tensor of TOKEN.safetensors, which diffusers, A1111 and ComfyUI read. The prompt of the
    class does not hold the token, so there is no prior term: its gradient would be zero.
    """

    weights_file = "token.safetensors"

    def __init__(self, sd: StableDiffusion, settings: Settings, token: tokens.LearnedToken):
        super().__init__(sd, settings, {token.token: token.vectors}, token)

    def prepare(self, prompts: Prompts, dtype: torch.dtype) -> None:
        super().prepare(prompts, dtype)
        self.sd.unet.to(dtype)  # frozen, and not saved

    def parameter_groups(self, settings: Settings) -> list[dict[str, Any]]:
        return [self.token.group(settings)]

    def result_path(self, folder: Path, settings: Settings) -> Path:
        return folder / self.token.file

    def result(self, path: Path, settings: Settings, metadata: dict[str, str]) -> list[str]:
        self.token.save(path.parent, metadata)
        return []


def begin_token(sd: StableDiffusion, settings: Settings) -> tokens.LearnedToken | None:
    """Adds the token that the settings ask for; None if they ask for none. Raises InputError if it can't be added."""
    if settings.placeholder_token is None:
        return None
    try:
        return tokens.begin(sd, settings.placeholder_token, settings.initializer_token, settings.num_vectors)
    except InputError as error:
        raise InputError(f"--placeholder-token: {error}") from None
