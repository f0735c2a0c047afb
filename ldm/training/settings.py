"""The settings of a DreamBooth run: one dataclass, filled from defaults, a TOML file and the command line."""

import argparse
import math
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ldm import samplers
from ldm.errors import InputError
from ldm.runtime.cli import MAX_COUNT, Parser, positive
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
    """A field, and what the command line and a resumed run need to know of it.

    flags: other names. path: in a TOML file it is relative to that file's folder. may_change: whether a run that
    resumes may have another value than before. options: for argparse.
    """
    known = {"help": text, "flags": flags, "path": path, "may_change": may_change, "options": options}
    return field(default=default, metadata=known)


# What to give when memory runs out.
SAVES_MEMORY = {
    "training": "give --gradient-checkpointing, --mixed-precision bf16, --use-8bit-adam or a lower --train-batch-size",
    "sampling": "give --mixed-precision bf16 or a lower --sample-batch-size",
}
SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Settings:
    """Names as the diffusers DreamBooth script has them. The defaults are for Stable Diffusion 1.x at 512 pixels."""

    model: str | None = setting(
        None,
        "official .safetensors file or diffusers folder; the embedded tiny model if not given",
        flags=("--pretrained-model-name-or-path",),
        path=True,
        may_change=True,
    )
    ema: bool = setting(False, "of a full training checkpoint, begin with the averaged UNet instead of the last one")
    prediction_type: str | None = setting(None, "eps or v, over what the file says; SD 2.x files often say nothing")
    variant: str | None = setting(None, 'of a diffusers folder, take the files of this name: "fp16"')
    instance_data_dir: str | None = setting(None, "folder with photographs of the subject", path=True, may_change=True)
    instance_prompt: str | None = setting(None, 'names the subject by a rare word: "a photo of sks dog"')
    class_data_dir: str | None = setting(
        None,
        "folder for class pictures, yours or generated; class/ in the output folder if not given",
        path=True,
        may_change=True,
    )
    class_prompt: str | None = setting(None, 'names its class: "a photo of a dog"')
    with_prior_preservation: bool = setting(True, "train on class pictures beside the photographs")
    prior_loss_weight: float = setting(1.0, "weight of the prior-preservation term, lambda in eq. 2 of the paper")
    num_class_images: int = setting(200, "class pictures to have; the missing ones are generated", type=positive)
    resolution: int = setting(512, "side of the square that pictures are resized and cut to, in pixels", type=positive)
    train_batch_size: int = setting(
        1, "photographs a step; as many class pictures join them", type=positive, may_change=True
    )
    gradient_accumulation_steps: int = setting(
        1, "batches whose gradients are averaged into one step", type=positive, may_change=True
    )
    random_crop: bool = setting(False, "cut another square of a picture each time; latents are not cached then")
    random_flip: bool = setting(False, "mirror pictures half of the time")
    max_train_steps: int = setting(
        800, "optimizer steps", type=positive, may_change=lambda s: s.lr_scheduler == "constant"
    )
    learning_rate: float = setting(2e-6, "of AdamW")
    lr_scheduler: str = setting("constant", "how the learning rate moves", choices=SCHEDULES)
    lr_warmup_steps: int = setting(0, "steps over which the learning rate rises from 0")
    train_text_encoder: bool = setting(True, "train the text encoder beside the UNet")
    text_encoder_learning_rate: float | None = setting(None, "the UNet's if not given", type=float)
    text_encoder_stop_step: int | None = setting(None, "freeze the text encoder after this step", type=positive)
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm")
    snr_gamma: float | None = setting(None, "min-SNR weighting of the loss; 5 is usual", type=float)
    use_ema: bool = setting(False, "save the average of the weights instead of the last ones")
    ema_decay: float = setting(0.9999, "of that average, once it has warmed up")
    mixed_precision: str = setting("no", "what autocast computes in", choices=("no", "fp16", "bf16"))
    gradient_checkpointing: bool = setting(
        False, "less memory, a third more time: activations are computed twice", may_change=True
    )
    use_8bit_adam: bool = setting(False, "AdamW with 8-bit moments; needs the bitsandbytes extra")
    allow_tf32: bool = setting(False, "faster, coarser fp32 matrix products on NVIDIA GPUs")
    deterministic: bool = setting(False, "the same bits each time on a GPU too; slower")
    checkpointing_steps: int = setting(500, "save the whole state every so many steps", type=positive, may_change=True)
    checkpoints_total_limit: int | None = setting(
        None, "how many of them to keep; all if not given", type=positive, may_change=True
    )
    resume_from_checkpoint: str | None = setting(
        None, "latest, or a checkpoint folder: go on from there", path=True, may_change=True
    )
    seed: int = setting(0, "of everything random: order, noise, class pictures")
    output_dir: str | None = setting(
        None, "a new folder for the run; runs/dreambooth, numbered if taken", path=True, may_change=True
    )
    layout: str = setting("official", "of the saved model", choices=("official", "diffusers"), may_change=True)
    sampler: str = setting("ddim", "for class pictures and sheets", metavar="NAME")
    sample_steps: int = setting(50, "sampling steps for class pictures and sheets", type=positive)
    guidance_scale: float = setting(7.5, "classifier-free guidance for class pictures and sheets")
    class_guidance_scale: float | None = setting(None, "another for class pictures: lower is more varied", type=float)
    sample_batch_size: int = setting(4, "pictures sampled at once", type=positive, may_change=True)
    validation_prompt: tuple[str, ...] = setting(
        (),
        "a row of the before/after sheet, repeatable; instance and class prompt if not given",
        action="append",
        may_change=True,
    )
    num_validation_images: int = setting(4, "pictures in a row of the sheet", type=positive, may_change=True)
    report_to: str = setting(
        "none", "show the metrics there too; needs the tracking extra", choices=TRACKERS, may_change=True
    )
    device: str | None = setting(None, "cuda, cpu, ...; the best one here if not given", may_change=True)

    def may_change(self, name: str) -> bool:
        """Whether a run that resumes may have another value of this setting, or of this part of its identity."""
        if name == "launch":  # the torchrun that it belongs to
            return True
        known = next((f.metadata["may_change"] for f in fields(self) if f.name == name), False)
        return known(self) if callable(known) else known

    def problems(self) -> str | None:
        """What can't be trained with, as one line; None if all is well as far as settings go."""
        if self.instance_data_dir is None:
            return "--instance-data-dir is missing: the folder with photographs of your subject"
        if not (self.instance_prompt or "").strip():
            return '--instance-prompt is missing: it names the subject by a rare word, "a photo of sks dog"'
        if self.with_prior_preservation and not (self.class_prompt or "").strip():
            return '--class-prompt is missing ("a photo of a dog"); or give --no-with-prior-preservation'
        folders = [Path(folder).resolve() for folder in (self.class_data_dir, self.instance_data_dir) if folder]
        if self.with_prior_preservation and len(set(folders)) < len(folders):
            return f"--class-data-dir {self.class_data_dir} is --instance-data-dir too; give class pictures their own"
        for name in ("learning_rate", "text_encoder_learning_rate", "max_grad_norm", "snr_gamma"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                return f"--{name.replace('_', '-')} {value} is not a positive number"
        if self.resolution > 8192:
            return f"--resolution {self.resolution} is more than any model makes; 512 or 768 is usual"
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
        samplers.find(self.sampler)
        check_installed(self.report_to)
        return None


def parse(argv: Sequence[str] | None, tiny: Path) -> Settings:
    """Defaults, then `tiny` if no model is named, then --config, then the other flags.

    Raises InputError for unknown flags and keys, values of the wrong kind, and settings that can't be trained with.
    """
    given = vars(_parser().parse_args(argv))
    config = given.pop("config", None)
    from_file = _read_toml(Path(config)) if config else {}
    settings = Settings()
    if "model" not in given and "model" not in from_file:
        settings = replace(settings, **_read_toml(tiny))
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    settings = replace(settings, **{**from_file, **given})
    if problem := settings.problems():
        raise InputError(problem)
    return settings


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="train.py",
        description="DreamBooth: teaches a Stable Diffusion one subject from a few photographs.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE.toml", help="settings by their names below; flags go over it")
    for f in fields(Settings):
        meta, flag = f.metadata, "--" + f.name.replace("_", "-")
        options = dict(meta["options"])
        if isinstance(f.default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif "type" not in options and isinstance(f.default, int | float):
            options["type"] = type(f.default)
        shown = "" if f.default in (None, ()) else f" (default: {f.default})"
        parser.add_argument(flag, *meta["flags"], dest=f.name, help=meta["help"] + shown, **options)
    return parser


KINDS = {positive: int, float: float}


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--config {path} can't be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path} is not TOML: {error}") from None
    known = {f.name: f for f in fields(Settings)}
    known |= {_key(flag): f for f in fields(Settings) for flag in f.metadata["flags"]}
    settings: dict[str, Any] = {}
    for key, value in tree.items():
        if (f := known.get(_key(key))) is None:
            raise InputError(f"--config {path}: there is no setting {key!r}; train.py --help lists them")
        settings[f.name] = _checked(f"--config {path}: {key}", f, value, path.parent)
    return settings


def _key(name: str) -> str:
    return name.lstrip("-").replace("-", "_")


def _checked(where: str, f: Any, value: Any, folder: Path) -> Any:
    """The value of one key, of the kind that its default has."""
    kind = KINDS.get(f.metadata["options"].get("type"), str) if f.default is None else type(f.default)
    if kind is tuple:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise InputError(f"{where} is not a list of strings")
        return tuple(value)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise InputError(f"{where} is {value!r}, and should be a {kind.__name__}")
    options = f.metadata["options"]
    if options.get("type") is positive and not 1 <= value <= MAX_COUNT:
        raise InputError(f"{where} is {value}, and should be from 1 to {MAX_COUNT}")
    if "choices" in options and value not in options["choices"]:
        raise InputError(f"{where} is {value!r}; there are {', '.join(options['choices'])}")
    name = f.name in ("model", "resume_from_checkpoint")  # which may be no path: "latest", or a name on a hub
    if f.metadata["path"] and (not name or (folder / value).exists()):
        return str(folder / value)
    return value
