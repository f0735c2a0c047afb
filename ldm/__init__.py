"""Stable Diffusion and DreamBooth from scratch, in PyTorch."""

from ldm.errors import InputError
from ldm.model import StableDiffusion

__all__ = ["InputError", "StableDiffusion"]
