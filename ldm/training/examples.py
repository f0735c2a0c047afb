"""What a folder says about each of its photographs: a prompt, a mask, where the subject is."""

from dataclasses import dataclass
from pathlib import Path

from ldm import images
from ldm.images import Picture


@dataclass(frozen=True)
class Example:
    """A photograph and what is known about it.

    mask: a picture of the same shape, white where the loss counts; the photograph itself if its alpha channel is the
    mask. focus: (x, y), where the subject is, from (0, 0), left and top, to (1, 1). repeats: how often an epoch has it.
    """

    picture: Picture
    prompt: str
    mask: Picture | None = None
    focus: tuple[float, float] | None = None
    repeats: int = 1


def read_examples(folder: str | Path, prompt: str) -> list[Example]:
    """The photographs in a folder, sorted by name. prompt: that of each.

    Raises InputError, which names the folder or the file, if there is none, or if one can't be read.
    """
    return [Example(images.read_picture(path), prompt) for path in images.find_pictures(folder)]
