"""Prompts -> token ids: CLIP's byte-pair encoding (Sennrich et al. 2016, on bytes as in GPT-2), run by `tokenizers`.

A prompt is lower-cased and split into words. The UTF-8 bytes of each word, the last one marked `</w>`, are merged pair
by pair, in the order in which the pairs were learned. CLIP's 49,408 tokens are the 256 bytes, the same 256 at a word's
end, the 48,894 merges of vocab/clip_merges.txt.gz, start-of-text and end-of-text.
"""

import gzip
import itertools
import json
import os
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor

from ldm.config import MAX_CONTEXT
from ldm.errors import InputError, one_line
from ldm.runtime import parse_json, read_json, read_text

Vocab = dict[str, int]  # token -> id
Merges = list[tuple[str, str]]  # first learned first

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
# Contractions, runs of letters, single digits, runs of anything else (openai/CLIP, clip/simple_tokenizer.py).
WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

MAX_PROMPT = 10_000  # letters; a model reads about 300
MAX_TOKENS = 1 << 20
MAX_ADDED, MAX_TOKEN = 256, 150  # vectors of all added tokens; bytes of one token, which is a file's name too

DAMAGED = (ValueError, LookupError, TypeError, AttributeError)  # that a damaged tokenizer can raise


class Tokenizer:
    """tokenizer(prompts): list of B strings -> ids, LongTensor (B, context_length).

    A row is start-of-text, the words, end-of-text, then `pad_id` up to `context_length`. Words that do not fit are cut
    off before the end-of-text, with a warning that names them. What the vocabulary cannot spell becomes end-of-text.

    added: further tokens, and how many ids each becomes. The ids follow the vocabulary's. "[V]" of three vectors is the
    tokens "[V]", "[V]_1" and "[V]_2" of diffusers and transformers, and a prompt's "[V]" becomes all three.
    Raises InputError if vocabulary and merges do not make a tokenizer, or a token can't be added.
    """

    FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")

    def __init__(
        self, vocab: Vocab, merges: Merges, context_length: int, pad_id: int, added: dict[str, int] | None = None
    ):
        _check_types(vocab, context_length)
        if not {BOS, EOS} <= vocab.keys() or pad_id not in vocab.values():
            raise InputError(
                f"the tokenizer's vocabulary lacks {BOS}, {EOS} or id {pad_id} to pad with: not CLIP's kind"
            )
        self.vocab, self.merges = vocab, merges
        self.context_length, self.vocab_size = context_length, len(vocab)
        self.bos_id, self.eos_id, self.pad_id = vocab[BOS], vocab[EOS], pad_id
        try:
            self._bpe = tokenizers.Tokenizer(BPE(vocab, merges, end_of_word_suffix="</w>", unk_token=EOS))
        except Exception as error:  # the library raises no narrower class
            raise InputError(f"the tokenizer's merges do not fit its vocabulary: {error}") from error
        clean = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        split = pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True)
        self._bpe.normalizer = normalizers.Sequence(clean)
        self._bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        # A prompt may contain these two. SD2's padding, "!" with id 0, is not special: a prompt's "!" is "!</w>", 256,
        # as in OpenCLIP, which SD2 was trained with (transformers makes it 0, huggingface/diffusers#4153).
        self._bpe.add_special_tokens([AddedToken(token, normalized=True) for token in (BOS, EOS)])
        self.added: dict[str, int] = {}
        self._ids: dict[int, list[int]] = {}  # first id of an added token -> its ids
        for token, count in (added or {}).items():
            self._add(token, count)

    @classmethod
    def clip(cls, context_length: int = 77, pad_id: int = 49407) -> "Tokenizer":
        """CLIP's own vocabulary. SD1 pads with end-of-text, 49407, SD2 with 0."""
        return cls(*clip_vocabulary(), context_length, pad_id)

    def plus(self, token: str, count: int = 1) -> "Tokenizer":
        """The same tokenizer with one more token, of `count` ids. Raises InputError if there is such a token."""
        added = {**self.added, token: count}
        if token in self.added:
            raise InputError(f"there is a token {token} already; give another name")
        return Tokenizer(self.vocab, self.merges, self.context_length, self.pad_id, added)

    def added_ids(self) -> Vocab:
        """The added tokens, one for each id, as diffusers names them."""
        names = [name for token, count in self.added.items() for name in spelled(token, count)]
        return {name: len(self.vocab) + i for i, name in enumerate(names)}

    def _add(self, token: str, count: int) -> None:
        check_token(token)
        first = len(self.vocab) + len(self.added_ids())
        if max(self.vocab.values()) >= len(self.vocab):
            raise InputError("the tokenizer's vocabulary has gaps: no token can be added to it")
        if type(count) is not int or not 1 <= count <= MAX_ADDED - (first - len(self.vocab)):
            raise InputError(f"token {token} has {count} vectors; 1 to {MAX_ADDED} are possible for all added tokens")
        known = {word.lower() for word in self._bpe.get_vocab()}
        for name in spelled(token, count):
            if {name.lower(), f"{name.lower()}</w>"} & known:
                raise InputError(f"there is a token {name} already; give another name")
        names = [AddedToken(name, normalized=True) for name in spelled(token, count)]  # as transformers' add_tokens
        self._bpe.add_tokens(names)
        self._ids[first] = list(range(first, first + count))
        self.added[token] = count

    def __call__(self, prompts: list[str]) -> Tensor:
        if isinstance(prompts, str):
            raise TypeError("a tokenizer takes a list of prompts, not one string")
        rows, room = [], self.context_length - 2
        for prompt in prompts:
            check_prompt(prompt)
            if dropped := self.dropped(prompt):
                said = f"prompt too long for {self.context_length} tokens, dropped: {dropped}"
                warnings.warn(one_line(said), stacklevel=2)
            ids = self.ids(prompt)[:room]
            rows.append([self.bos_id, *ids, self.eos_id] + [self.pad_id] * (room - len(ids)))
        return torch.tensor(rows, dtype=torch.long).view(-1, self.context_length)

    def dropped(self, prompt: str) -> str:
        """The end of the prompt that is cut off, from the first word that loses a token; "" if all of it fits."""
        encoding, room = self._encode(prompt), self.context_length - 2
        ends = itertools.accumulate(len(ids) for ids in self._expanded(encoding))
        lost = next((i for i, end in enumerate(ends) if end > room), None)
        if lost is None:
            return ""
        word = encoding.token_to_word(lost)
        start, _ = encoding.offsets[lost] if word is None else encoding.word_to_chars(word)
        return prompt[start:].strip()

    def ids(self, words: str) -> list[int]:
        """The ids of some words, without start, end and padding."""
        return [id for ids in self._expanded(self._encode(words)) for id in ids]

    def _expanded(self, encoding: tokenizers.Encoding) -> list[list[int]]:
        """The ids of each token: those of all its vectors for an added one, else one."""
        return [self._ids.get(id, [id]) for id in encoding.ids]

    def _encode(self, prompt: str) -> tokenizers.Encoding:
        return self._bpe.encode(prompt, add_special_tokens=False)

    @classmethod
    def from_folder(
        cls, folder: str | Path, context_length: int | None = None, pad_id: int | None = None
    ) -> "Tokenizer":
        """The tokenizer/ folder of a diffusers model: vocab.json and merges.txt, or tokenizer.json alone (newer ones).

        Without the arguments, length and padding are the folder's own. Raises InputError for missing or damaged files.
        """
        folder = Path(folder)
        try:
            if os.path.lexists(folder / "vocab.json"):
                vocab = read_json(folder / "vocab.json")
                merges = _parse_merges(read_text(folder / "merges.txt"))
            else:
                model = read_json(folder / "tokenizer.json")["model"]
                vocab, merges = model["vocab"], [_pair(merge) for merge in model["merges"]]
            pad, length = _padding_and_length(folder)
            added = _added_tokens(folder, vocab)
            return cls(vocab, merges, context_length or length, vocab[pad] if pad_id is None else pad_id, added)
        except DAMAGED as error:
            raise InputError(f"{folder}: no readable tokenizer (vocab.json, merges.txt): {error}") from error

    def save(self, folder: str | Path) -> None:
        """Writes a tokenizer/ folder for transformers 4 and 5; CLIP's vocab.json and merges.txt as in the releases."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tokens = {id: token for token, id in self.vocab.items()}
        special = dict(bos_token=BOS, eos_token=EOS, unk_token=EOS, pad_token=tokens[self.pad_id])
        flags = dict(lstrip=False, normalized=True, rstrip=False, single_word=False, special=True)
        added = {str(self.vocab[token]): dict(content=token, **flags) for token in (BOS, EOS)}
        own = self.added_ids()
        added |= {str(id): dict(content=token, **flags | {"special": False}) for token, id in own.items()}
        config = dict(added_tokens_decoder=added, model_max_length=self.context_length, tokenizer_class="CLIPTokenizer")
        merges = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in self.merges)
        (folder / "merges.txt").write_text(merges, encoding="utf-8", newline="\n")
        _write_json(folder / "vocab.json", self.vocab)
        _write_json(folder / "tokenizer_config.json", config | special)
        _write_json(folder / "special_tokens_map.json", special)
        if own:
            _write_json(folder / "added_tokens.json", own)

    def to_metadata(self) -> str:
        """One line of JSON for a safetensors header. CLIP's own vocabulary is named, not written out."""
        vocab, merges = self.vocab, [" ".join(pair) for pair in self.merges]
        if (self.vocab, self.merges) == clip_vocabulary():
            vocab, merges = "clip", []
        tree = dict(vocab=vocab, merges=merges, context_length=self.context_length, pad_id=self.pad_id)
        tree |= {"added": self.added} if self.added else {}
        return json.dumps(tree, ensure_ascii=False)

    @classmethod
    def from_metadata(cls, text: str) -> "Tokenizer":
        """The inverse of `to_metadata`. Raises InputError if the text is damaged."""
        try:
            tree = parse_json(text, "it")
            known = tree["vocab"] == "clip"
            vocab, merges = clip_vocabulary() if known else (tree["vocab"], [_pair(merge) for merge in tree["merges"]])
            return cls(vocab, merges, tree["context_length"], tree["pad_id"], dict(tree.get("added", {})))
        except DAMAGED as error:
            raise InputError(f"the tokenizer in the file's metadata is damaged: {error}") from error


def check_prompt(prompt: str) -> None:
    """Raises InputError for a prompt that is too long to be tokenized in a moment, or that is no Unicode text."""
    if len(prompt) > MAX_PROMPT:
        raise InputError(f"a prompt has {len(prompt)} letters, and should have at most {MAX_PROMPT}: {prompt}")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise InputError(f"a prompt is no text that can be written as UTF-8: {prompt}") from None


def check_token(token: str) -> None:
    """Raises InputError for a text that can't be a token and a file's name, such as one with a space or a slash."""
    size = len(token.encode(errors="replace"))
    if not 0 < size <= MAX_TOKEN or not token.isprintable() or set(token) & set(" /\\") or token[0] in ".-":
        said = one_line(token, MAX_TOKEN)
        raise InputError(f"{said!r} can't be a token; take one short word, such as [V], that no . or - begins")


def spelled(token: str, count: int) -> list[str]:
    """The names of a token's vectors, as in diffusers: "[V]", "[V]_1", "[V]_2"."""
    return [token, *(f"{token}_{i}" for i in range(1, count))]


def _added_tokens(folder: Path, vocab: Vocab) -> dict[str, int]:
    """The tokens that the files of a tokenizer/ folder add to the vocabulary, and how many ids each has."""
    paths = [folder / name for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json")]
    whole, config, simple = (read_json(path) if os.path.lexists(path) else {} for path in paths)
    found = {entry["content"]: entry["id"] for entry in whole.get("added_tokens", [])}
    found |= {entry["content"]: int(id) for id, entry in config.get("added_tokens_decoder", {}).items()}
    found = {token: id for token, id in (found | simple).items() if token not in vocab}
    tokens = sorted(found, key=found.__getitem__)
    if [found[token] for token in tokens] != list(range(len(vocab), len(vocab) + len(tokens))):
        raise InputError(f"{folder}: its added tokens, {', '.join(tokens[:3])}, do not follow the vocabulary")
    added: dict[str, int] = {}
    for token in tokens:
        first = next(reversed(added), None)
        if first is not None and token == f"{first}_{added[first]}":
            added[first] += 1
        else:
            added[token] = 1
    return added


def _check_types(vocab: Vocab, context_length: int) -> None:
    """Raises InputError for what a damaged file can hold in place of a vocabulary and a length."""
    if not isinstance(vocab, dict) or not all(type(id) is int and 0 <= id < MAX_TOKENS for id in vocab.values()):
        raise InputError(f"the tokenizer's vocabulary does not give each token a number below {MAX_TOKENS}")
    if len(set(vocab.values())) < len(vocab):
        raise InputError("the tokenizer's vocabulary gives two tokens the same number")
    if type(context_length) is not int or not 3 <= context_length <= MAX_CONTEXT:
        raise InputError(f"the tokenizer's length {context_length!r} is not from 3 to {MAX_CONTEXT} tokens")


@cache
def clip_vocabulary() -> tuple[Vocab, Merges]:
    """CLIP's tokens and merges, from the table that the package carries."""
    table = Path(__file__).parent / "vocab" / "clip_merges.txt.gz"
    merges = _parse_merges(gzip.decompress(table.read_bytes()).decode())
    # Printable bytes stand for themselves and come first; the other 68 take the characters from U+0100 on (GPT-2).
    characters = [chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    tokens = characters + [c + "</w>" for c in characters] + ["".join(pair) for pair in merges] + [BOS, EOS]
    return {token: id for id, token in enumerate(tokens)}, merges


def _parse_merges(text: str) -> Merges:
    lines = text.removesuffix("\n").split("\n")
    return [_pair(line) for line in lines[lines[0].startswith("#version") :]]


def _pair(merge: str | list[str]) -> tuple[str, str]:
    """A merge is written "a b" in files, and ["a", "b"] in tokenizer.json since tokenizers 0.20."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _padding_and_length(folder: Path) -> tuple[str, int]:
    """Padding token and context length of a tokenizer/ folder, with transformers' precedence."""
    config, special = (
        read_json(folder / name) if os.path.lexists(folder / name) else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json")
    )
    if "added_tokens_decoder" not in config:  # older folders: the map overrides, as for SD2's "!"
        config |= special
    pad, length = config.get("pad_token", EOS), config.get("model_max_length", 77)
    return pad["content"] if isinstance(pad, dict) else pad, length if length < 10**6 else 77  # 1e30 means "not set"


def _write_json(path: Path, tree: Any) -> None:
    text = json.dumps(tree, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")
