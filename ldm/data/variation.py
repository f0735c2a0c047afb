"""Varies the caption of a row: leaves it out, or shuffles its tags."""

from collections.abc import Callable
from functools import partial

import torch

from ldm.settings import Settings


def variation(settings: Settings) -> Callable[[str, torch.Generator], str] | None:
    """`vary` with the settings of a run; None if they leave captions as they are."""
    return partial(vary, settings=settings) if settings.caption_dropout or settings.shuffle_tags else None


def vary(prompt: str, generator: torch.Generator, settings: Settings) -> str:
    """The prompt of one row.

    In the share `caption_dropout` of rows it is empty, so that the model keeps an unconditional prediction for guidance
    (Ho and Salimans 2022, algorithm 1). With `shuffle_tags`, the parts between commas come in a random order; the first
    `keep_tags` of them stay first. Without either, nothing is drawn.
    """
    if settings.caption_dropout and torch.rand((), generator=generator).item() < settings.caption_dropout:
        return ""
    if not settings.shuffle_tags:
        return prompt
    tags = [tag for part in prompt.split(",") if (tag := part.strip())]
    first, rest = tags[: settings.keep_tags], tags[settings.keep_tags :]
    order = torch.randperm(len(rest), generator=generator).tolist()
    return ", ".join([*first, *(rest[i] for i in order)])
