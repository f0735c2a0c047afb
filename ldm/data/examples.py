"""What a folder says about each of its photographs: a prompt, a mask, where the subject is."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm import images
from ldm.data.beside import Files, companions, sort_files
from ldm.data.captions import ENDINGS, Words, fill, read_lines, read_list
from ldm.data.focus import Point, camera_focus, read_focus
from ldm.errors import InputError, one_line
from ldm.images import Picture
from ldm.runtime import list_folder

STRETCH = 0.01  # between the sides' ratios of a photograph and its mask: sizes are rounded


@dataclass(frozen=True)
class Example:
    """A photograph and what is known about it.

    mask: a picture of the same shape, white where the loss counts; the photograph itself if its alpha channel is the
    mask. focus: (x, y), where the subject is, from (0, 0), left and top, to (1, 1). repeats: how often an epoch has it.
    """

    picture: Picture
    prompt: str
    mask: Picture | None = None
    focus: Point | None = None
    repeats: int = 1


def read_examples(folder: str | Path, prompt: str, words: Words | None = None) -> list[Example]:
    """The photographs in a folder, sorted by name; of folders within it, those that the folder's list names.

    prompt: that of photographs without a caption. words: what {token} and {class} stand for in captions. Raises
    InputError, which names the folder or the file, if there is none, or if something can't be read.
    """
    images.check_folder(folder)
    root = Path(folder)
    listed = read_list(root)
    for name in listed:
        if not images.is_picture(root / name):
            raise InputError(f"{root / name} is in the folder's list, and is no picture file that can be read")
    within = {root / name for name in listed if (root / name).parent != root}
    ours = companions(list_folder(root)) | {path.relative_to(root).parts[0] for path in within}
    beside = images.list_pictures(root, ours) if within else images.find_pictures(root, ours)
    return _with_captions(sorted([*beside, *within]), _Reader(root, listed, prompt, words or {}))


def captioned(paths: Sequence[Path], prompt: str, words: Words | None = None) -> list[Example]:
    """Pictures of one folder, with what the folder says about each. prompt, words: as for `read_examples`."""
    root = paths[0].parent if paths else Path()
    return _with_captions(paths, _Reader(root, read_list(root) if paths else {}, prompt, words or {}))


def _with_captions(paths: Sequence[Path], captions: "_Reader") -> list[Example]:
    examples = [captions.example(path) for path in paths]
    captions.warn()
    return examples


class _Reader:
    """Finds the caption of each photograph; collects what a person should know of all of them."""

    def __init__(self, root: Path, listed: dict[str, str | None], prompt: str, words: Words):
        self.prompt, self.words = prompt, words
        self.listed = {root / name: text for name, text in listed.items()}
        self.files: dict[Path, Files] = {}
        self.longer: list[Path] = []  # captions of several lines
        self.double: list[Path] = []  # photographs with two captions that differ

    def example(self, path: Path) -> Example:
        if path.parent not in self.files:
            self.files[path.parent] = sort_files(list_folder(path.parent))
        files, picture = self.files[path.parent], images.read_picture(path)
        mask, notes = files.mask(path), files.notes(path)
        focus = (read_focus(notes) if notes else None) or camera_focus(picture)
        mask = images.read_picture(mask) if mask else None
        if mask is not None:
            check_shape(mask, picture)
        return Example(picture, self._caption(path, files), mask, focus)

    def _caption(self, path: Path, files: Files) -> str:
        """The caption of a photograph: the file beside it, else the folder's list, else the usual prompt."""
        found = files.captions(path)
        texts = [read_lines(file) for file in found]
        if not texts:
            listed = self.listed.get(path)
            return fill(listed, self.words, f"the caption of {path}") if listed else self.prompt
        if len(texts[0]) > 1:
            self.longer.append(found[0])
        if any(other[0] != texts[0][0] for other in texts):
            self.double.append(path)
        return fill(texts[0][0], self.words, found[0])

    def warn(self) -> None:
        if self.longer:
            said = f"{self.longer[0]} has several lines, and the first is the caption"
            warnings.warn(_of_several(said, self.longer), stacklevel=4)
        if self.double:
            said = f"{self.double[0]} has two captions, and the one that ends in {ENDINGS[0]} is taken"
            warnings.warn(_of_several(said, self.double), stacklevel=4)


def _of_several(said: str, cases: list[Path]) -> str:
    return one_line(said if len(cases) == 1 else f"{said}; {len(cases)} pictures in all")


def check_shape(mask: Picture, picture: Picture) -> None:
    """Raises InputError, which names the mask, if it has another shape than its photograph. It may be smaller."""
    (a, b), (width, height) = images.upright_size(mask), images.upright_size(picture)
    if abs(a * height - b * width) > max(STRETCH * b * width, max(width, height, a, b)):
        raise InputError(
            f"{mask.path} has {a} x {b} pixels, and {picture.path.name} has {width} x {height}; "
            "a mask should have its photograph's size, or that shape"
        )
