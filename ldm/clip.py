"""CLIP's text encoder (Radford et al. 2021, section 2.4), OpenAI's for SD1 and OpenCLIP's for SD2.

The attributes spell the Hugging Face names, as the SD1 checkpoint does under `cond_stage_model.transformer.`; the names
of OpenCLIP in SD2 checkpoints are a table in formats/names.py.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.config import TextConfig

PROMPTS_AT_ONCE = 64  # in a batch, where a frozen text encoder encodes all prompts once


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


class Contexts:
    """Prompts -> what the UNet is conditioned on, while a text encoder trains or after it has stopped.

    A prompt's ids are made once, and its context once while the text encoder is frozen. Only prompts that `keep` names
    stay: with shuffled tags there is no end of other ones. The host does not wait for the device.
    """

    def __init__(
        self, tokenize: Callable[[list[str]], Tensor], encode: Callable[[Tensor], Tensor], device: torch.device
    ):
        """tokenize: P prompts -> ids (P, L); encode: ids -> (P, L, D), the text encoder."""
        self._tokenize, self._encode, self._device = tokenize, encode, device
        self._kept: dict[str, None] = {}  # a set in the order in which they were named
        self._ids: dict[str, Tensor] = {}  # (L,)
        self._contexts: dict[str, Tensor] = {}  # (L, D)

    def keep(self, prompts: Sequence[str]) -> None:
        """Names prompts that will come again."""
        self._kept |= dict.fromkeys(prompts)

    def trained(self, prompts: Sequence[str]) -> Tensor:
        """(B, L, D) for B prompts, with gradients; encodes each distinct one once."""
        distinct = list(dict.fromkeys(prompts))
        rows = self._sent(torch.tensor([distinct.index(prompt) for prompt in prompts]))
        return self._encode(self._ids_of(distinct)).index_select(0, rows)

    @torch.no_grad()
    def frozen(self, prompts: Sequence[str]) -> Tensor:
        """(B, L, D) for B prompts; encodes only those whose context it does not have yet, in one batch."""
        made: dict[str, Tensor] = {}
        if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._contexts]:
            made = dict(zip(new, self._encode(self._ids_of(new)), strict=True))
        self._contexts |= {prompt: context for prompt, context in made.items() if prompt in self._kept}
        return torch.stack([made[prompt] if prompt in made else self._contexts[prompt] for prompt in prompts])

    def encode_kept(self) -> None:
        """Encodes the prompts to keep, in the same batches whatever has been encoded before: called when the text
        encoder stops training, so that a run that resumes later computes the same bits."""
        self._contexts.clear()
        prompts = list(self._kept)
        for i in range(0, len(prompts), PROMPTS_AT_ONCE):
            self.frozen(prompts[i : i + PROMPTS_AT_ONCE])

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Inside, the text encoder has other weights: prompts are encoded anew, and these contexts forgotten after."""
        kept, self._contexts = self._contexts, {}
        try:
            yield
        finally:
            self._contexts = kept

    def _ids_of(self, prompts: list[str]) -> Tensor:
        rows = [self._ids[p] if p in self._ids else self._sent(self._tokenize([p])[0]) for p in prompts]
        self._ids |= {prompt: row for prompt, row in zip(prompts, rows, strict=True) if prompt in self._kept}
        return torch.stack(rows)

    def _sent(self, values: Tensor) -> Tensor:
        values = values.pin_memory() if self._device.type == "cuda" else values  # else a copy waits for the device
        return values.to(self._device, non_blocking=True)
