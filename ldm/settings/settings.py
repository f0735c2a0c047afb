"""Every setting of a run: the groups of settings in one object."""

from dataclasses import Field, dataclass, fields

from ldm import images
from ldm.errors import InputError
from ldm.formats import MAX_RANK
from ldm.settings.data import Captions, Model, Photographs, Prior, Shapes
from ldm.settings.loss import Loss
from ldm.settings.output import Output, Sampling
from ldm.settings.setting import Group, flag
from ldm.settings.subjects import SubjectSettings
from ldm.settings.training import LORA_RATE, RATE, LoRASettings, Machine, Optimization, TokenSettings, Trained
from ldm.settings.validation import ValidationSettings
from ldm.tokenizer import check_prompt

# In the order of --help.
GROUPS: tuple[type[Group], ...] = (
    Model,
    Photographs,
    Captions,
    Shapes,
    Prior,
    Trained,
    LoRASettings,
    TokenSettings,
    Optimization,
    Loss,
    Machine,
    Output,
    Sampling,
    ValidationSettings,
)

# Advice for out of memory.
SAVES_MEMORY = {
    "training": "give --gradient-checkpointing, --mixed-precision bf16, --use-8bit-adam or a lower --train-batch-size",
    "sampling": "give --mixed-precision bf16 or a lower --sample-batch-size",
}

# The most of what takes memory or disk before the first step.
LIMITS = {
    "num_class_images": 100_000,
    "num_validation_images": 100,
    "resolution": images.MAX_SIDE,
    "train_batch_size": 4096,
    "sample_batch_size": 4096,
    "gradient_accumulation_steps": 65_536,
    "lora_rank": MAX_RANK,
    "lora_conv_rank": MAX_RANK,
}


@dataclass(frozen=True)
class Settings(*GROUPS):
    """Names follow the diffusers DreamBooth script. The defaults are for Stable Diffusion 1.x at 512 pixels."""

    def __post_init__(self):
        if self.train == "token":  # the prior term has no gradient then: see `TokenTuning`
            object.__setattr__(self, "with_prior_preservation", False)
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", LORA_RATE if self.lora_rank else RATE)

    @property
    def predicts_prior(self) -> bool:
        """Whether the base model's own prediction is the target of the prior term."""
        return self.with_prior_preservation and self.prior == "prediction"

    @property
    def uses_class_pictures(self) -> bool:
        """Whether class pictures are the target of the prior term."""
        return self.with_prior_preservation and self.prior == "pictures"

    @property
    def photographs_of_step(self) -> int:
        """Photographs that a process trains on in a step."""
        return self.train_batch_size * self.gradient_accumulation_steps

    @property
    def rows_of_step(self) -> int:
        """Rows that a process trains on in a step: with the prior term there are as many of the class."""
        return self.photographs_of_step * (2 if self.with_prior_preservation else 1)

    @property
    def taught(self) -> tuple[SubjectSettings, ...]:
        """The subjects, with the defaults that all share: those of [[subjects]], or else the one of the flags."""
        usual = {name: getattr(self, name) for name in ("class_prompt", "class_data_dir", "num_class_images")}
        if not self.subjects:
            return (SubjectSettings("subject", self.instance_data_dir or "", self.instance_prompt or "", **usual),)
        return tuple(SubjectSettings(**usual | subject.given()) for subject in self.subjects)

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts of all subjects, then those of their classes; each once."""
        named = [subject.instance_prompt for subject in self.taught]
        return tuple(dict.fromkeys(filter(None, named + [subject.class_prompt for subject in self.taught])))

    @classmethod
    def groups(cls) -> list[tuple[type[Group], list[Field]]]:
        """Each group with its settings."""
        known = {f.name: f for f in fields(cls)}
        return [(group, [known[name] for name in group.__annotations__]) for group in GROUPS]

    def may_change(self, name: str) -> bool:
        """Whether a resumed run may have another value of this setting, or of this part of its identity."""
        if name in ("launch", "program"):  # the torchrun that it belongs to, the script that started it
            return True
        known = next((f.metadata["may_change"] for f in fields(self) if f.name == name), False)
        return known(self) if callable(known) else known

    def check_processes(self, size: int) -> None:
        """Raises InputError if so many processes can't train with these settings."""
        if self.fused_backward and size > 1:
            raise InputError("--fused-backward trains in one process: the update would come before the average")

    def problems(self) -> str | None:
        """The first problem of the settings, as one line; None if there is none."""
        for name, most in LIMITS.items():
            if (value := getattr(self, name) or 0) > most:
                return f"{flag(name)} {value} is too much: it should be at most {most}"
        if not 0 <= self.seed < 2**63 - self.num_validation_images:
            return f"--seed {self.seed} is not a whole number from 0 to 2**63"
        for group in GROUPS:
            if problem := group.problem(self):
                return problem
        for prompt in filter(None, (self.instance_prompt, self.class_prompt, *self.validation_prompt)):
            check_prompt(prompt)
        return None
