"""The subjects that a run teaches, with their photographs: usually one, the folder and the prompt of the flags."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ldm.data.captions import words_of
from ldm.data.examples import Example, read_examples
from ldm.data.masks import has_alpha
from ldm.errors import InputError
from ldm.settings import Settings, SubjectSettings


@dataclass(frozen=True)
class Subject:
    """A subject: its photographs, and the class whose pictures keep the class's word from becoming the subject.

    name: in metrics and sheets, and part of paths. prompt, class_prompt: those of rows without a caption. class_prompt
    is None without the prior term. class_data_dir: None for a folder in the run's own. num_class_images: pictures in
    it; missing ones are generated. weight: its share of the rows, relative to the other subjects' weights.
    """

    name: str
    examples: list[Example]
    prompt: str
    class_prompt: str | None = None
    class_data_dir: str | None = None
    num_class_images: int = 0
    weight: float = 1.0


def read_subjects(settings: Settings) -> list[Subject]:
    """The subjects that the settings name, with their photographs.

    Raises InputError, which names the file or the folder, if one can't be read.
    """
    folders: dict[str, list[SubjectSettings]] = {}
    for one in settings.taught:
        folders.setdefault(one.name, []).append(one)
    subjects = [_subject(parts, settings) for parts in folders.values()]
    if settings.alpha_masks and not any(example.mask for subject in subjects for example in subject.examples):
        raise InputError("--alpha-masks: no photograph has an alpha channel or a mask's file")
    return subjects


def _subject(parts: Sequence[SubjectSettings], settings: Settings) -> Subject:
    """parts: the folders of one subject."""
    first, examples = parts[0], []
    for part in parts:
        words = words_of(
            part.instance_prompt, part.class_prompt, settings.placeholder_token, settings.initializer_token
        )
        found = read_examples(part.instance_data_dir, part.instance_prompt, words)
        examples += [replace(_as_set(example, settings), repeats=part.repeats or 1) for example in found]
    token = settings.placeholder_token
    for example in examples if settings.train == "token" and token else ():
        if token.lower() not in example.prompt.lower():  # and without it nothing has a gradient
            raise InputError(f"the caption of {example.picture.path} does not hold {token}; write {{token}} into it")
    weight = next((part.weight for part in parts if part.weight is not None), None)
    if weight is None:
        is_counted = any(part.repeats is not None for part in parts)
        weight = float(sum(example.repeats for example in examples)) if is_counted else 1.0
    return Subject(
        name=first.name,
        examples=examples,
        prompt=first.instance_prompt,
        class_prompt=first.class_prompt if settings.with_prior_preservation else None,
        class_data_dir=first.class_data_dir,
        num_class_images=first.num_class_images,
        weight=weight,
    )


def _as_set(example: Example, settings: Settings) -> Example:
    if settings.center_crop:
        example = replace(example, focus=None)
    if settings.alpha_masks and example.mask is None and has_alpha(example.picture):
        example = replace(example, mask=example.picture)
    return example
