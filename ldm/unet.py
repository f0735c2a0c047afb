"""The denoiser: a U-Net with cross-attention to the text (LDM, section 3.3; after DDPM and ADM).

The attributes spell the official checkpoint's names under `model.diffusion_model.`, hence the numbered `input_blocks`
and `output_blocks`; comments in `__init__` say what each number holds.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.config import UNetConfig

KeysValues = dict["TransformerBlock", tuple[Tensor, Tensor]]  # see `UNet.keys_values`


class UNet(nn.Module):
    """Noisy latents, a step and the text -> the noise in the latents (or v), of the same size.

    Level i works at 1/2**i of the latents' size. The way down leaves a skip connection after every stage; the way up
    takes them in reverse order.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False  # recompute a stage's activations in the backward pass instead of keeping them
        width = config.channels[0]
        emb = 4 * width
        self.time_embed = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))

        def stage(width: int, out: int, attention: bool) -> Stage:
            layers: list[nn.Module] = [ResBlock(width, out, emb, config.norm_groups)]
            if attention:
                layers.append(SpatialTransformer(out, config))
            return Stage(*layers)

        # Down: one convolution; then for each level its blocks, and a stage that halves the size.
        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(config.in_channels, width, 3, padding=1))])
        skips = [width]
        for level, out in enumerate(config.channels):
            for _ in range(config.blocks):
                self.input_blocks.append(stage(width, out, config.attention[level]))
                width = out
                skips.append(width)
            if level < len(config.channels) - 1:
                self.input_blocks.append(Stage(Downsample(width)))
                skips.append(width)

        self.middle_block = Stage(
            ResBlock(width, width, emb, config.norm_groups),
            SpatialTransformer(width, config),
            ResBlock(width, width, emb, config.norm_groups),
        )

        # Up: every stage takes the skip connection that mirrors it; the last of a level also doubles the size.
        self.output_blocks = nn.ModuleList()
        for level, out in reversed(list(enumerate(config.channels))):
            for i in range(config.blocks + 1):
                block = stage(width + skips.pop(), out, config.attention[level])
                if level > 0 and i == config.blocks:
                    block.append(Upsample(out))
                self.output_blocks.append(block)
                width = out

        self.out = nn.Sequential(
            norm(width, config.norm_groups), nn.SiLU(), zero(nn.Conv2d(width, config.out_channels, 3, padding=1))
        )

    def forward(self, x: Tensor, t: Tensor, context: Tensor | KeysValues) -> Tensor:
        """Predicts the noise (or v) in noisy latents.

        x: (B, 4, h, w), any h and w; t: (B,) steps in [0, 1000), integer or float;
        context: (B, L, D), the text encoder's output, or its `keys_values`. Returns (B, 4, h, w).
        """
        emb = self.time_embed(timestep_embedding(t, self.config.channels[0]).to(x.dtype))  # (B, 4C)
        h, skips = x, []
        for block in self.input_blocks:
            h = self._run(block, h, emb, context)
            skips.append(h)
        h = self._run(self.middle_block, h, emb, context)
        for block in self.output_blocks:
            h = torch.cat([h, skips.pop()], dim=1)
            size = skips[-1].shape[-2:] if skips else None  # 65 halves to 33 and must grow back to 65
            h = self._run(block, h, emb, context, size)
        return self.out(h)

    def keys_values(self, context: Tensor) -> KeysValues:
        """The keys and values of a text in every block: a sampler needs them at each step, and they never change."""
        blocks = [module for module in self.modules() if isinstance(module, TransformerBlock)]
        return {block: block.attn2.keys_values(context) for block in blocks}

    def _run(self, stage: "Stage", *inputs: Tensor | KeysValues | torch.Size | None) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(stage, *inputs, use_reentrant=False)
        return stage(*inputs)


class Stage(nn.Sequential):
    """Layers in a row. Each also gets the timestep embedding, the context or the target size if it takes one.

    h: (B, C, H, W); emb: (B, 4C); context: (B, L, D) or its keys and values; size: (H, W) after an Upsample.
    """

    def forward(self, h: Tensor, emb: Tensor, context: Tensor | KeysValues, size: torch.Size | None = None) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                h = layer(h, emb)
            elif isinstance(layer, SpatialTransformer):
                h = layer(h, context)
            elif isinstance(layer, Upsample):
                h = layer(h, size)
            else:
                h = layer(h)
        return h


class ResBlock(nn.Module):
    """Two convolutions, with the timestep embedding added to every position between them.

    x: (B, C, H, W); emb: (B, 4C) -> (B, C', H, W).
    """

    def __init__(self, width: int, out: int, emb: int, groups: int):
        super().__init__()
        self.in_layers = nn.Sequential(norm(width, groups), nn.SiLU(), nn.Conv2d(width, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, out))
        self.out_layers = nn.Sequential(
            norm(out, groups),
            nn.SiLU(),
            nn.Identity(),  # in place of the original's dropout of 0, so that the convolution is named 3
            zero(nn.Conv2d(out, out, 3, padding=1)),
        )
        self.skip_connection = nn.Conv2d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class SpatialTransformer(nn.Module):
    """Flattens the picture to a sequence of positions, which attend to each other and to the text.

    x: (B, C, H, W); context: (B, L, D) or its keys and values -> (B, C, H, W).
    """

    def __init__(self, width: int, config: UNetConfig):
        super().__init__()
        self.linear = config.linear_projection
        self.norm = nn.GroupNorm(config.norm_groups, width, eps=1e-6)  # 1e-5 elsewhere in the UNet
        self.proj_in = nn.Linear(width, width) if self.linear else nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, config)])
        self.proj_out = zero(nn.Linear(width, width) if self.linear else nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor, context: Tensor | KeysValues) -> Tensor:
        h = self.norm(x)
        if self.linear:
            h = self.proj_in(h.flatten(2).transpose(1, 2))  # (B, H*W, C)
        else:
            h = self.proj_in(h).flatten(2).transpose(1, 2)  # (B, H*W, C)
        for block in self.transformer_blocks:
            h = block(h, context[block] if isinstance(context, dict) else context)
        if self.linear:
            h = self.proj_out(h).transpose(1, 2).reshape(x.shape)
        else:
            h = self.proj_out(h.transpose(1, 2).reshape(x.shape))
        return x + h


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and a feed-forward network, each with a residual connection.

    x: (B, N, C); context: (B, L, D) or its keys and values in this block -> (B, N, C).
    """

    def __init__(self, width: int, config: UNetConfig):
        super().__init__()
        heads, upcast = config.heads_at(width), config.upcast_attention
        self.attn1 = CrossAttention(width, width, heads, upcast)
        self.ff = FeedForward(width)
        self.attn2 = CrossAttention(width, config.context_dim, heads, upcast)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)

    def forward(self, x: Tensor, context: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class CrossAttention(nn.Module):
    """softmax(Q K^T / sqrt(d)) V, LDM eq. 3. Queries come from the picture, keys and values from the context."""

    def __init__(self, width: int, context_dim: int, heads: int, upcast: bool):
        """upcast: compute attention in fp32 where Q K^T could overflow fp16."""
        super().__init__()
        self.heads, self.upcast = heads, upcast
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_dim, width, bias=False)
        self.to_v = nn.Linear(context_dim, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: Tensor, context: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """x: (B, N, C); context: (B, M, D), or its keys and values -> (B, N, C)."""
        q = self.split(self.to_q(x))
        k, v = context if isinstance(context, tuple) else self.keys_values(context)
        if self.upcast and q.dtype == torch.float16:
            with torch.autocast(q.device.type, enabled=False):
                h = F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)
        else:
            h = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, C/heads)
        return self.to_out(h.transpose(1, 2).flatten(2))  # (B, N, C)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """context: (B, M, D) -> two of (B, heads, M, C/heads)."""
        return self.split(self.to_k(context)), self.split(self.to_v(context))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, C/heads)


class FeedForward(nn.Module):
    """Widens each position four times and back: (B, N, C) -> (B, N, C)."""

    def __init__(self, width: int):
        super().__init__()
        # the identity replaces the original's dropout of 0, so that names stay net.0 and net.2
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class GEGLU(nn.Module):
    """value * gelu(gate), Shazeer 2020; the value is the first half. (B, N, C) -> (B, N, 4C)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class Downsample(nn.Module):
    """Halves the size, rounding up: (B, C, H, W) -> (B, C, H/2, W/2)."""

    def __init__(self, width: int):
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Grows to a given size: (B, C, h, w) -> (B, C, *size)."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        return self.conv(F.interpolate(x, size=tuple(size), mode="nearest"))


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Sinusoids of the step, cosines first: (B,) -> (B, width) in fp32. DDPM, after "Attention is all you need"."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def norm(width: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, width, eps=1e-5)


def zero(layer: nn.Module) -> nn.Module:
    """Zeroes the last layer of a residual branch, so that the branch adds nothing at first (ADM)."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
