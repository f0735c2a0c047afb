"""DreamBooth (Ruiz et al. 2023): the loss, the batch that it is computed on, and the parameters that train."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm import formats
from ldm.clip import Block, Contexts
from ldm.formats import Tensors
from ldm.guidance import seen
from ldm.model import StableDiffusion
from ldm.runtime import compile_blocks, replacing
from ldm.settings import Settings
from ldm.tokens import LearnedToken
from ldm.unet import ResBlock, TransformerBlock, UNet

Prompts = tuple[str, ...]
Parameters = dict[str, nn.Parameter]  # by name
TRAIN_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Losses(NamedTuple):
    """Scalars, in the units of the target squared."""

    total: Tensor
    subject: Tensor
    prior: Tensor


def dreambooth_loss(
    prediction: Tensor,
    target: Tensor,
    is_class: Tensor,
    prior_weight: float,
    row_weight: Tensor | None = None,
    *,
    place_weight: Tensor | None = None,
    huber_c: float | None = None,
) -> Losses:
    """`two_terms` of `row_errors`: DreamBooth, eq. 2. prediction, target: (B, C, h, w); is_class, row_weight: (B,)."""
    error = row_errors(prediction, target, row_weight, place_weight=place_weight, huber_c=huber_c)
    return two_terms(error, is_class, prior_weight)


def row_errors(
    prediction: Tensor,
    target: Tensor,
    row_weight: Tensor | None = None,
    *,
    place_weight: Tensor | None = None,
    huber_c: float | None = None,
) -> Tensor:
    """The mean squared error of each row, (B,) fp32. prediction, target: (B, C, h, w).

    row_weight: (B,) factors on the rows' errors, 1 if None; see `min_snr_weight`. place_weight: (B, 1, h, w) factors on
    the errors of the latents' places, 1 if None; see `mask_weight`. huber_c: takes the pseudo-Huber error instead.
    """
    error = (prediction.float() - target.float()).square()
    if huber_c is not None:  # diffusers' and kohya's "huber": about d^2 where d is far below c, 2 c |d| far above
        error = 2 * huber_c * ((error + huber_c**2).sqrt() - huber_c)
    if place_weight is not None:
        error = error * place_weight
    error = error.flatten(1).mean(1)
    return error if row_weight is None else error * row_weight


def two_terms(error: Tensor, is_class: Tensor, prior_weight: float) -> Losses:
    """Subject term plus weighted prior-preservation term (DreamBooth, eq. 2): L = L(subject) + lambda L(class).

    error: (B,), of the rows; is_class: (B,) bool, True for rows of the class prior. The mean of no rows is 0.
    """
    subject, prior = _mean(error, ~is_class), _mean(error, is_class)
    return Losses(subject + prior_weight * prior, subject, prior)


def _mean(error: Tensor, rows: Tensor) -> Tensor:
    # masked_fill and not error[rows]: a size that depends on values would make the host wait for the device
    return error.masked_fill(~rows, 0.0).sum() / rows.sum().clamp(min=1)


def min_snr_weight(snr: Tensor, gamma: float, prediction: str) -> Tensor:
    """Row weights (B,) that keep easy, lightly noised steps from dominating. Min-SNR, Hang et al. 2023, section 3.4.

    snr: (B,) of the rows' steps; prediction: "eps" or "v", whose squared errors are x_0's times snr, or snr + 1.
    """
    return snr.clamp(max=gamma) / (snr if prediction == "eps" else snr + 1.0)


def mask_weight(mask: Tensor, unmasked_weight: float) -> Tensor:
    """Place weights (B, 1, h, w): 1 inside the mask and `unmasked_weight` outside, divided by the row's mean.

    mask: (B, 1, h, w) in [0, 1]. Their mean is 1, so that a small subject counts as much as a large one. An empty mask
    counts as a full one does; not at all if `unmasked_weight` is 0.
    """
    weight = mask + unmasked_weight * (1.0 - mask)
    return weight / weight.mean((1, 2, 3), keepdim=True).clamp(min=1e-8)


@dataclass
class Batch:
    """The rows of one forward pass. `is_class` says which term a row belongs to; the order of rows has no meaning."""

    latents: Tensor  # (B, 4, h, w), clean and scaled
    noise: Tensor  # (B, 4, h, w), standard normal
    t: Tensor  # (B,) steps, int64
    prompts: Prompts  # B, one a row
    is_class: Tensor  # (B,) bool, True for rows of the class prior
    class_rows: Tensor  # the places of those rows, int64
    class_prompts: Prompts  # and their prompts
    last: bool = True  # whether this is the last batch whose gradients the step accumulates
    mask: Tensor | None = None  # (B, 1, h, w) in [0, 1], 1 where the loss counts in full; 1 in rows of the class prior
    subject: Tensor | None = None  # (B,) the number of each row's subject, int64
    extra: Tensor | None = None  # (B, 5, h, w), a mask and the masked picture, which a model for painting in sees too


@dataclass(eq=False)
class Base:
    """The base model, whose predictions can be the target of the prior term. contexts: (L, D) of each class prompt."""

    unet: UNet
    contexts: dict[str, Tensor]


class Trainable(nn.Module):
    """One way of fine-tuning: the parameters that train, their saved names, and the result that a run writes.

    A subclass passes the parameters that train to `__init__`, under names that never change. That is enough: the
    methods below train, save and write exactly those. All other parameters of the model are frozen.
    """

    weights_file = "trained.safetensors"  # name of the file that `save` writes in a checkpoint folder

    def __init__(self, sd: StableDiffusion, settings: Settings, trained: Parameters, token: LearnedToken | None = None):
        """token: a learned token that is among what trains."""
        super().__init__()
        self.sd, self.trained, self.token = sd, trained, token
        for parameter in sd.parameters().values():
            parameter.requires_grad_(False)
        for parameter in trained.values():
            parameter.requires_grad_(True)
        # DistributedDataParallel averages the gradients of registered networks.
        for name in ("unet", "text_encoder"):
            if any(parameter.requires_grad for parameter in getattr(sd, name).parameters()):
                setattr(self, name, getattr(sd, name).to(TRAIN_TYPES[settings.train_dtype]))
        self._compiles = settings.compile
        sd.unet.checkpointing = sd.text_encoder.text_model.checkpointing = settings.gradient_checkpointing
        self._base: Base | None = None  # see `keep_base`
        self._base_schedule = sd.schedule  # what the base model was trained on, also if the run trains on another one
        self._contexts = Contexts(sd.tokenizer, sd.text_encoder, sd.device)
        self._text_encoder_may_stop = False

    # One forward pass

    def forward(self, noisy: Tensor, t: Tensor, prompts: Sequence[str]) -> Tensor:
        """noisy: (B, 4 or 9, h, w), see `guidance.seen`; t: (B,); prompts: B, one a row. Returns (B, 4, h, w)."""
        context = self.context(prompts)  # (B, L, D)
        if (dtype := next(self.sd.unet.parameters()).dtype) != torch.float32:
            noisy, context = noisy.to(dtype), context.to(dtype)
        return self.sd.unet(noisy, t, context)

    def context(self, prompts: Sequence[str]) -> Tensor:
        """B prompts -> (B, L, D). While the text encoder is frozen it encodes each prompt of `prepare` once."""
        return self._contexts.trained(prompts) if self.text_encoder_trains else self._contexts.frozen(prompts)

    @property
    def text_encoder_trains(self) -> bool:
        return any(parameter.requires_grad for parameter in self.sd.text_encoder.parameters())

    @torch.no_grad()
    def keep_base(self, prompts: Prompts, dtype: torch.dtype) -> None:
        """Called once before training if `base` will be: keeps a frozen copy of the UNet in `dtype`."""
        unet = deepcopy(self.sd.unet).requires_grad_(False).to(dtype)
        self._base = Base(unet, dict(zip(prompts, self.sd.encode_prompt(prompts), strict=True)))

    @torch.no_grad()
    def base(self, noisy: Tensor, t: Tensor, prompts: Sequence[str]) -> Tensor:
        """The base model's prediction. noisy: (B, 4 or 9, h, w); t: (B,); prompts: B of those of `keep_base`."""
        unet = self._base.unet
        dtype, channels = next(unet.parameters()).dtype, unet.config.out_channels
        context = torch.stack([self._base.contexts[prompt] for prompt in prompts]).to(dtype)
        x, beside = noisy[:, :channels], noisy[:, channels:]
        return self.sd.schedule.ask(lambda x, t: unet(seen(x, beside).to(dtype), t, context), self._base_schedule, x, t)

    def base_parameters(self) -> list[nn.Parameter]:
        """The parameters of the copy that `keep_base` has made, if it has."""
        return list(self._base.unet.parameters()) if self._base else []

    def prepare(self, prompts: Prompts, dtype: torch.dtype) -> None:
        """Called once before training: a frozen text encoder encodes the prompts, and is then stored in `dtype`.

        If the settings say so, torch compiles UNet and text encoder when they first run.
        """
        self.compile_networks()
        self.keep_prompts(prompts)
        if not self.text_encoder_trains:
            self.sd.freeze(self.sd.text_encoder, dtype)

    def keep_prompts(self, prompts: Prompts) -> None:
        """Encodes these prompts once: now if the text encoder is frozen, else when it stops training."""
        self._contexts.keep(prompts)
        self._text_encoder_may_stop = self.text_encoder_trains
        if not self._text_encoder_may_stop:
            self._contexts.encode_kept()

    def after_stop(self) -> None:
        """Called when parameters have stopped training: if they were the text encoder's last, encodes the prompts."""
        if self._text_encoder_may_stop and not self.text_encoder_trains:
            self._contexts.encode_kept()

    def with_other_weights(self) -> AbstractContextManager:
        """Inside, the weights are averages: what a text encoder has encoded after it stopped training is set aside."""
        return self._contexts.set_aside() if self._text_encoder_may_stop else nullcontext()

    def compile_networks(self) -> None:
        """Makes torch compile UNet and text encoder block by block, if the settings say so."""
        if self._compiles:
            for network in (self.sd.unet, self.sd.text_encoder):
                compile_blocks(network, ResBlock, TransformerBlock, Block)

    # What the optimizer and a checkpoint see

    def parameter_groups(self, settings: Settings) -> list[dict[str, Any]]:
        """Groups for the optimizer: "params", "lr", "name", and "stop", the last step that updates them, or None."""
        params = list(self.trained.values())
        return [{"name": "trained", "params": params, "lr": settings.learning_rate, "stop": None}]

    def groups_of(self, unet: str, text: str, settings: Settings, text_rate: float) -> list[dict[str, Any]]:
        """A group each for the UNet, the text encoder and the token.

        unet, text: what the names of their parameters begin with. text_rate: the text encoder's learning rate, if the
        settings have none.
        """
        stop, token = settings.text_encoder_stop_step, self.token.vectors if self.token else None
        of_unet, of_text = (
            [p for name, p in self.trained.items() if name.startswith(prefix) and p is not token]
            for prefix in (unet, text)
        )
        groups = [{"name": "unet", "params": of_unet, "lr": settings.learning_rate, "stop": None}]
        if of_text:
            rate = settings.text_encoder_learning_rate or text_rate
            groups.append({"name": "text encoder", "params": of_text, "lr": rate, "stop": stop})
        if self.token is not None:
            groups.append(self.token.group(settings, stop))
        return groups

    def after_update(self) -> None:
        """Called after each update of the parameters."""
        if self.token is not None and self.token.vectors.requires_grad:
            self.token.keep_norm()

    def named_parameters_saved(self) -> Parameters:
        """The parameters that a checkpoint holds, by name."""
        return self.trained

    def bytes_saved(self) -> int:
        """The size of the file that `save` writes, without headers."""
        return sum(parameter.nbytes for parameter in self.named_parameters_saved().values())

    def save(self, path: Path, metadata: dict[str, str]) -> list[str]:
        """Writes the trained parameters. Returns the names of the model's tensors that such a file can't hold."""
        tensors = {name: parameter.detach().cpu() for name, parameter in self.named_parameters_saved().items()}
        formats.save_tensors(path, tensors, metadata)
        return []

    def load(self, path: Path) -> None:
        """Loads a file that `save` has written, bit for bit."""
        self.adopt(self.read(path))

    def read(self, path: Path) -> Tensors:
        """The tensors that `save` has written. Raises InputError if the file is damaged."""
        return formats.open_tensors(path)[0]

    def expected(self) -> Tensors:
        """Tensors of the names and shapes that `read` should return."""
        return dict(self.named_parameters_saved())

    @torch.no_grad()
    def adopt(self, tensors: Tensors) -> None:
        """Copies tensors of the saved names into the parameters."""
        for name, parameter in self.named_parameters_saved().items():
            parameter.copy_(tensors[name])

    # The run's result

    def result_path(self, folder: Path, settings: Settings) -> Path:
        """The path in a run's folder that `result` writes to."""
        return folder / self.weights_file

    def result(self, path: Path, settings: Settings, metadata: dict[str, str]) -> list[str]:
        """Writes the run's result to `path`. Returns the names of tensors that it leaves out."""
        with replacing(path) as temporary:
            return self.save(temporary, metadata)
