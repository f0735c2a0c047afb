"""What a model file or folder holds: `Source`.

A Source knows no network. `read` fills it with the names and shapes that a file has, and `StableDiffusion.load` checks
them. Inside the program the text encoder has the names of SD1's file for both families; OpenCLIP's names, which the
official files of SD2 have, are translated where files are read and written.
"""

import hashlib
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ldm.config import SD1, SD2, SD2_V, ModelConfig
from ldm.errors import InputError, one_line
from ldm.formats import modelspec, names
from ldm.formats.archive import show
from ldm.formats.tensors import Tensors, file_hash, raw_bytes
from ldm.images import MAX_SIDE
from ldm.runtime import parse_json
from ldm.samplers import SAMPLERS
from ldm.tokenizer import Tokenizer

# The models that an official file can be if it says nothing about itself.
PRESETS = {"sd1": SD1, "sd2": SD2, "sd2_v": SD2_V}
FAMILIES = {"sd1": "Stable Diffusion 1", "sd2": "Stable Diffusion 2"}

PREDICTIONS = ("eps", "v")

# keys in the metadata of the files that we write
CONFIG_KEY, TOKENIZER_KEY, SAMPLING_KEY = "ldm.config", "ldm.tokenizer", "ldm.sampling"
TRAINING_KEY = "ldm.training"  # settings of the model's training run, for its card

MAX_GUIDANCE = 100  # a larger one in a file is taken for damage


@dataclass
class Source:
    """What a model file or diffusers folder holds, under the names of SD1's official file."""

    config: ModelConfig
    tokenizer: Tokenizer
    tensors: Tensors  # the three networks
    extra: Tensors = field(default_factory=dict)  # known, not computed with, saved again in the official layout
    dropped: list[str] = field(default_factory=list)  # names of EMA tensors, which are not saved again
    metadata: dict[str, str] = field(default_factory=dict)  # where a tuned model comes from; see `own_metadata`
    layout: str = "official"
    has_ema: bool = False
    prediction_from: str = "the configuration"  # what told whether the model predicts eps or v
    dtypes: tuple[str, ...] = ()  # of the networks' tensors
    path: Path | None = None
    options: dict[str, Any] = field(default_factory=dict)  # what `read` was given beside the path

    def __post_init__(self):
        self.dtypes = self.dtypes or tuple(sorted({str(t.dtype).removeprefix("torch.") for t in self.tensors.values()}))

    def without_tensors(self) -> "Source":
        """The same, without the three networks' tensors: nothing large is held, and nothing of the file is mapped."""
        return replace(self, tensors={}, extra={name: tensor.clone() for name, tensor in self.extra.items()})

    def describe(self) -> str:
        """Family, layout, types, and what the model predicts and how that is known: one line."""
        name = family(self.config) or "a model of its own size"
        layout = {"official": "official single file", "diffusers": "diffusers folder"}[self.layout]
        predicts = f"predicts {self.config.schedule.prediction} ({self.prediction_from})"
        predicts += ", zero terminal SNR" if self.config.schedule.zero_terminal_snr else ""
        return f"{name}, {layout}, {'/'.join(self.dtypes)}, {predicts}"

    def official_tensors(self) -> Tensors:
        """The three networks as an official file of the family names and shapes them."""
        tensors = dict(self.tensors)
        for official, own in self.learned_names().items():
            if own in tensors:
                tensors[official] = tensors.pop(own)
        if not self.config.text.openclip:
            return tensors
        text = names.to_openclip(names.take_prefixed(tensors, names.TEXT_PREFIX), self.config.text)
        return tensors | {names.OPENCLIP_PREFIX + key: tensor for key, tensor in text.items()}

    def learned_names(self) -> dict[str, str]:
        """The tensors of learned tokens: name in an official file -> name in `tensors`."""
        return {names.BUNDLED.format(token): names.LEARNED.format(i) for i, token in enumerate(self.tokenizer.added)}

    def title(self) -> str:
        """A name for people: that of its file or folder, or else its family's."""
        if self.path is None:
            return family(self.config) or "Stable Diffusion"
        path = self.path.absolute()
        return path.stem if path.is_file() else path.name

    def fingerprint(self) -> str:
        """SHA-256 over names, types, shapes and bytes of the three networks, in the order of their official names.

        Raises ValueError for a source without its tensors.
        """
        if not self.tensors:
            raise ValueError("a source without its tensors has no fingerprint")
        digest = hashlib.sha256()
        for name, tensor in sorted(self.official_tensors().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(raw_bytes(tensor))
        return digest.hexdigest()

    def file_hash(self) -> str | None:
        """SHA-256 of the whole single file, by which other programs know it; None for a folder."""
        if self.path is None or not self.path.is_file():
            return None
        return file_hash(self.path)

    def sampling(self) -> dict[str, Any]:
        """How the model's training run sampled: any of sampler, steps, guidance_scale and resolution (in pixels).

        Empty for a model that does not say it. Damaged and absurd values are left out, with a warning.
        """
        if (text := self.metadata.get(SAMPLING_KEY)) is None:
            return {}
        try:
            tree = parse_json(text, SAMPLING_KEY)
        except InputError:
            tree = None
        if not isinstance(tree, dict):
            said = f"{self.path}: its metadata {SAMPLING_KEY} is damaged, and is ignored"
            warnings.warn(one_line(said), stacklevel=2)
            return {}
        found = {}
        for name, is_usable in self._sampling_checks().items():
            if name in tree and is_usable(tree[name]):
                found[name] = tree[name]
            elif name in tree:
                said = f"{self.path}: its metadata {SAMPLING_KEY} says {name} {show(tree[name])}, which is ignored"
                warnings.warn(one_line(said), stacklevel=2)
        return found

    def _sampling_checks(self) -> dict[str, Any]:
        """For each entry of `sampling`, whether a value that a file gives can be used."""
        timesteps, factor = self.config.schedule.timesteps, self.config.vae.factor
        return {
            "sampler": lambda value: isinstance(value, str) and value in SAMPLERS,
            "steps": lambda value: type(value) is int and 1 <= value < timesteps,
            "guidance_scale": lambda value: type(value) in (int, float) and abs(value) <= MAX_GUIDANCE,
            "resolution": lambda value: type(value) is int and 0 < value <= MAX_SIDE and value % factor == 0,
        }


def own_metadata(metadata: dict[str, str]) -> dict[str, str]:
    """Our own entries and those of its author in a file's metadata, without those that describe the model itself."""
    described = (CONFIG_KEY, TOKENIZER_KEY)
    own = {key: text for key, text in metadata.items() if key.startswith("ldm.") and key not in described}
    return own | modelspec.kept(metadata)


def predicting(config: ModelConfig, prediction: str) -> ModelConfig:
    """The same model, of which the UNet predicts "eps" or "v"."""
    return replace(config, schedule=replace(config.schedule, prediction=prediction))


def family(config: ModelConfig) -> str | None:
    """The name of the family whose sizes a model has; None if it has sizes of its own."""
    official = {name: PRESETS[key] for key, name in FAMILIES.items()}
    official |= {f"{name} for painting in": it.for_painting_in() for name, it in official.items()}
    sizes = config.unet, config.vae, config.text
    return next((name for name, it in official.items() if sizes == (it.unet, it.vae, it.text)), None)
