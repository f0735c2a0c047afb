"""The tables between naming schemes: official checkpoint <-> diffusers folder, and OpenCLIP's text encoder <-> ours.

A table maps a module's name in one scheme to its name in the other. What follows a module's name (`weight`, `bias`,
the inside of a transformer block) is the same in both schemes. Tables are bijective: `invert` reverses them.
"""

import re

import torch
from torch import Tensor

from ldm.config import TextConfig, UNetConfig, VAEConfig

Table = dict[str, str]

# How the names of a network's tensors begin in an official single file. We use SD1's text encoder names for SD2 too.
UNET_PREFIX, VAE_PREFIX, TEXT_PREFIX = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
OPENCLIP_PREFIX = "cond_stage_model.model."  # the text encoder in SD2's files

TABLE = TEXT_PREFIX + "text_model.embeddings.token_embedding.weight"
# The vectors of the i-th learned token. Single files name them by the token, as other programs do that put embeddings
# into another file (A1111); the table of a diffusers folder holds them as its last rows.
LEARNED = TEXT_PREFIX + "text_model.embeddings.learned.{}"
BUNDLED = "bundle_emb.{}.string_to_param.*"

EMA_PREFIX = "model_ema."  # averages of the UNet in a full training checkpoint: never written

# diffusers has had two schemes for the autoencoder's attention: the older one -> today's
OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def rename(key: str, table: Table) -> str | None:
    """Replaces the longest module name that the table knows at the start of the key; None if it knows none."""
    head = key
    while head and head not in table:
        head = head.rpartition(".")[0]
    return table[head] + key[len(head) :] if head else None


def invert(table: Table) -> Table:
    """The table in the other direction."""
    return {value: key for key, value in table.items()}


def take_prefixed(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Moves the tensors whose names begin with the prefix out of `tensors`. Returns them without the prefix."""
    return {key[len(prefix) :]: tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}


def unet_table(config: UNetConfig) -> Table:
    """Official names under `model.diffusion_model.` -> diffusers' UNet2DConditionModel."""
    table = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "middle_block.1": "mid_block.attentions.0",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    table |= _unet_resblock("middle_block.0", "mid_block.resnets.0")
    table |= _unet_resblock("middle_block.2", "mid_block.resnets.1")

    levels, number = len(config.channels), 1
    for level in range(levels):
        for i in range(config.blocks):
            table |= _unet_resblock(f"input_blocks.{number}.0", f"down_blocks.{level}.resnets.{i}")
            if config.attention[level]:
                table[f"input_blocks.{number}.1"] = f"down_blocks.{level}.attentions.{i}"
            number += 1
        if level < levels - 1:
            table[f"input_blocks.{number}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            number += 1

    number = 0
    for up, level in enumerate(reversed(range(levels))):
        for i in range(config.blocks + 1):
            table |= _unet_resblock(f"output_blocks.{number}.0", f"up_blocks.{up}.resnets.{i}")
            if config.attention[level]:
                table[f"output_blocks.{number}.1"] = f"up_blocks.{up}.attentions.{i}"
            number += 1
        if level > 0:
            last = 2 if config.attention[level] else 1
            table[f"output_blocks.{number - 1}.{last}.conv"] = f"up_blocks.{up}.upsamplers.0.conv"
    return table


def vae_table(config: VAEConfig) -> Table:
    """Official names under `first_stage_model.` -> diffusers' AutoencoderKL."""
    table = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    levels = len(config.channels)
    for half in ("encoder", "decoder"):
        table |= {f"{half}.{name}": f"{half}.{name}" for name in ("conv_in", "conv_out")}
        table[f"{half}.norm_out"] = f"{half}.conv_norm_out"
        for i in (1, 2):
            table |= _vae_resblock(f"{half}.mid.block_{i}", f"{half}.mid_block.resnets.{i - 1}")
        attention = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
        for ours, theirs in attention.items():
            table[f"{half}.mid.attn_1.{ours}"] = f"{half}.mid_block.attentions.0.{theirs}"
    for level in range(levels):
        up = levels - 1 - level  # diffusers counts the decoder's levels from the coarsest
        for i in range(config.blocks):
            table |= _vae_resblock(f"encoder.down.{level}.block.{i}", f"encoder.down_blocks.{level}.resnets.{i}")
        for i in range(config.blocks + 1):
            table |= _vae_resblock(f"decoder.up.{level}.block.{i}", f"decoder.up_blocks.{up}.resnets.{i}")
        if level < levels - 1:
            table[f"encoder.down.{level}.downsample.conv"] = f"encoder.down_blocks.{level}.downsamplers.0.conv"
        if level > 0:
            table[f"decoder.up.{level}.upsample.conv"] = f"decoder.up_blocks.{up}.upsamplers.0.conv"
    return table


def openclip_table(config: TextConfig) -> Table:
    """Names under `cond_stage_model.model.` -> ours, except for the stacked q, k and v (see STACKED)."""
    table = {"token_embedding": "text_model.embeddings.token_embedding", "ln_final": "text_model.final_layer_norm"}
    table["positional_embedding"] = "text_model.embeddings.position_embedding.weight"
    parts = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    for i in range(config.layers):
        for theirs, ours in parts.items():
            table[f"transformer.resblocks.{i}.{theirs}"] = f"text_model.encoder.layers.{i}.{ours}"
    return table


# OpenCLIP keeps q, k and v stacked in one matrix, and their biases in one vector.
STACKED = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")


def from_openclip(tensors: dict[str, Tensor], config: TextConfig) -> dict[str, Tensor]:
    """OpenCLIP's text encoder under our names. q, k and v become views of their stack; unknown names stay.

    config.layers says which blocks to rename. A stack that is not three of a kind is passed on three times, whole:
    its shape is then refused where shapes are checked.
    """
    table, ours = openclip_table(config), {}
    for key, tensor in tensors.items():
        if stacked := STACKED.fullmatch(key):
            is_stack = tensor.ndim > 0 and len(tensor) % 3 == 0
            for letter, part in zip("qkv", tensor.chunk(3) if is_stack else [tensor] * 3, strict=True):
                ours[f"text_model.encoder.layers.{stacked[1]}.self_attn.{letter}_proj.{stacked[2]}"] = part
        else:
            ours[rename(key, table) or key] = tensor
    return ours


def to_openclip(tensors: dict[str, Tensor], config: TextConfig) -> dict[str, Tensor]:
    """The inverse of `from_openclip`."""
    table, theirs = invert(openclip_table(config)), {}
    for i in range(config.layers):
        for kind in ("weight", "bias"):
            parts = [tensors[f"text_model.encoder.layers.{i}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            theirs[f"transformer.resblocks.{i}.attn.in_proj_{kind}"] = torch.cat(parts)
    for key, tensor in tensors.items():
        if (name := rename(key, table)) is not None:
            theirs[name] = tensor
    return theirs


def unused_text(config: TextConfig) -> dict[str, Tensor]:
    """Tensors that the original's text encoder class has and never computes with, under official names.

    SD1: the position ids. SD2: OpenCLIP's last block, its projection and its temperature, filled with zeros.
    """
    if not config.openclip:
        return {TEXT_PREFIX + "text_model.embeddings.position_ids": torch.arange(config.context_length)[None]}
    width, mlp = config.width, config.mlp_width
    block = f"transformer.resblocks.{config.layers}."
    shapes = {"text_projection": (width, width), "logit_scale": ()}
    for name, shape in {
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width),
        "attn.out_proj.bias": (width,),
        "ln_2.weight": (width,),
        "ln_2.bias": (width,),
        "mlp.c_fc.weight": (mlp, width),
        "mlp.c_fc.bias": (mlp,),
        "mlp.c_proj.weight": (width, mlp),
        "mlp.c_proj.bias": (width,),
    }.items():
        shapes[block + name] = shape
    return {OPENCLIP_PREFIX + name: torch.zeros(shape) for name, shape in shapes.items()}


def _unet_resblock(ours: str, theirs: str) -> Table:
    parts = {
        "in_layers.0": "norm1",
        "in_layers.2": "conv1",
        "emb_layers.1": "time_emb_proj",
        "out_layers.0": "norm2",
        "out_layers.3": "conv2",
        "skip_connection": "conv_shortcut",
    }
    return {f"{ours}.{a}": f"{theirs}.{b}" for a, b in parts.items()}


def _vae_resblock(ours: str, theirs: str) -> Table:
    parts = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"nin_shortcut": "conv_shortcut"}
    return {f"{ours}.{a}": f"{theirs}.{b}" for a, b in parts.items()}
