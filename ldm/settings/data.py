"""Settings of what a run is given: the model, the photographs, the class pictures."""

from dataclasses import dataclass
from pathlib import Path

from ldm.runtime import cli
from ldm.settings.setting import Group, flag, not_a_number, setting
from ldm.settings.subjects import SubjectSettings, problem_of


@dataclass(frozen=True)
class Model(Group):
    """The base model"""

    model: str | None = setting(
        None,
        "official .safetensors or .ckpt file, or diffusers folder; the embedded tiny model if not given",
        flags=("--pretrained-model-name-or-path",),
        path=True,
        may_change=True,
    )
    ema: bool = setting(False, "begin with the averaged UNet of a full training checkpoint instead of the last one")
    prediction_type: str | None = setting(
        None, "what the model predicts, eps or v; overrides the file, and SD 2.x files often do not say"
    )
    variant: str | None = setting(None, 'load the files of this variant of a diffusers folder, for example "fp16"')


@dataclass(frozen=True)
class Photographs(Group):
    """The subject and its photographs"""

    instance_data_dir: str | None = setting(
        None,
        "folder with photographs of the subject, and with captions beside them or in metadata.jsonl; or a folder of "
        "kohya's folders, 10_sks dog",
        flags=("--train-data-dir",),
        path=True,
        may_change=True,
    )
    instance_prompt: str | None = setting(None, 'prompt that names the subject by a rare word: "a photo of sks dog"')
    resolution: int = setting(
        512, "side of the square that pictures are resized and cut to, in pixels", type=cli.positive
    )
    center_crop: bool = setting(
        False, "cut pictures in the middle; if not given, around the subject, where a picture's file says where it is"
    )
    random_crop: bool = setting(False, "cut another square out of a picture each time; latents are not cached then")
    random_flip: bool = setting(False, "mirror pictures half of the time")

    alpha_masks: bool = setting(False, "take a photograph's alpha channel as its mask, if it has no mask file")
    subjects: tuple[SubjectSettings, ...] = setting(
        (), "several subjects, each with its own folder and prompt", in_file_only=True
    )

    def problem(self) -> str | None:
        if self.center_crop and self.random_crop:
            return "--center-crop and --random-crop contradict each other; leave one of them out"
        if self.subjects:
            return self._problem_of_several()
        if self.instance_data_dir is None:
            return "--instance-data-dir is missing: the folder with photographs of your subject"
        if not (self.instance_prompt or "").strip():
            return '--instance-prompt is missing: it names the subject by a rare word, "a photo of sks dog"'
        return None

    def _problem_of_several(self) -> str | None:
        for name in ("instance_data_dir", "instance_prompt", "placeholder_token"):
            if getattr(self, name) is not None:
                return f"{flag(name)} is for one subject; this run has several, each with its own in [[subjects]]"
        return problem_of(self.taught, self.with_prior_preservation)


@dataclass(frozen=True)
class Captions(Group):
    """Captions"""

    caption_dropout: float = setting(
        0.0, "share of rows that are trained without a prompt; 0.1 is usual", flags=("--caption-dropout-rate",)
    )
    shuffle_tags: bool = setting(
        False, "put the parts of a caption between commas in a random order each time", flags=("--shuffle-caption",)
    )
    keep_tags: int = setting(0, "tags that stay first with --shuffle-tags", flags=("--keep-tokens",))

    def problem(self) -> str | None:
        if not 0 <= self.caption_dropout <= 1:
            return f"--caption-dropout {self.caption_dropout} is not a share from 0 to 1"
        if self.keep_tags < 0:
            return f"--keep-tags {self.keep_tags} is below 0"
        if self.keep_tags and not self.shuffle_tags:
            return "--keep-tags is for --shuffle-tags: without it all tags stay where they are"
        return None


@dataclass(frozen=True)
class Shapes(Group):
    """Photographs that are not square"""

    aspect_ratio_buckets: bool = setting(
        False, "cut a photograph to the size of the nearest shape, and not to a square; all have about the same area"
    )
    upscale: bool = setting(
        True, "enlarge photographs that are smaller than their bucket; if not, they get a bucket of their own size"
    )

    def problem(self) -> str | None:
        if not self.upscale and not self.aspect_ratio_buckets:
            return "--no-upscale is for --aspect-ratio-buckets: without them all pictures have one size"
        return None


@dataclass(frozen=True)
class Prior(Group):
    """Prior preservation"""

    with_prior_preservation: bool = setting(True, "train on class pictures as well as photographs")
    class_prompt: str | None = setting(None, 'prompt that names the class of the subject: "a photo of a dog"')
    class_data_dir: str | None = setting(
        None,
        "folder for class pictures, your own or generated; class/ in the output folder if not given",
        flags=("--reg-data-dir",),
        path=True,
        may_change=True,
    )
    num_class_images: int = setting(200, "number of class pictures; missing ones are generated", type=cli.positive)
    class_guidance_scale: float | None = setting(
        None, "guidance scale of class pictures alone; lower is more varied", type=float
    )
    prior: str = setting(
        "pictures",
        "target of the prior term: class pictures, or the base model's own prediction for the class prompt on the "
        "photographs' noisy latents, which needs no class pictures",
        choices=("pictures", "prediction"),
    )
    prior_loss_weight: float = setting(1.0, "weight of the prior-preservation term, lambda in eq. 2 of the paper")

    def problem(self) -> str | None:
        if self.with_prior_preservation and not self.subjects and not (self.class_prompt or "").strip():
            return '--class-prompt is missing ("a photo of a dog"); or give --no-with-prior-preservation'
        folders = [Path(folder).resolve() for folder in (self.class_data_dir, self.instance_data_dir) if folder]
        if self.with_prior_preservation and len(set(folders)) < len(folders):
            return f"--class-data-dir {self.class_data_dir} is --instance-data-dir too; give class pictures their own"
        if not 0 <= self.prior_loss_weight < float("inf"):
            return f"--prior-loss-weight {self.prior_loss_weight} is not a number from 0"
        return not_a_number(self, "class_guidance_scale")
