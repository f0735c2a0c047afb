"""Which files of a folder are photographs, and which say something about the photograph that they lie beside.

A file belongs to a photograph if it has its name, with or without the ending: 1.txt and 1.jpg.txt to 1.jpg.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm import images
from ldm.data.captions import ENDINGS, LISTS
from ldm.errors import InputError

MASK = re.compile(r"(.+)-(?:mask|masklabel)")  # the name of a mask's file, without its ending
NOTES = ".json"
KEPT = ".npz"  # latents that kohya's programs keep beside a picture


@dataclass(frozen=True)
class Files:
    """The files of one folder. Those beside a photograph are found by its name without the ending."""

    photographs: tuple[Path, ...]
    beside: dict[str, tuple[Path, ...]]

    def captions(self, photograph: Path) -> list[Path]:
        """The caption's files of a photograph, at most one of each of `ENDINGS`, in their order."""
        found = [path for ending in ENDINGS for path in self._of(photograph) if path.suffix.lower() == ending]
        return found

    def notes(self, photograph: Path) -> Path | None:
        """The JSON file of a photograph."""
        return next((path for path in self._of(photograph) if path.suffix.lower() == NOTES), None)

    def mask(self, photograph: Path) -> Path | None:
        """The mask's file of a photograph. Raises InputError if it has two."""
        found = [path for path in self._of(photograph) if MASK.fullmatch(path.stem) and images.is_picture(path)]
        if len(found) > 1:
            raise InputError(f"{photograph} has two masks, {found[0].name} and {found[1].name}; take one away")
        return found[0] if found else None

    def names(self) -> set[str]:
        """The names of all files beside photographs."""
        return {path.name for paths in self.beside.values() for path in paths}

    def _of(self, photograph: Path) -> tuple[Path, ...]:
        return self.beside.get(photograph.name, ()) + self.beside.get(photograph.stem, ())


def sort_files(paths: Sequence[Path]) -> Files:
    """Sorts the files of a folder. Files that are neither photographs nor beside one are left out."""
    pictures = [path for path in paths if images.is_picture(path)]
    stems = {path.stem for path in pictures}
    masks = {path: name[1] for path in pictures if (name := MASK.fullmatch(path.stem)) and name[1] in stems}
    photographs = [path for path in pictures if path not in masks]
    known = {name for path in photographs for name in (path.name, path.stem)}
    beside: dict[str, list[Path]] = {}
    for path in paths:
        if path.suffix.lower() in (*ENDINGS, NOTES, KEPT) and path.stem in known:
            beside.setdefault(path.stem, []).append(path)
    for path, name in masks.items():
        beside.setdefault(name, []).append(path)
    return Files(tuple(photographs), {name: tuple(found) for name, found in beside.items()})


def companions(paths: Sequence[Path]) -> set[str]:
    """The names of the files in a folder that say something about its photographs."""
    return sort_files(paths).names() | {path.name for path in paths if path.name in LISTS}
