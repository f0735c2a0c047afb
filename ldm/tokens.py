"""A learned token: a new word, and one or more vectors that the text encoder reads for it (Gal et al. 2022, section 4).

The text encoder looks up a vector for each token of a prompt. Textual Inversion adds a token and trains its vectors
alone; all networks stay as they are, and what has been learned is a file of a few kilobytes. A token of several vectors
holds more: a prompt's "[V]" becomes N tokens in a row.

A DreamBooth run can train the vectors alone, with the networks, or with a LoRA of them, which is known as pivotal
tuning. The vectors begin as those of a known word.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.config import ModelConfig
from ldm.errors import InputError
from ldm.formats import LEARNED, Adapter, kind_of, modelspec, read_embedding, write_embedding
from ldm.model import StableDiffusion
from ldm.settings import Settings
from ldm.tokenizer import check_token


@dataclass(eq=False)
class LearnedToken:
    """A token that trains. name: of its parameter, as in `StableDiffusion.parameters`. norms: (N, 1), to be kept."""

    token: str
    name: str
    vectors: nn.Parameter  # (N, D)
    norms: Tensor
    config: ModelConfig  # of the model that it is for

    @property
    def file(self) -> str:
        """The name of its file: the token's own, from which A1111 and ComfyUI take it."""
        return f"{self.token}.safetensors"

    def group(self, settings: Settings, stop: int | None = None) -> dict[str, Any]:
        """The optimizer's group; see `Trainable.parameter_groups`."""
        return {"name": "token", "params": [self.vectors], "lr": settings.token_learning_rate, "stop": stop}

    def save(self, folder: Path, metadata: dict[str, str]) -> None:
        """Writes the token's file into a folder."""
        about = modelspec.describe(self.config, self.token, "textual-inversion")
        write_embedding(folder / self.file, self.token, self.vectors, about | metadata)

    @torch.no_grad()
    def keep_norm(self) -> None:
        """Scales each vector to the norm that it began with.

        The words of the table have norms that hardly differ. A vector that trains freely grows far longer, and then
        drowns the rest of the prompt.
        """
        norms = self.vectors.float().norm(dim=1, keepdim=True).clamp(min=1e-12)
        self.vectors.copy_(self.vectors * (self.norms.to(norms.device) / norms))


def add_token(sd: StableDiffusion, token: str, vectors: Tensor) -> nn.Parameter:
    """Adds a token to the tokenizer and its vectors (N, D) to the text encoder. Returns the new parameter (N, D).

    Prompts that hold the token, in large or small letters, become its N vectors there. `sd.save` saves it too. Raises
    InputError if there is such a token already, or the vectors are not of the text encoder's width.
    """
    embeddings = sd.text_encoder.text_model.embeddings
    table = embeddings.token_embedding.weight
    if vectors.shape[1] != table.shape[1]:
        here, there = kind_of(table.shape[1]), kind_of(vectors.shape[1])
        raise InputError(f"token {token} is for {there}, and the model is for {here}: its vectors do not fit")
    if len(sd.tokenizer.vocab) != len(table):
        raise InputError(f"no token can be added: {len(table)} vectors belong to {len(sd.tokenizer.vocab)} tokens")
    sd.tokenizer = sd.tokenizer.plus(token, len(vectors))
    embeddings.learned.append(nn.Parameter(vectors.to(table.device, table.dtype, copy=True)))
    return embeddings.learned[-1]


def add_embedding(sd: StableDiffusion, path: str | Path, token: str | None = None) -> str:
    """Adds the token of an embedding file. Returns it. token: its name, if not the file's own (formats/embedding.py).

    Raises InputError, which names the file, if it can't be read, or its token can't be added.
    """
    own, vectors = read_embedding(path)
    try:
        check_token(token or own)
    except InputError as error:
        advice = "; rename the file" if token is None and own == Path(path).stem else ""
        raise InputError(f"{path}: {error}{advice}") from None
    try:
        add_token(sd, token or own, vectors).requires_grad_(False)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return token or own


def add_bundled(sd: StableDiffusion, adapter: Adapter) -> list[str]:
    """Adds the tokens that lie in a LoRA's file, and returns them. Raises InputError as `add_token` does."""
    for token, vectors in adapter.tokens.items():
        if token in sd.tokenizer.added:
            raise InputError(f"{adapter.path}: its token {token} is there already, from the model or another file")
        try:
            add_token(sd, token, vectors).requires_grad_(False)
        except InputError as error:
            raise InputError(f"{adapter.path}: {error}") from None
    return list(adapter.tokens)


def begin(sd: StableDiffusion, token: str, initializer: str, count: int | None = None) -> LearnedToken:
    """Adds a token whose vectors begin as those of a known word or words, and returns it.

    initializer: one vector for each of its tokens. count: number of vectors, those of the initializer repeated or cut;
    as many as it has if None. Raises InputError if there is such a token already, or the initializer is empty.
    """
    ids = sd.tokenizer.ids(initializer)
    if not ids:
        raise InputError(f"the initializer {initializer!r} has no token to begin with; take a word such as dog")
    count, room = count or len(ids), sd.tokenizer.context_length - 2
    if count > room:
        raise InputError(f"token {token} is to have {count} vectors, and a prompt has room for {room}")
    ids = [ids[i % len(ids)] for i in range(count)]
    embeddings = sd.text_encoder.text_model.embeddings
    with torch.no_grad():
        vectors = embeddings.vectors(torch.tensor(ids, device=sd.device))
    parameter = add_token(sd, token, vectors)
    name = LEARNED.format(len(embeddings.learned) - 1)
    return LearnedToken(token, name, parameter, vectors.float().norm(dim=1, keepdim=True), sd.config)
