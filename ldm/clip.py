"""CLIP's text encoder (Radford et al. 2021, section 2.4), OpenAI's for SD1 and OpenCLIP's for SD2.

The attributes spell the Hugging Face names, as the SD1 checkpoint does under `cond_stage_model.transformer.`; the names
of OpenCLIP in SD2 checkpoints are a table in formats/names.py.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.config import TextConfig


class TextEncoder(nn.Module):
    """Token ids (B, L) -> context (B, L, D): a vector for each token, which the UNet is conditioned on."""

    def __init__(self, config: TextConfig, learned: Sequence[int] = ()):
        """learned: how many vectors each learned token has; see `Embeddings`."""
        super().__init__()
        self.config = config
        self.text_model = TextTransformer(config, learned)

    def forward(self, ids: Tensor) -> Tensor:
        return self.text_model(ids)


class TextTransformer(nn.Module):
    """Embeddings, `layers` blocks and a final norm: ids (B, L) -> (B, L, D)."""

    def __init__(self, config: TextConfig, learned: Sequence[int] = ()):
        super().__init__()
        self.checkpointing = False  # as in the UNet
        self.embeddings = Embeddings(config, learned)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_layer_norm = nn.LayerNorm(config.width)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embeddings(ids)  # (B, L, D)
        for layer in self.encoder.layers:
            if self.checkpointing and torch.is_grad_enabled():
                h = checkpoint(layer, h, use_reentrant=False)
            else:
                h = layer(h)
        return self.final_layer_norm(h)


class Embeddings(nn.Module):
    """One vector for the token and one for its position, added: ids (B, L) -> (B, L, D).

    learned: a matrix (N, D) for each learned token (ldm/tokens.py). Its N ids follow those of the table and of the
    matrices before it. They are parameters of their own, so that they can train while the table does not.
    """

    def __init__(self, config: TextConfig, learned: Sequence[int] = ()):
        super().__init__()
        self.token_embedding = embedding(config.vocab_size, config.width, std=0.02)  # as CLIP was initialised
        self.position_embedding = embedding(config.context_length, config.width, std=0.01)
        self.learned = nn.ParameterList(nn.Parameter(torch.zeros(count, config.width)) for count in learned)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        return self.vectors(ids) + self.position_embedding(positions)

    def vectors(self, ids: Tensor) -> Tensor:
        """The tokens' vectors: ids (B, L) -> (B, L, D)."""
        if not len(self.learned):
            return self.token_embedding(ids)
        beyond = ids - self.token_embedding.num_embeddings  # from 0 on for learned tokens
        learned = F.embedding(beyond.clamp(min=0), torch.cat(list(self.learned)))
        known = self.token_embedding(ids.clamp(max=self.token_embedding.num_embeddings - 1))
        return torch.where(beyond[..., None] >= 0, learned.to(known.dtype), known)


def embedding(rows: int, width: int, std: float) -> nn.Embedding:
    weight = torch.empty(rows, width)
    if not weight.is_meta:  # on meta, drawing takes a second: torch imports its compiler
        nn.init.normal_(weight, std=std)
    return nn.Embedding.from_pretrained(weight, freeze=False)


class Block(nn.Module):
    """Self-attention and an MLP, each after a norm and with a residual connection: (B, L, D) -> (B, L, D)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.self_attn = CausalAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.width)
        self.mlp = MLP(config)
        self.layer_norm2 = nn.LayerNorm(config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CausalAttention(nn.Module):
    """Self-attention of each token to itself and the tokens before it. Padding is not masked, as in the original."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.heads = config.heads
        self.q_proj = nn.Linear(config.width, config.width)
        self.k_proj = nn.Linear(config.width, config.width)
        self.v_proj = nn.Linear(config.width, config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, L, D) -> (B, L, D)."""
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, L, D/heads)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(h.transpose(1, 2).flatten(2))  # (B, L, D)


class MLP(nn.Module):
    """fc2(activation(fc1(x))): (B, L, D) -> (B, L, D)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}
