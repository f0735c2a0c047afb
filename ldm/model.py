"""Stable Diffusion: three networks, a tokenizer and a schedule, and what they do together."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ldm import samplers
from ldm.clip import TextEncoder
from ldm.config import ModelConfig
from ldm.errors import InputError
from ldm.formats import names, weights
from ldm.guidance import SeededNoise, denoiser, pair_up
from ldm.images import to_pil
from ldm.schedule import Schedule
from ldm.tokenizer import Tokenizer
from ldm.unet import UNet
from ldm.vae import Autoencoder


class StableDiffusion:
    """unet, vae, text_encoder, tokenizer and schedule of one `ModelConfig`; random weights until loaded."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer | None = None):
        self.config = config
        self.unet = UNet(config.unet)
        self.vae = Autoencoder(config.vae)
        self.text_encoder = TextEncoder(config.text)
        self.tokenizer = tokenizer or Tokenizer.clip(config.text.context_length, config.text.pad_id)
        self.schedule = Schedule(config.schedule)
        self.summary = "random weights"  # what was loaded, in words
        self._extra: weights.Tensors = {}  # of the official file, not computed with
        self._dropped: list[str] = []  # names of what it had and is not saved
        self._origin: dict[str, str] = {}  # what its metadata said of where it comes from
        self._read: Callable[[], weights.Source] | None = None  # reads again what was loaded
        self._frozen: weights.Tensors = {}  # what `freeze` has set aside, as it was

    # Files

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = torch.float32,
        *,
        ema: bool = False,
        prediction: str | None = None,
        variant: str | None = None,
    ) -> "StableDiffusion":
        """Loads an official single file or a diffusers folder; every tensor is insisted on, with its shape.

        The networks adopt the file's memory-mapped tensors; only what has another type or device is copied.
        dtype: of the networks; as stored if None. ema, prediction, variant: see `weights.read`.
        Raises InputError, which names the tensor, if one is missing, unknown or of another shape. The numbers are not
        looked at, and so not read from the disk before they are needed: `check_finite` does.
        """
        read = partial(weights.read, path, ema=ema, prediction=prediction, variant=variant)
        source = read()
        sd = cls.without_weights(path, source)
        sd.summary, sd._read = f"{path}: {weights.describe(source)}", read
        sd._extra, sd._dropped, sd._origin = source.extra, source.dropped, source.origin
        if problems := sd.differences(source.tensors):
            raise InputError(f"{path}: {weights.listed(problems, 1)}")
        for prefix, network in sd.networks().items():
            state = {name: source.tensors[prefix + name].to(device, dtype) for name in network.state_dict()}
            network.load_state_dict(state, assign=True)
            network.eval()
        return sd

    @classmethod
    def without_weights(cls, path: str | Path, source: weights.Source) -> "StableDiffusion":
        """The model that a source describes, on the meta device. Raises InputError if no such model could run."""
        try:
            with torch.device("meta"):
                sd = cls(source.config, source.tokenizer)
                sd.rehearse()
        except Exception as error:
            raise InputError(f"{path}: what it says of itself makes no model that can run: {error}") from None
        return sd

    def save(
        self,
        path: str | Path,
        layout: str = "official",
        dtype: torch.dtype | None = None,
        metadata: dict[str, str] | None = None,
    ) -> list[str]:
        """Writes the model to `path`: layout "official" is one .safetensors file, "diffusers" a folder.

        dtype: of the stored weights; as they are if None. metadata: more lines for the safetensors headers;
        if None, those that tell where the loaded model came from.
        What is at `path` stays whole until the new one is. Returns the names of the tensors beside the three networks
        that the source had and that are not saved: EMA weights, and in a folder what it has no place for.
        """
        if layout not in weights.WRITERS:
            raise InputError(f"unknown layout {layout!r}; there are {' and '.join(weights.WRITERS)}")
        return weights.WRITERS[layout](path, self._now(dtype), metadata)

    def fingerprint(self) -> str:
        """SHA-256 of the weights as they are stored where they were loaded from, or as they are if made here."""
        return weights.fingerprint(self._read() if self._read else self._now(None))

    def _now(self, dtype: torch.dtype | None) -> weights.Source:
        """The weights as they are at present, ready to be written."""
        state = self.state() | self._frozen
        tensors = {name: tensor.detach().to("cpu", dtype) for name, tensor in state.items()}
        return weights.Source(self.config, tensors, self.tokenizer, self._extra, self._dropped, origin=self._origin)

    def differences(self, tensors: weights.Tensors) -> list[str]:
        """What keeps these tensors from being this model's, a phrase each: rule 2, loading is strict."""
        expected = self.state()
        problems = [f"missing tensor {name}" for name in sorted(expected.keys() - tensors.keys())]
        problems += [f"unknown tensor {name}" for name in sorted(tensors.keys() - expected.keys())]
        for name in sorted(expected.keys() & tensors.keys()):
            found, shape = tensors[name], expected[name].shape
            if found.shape != shape:
                problems.append(f"{name} is {tuple(found.shape)}, and should be {tuple(shape)}")
            elif found.dtype not in weights.DTYPES:
                problems.append(f"{name} holds {found.dtype}, and should hold fp32, fp16 or bf16 numbers")
        return problems

    def check_finite(self) -> None:
        """Raises InputError, which names the tensors, if weights are NaN or infinity. Reads all of them."""
        if bad := weights.not_finite(self.state()):
            what = weights.listed(bad, 1)
            raise InputError(f"{what} holds NaN or infinity; the model's file is damaged, or the model has diverged")

    @torch.no_grad()
    def rehearse(self) -> None:
        """Runs the three networks once for a small picture, unless their sizes are the official ones, known to run.

        On the meta device, which knows shapes only, it costs next to nothing.

        Raises whatever comes up where they do not fit each other, the tokenizer or this program.
        """
        text, tokenizer = self.config.text, self.tokenizer
        if tokenizer.context_length != text.context_length or max(tokenizer.vocab.values()) >= text.vocab_size:
            raise ValueError("the tokenizer is not the text encoder's")
        if weights.family(self.config) is not None:
            return
        context = self.text_encoder(torch.zeros(1, text.context_length, dtype=torch.long))
        image = torch.zeros(1, 3, self.config.vae.factor, self.config.vae.factor)
        z = self.vae.encode(image).mode() * self.config.vae.scale_factor
        if self.unet(z, torch.zeros(1), context).shape != z.shape or self.vae.decode(z).shape != image.shape:
            raise ValueError("what it makes of latents or pictures is not of their size")

    def reschedule(self, **changes: Any) -> None:
        """Changes entries of `config.schedule`. Raises InputError for those that do not go together."""
        self.schedule = Schedule(replace(self.config.schedule, **changes))
        self.config = replace(self.config, schedule=self.schedule.config)

    def networks(self) -> dict[str, nn.Module]:
        """The three networks by the prefix that their tensors have in an official file."""
        return {names.UNET: self.unet, names.VAE: self.vae, names.TEXT: self.text_encoder}

    def state(self) -> weights.Tensors:
        """All parameters under their official names."""
        return {prefix + name: t for prefix, net in self.networks().items() for name, t in net.state_dict().items()}

    def parameters(self) -> dict[str, nn.Parameter]:
        """The networks' parameters themselves, under their official names."""
        return {prefix + name: p for prefix, net in self.networks().items() for name, p in net.named_parameters()}

    def freeze(self, network: nn.Module, dtype: torch.dtype) -> None:
        """Ends a network's training: no gradients, and its weights in the type to compute in.

        What `save` writes of it stays as it is now.
        """
        prefix = next(prefix for prefix, other in self.networks().items() if other is network)
        now = {prefix + name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}
        self._frozen = now | self._frozen
        network.requires_grad_(False).to(dtype)

    def forget_encoder(self) -> None:
        """Frees the autoencoder's encoder, which nothing needs once all pictures are latents; `save` still has it."""
        self.freeze(self.vae, next(self.vae.parameters()).dtype)
        self.vae.encoder = nn.Identity()

    # Between people's things and tensors

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    def encode_prompt(self, prompts: str | Sequence[str]) -> Tensor:
        """Prompts -> context (B, L, D), what the UNet is conditioned on."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        return self.text_encoder(self.tokenizer(prompts).to(self.device))

    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> scaled latents: a sample if a generator is given, else the mode."""
        posterior = self.vae.encode(images)
        z = posterior.sample(generator) if generator is not None else posterior.mode()
        return z * self.config.vae.scale_factor

    def decode_latents(self, z: Tensor) -> Tensor:
        """Scaled latents (B, 4, h, w) -> images (B, 3, 8h, 8w), about [-1, 1].

        In fp16, also autocast's, the autoencoder of SD can overflow to NaN: such latents are decoded again in fp32.
        """
        z = z / self.config.vae.scale_factor
        images = self.vae.decode(z.to(next(self.vae.parameters()).dtype))
        if z.isfinite().all() and not images.isfinite().all():
            with torch.autocast(self.device.type, enabled=False):
                images = self.vae.float().decode(z.float())
        return images

    # Sampling

    @torch.no_grad()
    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        negative_prompt: str = "",
        steps: int = 50,
        guidance: float = 7.5,
        guidance_rescale: float = 0.0,
        sampler: str = "ddim",
        eta: float = 0.0,
        seeds: Sequence[int] = (0,),
        height: int | None = None,
        width: int | None = None,
        latents: Tensor | None = None,
        init_image: Tensor | None = None,
        strength: float = 0.8,
        output: str = "pil",
        progress: Callable[[], object] | None = None,
    ) -> list[Image.Image] | Tensor:
        """Pictures for prompts, one prompt a seed; a list of length one serves all of the other.

        A picture depends on its prompt and its seed alone, not on the batch: initial latents, then the sampler's
        noise, come from `torch.Generator().manual_seed(seed)`, float32 on the CPU.
        height, width: pixels, multiples of the autoencoder's factor (8 in SD); the training size if None.
        latents: (B, 4, h, w) standard normal noise to start from instead, for B pictures.
        init_image: (3, H, W) in [-1, 1], a picture to start from, which gives the size; strength: how much of the way
        from noise is gone again, from 0, the picture as it is, to 1, nothing of it (SDEdit, Meng et al. 2022).
        progress: called after each evaluation of the UNet; `Sampler.evaluations` tells how many there are.
        output: "pil" for a list of images, "tensor" for (B, 3, H, W) in [-1, 1], "latent" for scaled latents.
        Raises InputError for sizes, steps, samplers, strengths and outputs that there are not, and RunError if a
        picture for PIL came out as NaN or infinity.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        prompts, seeds = pair_up(prompts, seeds, 1 if latents is None else len(latents))
        if output not in ("pil", "tensor", "latent"):
            raise InputError(f"unknown output {output!r}; there are pil, tensor and latent")
        chosen = samplers.find(sampler)
        times = chosen.times(self.schedule, steps)
        if init_image is not None:
            height, width = init_image.shape[1:]
        shape = self.latent_shape(height, width) if latents is None else tuple(latents.shape[1:])
        noise = SeededNoise(seeds, shape, self.device)
        picture = None if init_image is None else self._samples(init_image, noise.generators)  # each one's first draw
        x = noise() if latents is None else latents.to(self.device, torch.float32)
        if picture is not None:
            times = times[steps - samplers.steps_for_strength(steps, strength) :]
            x = self.schedule.add_noise(picture, x, times[0]) if times else picture
        negative = [negative_prompt] * len(prompts) if guidance != 1.0 else []
        context = self.encode_prompt(negative + prompts)
        denoise = denoiser(self.unet, self.schedule, context, guidance, guidance_rescale, progress)
        z = chosen.loop(denoise, x, self.schedule, times, eta=eta, noise=noise)
        if output == "latent":
            return z
        images = self.decode_latents(z).float()
        return images if output == "tensor" else to_pil(images)

    def _samples(self, image: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """(3, H, W) in [-1, 1] -> scaled latents (B, 4, h, w): it is encoded once, and each generator draws of it."""
        posterior = self.vae.encode(image[None].to(self.device, next(self.vae.parameters()).dtype))
        z = torch.cat([posterior.sample(generator) for generator in generators])
        return (z * self.config.vae.scale_factor).float()

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """(4, h, w) for a picture of this size in pixels. Raises InputError if the autoencoder can't make it."""
        factor, native = self.config.vae.factor, self.config.resolution
        sides = {"height": native if height is None else height, "width": native if width is None else width}
        for name, side in sides.items():
            if side <= 0 or side % factor:
                near = max(factor, round(side / factor) * factor)
                raise InputError(f"{name} {side} is not a positive multiple of {factor} pixels; take {near}")
        return self.config.unet.in_channels, sides["height"] // factor, sides["width"] // factor
