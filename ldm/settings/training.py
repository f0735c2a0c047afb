"""Settings of what trains and how: the weights, a LoRA, a token; the optimizer; the types of numbers."""

import math
from dataclasses import dataclass

from ldm.lora import TARGETS
from ldm.runtime import cli
from ldm.settings.setting import Group, not_positive, setting

RATE, LORA_RATE = 2e-6, 1e-4  # learning rates that are usual for all weights, and for a LoRA
LOW_LORA_RATE = 1e-5  # below it a LoRA hardly learns
MIN_ALPHA = 1e-6  # far below it, the scale of a LoRA becomes 0 in fp32

LR_SCHEDULES = {  # name -> the factor on the learning rate after the warm-up; progress: 0 at its first step
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 + 0.5 * math.cos(math.pi * progress),
}


@dataclass(frozen=True)
class Trained(Group):
    """What trains"""

    train: str = setting(
        "all", "what trains; token: only the new token's vectors, without class pictures", choices=("all", "token")
    )
    train_text_encoder: bool = setting(True, "train the text encoder as well as the UNet")
    text_encoder_stop_step: int | None = setting(None, "freeze the text encoder after this step", type=cli.positive)


@dataclass(frozen=True)
class LoRASettings(Group):
    """A LoRA instead of all weights"""

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
    lora_conv_rank: int | None = setting(
        None,
        "rank of the 3x3 convolutions of --lora-targets all, most of the file; alpha / rank is as elsewhere; "
        "--lora-rank if not given",
        flags=("--conv-dim",),
        type=cli.positive,
    )

    def problem(self) -> str | None:
        if self.lora_conv_rank and self.lora_targets != "all":
            return "--lora-conv-rank is for the 3x3 convolutions, which only --lora-targets all trains"
        if self.lora_alpha is not None and 0 < self.lora_alpha < MIN_ALPHA:
            return f"--lora-alpha {self.lora_alpha} is too little: it should be at least {MIN_ALPHA}"
        return not_positive(self, "lora_alpha")


@dataclass(frozen=True)
class TokenSettings(Group):
    """A new token for the subject"""

    placeholder_token: str | None = setting(
        None, 'new token that the prompts name the subject by, "[V]"; it is trained, and saved also by itself'
    )
    initializer_token: str | None = setting(None, "known word or words whose vectors the new token begins with")
    num_vectors: int | None = setting(
        None, "vectors of the new token; as many as the initializer has if not given", type=cli.positive
    )
    token_learning_rate: float = setting(2e-3, "learning rate of the new token's vectors")

    def problem(self) -> str | None:
        if self.train == "token" and self.lora_rank:
            return "--train token trains the token alone: leave out --lora-rank, or --train token to train both"
        if problem := not_positive(self, "token_learning_rate"):
            return problem
        token, prompt = self.placeholder_token, self.instance_prompt or ""
        if token is None:
            return '--train token needs --placeholder-token: the new word, "[V]"' if self.train == "token" else None
        if self.initializer_token is None:
            return "--placeholder-token needs --initializer-token: a word for the subject's class, such as dog"
        if token.lower() in ("lora", "model"):
            return f"--placeholder-token {token}: its file would have the name of the run's own; take another word"
        if token.lower() not in prompt.lower():
            return f"--instance-prompt {prompt!r} does not hold the placeholder token {token}"
        return None


@dataclass(frozen=True)
class Optimization(Group):
    """Steps and learning rate"""

    max_train_steps: int = setting(
        800, "optimizer steps", type=cli.positive, may_change=lambda s: s.lr_scheduler == "constant"
    )
    train_batch_size: int = setting(
        1, "photographs in a batch; it has as many class pictures", type=cli.positive, may_change=True
    )
    gradient_accumulation_steps: int = setting(
        1, "batches whose gradients are averaged in one step", type=cli.positive, may_change=True
    )
    learning_rate: float | None = setting(
        None, f"AdamW learning rate; if not given, {RATE:g}, and {LORA_RATE:g} with --lora-rank", type=float
    )
    text_encoder_learning_rate: float | None = setting(
        None, "learning rate of the text encoder; if not given, the UNet's, and half of it with --lora-rank", type=float
    )
    lr_scheduler: str = setting("constant", "learning rate over the steps", choices=tuple(LR_SCHEDULES))
    lr_warmup_steps: int = setting(0, "steps over which the learning rate rises from 0")
    max_grad_norm: float = setting(1.0, "largest norm of the gradients; larger ones are scaled down to it; 0: no limit")
    use_ema: bool = setting(False, "save the average of the weights instead of the last ones")
    ema_decay: float = setting(0.9999, "decay of that average, once it has warmed up")
    seed: int = setting(0, "random seed of the order of pictures, noise, timesteps and class pictures")

    def problem(self) -> str | None:
        if problem := not_positive(self, "learning_rate", "text_encoder_learning_rate"):
            return problem
        if not 0 <= self.max_grad_norm < float("inf"):
            return f"--max-grad-norm {self.max_grad_norm} is not a number from 0; 0 leaves the gradients as they are"
        if self.lr_warmup_steps < 0:
            return f"--lr-warmup-steps {self.lr_warmup_steps} is below 0"
        if not 0 <= self.ema_decay < 1:
            return f"--ema-decay {self.ema_decay} is not from 0 to below 1"
        return None


@dataclass(frozen=True)
class Machine(Group):
    """Memory, speed and exactness"""

    device: str | None = setting(None, "cuda, cpu, ...; if not given, cuda if available, else cpu", may_change=True)
    mixed_precision: str = setting("no", "type that autocast computes in", choices=("no", "fp16", "bf16"))
    gradient_checkpointing: bool = setting(
        False, "less memory, a third more time: activations are computed twice", may_change=True
    )
    use_8bit_adam: bool = setting(False, "AdamW with 8-bit moments; needs the bitsandbytes extra")
    train_dtype: str = setting(
        "fp32", "type of the weights that train; bf16 computes in bf16 and rounds at random", choices=("fp32", "bf16")
    )
    fused_backward: bool = setting(
        False, "update each parameter inside the backward pass and free its gradient; needs --max-grad-norm 0"
    )
    compile: bool = setting(
        False, "compile the networks block by block: faster steps after some minutes; needs a C++ compiler"
    )
    allow_tf32: bool = setting(False, "faster, coarser fp32 matrix products on NVIDIA GPUs")
    deterministic: bool = setting(False, "the same bits each time on a GPU too; slower")

    def problem(self) -> str | None:
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
