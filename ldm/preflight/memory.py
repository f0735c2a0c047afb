"""Predicts how much memory a run needs, before it runs out: goes through a training step without numbers, and counts.

On torch's meta device a tensor has a shape and a type, but no numbers: a step of the largest model takes no memory
there, and a second. `Ledger` counts the bytes that its tensors would take. They hold

    weights       of all networks; frozen ones are stored in the type that autocast computes in
    gradients     of what trains; they come to life one by one during the backward pass
    moments       AdamW's two averages for each number that trains
    average       the EMA of the weights
    activations   what the forward pass keeps for the backward pass, weights cast to 16 bits among it; temporary tensors
    heap          on a CPU, what the C library's heap holds of freed tensors

At the start of the backward pass all activations are alive and no gradient, at its end all gradients and no activation.
The peak lies where the sum is largest.
"""

import resource
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.dreambooth import Trainable, dreambooth_loss
from ldm.model import StableDiffusion
from ldm.preflight.ledger import Kernels, Ledger
from ldm.preflight.note import Note, amount
from ldm.runtime import at_once
from ldm.settings import Settings
from ldm.training import Precision, Run
from ldm.validation import weights_kept

Tuning = Callable[[StableDiffusion, Settings], Trainable]

# Freed tensors below 32 MB lie between living ones in glibc's heap, which can't use all of that room again. Measured
# on the embedded model at 64, 128 and 256 pixels, in fp32 and bf16: 0.26 to 0.56 of the activations.
HEAP = 1 / 3


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at one moment of a run."""

    moment: str  # "in a training step", ...
    weights: int
    gradients: int
    moments: int
    average: int
    activations: int
    heap: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "moment"}

    def __str__(self) -> str:
        total, parts = self.total, {name: size for name, size in self.parts.items() if size > 0.001 * self.total}
        shown = ", ".join(f"{name} {amount(size, total)}" for name, size in parts.items())
        return f"about {amount(total)} at the peak, {self.moment}: {shown}"


def predict(
    sd: StableDiffusion, tuning: Tuning, settings: Settings, device: torch.device, processes: int = 1
) -> Memory:
    """The peak of a run on one device: in a training step, or while pictures are sampled before or after training.

    tuning: makes the `Trainable` of a model, here of a twin of `sd` on the meta device. processes: of the whole run.
    Not counted: CUDA's context, and the workspaces of single kernels. Encoding the pictures once, before training,
    takes less than sampling them.
    """
    rehearsal = Rehearsal(sd, tuning, settings, device)
    before = rehearsal.class_pictures()
    rehearsal.prepare()
    return max(before, rehearsal.training_step(processes), rehearsal.sheet(), key=lambda memory: memory.total)


class Twin(StableDiffusion):
    """A model without numbers, on the meta device."""

    def __init__(self, sd: StableDiffusion):
        with torch.device("meta"):
            super().__init__(sd.config, sd.source.tokenizer if sd.source else sd.tokenizer)  # `tuning` adds its token
        self.source = sd.source
        self.originals: list[Tensor] = []  # weights from before a cast, which stay on the CPU
        for module in self.unet.modules():
            if getattr(module, "upcast", False):
                module.upcast = False  # autocast can't be switched off on the meta device; see `Kernels`

    def freeze(self, network: nn.Module, dtype: torch.dtype) -> None:
        self.originals += [parameter.detach() for parameter in network.parameters()]
        network.requires_grad_(False).to(dtype)


class Rehearsal:
    """Simulates on the meta device the moments of a run that may need most memory, in the order of the run."""

    def __init__(self, sd: StableDiffusion, tuning: Tuning, settings: Settings, device: torch.device):
        self.settings, self.device = (settings := replace(settings, compile=False)), device
        self.encodes = settings.random_crop or sd.config.unet.paints_in  # pictures in each step: cut, or with a hole
        self.sd = Twin(sd)
        with torch.device("meta"):
            self.trainable = tuning(self.sd, settings)
        self.trained = list(self.trainable.named_parameters_saved().values())
        self._sampled: tuple[int, int] | None = None
        precision = Precision(settings.mixed_precision, device, settings.train_dtype)
        self.kernels = Kernels(precision.dtype, device, sd.config.unet.upcast_attention)
        named, of_class = settings.taught[0].instance_prompt, settings.taught[0].class_prompt
        self.prompts = ((named, of_class) if settings.with_prior_preservation else (named,)) * settings.train_batch_size

    def class_pictures(self) -> Memory:
        """The sheet before training, or batches of class pictures, on a CPU as many at once as it has cores."""
        given, batches = self.settings, 1
        pictures = len(given.validation_prompt or given.prompts) * given.num_validation_images
        if given.uses_class_pictures:
            pictures = max(pictures, given.num_class_images)
            batches = min(at_once(self.device), -(-given.num_class_images // given.sample_batch_size))
        work = batches * self._sampling(min(given.sample_batch_size, pictures))
        return self._memory("while it samples pictures before training", 0, work, began=False)

    def prepare(self) -> None:
        """What train.py does between the class pictures and the first step."""
        dtype = self.kernels.dtype
        self.sd.originals += weights_kept(self.settings, self.sd.unet, dtype)
        if self.encodes:
            self.sd.freeze(self.sd.vae, torch.float32)
        else:
            self.sd.forget_encoder()
            self.sd.freeze(self.sd.vae, dtype)
        if self.settings.predicts_prior:
            self.trainable.keep_base((self.settings.taught[0].class_prompt,), dtype)
        self.trainable.prepare(tuple(dict.fromkeys(self.prompts)), dtype)

    def training_step(self, processes: int) -> Memory:
        """Batch, forward and backward pass. The update needs no more: fused AdamW makes no temporary tensors."""
        with self._ledger(self.trained) as ledger, self.kernels:
            if self.settings.gradient_accumulation_steps > 1 or processes > 1:  # of the batch before; DDP's buckets
                for parameter in self.trained:
                    parameter.grad = torch.empty_like(parameter)
                    ledger.note_gradient(parameter)
            if self.settings.fused_backward:
                for parameter in self.trained:
                    parameter.register_post_accumulate_grad_hook(free_gradient)
            if self.encodes:
                with torch.no_grad():
                    self.sd.encode_images(self._pictures(len(self.prompts)))
            noisy = self._noisy(len(self.prompts))
            t = torch.empty(len(noisy), dtype=torch.long, device="meta")
            is_class = torch.empty(len(noisy), dtype=torch.bool, device="meta")
            with self.kernels.autocast():
                prediction = self.trainable(noisy, t, self.prompts)
                if self.settings.predicts_prior:
                    half = len(noisy) // 2
                    self.trainable.base(noisy[:half], t[:half], (self.settings.taught[0].class_prompt,) * half)
            self.kernels.backward(dreambooth_loss(prediction, noisy[:, : prediction.shape[1]], is_class, 1.0).total)
        gradients = ledger.gradients_at_peak
        return self._memory("in a training step", gradients, ledger.peak - gradients)

    def sheet(self) -> Memory:
        """The sheet after training, while AdamW's moments are still there."""
        pictures = len(self.settings.validation_prompt or self.settings.prompts) * self.settings.num_validation_images
        work = self._sampling(min(self.settings.sample_batch_size, pictures))
        return self._memory("while it samples the sheet after training", 0, work)

    def _memory(self, moment: str, gradients: int, activations: int, began: bool = True) -> Memory:
        """began: whether AdamW has made its moments."""
        of_one = moment_bytes_8bit if self.settings.use_8bit_adam else moment_bytes
        moments = sum(map(of_one, self.trained)) if began else 0
        average = sum(4 * parameter.numel() for parameter in self.trained) if self.settings.use_ema else 0
        heap = round(HEAP * activations) if self.device.type == "cpu" else 0
        return Memory(moment, self._weights(), gradients, moments, average, activations, heap)

    def _sampling(self, pictures: int) -> int:
        """Bytes to sample a batch of pictures, beside the model."""
        if self._sampled is None:
            self._sampled = self._sample_one()
        copies, picture = self._sampled
        return copies + pictures * picture

    def _sample_one(self) -> tuple[int, int]:
        """Evaluates the UNet with guidance, and decodes: the bytes of cast weights, and those that a picture takes."""
        rows, sd = 2, self.sd
        with torch.no_grad(), self._ledger() as ledger, self.kernels, self.kernels.autocast():
            ids = torch.empty(rows, sd.config.text.context_length, dtype=torch.long, device="meta")
            noisy, channels = self._noisy(rows), sd.config.vae.latent_channels
            sd.unet(noisy.to(next(sd.unet.parameters()).dtype), torch.empty(rows, device="meta"), sd.text_encoder(ids))
            sd.vae.decode(noisy[:1, :channels].to(next(sd.vae.parameters()).dtype)).float()
            return self.kernels.copied, ledger.peak - self.kernels.copied

    def _ledger(self, trained: list[nn.Parameter] | None = None) -> Ledger:
        return Ledger(self._everything(), trained or [])

    def _noisy(self, rows: int) -> Tensor:
        """The UNet's input: noisy latents, and a mask and a picture if it is for painting in."""
        side = self.settings.resolution // self.sd.config.vae.factor
        return torch.empty(rows, self.sd.config.unet.in_channels, side, side, device="meta")

    def _pictures(self, rows: int) -> Tensor:
        return torch.empty(rows, 3, self.settings.resolution, self.settings.resolution, device="meta")

    def _everything(self) -> list[Tensor]:
        model = [*self.sd.state().values(), *self.trained, *self.trainable.parameters()]
        return [*model, *self.trainable.base_parameters(), *self.sd.originals]

    def _weights(self) -> int:
        """Bytes of all weights. `StableDiffusion.freeze` keeps those that it casts on the CPU."""
        tensors = self._everything()
        if self.device.type != "cpu":
            tensors = tensors[: len(tensors) - len(self.sd.originals)]
        return sum({id(s): s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}.values())


def free_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def moment_bytes(parameter: Tensor) -> int:
    """AdamW: the averages of the gradient and of its square, in fp32."""
    return 2 * 4 * parameter.numel()


def moment_bytes_8bit(parameter: Tensor) -> int:
    """8-bit AdamW: a byte for each number of the two, and an fp32 scale for each block of 256 (Dettmers et al. 2022).

    bitsandbytes keeps small tensors in fp32.
    """
    n = parameter.numel()
    return 2 * 4 * n if n < 4096 else 2 * (n + 4 * -(-n // 256))


# The flags that save memory, and what they change


def savers(settings: Settings, device: torch.device, processes: int = 1) -> dict[str, Settings]:
    """The settings with each flag that may save memory, by the flag."""
    has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported()
    changes = {
        "--gradient-checkpointing": {"gradient_checkpointing": True},
        "--use-8bit-adam": {"use_8bit_adam": True},
        "--no-train-text-encoder": {"train_text_encoder": False},
        "--no-use-ema": {"use_ema": False},
    }
    is_full = settings.lora_rank is None and settings.train == "all"
    if settings.train_dtype == "fp32" and has_bf16 and is_full and settings.mixed_precision != "fp16":
        changes["--train-dtype bf16"] = {"train_dtype": "bf16", "mixed_precision": "no"}
    if settings.gradient_accumulation_steps == 1 and settings.mixed_precision != "fp16" and processes == 1:
        changes["--fused-backward --max-grad-norm 0"] = {"fused_backward": True, "max_grad_norm": 0.0}
    if settings.mixed_precision == "no" and settings.train_dtype == "fp32":
        half = "bf16" if has_bf16 else "fp16"
        changes[f"--mixed-precision {half}"] = {"mixed_precision": half}
    for name in ("train_batch_size", "sample_batch_size"):
        if (fewer := getattr(settings, name) // 2) > 0:
            changes[f"--{name.replace('_', '-')} {fewer}"] = {name: fewer}
    return {flag: replace(settings, **change) for flag, change in changes.items()}


def memory_notes(run: Run, sd: StableDiffusion, tuning: Tuning) -> list[Note]:
    """The prediction, and a warning with the flags that help if the device has less."""
    device, most = run.world.device, available(run.world.device)
    predicted = predict(sd, tuning, run.settings, device, run.world.size)
    notes = [Note("memory", str(predicted))]
    if most is not None and most < predicted.total:
        text = f"{device} has {amount(most)} for it; {advice(run, sd, tuning, predicted.total)}"
        notes.append(Note("memory", text, warning=True))
    return notes


def advice(run: Run, sd: StableDiffusion, tuning: Tuning, without: int) -> str:
    """The flags that help, from the one that saves most: "--use-8bit-adam saves 5.2 GB, ...". without: bytes so far."""
    saved = {}
    for flag, settings in savers(run.settings, run.world.device, run.world.size).items():
        saved[flag] = without - predict(sd, tuning, settings, run.world.device, run.world.size).total
    helpful = sorted((flag for flag in saved if saved[flag] > 0.01 * without), key=lambda flag: -saved[flag])
    return ", ".join(f"{flag} saves {amount(saved[flag])}" for flag in helpful) or "no flag saves much"


def available(device: torch.device) -> int | None:
    """Bytes that this process may have on the device, with those that it has already. None where nobody can tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return None
    lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
    mine = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return 1024 * int(lines["MemAvailable"].split()[0]) + mine
