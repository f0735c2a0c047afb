"""Stable Diffusion: three networks, a tokenizer and a schedule; loads, encodes, generates, decodes and saves."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ldm import formats, samplers, tiling
from ldm.clip import TextEncoder
from ldm.config import ModelConfig
from ldm.errors import InputError
from ldm.guidance import Canvas, SeededNoise, Start, denoiser, pair_up
from ldm.images import to_pil
from ldm.lora import Adaptable
from ldm.schedule import Schedule
from ldm.tokenizer import Tokenizer
from ldm.unet import UNet
from ldm.vae import Autoencoder


class StableDiffusion(Adaptable):
    """unet, vae, text_encoder, tokenizer and schedule of one `ModelConfig`; random weights until loaded.

    source: what the model was loaded from, without the networks' tensors; None if it was made in code.
    """

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer | None = None):
        self.config = config
        self.unet = UNet(config.unet)
        self.vae = Autoencoder(config.vae)
        self.tokenizer = tokenizer or Tokenizer.clip(config.text.context_length, config.text.pad_id)
        self.text_encoder = TextEncoder(config.text, self.tokenizer.added.values())
        self.schedule = Schedule(config.schedule)
        self.source: formats.Source | None = None
        self.tiling = False  # decode one picture at a time and in strips, which needs less memory
        self._frozen: formats.Tensors = {}  # weights from before `freeze` cast them

    # Load

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
        mapped: bool = True,
    ) -> "StableDiffusion":
        """Loads an official single file or a diffusers folder. Loading is strict: every tensor must be there.

        The networks adopt the file's memory-mapped tensors; a tensor of another type or device is copied. mapped: if
        False, all tensors are copied, and the file may change afterwards. dtype: of the networks; as stored if None.
        ema, prediction, variant: see `formats.read`.
        Raises InputError, which names the tensor, if one is missing, unknown or of another shape. The numbers are read
        from the disk when they are first needed: `check_finite` checks them.
        """
        source = formats.read(path, ema=ema, prediction=prediction, variant=variant)
        sd = cls.without_weights(source)
        if problems := formats.differences(source.tensors, sd.state()):
            raise InputError(f"{path}: {formats.abbreviate(problems, 1)}")
        for prefix, network in sd.networks().items():
            state = {n: source.tensors[prefix + n].to(device, dtype, copy=not mapped) for n in network.state_dict()}
            network.load_state_dict(state, assign=True)
            network.eval()
        return sd

    @classmethod
    def without_weights(cls, source: formats.Source) -> "StableDiffusion":
        """The model that a source describes, on the meta device. Raises InputError if such a model can't run."""
        try:
            source.config.check_fits()
            text, tokenizer = source.config.text, source.tokenizer
            if tokenizer.context_length != text.context_length or max(tokenizer.vocab.values()) >= text.vocab_size:
                raise ValueError("the tokenizer does not belong to the text encoder")
            with torch.device("meta"):
                sd = cls(source.config, tokenizer)
        except Exception as error:
            raise InputError(f"{source.path}: its configuration describes no model that can run: {error}") from None
        sd.source = source.without_tensors()
        return sd

    def check_finite(self) -> None:
        """Raises InputError, which names the tensors, if weights are NaN or infinity. Reads all of them."""
        if bad := formats.not_finite(self.state()):
            what = formats.abbreviate(bad, 1)
            raise InputError(f"{what} holds NaN or infinity; the model's file is damaged, or the model has diverged")

    @property
    def summary(self) -> str:
        """One line: the path that the model was loaded from, and its description."""
        return "random weights" if self.source is None else f"{self.source.path}: {self.source.describe()}"

    def source_fingerprint(self) -> str:
        """SHA-256 of the stored weights, read again from the path that the model was loaded from.

        Later changes of the model do not count. For a model made in code, the present weights are hashed.
        """
        if self.source is None:
            return self._snapshot(None).fingerprint()
        return formats.read(self.source.path, **self.source.options).fingerprint()

    def prefer_device_layout(self) -> None:
        """Stores the convolutions' weights in the order in which a GPU computes; their values and names stay."""
        if self.device.type == "cuda":
            for network in (self.unet, self.vae):
                network.to(memory_format=torch.channels_last)

    # Encode

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    def encode_prompt(self, prompts: str | Sequence[str]) -> Tensor:
        """Prompts -> context (B, L, D), what the UNet is conditioned on. Equal prompts are encoded once."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        context = self.text_encoder(self.tokenizer(list(distinct)).to(self.device))
        return context.index_select(0, torch.tensor([distinct[prompt] for prompt in prompts]).to(self.device))

    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> scaled latents: a sample if a generator is given, else the mode."""
        posterior = self.vae.encode(images)
        z = posterior.mode() if generator is None else posterior.sample(generator)
        return z * self.config.vae.scale_factor

    # Generate

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
        mask: Tensor | None = None,
        strength: float | None = None,
        output: str = "pil",
        progress: Callable[[], object] | None = None,
    ) -> list[Image.Image] | Tensor:
        """Pictures for prompts: one prompt per seed; a list of length one is broadcast to the other's length.

        A picture depends on its prompt and its seed alone, not on the batch: initial latents, then the sampler's
        noise, come from `torch.Generator().manual_seed(seed)`, float32 on the CPU. progress: called after each
        evaluation of the UNet; `Sampler.evaluations` gives their number.
        height, width: pixels, multiples of the autoencoder's factor (8 in SD); the training size if None. latents:
        (B, 4, h, w) standard normal noise to start from instead of the seeds' noise, for B pictures.
        init_image, mask, strength: a picture to start from, which gives the size; see `Canvas`. Strength is 0.8 if
        None, and 1 with a mask. Outside the mask the picture keeps its bits.
        output: "pil" for a list of images, "tensor" for (B, 3, H, W) in [-1, 1], "latent" for scaled latents.
        Raises InputError for impossible arguments, and RunError if a picture for PIL is NaN or infinity.
        """
        canvas = Canvas.of(init_image, mask, strength)
        shape = self._start_shape(latents, init_image, height, width)
        prompts, seeds = pair_up(prompts, seeds, 1 if latents is None else len(latents))
        if output not in ("pil", "tensor", "latent"):
            raise InputError(f"unknown output {output!r}; there are pil, tensor and latent")
        chosen, noise = samplers.find(sampler), SeededNoise(seeds, shape, self.device)
        start = Start(canvas, self.config, self.schedule, self._samples)
        x, times = start.begin(noise, latents, chosen.times(self.schedule, steps))
        context = self.encode_prompt(([negative_prompt] * len(prompts) if guidance != 1.0 else []) + prompts)
        denoise = denoiser(self.unet, self.schedule, context, guidance, guidance_rescale, progress, start.beside)
        z = start.finish(chosen.loop(start.keeping(denoise), x, self.schedule, times, eta=eta, noise=noise))
        del denoise  # frees the recording's memory before the autoencoder needs it
        if output == "latent":
            return z
        images = start.paste(self.decode_latents(z).float())
        return images if output == "tensor" else to_pil(images)

    def _start_shape(
        self, latents: Tensor | None, init_image: Tensor | None, height: int | None, width: int | None
    ) -> tuple[int, ...]:
        """(4, h, w) of the latents to sample. Raises InputError unless sampling can start from these."""
        channels = self.config.vae.latent_channels
        if latents is not None and (latents.ndim != 4 or latents.shape[1] != channels or 0 in latents.shape):
            raise InputError(f"latents are {tuple(latents.shape)}, and should be (B, {channels}, h, w)")
        if init_image is None:
            return self.latent_shape(height, width) if latents is None else tuple(latents.shape[1:])
        shape = self.latent_shape(*init_image.shape[1:])
        if latents is not None and (found := tuple(latents.shape[1:])) != shape:
            raise InputError(f"latents are {found} each, and init_image {tuple(init_image.shape)} makes {shape}")
        return shape

    def _samples(self, image: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """(3, H, W) in [-1, 1] -> scaled latents (B, 4, h, w): encoded once, sampled by each of the B generators."""
        posterior = self.vae.encode(image[None].to(self.device, next(self.vae.parameters()).dtype))
        z = torch.cat([posterior.sample(generator) for generator in generators])
        return (z * self.config.vae.scale_factor).float()

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """(4, h, w) for a picture of this size in pixels, of the training size if None. Raises as `check_size`."""
        height, width = (self.config.resolution if side is None else side for side in (height, width))
        self.check_size(height, width)
        return self.config.vae.latent_channels, height // self.config.vae.factor, width // self.config.vae.factor

    def check_size(self, height: int, width: int) -> None:
        """Raises InputError if the autoencoder can't make pictures of this size in pixels."""
        factor = self.config.vae.factor
        for name, side in (("height", height), ("width", width)):
            if side <= 0 or side % factor:
                near = max(factor, round(side / factor) * factor)
                raise InputError(f"{name} {side} is not a positive multiple of {factor} pixels; take {near}")

    def reschedule(self, **changes: Any) -> None:
        """Changes entries of `config.schedule`. Raises InputError for values that do not go together."""
        self.schedule = Schedule(replace(self.config.schedule, **changes))
        self.config = replace(self.config, schedule=self.schedule.config)

    # Decode

    def decode_latents(self, z: Tensor) -> Tensor:
        """Scaled latents (B, 4, h, w) -> images (B, 3, 8h, 8w), about [-1, 1].

        In fp16, also under autocast, SD's autoencoder can overflow to NaN: an fp32 copy decodes such latents again.
        """
        z = z / self.config.vae.scale_factor
        decode = tiling.decode if self.tiling else Autoencoder.decode
        images = decode(self.vae, z.to(next(self.vae.parameters()).dtype))
        if z.isfinite().all() and not images.isfinite().all():
            with torch.autocast(self.device.type, enabled=False):
                images = decode(deepcopy(self.vae).float(), z.float())
        return images

    # Save

    def save(
        self,
        path: str | Path,
        layout: str = "official",
        dtype: torch.dtype | None = None,
        metadata: dict[str, str] | None = None,
    ) -> list[str]:
        """Writes the model to `path`: layout "official" is one .safetensors file, "diffusers" a folder.

        dtype: of the stored weights; as they are if None. metadata: for the safetensors headers; the source's if None.
        An older model at `path` stays until the new one is complete. Returns the names of the source's tensors that
        are not saved: EMA weights, and tensors that a folder can't hold. Raises InputError for an unknown layout.
        """
        snapshot = self._snapshot(dtype)
        snapshot.metadata = snapshot.metadata if metadata is None else metadata
        return formats.write(path, snapshot, layout)

    def _snapshot(self, dtype: torch.dtype | None) -> formats.Source:
        """The model as it is now, ready to be written."""
        tensors = {name: t.detach().to("cpu", dtype) for name, t in (self.state() | self._frozen).items()}
        source = self.source or formats.Source(self.config, self.tokenizer, {})
        return replace(source, config=self.config, tokenizer=self.tokenizer, tensors=tensors, dtypes=())

    # Parameters, for training

    def networks(self) -> dict[str, nn.Module]:
        """The three networks by the prefix of their tensors' names in an official file."""
        return {formats.UNET_PREFIX: self.unet, formats.VAE_PREFIX: self.vae, formats.TEXT_PREFIX: self.text_encoder}

    def state(self) -> formats.Tensors:
        """All parameters under their official names, detached."""
        return {prefix + name: t for prefix, net in self.networks().items() for name, t in net.state_dict().items()}

    def parameters(self) -> dict[str, nn.Parameter]:
        """The networks' parameters themselves, under their official names."""
        return {prefix + name: p for prefix, net in self.networks().items() for name, p in net.named_parameters()}

    def freeze(self, network: nn.Module, dtype: torch.dtype) -> None:
        """Stops training one of the three networks: turns its gradients off and casts it to `dtype` for computing.

        `save` writes its weights as they are now, before the cast.
        """
        prefix = next(prefix for prefix, other in self.networks().items() if other is network)
        self._frozen = {prefix + n: t.detach().cpu() for n, t in network.state_dict().items()} | self._frozen
        network.requires_grad_(False).to(dtype)

    def forget_encoder(self) -> None:
        """Frees the memory of the autoencoder's encoder, once all pictures are encoded. `save` still writes it."""
        self.freeze(self.vae, next(self.vae.parameters()).dtype)
        self.vae.encoder = nn.Identity()
