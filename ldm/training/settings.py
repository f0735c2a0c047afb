"""The settings of a DreamBooth run: one frozen dataclass, whose fields are the flags of train.py."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ldm import images, samplers
from ldm.errors import InputError
from ldm.formats import MAX_RANK
from ldm.lora import TARGETS
from ldm.runtime import cli
from ldm.tokenizer import check_prompt
from ldm.training.optimizer import LR_SCHEDULES
from ldm.training.tracking import TRACKERS, check_installed


def setting(
    default: Any,
    text: str,
    *,
    flags: tuple[str, ...] = (),
    path: bool = False,
    may_change: bool | Callable[["Settings"], bool] = False,
    **options: Any,
) -> Any:
    """A field with metadata for the command line and for resumed runs.

    flags: other names. path: whether it is a path, which in a TOML file is relative to that file's folder. may_change:
    whether a resumed run may have another value than before. options: for argparse.
    """
    known = {"help": text, "flags": flags, "path": path, "may_change": may_change, "options": options}
    return field(default=default, metadata=known)


RATE, LORA_RATE = 2e-6, 1e-4  # learning rates that are usual for all weights, and for a LoRA
LOW_LORA_RATE = 1e-5  # below it a LoRA hardly learns

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
}


@dataclass(frozen=True)
class Settings:
    """Names follow the diffusers DreamBooth script. The defaults are for Stable Diffusion 1.x at 512 pixels."""

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
    instance_data_dir: str | None = setting(None, "folder with photographs of the subject", path=True, may_change=True)
    instance_prompt: str | None = setting(None, 'prompt that names the subject by a rare word: "a photo of sks dog"')
    class_data_dir: str | None = setting(
        None,
        "folder for class pictures, your own or generated; class/ in the output folder if not given",
        path=True,
        may_change=True,
    )
    class_prompt: str | None = setting(None, 'prompt that names the class of the subject: "a photo of a dog"')
    with_prior_preservation: bool = setting(True, "train on class pictures as well as photographs")
    prior: str = setting(
        "pictures",
        "target of the prior term: class pictures, or the base model's own prediction for the class prompt on the "
        "photographs' noisy latents, which needs no class pictures",
        choices=("pictures", "prediction"),
    )
    prior_loss_weight: float = setting(1.0, "weight of the prior-preservation term, lambda in eq. 2 of the paper")
    num_class_images: int = setting(200, "number of class pictures; missing ones are generated", type=cli.positive)
    resolution: int = setting(
        512, "side of the square that pictures are resized and cut to, in pixels", type=cli.positive
    )
    train_batch_size: int = setting(
        1, "photographs in a batch; it has as many class pictures", type=cli.positive, may_change=True
    )
    gradient_accumulation_steps: int = setting(
        1, "batches whose gradients are averaged in one step", type=cli.positive, may_change=True
    )
    random_crop: bool = setting(False, "cut another square out of a picture each time; latents are not cached then")
    random_flip: bool = setting(False, "mirror pictures half of the time")
    max_train_steps: int = setting(
        800, "optimizer steps", type=cli.positive, may_change=lambda s: s.lr_scheduler == "constant"
    )
    learning_rate: float | None = setting(
        None, f"AdamW learning rate; if not given, {RATE:g}, and {LORA_RATE:g} with --lora-rank", type=float
    )
    lr_scheduler: str = setting("constant", "learning rate over the steps", choices=LR_SCHEDULES)
    lr_warmup_steps: int = setting(0, "steps over which the learning rate rises from 0")
    train_text_encoder: bool = setting(True, "train the text encoder as well as the UNet")
    text_encoder_learning_rate: float | None = setting(
        None, "learning rate of the text encoder; if not given, the UNet's, and half of it with --lora-rank", type=float
    )
    text_encoder_stop_step: int | None = setting(None, "freeze the text encoder after this step", type=cli.positive)
    placeholder_token: str | None = setting(
        None, 'new token that the prompts name the subject by, "[V]"; it is trained, and saved also by itself'
    )
    initializer_token: str | None = setting(None, "known word or words whose vectors the new token begins with")
    num_vectors: int | None = setting(
        None, "vectors of the new token; as many as the initializer has if not given", type=cli.positive
    )
    token_learning_rate: float = setting(2e-3, "learning rate of the new token's vectors")
    train: str = setting(
        "all", "what trains; token: only the new token's vectors, without class pictures", choices=("all", "token")
    )
    lora_rank: int | None = setting(
        None,
        "train a LoRA of this rank, a small file, instead of all weights; 4 to 32 is usual",
        flags=("--rank", "--network-dim"),
        type=cli.positive,
    )
    lora_alpha: float | None = setting(
        None, "the LoRA is scaled by alpha / rank; the rank if not given", flags=("--network-alpha",), type=float
    )
    lora_targets: str = setting(
        "transformer",
        "layers with a LoRA: attention; transformer: its projections and MLPs too; all: the convolutions too",
        choices=tuple(TARGETS),
    )
    max_grad_norm: float = setting(1.0, "largest norm of the gradients; larger ones are scaled down to it; 0: any")
    snr_gamma: float | None = setting(None, "min-SNR weighting of the loss; 5 is usual", type=float)
    use_ema: bool = setting(False, "save the average of the weights instead of the last ones")
    ema_decay: float = setting(0.9999, "decay of that average, once it has warmed up")
    train_dtype: str = setting(
        "fp32", "type of the weights that train; bf16 computes in bf16 and rounds at random", choices=("fp32", "bf16")
    )
    fused_backward: bool = setting(
        False, "update each parameter inside the backward pass and free its gradient; needs --max-grad-norm 0"
    )
    mixed_precision: str = setting("no", "type that autocast computes in", choices=("no", "fp16", "bf16"))
    gradient_checkpointing: bool = setting(
        False, "less memory, a third more time: activations are computed twice", may_change=True
    )
    use_8bit_adam: bool = setting(False, "AdamW with 8-bit moments; needs the bitsandbytes extra")
    compile: bool = setting(
        False, "compile the networks block by block: faster steps after some minutes; needs a C++ compiler"
    )
    allow_tf32: bool = setting(False, "faster, coarser fp32 matrix products on NVIDIA GPUs")
    deterministic: bool = setting(False, "the same bits each time on a GPU too; slower")
    checkpointing_steps: int = setting(500, "number of steps between checkpoints", type=cli.positive, may_change=True)
    checkpoints_total_limit: int | None = setting(
        None, "number of checkpoints to keep; all if not given", type=cli.positive, may_change=True
    )
    resume_from_checkpoint: str | None = setting(
        None, "resume from this checkpoint folder, or from the latest one of the run", path=True, may_change=True
    )
    seed: int = setting(0, "random seed of the order of pictures, noise, timesteps and class pictures")
    output_dir: str | None = setting(
        None, "a new folder for the run; runs/dreambooth, numbered if taken", path=True, may_change=True
    )
    layout: str = setting("official", "layout of the saved model", choices=("official", "diffusers"), may_change=True)
    sampler: str = setting("ddim", "sampler of class pictures and sheets", metavar="NAME")
    sample_steps: int = setting(50, "sampling steps for class pictures and sheets", type=cli.positive)
    guidance_scale: float = setting(7.5, "classifier-free guidance for class pictures and sheets")
    class_guidance_scale: float | None = setting(
        None, "guidance scale of class pictures alone; lower is more varied", type=float
    )
    sample_batch_size: int = setting(4, "pictures sampled at once", type=cli.positive, may_change=True)
    validation_prompt: tuple[str, ...] = setting(
        (),
        "prompt of one row of the before/after sheet, repeatable; instance and class prompt if not given",
        action="append",
        may_change=True,
    )
    num_validation_images: int = setting(4, "pictures in a row of the sheet", type=cli.positive, may_change=True)
    report_to: str = setting(
        "none", "also send the metrics to this tracker; needs the tracking extra", choices=TRACKERS, may_change=True
    )
    device: str | None = setting(None, "cuda, cpu, ...; if not given, cuda if available, else cpu", may_change=True)

    def __post_init__(self):
        if self.train == "token":  # the prior term has no gradient then: see `TokenTuning`
            object.__setattr__(self, "with_prior_preservation", False)
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", LORA_RATE if self.lora_rank else RATE)

    @property
    def predicts_prior(self) -> bool:
        """Whether the base model's own prediction is the target of the prior term."""
        return self.with_prior_preservation and self.prior == "prediction"

    def may_change(self, name: str) -> bool:
        """Whether a resumed run may have another value of this setting, or of this part of its identity."""
        if name == "launch":  # the torchrun that it belongs to
            return True
        known = next((f.metadata["may_change"] for f in fields(self) if f.name == name), False)
        return known(self) if callable(known) else known

    def check_processes(self, size: int) -> None:
        """Raises InputError if so many processes can't train with these settings."""
        if self.fused_backward and size > 1:
            raise InputError("--fused-backward trains in one process: the update would come before the average")

    def problems(self) -> str | None:
        """The first problem of the settings, as one line; None if there is none."""
        if self.instance_data_dir is None:
            return "--instance-data-dir is missing: the folder with photographs of your subject"
        if not (self.instance_prompt or "").strip():
            return '--instance-prompt is missing: it names the subject by a rare word, "a photo of sks dog"'
        if self.with_prior_preservation and not (self.class_prompt or "").strip():
            return '--class-prompt is missing ("a photo of a dog"); or give --no-with-prior-preservation'
        folders = [Path(folder).resolve() for folder in (self.class_data_dir, self.instance_data_dir) if folder]
        if self.with_prior_preservation and len(set(folders)) < len(folders):
            return f"--class-data-dir {self.class_data_dir} is --instance-data-dir too; give class pictures their own"
        for name in ("learning_rate", "text_encoder_learning_rate", "lora_alpha", "token_learning_rate", "snr_gamma"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                return f"--{name.replace('_', '-')} {value} is not a positive number"
        if not 0 <= self.max_grad_norm < float("inf"):
            return f"--max-grad-norm {self.max_grad_norm} is not a number from 0; 0 leaves the gradients as they are"
        if problem := self._problem_of_small_mode():
            return problem
        for name, most in LIMITS.items():
            if (value := getattr(self, name) or 0) > most:
                return f"--{name.replace('_', '-')} {value} is too much: it should be at most {most}"
        if self.lr_warmup_steps < 0:
            return f"--lr-warmup-steps {self.lr_warmup_steps} is below 0"
        if not 0 <= self.seed < 2**63 - self.num_validation_images:
            return f"--seed {self.seed} is not a whole number from 0 to 2**63"
        for name in ("guidance_scale", "class_guidance_scale"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                return f"--{name.replace('_', '-')} {value} is not a number; 7.5 is usual"
        if not 0 <= self.ema_decay < 1:
            return f"--ema-decay {self.ema_decay} is not from 0 to below 1"
        if not 0 <= self.prior_loss_weight < float("inf"):
            return f"--prior-loss-weight {self.prior_loss_weight} is not a number from 0"
        prompts = (self.instance_prompt, self.class_prompt, *self.validation_prompt)
        for prompt in filter(None, prompts):
            check_prompt(prompt)
        rows = len(self.validation_prompt) or 2
        images.check_sheet(rows, self.num_validation_images, self.resolution, self.resolution)
        samplers.find(self.sampler)
        check_installed(self.report_to)
        return None

    def _problem_of_small_mode(self) -> str | None:
        if self.train_dtype == "bf16" and self.mixed_precision == "fp16":
            return "--train-dtype bf16 computes in bf16; leave out --mixed-precision fp16"
        if self.train_dtype == "bf16" and self.lora_rank:
            return "--train-dtype bf16 is for whole networks; a LoRA is in fp32, its base in --mixed-precision's type"
        if not self.fused_backward:
            return None
        for flag, is_given, reason in (
            ("--max-grad-norm 0", self.max_grad_norm == 0, "the norm of all gradients is known after the updates"),
            (
                "--gradient-accumulation-steps 1",
                self.gradient_accumulation_steps == 1,
                "no gradient is kept to add to",
            ),
            ("no --mixed-precision fp16", self.mixed_precision != "fp16", "an overflow is known after the updates"),
        ):
            if not is_given:
                return f"--fused-backward needs {flag}: {reason}"
        return None
