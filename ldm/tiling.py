"""Decodes large pictures in strips of rows: the same picture, without seams, in less memory.

Two kinds of layers see the whole picture. The attention works at the latents' size and needs little memory: it runs as
it is. GroupNorm needs the mean and the variance of the whole map: they are computed first, and then the norm, its
activation and its convolution run on one strip after the other. A strip overlaps its neighbours by the one row that a
3x3 convolution looks at. So the picture differs from the one that is decoded at once by rounding alone.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.vae import Autoencoder, ResBlock

ROWS = 64  # of a strip
Layer = Callable[[Tensor], Tensor]


def decode(vae: Autoencoder, z: Tensor) -> Tensor:
    """`vae.decode`, one picture at a time and each in strips: z (B, 4, h, w), unscaled -> images (B, 3, 8h, 8w)."""
    return torch.cat([_decode(vae, one) for one in z.split(1)])


def _decode(vae: Autoencoder, z: Tensor) -> Tensor:
    decoder = vae.decoder
    h = decoder.mid(decoder.conv_in(vae.post_quant_conv(z)))
    for stage in reversed(decoder.up):
        for block in stage.block:
            h = _res_block(block, h)
        if hasattr(stage, "upsample"):
            h = strips(stage.upsample, h, factor=2)
    return strips(_normed(decoder.norm_out, h, decoder.conv_out), h)


def _res_block(block: ResBlock, x: Tensor) -> Tensor:
    """The block's output. It is written over x where it has x's width."""
    h = strips(_normed(block.norm1, x, block.conv1), x)
    return strips(_normed(block.norm2, h, block.conv2), h, onto=block.nin_shortcut(x))


def strips(layer: Layer, x: Tensor, factor: int = 1, onto: Tensor | None = None) -> Tensor:
    """layer(x) in strips of `ROWS` rows. x: (1, C, H, W) -> (1, C', factor * H, factor * W).

    layer: looks at most one row up and down. onto: a tensor to add the output to, in place.
    """
    height, out = x.shape[2], onto
    for top in range(0, height, ROWS):
        end = min(top + ROWS, height)
        above, below = int(top > 0), int(end < height)  # rows of the neighbours, which the layer looks at
        part = layer(x[:, :, top - above : end + below])
        part = part[:, :, above * factor : part.shape[2] - below * factor]
        if out is None:
            out = part.new_zeros(1, part.shape[1], factor * height, part.shape[3])
        out[:, :, factor * top : factor * end] += part
    return out


def _normed(norm: nn.GroupNorm, x: Tensor, convolution: nn.Conv2d) -> Layer:
    """The function convolution(silu(norm(part))) of some rows of x, normalised as all of x (1, C, H, W)."""
    groups = x[0].unflatten(0, (norm.num_groups, -1))  # a view, whatever the strides are
    moments = [torch.var_mean(group.float(), correction=0) for group in groups]  # one by one: in fp16 a copy is made
    var, mean = (torch.stack(m).repeat_interleave(x.shape[1] // len(groups)) for m in zip(*moments, strict=True))
    scale = norm.weight * (var + norm.eps).rsqrt()  # (C,)
    shift = norm.bias - mean * scale
    scale, shift = scale.view(-1, 1, 1), shift.view(-1, 1, 1)
    return lambda part: convolution(F.silu((part.float() * scale + shift).to(x.dtype)))
