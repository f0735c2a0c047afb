"""The autoencoder: 8x8 pixels to one latent of four numbers, and back (LDM, Rombach et al. 2022, section 3.1).

The attributes spell the official checkpoint's names under `first_stage_model.`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config import VAEConfig

LARGE = 1024  # positions of a map whose attention should not be held as a matrix


class DiagonalGaussian:
    """The encoder's output: an independent normal distribution for each number of the latent.

    mean, logvar, std: (B, C, h, w); logvar is clamped to [-30, 20].
    """

    def __init__(self, moments: Tensor):
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    def mode(self) -> Tensor:
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """mean + std * noise; the noise is drawn on the generator's device (the CPU if none), then moved."""
        device = generator.device if generator is not None else "cpu"
        noise = torch.randn(self.mean.shape, generator=generator, device=device)
        return self.mean + self.std * noise.to(self.mean)

    def kl(self) -> Tensor:
        """KL divergence from the standard normal, summed over each latent: (B,). VAE (Kingma & Welling), appendix B."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).flatten(1).sum(1)


class Autoencoder(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1] <-> latents (B, 4, H/8, W/8), not yet scaled by `scale_factor`."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        z = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1)
        self.post_quant_conv = nn.Conv2d(z, z, 1)

    def encode(self, images: Tensor) -> DiagonalGaussian:
        """images: (B, 3, H, W) in [-1, 1], sides divisible by the factor (8 in SD)."""
        return DiagonalGaussian(self.quant_conv(self.encoder(images)))

    def decode(self, z: Tensor) -> Tensor:
        """z: (B, 4, h, w), unscaled -> images (B, 3, 8h, 8w), about [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))


class Encoder(nn.Module):
    """Pictures (B, 3, H, W) -> moments (B, 2z, H/f, W/f): z means, then z log-variances; f is 8 in SD, z is 4.

    Each level has `blocks` residual blocks of its width; every level but the last then halves the size.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.channels, config.norm_groups
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        width = widths[0]
        for level, out in enumerate(widths):
            stage = nn.Module()
            stage.block = nn.ModuleList(ResBlock(width if i == 0 else out, out, groups) for i in range(config.blocks))
            if level < len(widths) - 1:
                stage.downsample = Downsample(out)
            self.down.append(stage)
            width = out
        self.mid = Middle(width, groups)
        self.norm_out = norm(width, groups)
        self.conv_out = nn.Conv2d(width, 2 * config.latent_channels, 3, padding=1)  # mean and log-variance

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for stage in self.down:
            for block in stage.block:
                h = block(h)
            if hasattr(stage, "downsample"):
                h = stage.downsample(h)  # (B, C, H/2, W/2)
        h = self.mid(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Latents (B, z, h, w) -> pictures (B, 3, f h, f w).

    Levels run from the coarsest to the finest. Each has one residual block more than the encoder's; every level but
    the finest then doubles the size.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.channels, config.norm_groups
        width = widths[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        self.mid = Middle(width, groups)
        stages = []
        for level, out in reversed(list(enumerate(widths))):
            stage = nn.Module()
            stage.block = nn.ModuleList(
                ResBlock(width if i == 0 else out, out, groups) for i in range(config.blocks + 1)
            )
            if level > 0:
                stage.upsample = Upsample(out)
            stages.append(stage)
            width = out
        self.up = nn.ModuleList(reversed(stages))  # the official file counts levels from the finest
        self.norm_out = norm(width, groups)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for stage in reversed(self.up):
            for block in stage.block:
                h = block(h)
            if hasattr(stage, "upsample"):
                h = stage.upsample(h)  # (B, C, 2H, 2W)
        return self.conv_out(F.silu(self.norm_out(h)))


class Middle(nn.Module):
    """Two residual blocks around one attention layer, at the coarsest level: (B, C, h, w) -> (B, C, h, w)."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.block_1 = ResBlock(width, width, groups)
        self.attn_1 = Attention(width, groups)
        self.block_2 = ResBlock(width, width, groups)

    def forward(self, h: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(h)))


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), without a timestep: (B, C, H, W) -> (B, C', H, W)."""

    def __init__(self, width: int, out: int, groups: int):
        super().__init__()
        self.norm1 = norm(width, groups)
        self.conv1 = nn.Conv2d(width, out, 3, padding=1)
        self.norm2 = norm(out, groups)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class Attention(nn.Module):
    """Self-attention over all positions, with one head: (B, C, H, W) -> (B, C, H, W).

    Its matrices are stored as 1x1 convolutions.
    """

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = norm(width, groups)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (self.q, self.k, self.v))
        if q.shape[2] > LARGE:  # of contiguous ones torch never holds all of Q K^T, (H*W)^2 numbers
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        h = F.scaled_dot_product_attention(q, k, v)  # (B, 1, H*W, C)
        return x + self.proj_out(h.squeeze(1).transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Halves the size: (B, C, H, W) -> (B, C, H/2, W/2)."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # the original pads right and bottom only


class Upsample(nn.Module):
    """Doubles the size: (B, C, h, w) -> (B, C, 2h, 2w)."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def norm(width: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, width, eps=1e-6)  # 1e-5 in the UNet
