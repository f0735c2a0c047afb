"""kohya's data-set folders as subjects: "10_sks dog" holds photographs of "sks dog", each 10 times an epoch.

    train/10_sks dog/*.jpg, train/5_zwx cat/*.jpg       --train-data-dir train
    reg/1_dog/*.jpg, reg/1_cat/*.jpg                    --reg-data-dir reg, class pictures, generated if not given

The words after the number are the prompt of the pictures without a caption. The class is what follows the first of
them. Folders with the same words are one subject.
"""

import os
import re
from dataclasses import replace
from pathlib import Path

from ldm import images
from ldm.data.captions import LISTS
from ldm.errors import InputError
from ldm.runtime import list_folder
from ldm.settings import Settings, SubjectSettings

NAME = re.compile(r"0*([1-9]\d{0,5})_(.+)")


def with_subjects_of_folders(settings: Settings) -> Settings:
    """The settings, in which a folder of kohya's folders is replaced by the subjects that it stands for.

    Raises InputError, with what to do, for a folder above or below the one to give, and for one whose prompts or
    classes aren't known.
    """
    given = settings.instance_data_dir
    if given is None or not os.path.isdir(given):
        return settings
    root = Path(given)
    found = named_folders(root)
    if not found:
        _check_level(root, settings)
        return settings
    if any(images.is_picture(path) for path in list_folder(root)):
        raise InputError(f"{root} holds photographs, and {found[0].name} too; move the photographs or the folder away")
    if settings.instance_prompt is not None:
        raise InputError(f"{found[0]} and the like name their prompts themselves; leave out --instance-prompt")
    reg = Path(settings.class_data_dir) if settings.class_data_dir else None
    subjects = tuple(_subject(path, settings, reg) for path in found)
    if len(subjects) > 1:
        usual = {"instance_data_dir": None, "instance_prompt": None, "class_data_dir": None}
        return replace(settings, subjects=subjects, **usual)
    one = subjects[0].given()
    return replace(settings, **{name: one[name] for name in one if name not in ("name", "repeats")})


def names_prompts(folder: Path) -> bool:
    """Whether this is a folder of kohya's folders, or one of them, so that names say the prompts."""
    return os.path.isdir(folder) and bool(named_folders(folder) or (_is_named(folder) and _holds_pictures(folder)))


def named_folders(root: Path) -> list[Path]:
    """The folders in `root` that have pictures and names of kohya's kind; none if `root` has a list of its own."""
    paths = list_folder(root)
    if any(path.name in LISTS for path in paths):
        return []
    return [path for path in paths if _is_named(path) and path.is_dir() and _holds_pictures(path)]


def _is_named(folder: Path) -> bool:
    return NAME.fullmatch(folder.absolute().name) is not None


def _holds_pictures(folder: Path) -> bool:
    return os.access(folder, os.R_OK | os.X_OK) and any(images.is_picture(path) for path in list_folder(folder))


def _subject(path: Path, settings: Settings, reg: Path | None) -> SubjectSettings:
    repeats, words = NAME.fullmatch(path.name).groups()
    words = " ".join(words.split())
    kind = settings.class_prompt or words.partition(" ")[2] or None
    return SubjectSettings(words, str(path), words, kind, _class_folder(reg, kind), None, repeats=int(repeats))


def _class_folder(reg: Path | None, kind: str | None) -> str | None:
    """The folder of class pictures for a class: the one in `reg` that is named by it, the only one, or `reg` itself."""
    if reg is None or not reg.is_dir() or not (found := named_folders(reg)):
        return str(reg) if reg else None
    names = {path: NAME.fullmatch(path.name)[2] for path in found}
    same = [path for path in found if names[path] == kind] or (found if len(found) == 1 else [])
    if len(same) != 1:
        raise InputError(f"{reg} holds {', '.join(path.name for path in found)}, and not one folder for {kind!r}")
    return str(same[0])


def _check_level(root: Path, settings: Settings) -> None:
    """Raises InputError if this is the folder above or below a data-set folder of kohya's."""
    paths = list_folder(root)
    has_pictures = any(images.is_picture(path) for path in paths)
    if _is_named(root) and has_pictures and settings.instance_prompt is None:
        parent = root.absolute().parent
        raise InputError(f"{root} is one of kohya's folders; give the folder that it is in, {parent}, or a prompt")
    if has_pictures or any(path.name in LISTS for path in paths):
        return
    for path in paths:
        if path.is_dir() and os.access(path, os.R_OK | os.X_OK):
            if inner := named_folders(path):
                raise InputError(f"{root} holds no picture; {path} has {inner[0].name} in it: give {path}")
            if _holds_pictures(path) or any((path / name).exists() for name in LISTS):
                said = f"{root} holds no picture, and {path} does; give that folder"
                raise InputError(f"{said}, or name that one as kohya's folders are named: 10_sks dog")
