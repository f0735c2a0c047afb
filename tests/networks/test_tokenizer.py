"""Token ids equal those of CLIP, transformers and OpenCLIP. Saved folders keep the tokenizer."""

import gzip
import hashlib
import html
import importlib
import importlib.util
import json
import random
import sys
import time
import types
import unicodedata
from pathlib import Path
from unittest import mock

import pytest
import torch

import ldm
from ldm.errors import InputError
from ldm.tokenizer import BOS, EOS, Tokenizer, clip_vocabulary

FACTS = json.loads((Path(__file__).parent.parent / "facts" / "tokenizer.json").read_text())

# A vocabulary as small models have: a single merge, a + b</w>, and no token for most characters.
SMALL = Tokenizer(
    vocab={"a": 0, "b": 1, "a</w>": 2, "b</w>": 3, "ab</w>": 4, BOS: 5, EOS: 6}, merges=[("a", "b</w>")],
    context_length=8, pad_id=6,
)  # fmt: skip


@pytest.fixture(scope="module", params=[49407, 0], ids=["sd1", "sd2"])
def tokenizer(request) -> Tokenizer:
    return Tokenizer.clip(pad_id=request.param)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_ids_are_those_published(tokenizer):
    for golden in FACTS["goldens"]:
        padding = [tokenizer.pad_id] * (77 - len(golden["ids"]))
        assert tokenizer([golden["text"]])[0].tolist() == golden["ids"] + padding, golden


def test_the_merge_table_is_the_released_one():
    table = Path(ldm.__file__).parent / "vocab" / "clip_merges.txt.gz"
    assert sha256(gzip.decompress(table.read_bytes())) == FACTS["merges_sha256"]


def test_a_saved_folder_has_the_files_released_with_sd1(tmp_path):
    Tokenizer.clip().save(tmp_path)
    assert sha256((tmp_path / "merges.txt").read_bytes()) == FACTS["merges_sha256"]
    assert sha256((tmp_path / "vocab.json").read_bytes()) == FACTS["vocab_sha256"]


def test_a_tokenizer_gives_padded_ids_and_tells_its_sizes(tokenizer):
    ids = tokenizer(["a cat", "", "two dogs"])
    assert (ids.shape, ids.dtype) == ((3, 77), torch.long)
    assert (tokenizer.vocab_size, tokenizer.context_length) == (49408, 77)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (49406, 49407)
    assert tokenizer([]).shape == (0, 77)
    with pytest.raises(TypeError, match="list of prompts"):
        tokenizer("a cat")


def test_sd2_distinguishes_exclamation_marks_from_its_padding():
    """huggingface/diffusers#4153: the ids of open_clip.tokenize, with which SD2 was trained."""
    ids = Tokenizer.clip(pad_id=0)(["! !! !!!"])[0].tolist()
    assert ids == [49406, 256, 748, 995, 49407] + [0] * 72


@pytest.mark.parametrize(
    ("prompt", "dropped"),
    [
        ("dog " * 75, ""),
        ("dog " * 75 + "Été, two cats ", "Été, two cats"),
        ("dog " * 74 + "zwx dog", "zwx dog"),  # "zwx" has two tokens, and there is no room for the second
        ("dog " * 74 + "cat, two", ", two"),
    ],
)
def test_words_that_do_not_fit_are_cut_and_named(tokenizer, prompt, dropped, recwarn):
    assert tokenizer.dropped(prompt) == dropped
    ids = tokenizer(["a cat", prompt])[1].tolist()
    assert len(ids) == 77 and ids[:75] == [49406] + [1929] * 74 and ids[76] == 49407
    assert [str(w.message) for w in recwarn] == [f"prompt too long for 77 tokens, dropped: {dropped}"] * bool(dropped)


@pytest.mark.filterwarnings("ignore:prompt too long")
def test_a_small_vocabulary_gives_the_expected_ids():
    assert SMALL(["AB a? b"])[0].tolist() == [5, 4, 2, 6, 3, 6, 6, 6]  # a character without a token becomes end-of-text
    assert SMALL(["ab" * 9])[0].tolist() == [5, 0, 1, 0, 1, 0, 1, 6]
    assert SMALL.vocab_size == 7


def same(a: Tokenizer, b: Tokenizer) -> bool:
    return all(getattr(a, x) == getattr(b, x) for x in ("vocab", "merges", "context_length", "pad_id"))


@pytest.mark.parametrize("ours", [Tokenizer.clip(), Tokenizer.clip(pad_id=0), SMALL], ids=["sd1", "sd2", "small"])
def test_a_tokenizer_is_restored_from_a_folder_and_from_metadata(ours, tmp_path):
    ours.save(tmp_path)
    assert same(Tokenizer.from_folder(tmp_path), ours)
    assert Tokenizer.from_folder(tmp_path, context_length=5, pad_id=1)(["ab"]).shape == (1, 5)

    # Newer versions of transformers write tokenizer.json alone, with merges as pairs, or as strings before.
    for merges in (ours.merges, [" ".join(pair) for pair in ours.merges]):
        (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": ours.vocab, "merges": merges}}))
        for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):
            (tmp_path / name).unlink(missing_ok=True)
        assert same(Tokenizer.from_folder(tmp_path), ours)

    assert same(Tokenizer.from_metadata(ours.to_metadata()), ours)
    assert len(ours.to_metadata()) < 200  # CLIP's vocabulary is only named


def test_settings_of_a_folder_have_the_precedence_of_transformers(tmp_path):
    """SD2's own folder has its padding, "!", in special_tokens_map.json."""
    Tokenizer.clip().save(tmp_path)
    padding = {"content": EOS, "lstrip": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": padding, "model_max_length": 10**30}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "!"}))
    assert (Tokenizer.from_folder(tmp_path).pad_id, Tokenizer.from_folder(tmp_path).context_length) == (0, 77)
    (tmp_path / "special_tokens_map.json").unlink()
    assert Tokenizer.from_folder(tmp_path).pad_id == 49407


def test_missing_and_damaged_tokenizers_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"missing: no readable tokenizer .*No such file"):
        Tokenizer.from_folder(tmp_path / "missing")
    SMALL.save(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nx y\n")
    with pytest.raises(InputError, match="merges do not fit"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": 0')
    with pytest.raises(InputError, match="no readable tokenizer"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(InputError, match="vocabulary lacks"):
        Tokenizer({"a": 0}, [], 77, 0)
    with pytest.raises(InputError, match="metadata is damaged"):
        Tokenizer.from_metadata('{"vocab": ["a"], "merges": []}')


ALPHABETS = [
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "0123456789",
    "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
    "àâäçéèêëîïôöùûüÿñßøåæœÀÉÎÕÜŽČŠłđıİ",
    "e\u0301a\u0308n\u0303o\u0302\u0327",  # accents as separate characters
    "абвгдежзийклмнопрстуфхцчшщъыьэюяЖЩЫαβγδεζηθικλμνξοπρςστυφχψωΔΣΩ",
    "一丁七万三上下不世中国東京日本語漢字猫犬写真の絵はかわいいカタカナ한국어고양이",
    "אבגדהוزحطيكلمنसहिन्दीไทยภาษา",
    "😀🐶🐱❤️👩‍🎨👍🏽🇫🇷🇯🇵✨☆★♥←→∑√∞≤½²№™",
    "１２３ＡＢＣﬁﬂ“”‘’…—–«»",
]
SPACES = [" ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u2003", "\u2009", "\u200b", "\u3000", "\ufeff", "\u0085", ""]
WORDS = "photo dog's CAN'T they'll sks zwx 16-inch 3.14 &amp; <b> it'd I'm we've you're a an the".split() + [BOS, EOS]


def generated_prompts(n: int, seed: int = 0) -> list[str]:
    """Words of one script, words from a list and words of any characters, joined by any kind of space."""
    rng = random.Random(seed)
    # Characters of Unicode 3.2 only: for later ones the libraries disagree about what is a letter.
    known = unicodedata.ucd_3_2_0.category
    anything = [c for c in map(chr, range(1, 0x20000)) if known(c) not in ("Cn", "Cs")]

    def word() -> str:
        kind = rng.random()
        if kind < 0.2:
            return rng.choice(WORDS)
        letters = anything if kind < 0.25 else rng.choice(ALPHABETS)
        return "".join(rng.choices(letters, k=rng.randint(1, 9)))

    return ["".join(word() + rng.choice(SPACES) for _ in range(rng.choice((1, 3, 8, 40)))) for _ in range(n)]


@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["written by us", "written by transformers"])
@pytest.mark.filterwarnings("ignore:prompt too long")
def test_ids_equal_those_of_transformers(dialect, tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the parity extra")
    tokenizer.save(tmp_path)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    ours = tokenizer
    if dialect == "written by transformers":
        theirs.save_pretrained(tmp_path / "theirs")
        ours = Tokenizer.from_folder(tmp_path / "theirs")
        assert same(ours, tokenizer)
    assert (theirs.pad_token_id, theirs.model_max_length) == (tokenizer.pad_id, 77)
    prompts = [golden["text"] for golden in FACTS["goldens"]] + generated_prompts(3000)
    if tokenizer.pad_id == 0:  # transformers reads a prompt's "!" as padding, see above
        prompts = [prompt.replace("!", "?") for prompt in prompts]
    expected = theirs(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    for prompt, a, b in zip(prompts, ours(prompts), expected, strict=True):
        assert torch.equal(a, b), prompt


def test_a_small_vocabulary_equals_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the parity extra")
    SMALL.save(tmp_path)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    for prompt in ("ab", "AB a? b", "b aab", "ab!", "", f"a {EOS} b"):
        expected = theirs(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
        assert torch.equal(SMALL([prompt]), expected), prompt


@pytest.mark.filterwarnings("ignore:prompt too long")
def test_ids_equal_those_of_open_clip():
    """Compares the prompts that OpenCLIP's cleaning (ftfy, HTML entities) does not change.

    Two kinds are left out: special tokens, which OpenCLIP spells differently, and the capital sigma, for which Python's
    lower() has another letter at the end of a word; tokenizers and transformers have only one.
    """
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        pytest.skip("needs the parity extra")
    ftfy = pytest.importorskip("ftfy")
    package = types.ModuleType("open_clip")  # the package itself imports torchvision, its tokenizer does not
    package.__path__ = list(spec.submodule_search_locations)
    with mock.patch.dict(sys.modules, {"open_clip": package}):
        theirs = importlib.import_module("open_clip.tokenizer").SimpleTokenizer()
    tokenizer, compared = Tokenizer.clip(pad_id=0), 0
    for prompt in [golden["text"] for golden in FACTS["goldens"]] + generated_prompts(12000, seed=1):
        if html.unescape(ftfy.fix_text(prompt)) != prompt or any(left_out in prompt for left_out in (BOS, EOS, "Σ")):
            continue
        compared += 1
        assert torch.equal(tokenizer([prompt]), theirs(prompt)), repr(prompt)
    assert compared >= 2000


@pytest.mark.parametrize(
    "prompt", ["a" * 1_000_000, "a cat " * 200_000, "\n" * 1_000_000], ids=["word", "words", "lines"]
)
def test_a_prompt_of_a_million_letters_is_refused_at_once(tokenizer, prompt):
    start = time.perf_counter()
    with pytest.raises(InputError, match=r"a prompt has \d+ letters, and should have at most 10000") as error:
        tokenizer([prompt])
    assert len(str(error.value)) <= 500 and time.perf_counter() - start < 1


@pytest.mark.parametrize(
    "prompt", ["a" * 10_000, "a cat " * 1_666, "é" * 10_000, "\U0001f600" * 10_000], ids=["word", "words", "é", "emoji"]
)
def test_the_longest_prompt_is_cut_with_a_short_warning(tokenizer, prompt):
    start = time.perf_counter()
    with pytest.warns(UserWarning, match="prompt too long for 77 tokens, dropped: .* [.]{3} ") as warned:
        assert tokenizer([prompt]).shape == (1, 77)
    assert len(str(warned[0].message)) <= 500 and time.perf_counter() - start < 5


def test_a_prompt_that_is_no_unicode_text_is_refused(tokenizer):
    with pytest.raises(InputError, match=r"a prompt is no text that can be written as UTF-8: a \\ud800 cat"):
        tokenizer(["a \ud800 cat"])


@pytest.mark.parametrize("vocab", [[], {"a": "0"}, {"a": -1}, {"a": 2**40}, {"a": True}, {"a": 0, "b": 0}])
def test_a_vocabulary_gives_each_token_a_number_of_its_own(vocab):
    with pytest.raises(InputError, match="the tokenizer's vocabulary (does not give each|gives two tokens the same)"):
        Tokenizer(vocab, [], 77, 0)


@pytest.mark.parametrize("length", [None, 0, 2, -1, 10**9, 77.0, "77", True])
def test_a_length_is_a_number_of_tokens(length):
    with pytest.raises(InputError, match="the tokenizer's length .* is not from 3 to 1024 tokens"):
        Tokenizer(*clip_vocabulary(), length, 0)
