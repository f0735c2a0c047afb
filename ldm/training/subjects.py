"""The subjects that a run teaches: usually one, from --instance-data-dir and --instance-prompt."""

from dataclasses import dataclass

from ldm.training.examples import Example, read_examples
from ldm.training.settings import Settings


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
    """The subjects that the settings name, with their photographs. Raises InputError if one can't be read."""
    return [
        Subject(
            name="subject",
            examples=read_examples(settings.instance_data_dir, settings.instance_prompt),
            prompt=settings.instance_prompt,
            class_prompt=settings.class_prompt if settings.with_prior_preservation else None,
            class_data_dir=settings.class_data_dir,
            num_class_images=settings.num_class_images,
        )
    ]
