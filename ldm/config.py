"""A model as data: one frozen dataclass for each network, and the presets of the official releases.

Sources of the presets: CompVis/stable-diffusion configs/stable-diffusion/v1-inference.yaml,
Stability-AI/stablediffusion configs/stable-diffusion/v2-inference{,-v}.yaml, and for painting in
runwayml/stable-diffusion configs/stable-diffusion/v1-inpainting-inference.yaml and
Stability-AI/stablediffusion configs/stable-diffusion/v2-inpainting-inference.yaml.
"""

import sys
from dataclasses import asdict, dataclass, field, fields, replace
from types import UnionType
from typing import Any, get_args, get_origin

# Limits above every Stable Diffusion. A small file that asks for more layers would keep the program busy for minutes.
MAX_COUNTS = {"blocks": 6, "layers": 48}
MAX_LEVELS, MAX_SIZE = 6, 2**20
MAX_CONTEXT = 1024  # tokens; the memory for attention grows with their square
MAX_SCALE = 1e4  # largest scale of latents; its inverse is the smallest


class Checked:
    """Checks types and bounds of the fields, since a file can hold anything. Raises ValueError."""

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if not _fits(value, f.type) or (f.name in MAX_COUNTS and value > MAX_COUNTS[f.name]):
                raise self.impossible(f.name)

    def impossible(self, name: str) -> ValueError:
        """The error for a field that has no possible value."""
        return ValueError(f"{type(self).__name__}.{name} can't be {getattr(self, name)!r}")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value has the declared type.

    Whole numbers are 0 to MAX_SIZE, others finite; tuples have 1 to MAX_LEVELS items.
    """
    if get_origin(kind) is tuple:
        short = isinstance(value, tuple) and 0 < len(value) <= MAX_LEVELS
        return short and all(_fits(item, get_args(kind)[0]) for item in value)
    if isinstance(kind, UnionType):
        return any(_fits(value, one) for one in get_args(kind))
    if kind is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max  # False for NaN
    return type(value) is kind and (kind is not int or 0 <= value <= MAX_SIZE)


@dataclass(frozen=True)
class UNetConfig(Checked):
    """The denoiser. Level i works at 1/2**i of the latents' size, `channels[i]` wide."""

    in_channels: int = 4  # 9 in models for painting in: noisy latents, the mask, the latents of the masked picture
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    attention: tuple[bool, ...] = (True, True, True, False)  # levels with cross-attention to the text
    blocks: int = 2  # residual blocks in a level, one more on the way up
    heads: int | None = 8  # SD1: eight heads at every width
    head_dim: int | None = None  # SD2: 64-wide heads, as many as fit
    linear_projection: bool = False  # SD2: proj_in and proj_out are matrices, not 1x1 convolutions
    context_dim: int = 768
    norm_groups: int = 32

    @property
    def paints_in(self) -> bool:
        """Whether the UNet also sees a mask and the latents of the masked picture."""
        return self.in_channels == 2 * self.out_channels + 1

    @property
    def upcast_attention(self) -> bool:
        """Whether attention logits are computed in fp32, since SD2's overflow fp16."""
        return self.head_dim is not None

    def heads_at(self, channels: int) -> int:
        """Number of attention heads in a layer of this width."""
        return self.heads if self.heads is not None else channels // self.head_dim


@dataclass(frozen=True)
class VAEConfig(Checked):
    """The autoencoder between pictures and latents."""

    channels: tuple[int, ...] = (128, 256, 512, 512)
    blocks: int = 2
    latent_channels: int = 4
    norm_groups: int = 32
    scale_factor: float = 0.18215  # 1 / standard deviation of the latents, measured once by CompVis

    def __post_init__(self):
        super().__post_init__()
        if not 1 / MAX_SCALE <= self.scale_factor <= MAX_SCALE:
            raise self.impossible("scale_factor")

    @property
    def factor(self) -> int:
        """Pixels along one side of one latent position: 8 in SD."""
        return 2 ** (len(self.channels) - 1)


@dataclass(frozen=True)
class TextConfig(Checked):
    """CLIP's text encoder."""

    vocab_size: int = 49408
    context_length: int = 77
    width: int = 768
    mlp_width: int = 3072
    layers: int = 12  # blocks that run; SD2 leaves out OpenCLIP's last one
    heads: int = 12
    activation: str = "quick_gelu"  # in OpenAI's CLIP; OpenCLIP uses the exact "gelu"
    pad_id: int = 49407  # SD1 pads with end-of-text, SD2 with 0

    def __post_init__(self):
        super().__post_init__()
        if self.context_length > MAX_CONTEXT:
            raise self.impossible("context_length")

    @property
    def openclip(self) -> bool:
        """Whether this is OpenCLIP's text encoder. Official files name and stack its tensors differently."""
        return self.activation == "gelu"


@dataclass(frozen=True)
class ScheduleConfig(Checked):
    """The forward process (DDPM), and what the UNet predicts."""

    timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.0120
    prediction: str = "eps"  # or "v"
    zero_terminal_snr: bool = False  # the last step is pure noise (Lin et al. 2023); for models that predict v
    spacing: str = "leading"  # of sampling steps; "trailing" begins at the noisiest step


@dataclass(frozen=True)
class ModelConfig(Checked):
    """A whole Stable Diffusion."""

    unet: UNetConfig = field(default_factory=UNetConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    text: TextConfig = field(default_factory=TextConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    sample_size: int = 64  # height and width of the latents that the model was trained on

    def check_fits(self) -> None:
        """Raises ValueError, which says what is wrong, unless the networks can run and take each other's outputs."""
        unet, vae, text = self.unet, self.vae, self.text
        sizes = *unet.channels, *vae.channels, text.width, text.mlp_width, vae.latent_channels
        if 0 in (*sizes, unet.blocks, vae.blocks, text.layers):
            raise ValueError("a network with an empty layer")
        if unet.channels[0] % 2:
            raise ValueError(f"channels[0] {unet.channels[0]} is odd, and half of a step's embedding are cosines")
        wide = [width for width, attends in zip(unet.channels, unet.attention, strict=False) if attends]
        for width, heads in (*((w, unet.heads_at(w)) for w in (*wide, unet.channels[-1])), (text.width, text.heads)):
            if heads == 0 or width % heads:
                raise ValueError(f"width {width} does not divide into {heads} heads")
        if unet.out_channels != vae.latent_channels or not (unet.in_channels == unet.out_channels or unet.paints_in):
            raise ValueError("the UNet's latents do not have the channels of the autoencoder's")
        if unet.context_dim != text.width:
            raise ValueError(f"context_dim {unet.context_dim} is not the text encoder's width {text.width}")

    def for_painting_in(self) -> "ModelConfig":
        """The same model, whose UNet also sees a mask and the latents of the masked picture: nine channels."""
        return replace(self, unet=replace(self.unet, in_channels=2 * self.unet.out_channels + 1))

    @property
    def resolution(self) -> int:
        """Height and width in pixels of the pictures that the model was trained on."""
        return self.sample_size * self.vae.factor

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionaries, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "ModelConfig":
        """The inverse of `to_dict`, also for a tree read from JSON, where tuples are lists."""
        parts = {"unet": UNetConfig, "vae": VAEConfig, "text": TextConfig, "schedule": ScheduleConfig}
        made = {name: kind(**{k: _tuple(v) for k, v in tree[name].items()}) for name, kind in parts.items()}
        return cls(**made, **{k: v for k, v in tree.items() if k not in parts})


def _tuple(value):
    return tuple(value) if isinstance(value, list) else value


SD1 = ModelConfig()
SD2 = ModelConfig(
    unet=UNetConfig(heads=None, head_dim=64, linear_projection=True, context_dim=1024),
    text=TextConfig(width=1024, mlp_width=4096, layers=23, heads=16, activation="gelu", pad_id=0),
)
SD2_V = replace(SD2, schedule=ScheduleConfig(prediction="v"), sample_size=96)
SD1_INPAINT, SD2_INPAINT = SD1.for_painting_in(), SD2.for_painting_in()
