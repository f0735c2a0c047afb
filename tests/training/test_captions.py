"""Captions: where a photograph's prompt comes from, what {token} and {class} become, and how captions vary."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from runs import photograph

from ldm import InputError
from ldm.data import read_subjects
from ldm.data.captions import fill, words_of
from ldm.data.examples import read_examples
from ldm.data.variation import vary
from ldm.training import parse
from train import TINY

WORDS = {"token": "sks", "class": "dog"}


def prompts(folder, prompt="a sks dog", words=WORDS) -> dict[str, str]:
    """{name: prompt} of the photographs in a folder."""
    return {str(e.picture.path.relative_to(folder)): e.prompt for e in read_examples(folder, prompt, words)}


# Beside the picture


@pytest.mark.parametrize("name", ["0.txt", "0.caption", "0.png.txt", "0.TXT"])
def test_a_file_beside_a_picture_is_its_caption_and_the_prompt_that_of_the_others(name, tmp_path, recwarn):
    folder = photograph(tmp_path / "my dög 犬")
    (folder / name).write_text("a photo of {token} {class} on a chair\n", encoding="utf-8")
    found = prompts(folder)
    assert found == {"0.png": "a photo of sks dog on a chair", "1.png": "a sks dog", "2.png": "a sks dog"}
    assert not recwarn.list


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfein gro\xc3\x9fer  {class}",
        b"\r\n\r\nein gro\xc3\x9fer\t{class}  \r\n",
        b"ein gro\xc3\x9fer {class}",
    ],
)
def test_a_caption_has_single_spaces_and_may_begin_with_a_byte_order_mark_or_blank_lines(content, tmp_path):
    folder = photograph(tmp_path / "dog")
    (folder / "1.txt").write_bytes(content)
    assert prompts(folder)["1.png"] == "ein großer dog"


def test_the_first_line_is_the_caption_and_one_warning_says_that_there_are_more(tmp_path):
    folder = photograph(tmp_path / "dog")
    for name in ("0.txt", "1.txt"):
        (folder / name).write_text("one\ntwo\n")
    with pytest.warns(match=r"0\.txt has several lines, and the first is the caption; 2 pictures in all") as warned:
        assert prompts(folder)["0.png"] == "one"
    assert len(warned) == 1


def test_of_two_captions_that_differ_the_text_file_is_taken_with_a_warning(tmp_path, recwarn):
    folder = photograph(tmp_path / "dog")
    (folder / "0.txt").write_text("same")
    (folder / "0.caption").write_text("same")
    assert prompts(folder)["0.png"] == "same" and not recwarn.list
    (folder / "0.caption").write_text("other")
    with pytest.warns(match=r"0\.png has two captions, and the one that ends in \.txt is taken"):
        assert prompts(folder)["0.png"] == "same"


def test_a_text_that_lies_beside_no_picture_is_skipped_with_a_warning(tmp_path):
    folder = photograph(tmp_path / "dog")
    (folder / "notes.txt").write_text("bought in May")
    with pytest.warns(match=r"skipped .*notes\.txt"):
        assert set(prompts(folder).values()) == {"a sks dog"}


HOSTILE = {
    "an empty file": (b"", "is empty; write the caption into it"),
    "blank lines": (b"\n \r\n", "is empty"),
    "latin-1": ("ein großer Hund".encode("latin-1"), r"not UTF-8 text \(byte 7\); save the caption as UTF-8"),
    "UTF-16": ("a dog".encode("utf-16"), "not UTF-8 text"),
    "a picture": (b"\x89PNG\r\n\x1a\n\x00\x00", "not UTF-8 text"),
    "NUL": (b"a\0dog", "holds control characters"),
    "an escape sequence": (b"\x1b[31mdog", "holds control characters"),
    "a long line": (b"dog " * 10_000, "should have at most 10000"),
    "too many bytes": (b"x" * 70_000, "is too large"),
    "an unknown name": (
        b"a {subject}",
        r"holds \{subject\}, which stands for nothing; there are \{token\} and",
    ),
}


@pytest.mark.parametrize(("content", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_caption_that_is_no_plain_text_is_refused_and_named(content, message, tmp_path):
    folder = photograph(tmp_path / "dog")
    (folder / "1.txt").write_bytes(content)
    with pytest.raises(InputError, match=rf"1\.txt.*{message}") as error:
        prompts(folder)
    assert "\n" not in str(error.value) and str(error.value).isprintable()


def test_a_caption_of_many_megabytes_a_pipe_and_a_device_are_not_read(tmp_path):
    folder = photograph(tmp_path / "dog")
    with (folder / "0.txt").open("wb") as file:
        file.truncate(100 << 20)  # sparse
    with pytest.raises(InputError, match=r"0\.txt is too large"):
        prompts(folder)
    (folder / "0.txt").unlink()
    os.mkfifo(folder / "0.txt")
    with pytest.raises(InputError, match=r"0\.txt can't be read: it is a pipe"):
        prompts(folder)
    (folder / "0.txt").unlink()
    (folder / "0.txt").symlink_to("/dev/zero")
    with pytest.raises(InputError, match=r"0\.txt can't be read"):
        prompts(folder)


def test_links_to_pictures_and_captions_are_followed(tmp_path):
    stored = photograph(tmp_path / "stored")
    (stored / "0.txt").write_text("a {class}")
    folder = tmp_path / "dog"
    folder.mkdir()
    (folder / "a b.png").symlink_to(stored / "0.png")
    (folder / "a b.txt").symlink_to(stored / "0.txt")
    assert prompts(folder) == {"a b.png": "a dog"}


# A list for the folder


def test_an_imagefolder_is_read_as_hugging_face_writes_it(tmp_path, recwarn):
    """https://huggingface.co/docs/datasets/image_dataset#imagefolder: file_name may name pictures in folders."""
    folder = photograph(tmp_path / "data")
    photograph(folder / "sub")
    rows = [
        {"file_name": "0.png", "text": "a {token} {class}"},
        {"file_name": "sub/1.png", "text": "naïve 犬", "label": 3},
        {"file_name": "./2.png", "text": None},
    ]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    expected = {"0.png": "a sks dog", "1.png": "usual", "2.png": "usual", "sub/1.png": "naïve 犬"}
    assert prompts(folder, "usual") == expected
    (folder / "metadata.jsonl").unlink()
    lines = ["file_name,text,label", '0.png,"a {token} {class}",1', "sub/1.png,naïve 犬,2", "2.png,,3"]
    (folder / "metadata.csv").write_text("\n".join(lines), encoding="utf-8-sig")
    assert prompts(folder, "usual") == expected
    (folder / "0.txt").write_text("beside")
    assert prompts(folder, "usual")["0.png"] == "beside"
    assert not recwarn.list


BAD_LISTS = {
    "no JSON": ("{", r"line 1 is damaged"),
    "no object": ("3", 'line 1 has no "file_name"'),
    "no name": ('\n{"text": "a"}', 'line 2 has no "file_name"'),
    "a missing picture": ('{"file_name": "9.png"}', r"line 1 names 9\.png, and .*dog holds no such picture"),
    "a path out": ('{"file_name": "../dog/0.png"}', "is outside the folder"),
    "an absolute path": ('{"file_name": "/etc/passwd"}', "is outside the folder"),
    "NUL": ('{"file_name": "a\\u0000"}', "holds no such picture"),
    "twice": ('{"file_name": "0.png"}\n{"file_name": "./0.png"}', r"line 2 names 0\.png again"),
    "a number": ('{"file_name": "0.png", "text": 5}', "the caption is 5, and should be text"),
    "a half of a letter": ('{"file_name": "0.png", "text": "\\ud800"}', "no text that can be written"),
    "no picture": ('{"file_name": "metadata.jsonl"}', "is no picture file"),
    "nested": ("[" * 2000, "nested too deeply|damaged"),
}


@pytest.mark.parametrize(("text", "message"), BAD_LISTS.values(), ids=BAD_LISTS)
def test_a_wrong_list_is_refused_in_one_line_that_says_where(text, message, tmp_path):
    folder = photograph(tmp_path / "dog")
    (folder / "metadata.jsonl").write_text(text)
    with pytest.raises(InputError, match=message) as error:
        prompts(folder)
    assert "\n" not in str(error.value) and "metadata.jsonl" in str(error.value)


def test_a_damaged_table_and_two_lists_are_refused(tmp_path):
    folder = photograph(tmp_path / "dog")
    (folder / "metadata.csv").write_text('file_name,text\n0.png,"a"b\n')
    with pytest.raises(InputError, match=r"metadata\.csv, line 2 is damaged"):
        prompts(folder)
    (folder / "metadata.jsonl").write_text("")
    with pytest.raises(InputError, match=r"holds metadata\.jsonl and metadata\.csv; take one of them away"):
        prompts(folder)


# {token} and {class}


@pytest.mark.parametrize(
    ("prompt", "class_prompt", "token", "kind"),
    [
        ("a photo of sks dog", "a photo of a dog", "sks", "dog"),
        ("a photo of a sks dog", "a photo of a dog", "sks", "dog"),
        ("a photo of the sks golden retriever", "a photo of a golden retriever", "sks", "golden retriever"),
        ("sks dog", "dog", "sks", "dog"),
        ("photo of zwx qqq person", "a photo of a person", "zwx qqq", "person"),
        ("a photo of sks", "a photo of a dog", "sks", "dog"),
        ("A photo of an Olis Dog.", "a photo of a dog", "Olis", "dog"),
        ("photo of sks dog in snow", "Photo of dog", "sks snow", "dog"),
        ("a dog", "a dog", None, "dog"),
        ("a photo of the dog", "a photo of a dog", None, "dog"),
        ("a photo of sks dog", None, None, None),
        ("a photo of {token} {class}", "a photo of an ox", None, "ox"),
    ],
)
def test_the_words_are_those_that_the_two_prompts_say(prompt, class_prompt, token, kind):
    found = words_of(prompt, class_prompt)
    assert (found["token"], found["class"]) == (token, kind)


def test_a_placeholder_and_its_initializer_are_the_words_where_there_is_no_class_prompt():
    assert words_of("a photo of [V]", None, "[V]", "dog") == {"token": "[V]", "class": "dog"}
    assert words_of("a photo of [V]", "a photo of a cat", "[V]", "dog") == {"token": "[V]", "class": "cat"}


def test_words_that_are_not_known_are_refused_and_other_braces_stay():
    assert fill("{ {} {a|b} {token}}", WORDS, "it") == "{ {} {a|b} sks}"
    with pytest.raises(InputError, match=r"1\.txt holds \{class\}, and the prompts do not say what it is"):
        fill("a {class}", words_of("a sks dog", None), "1.txt")


def test_a_token_that_trains_alone_is_in_every_caption(tmp_path):
    """Without it a row would have no gradient."""
    folder = photograph(tmp_path / "dog")
    (folder / "0.txt").write_text("{token} on grass")
    flags = ["--model", "x", "--instance-data-dir", str(folder), "--instance-prompt", "a photo of [V]"]
    flags += ["--placeholder-token", "[V]", "--initializer-token", "dog", "--train", "token"]
    (subject,) = read_subjects(parse(flags, TINY))
    assert [example.prompt for example in subject.examples] == ["[V] on grass", "a photo of [V]", "a photo of [V]"]
    (folder / "0.txt").write_text("a dog on grass")
    with pytest.raises(InputError, match=r"0\.png does not hold \[V\]; write \{token\} into it"):
        read_subjects(parse(flags, TINY))


# Variation


def options(**given) -> SimpleNamespace:
    return SimpleNamespace(**{"caption_dropout": 0.0, "shuffle_tags": False, "keep_tags": 0} | given)


def generators(count: int):
    return (torch.Generator().manual_seed(seed) for seed in range(count))


def test_captions_are_left_out_in_the_share_that_is_asked_for():
    """1,000 rows at 20 %: the standard deviation is 1.3 %."""
    found = [vary("a dog", generator, options(caption_dropout=0.2)) for generator in generators(1000)]
    assert set(found) == {"", "a dog"} and abs(found.count("") / 1000 - 0.2) < 0.05
    assert vary("a dog", torch.Generator(), options(caption_dropout=1.0)) == ""


def test_tags_are_shuffled_behind_those_that_stay_first():
    tags = "sks dog, grass, , red ball,sun"
    found = [vary(tags, generator, options(shuffle_tags=True, keep_tags=1)) for generator in generators(200)]
    assert {tuple(sorted(prompt.split(", "))) for prompt in found} == {("grass", "red ball", "sks dog", "sun")}
    assert {prompt.split(", ")[0] for prompt in found} == {"sks dog"}
    assert len(set(found)) == 6  # all orders of three
    assert vary(tags, torch.Generator(), options(shuffle_tags=True, keep_tags=9)) == "sks dog, grass, red ball, sun"


def test_a_prompt_stays_as_it_is_without_options_and_a_row_always_gets_the_same_one():
    assert vary("a , b", torch.Generator(), options(keep_tags=3)) == "a , b"
    given = options(shuffle_tags=True, caption_dropout=0.5)
    once, again = ([vary("a, b, c", g, given) for g in generators(20)] for _ in range(2))
    assert once == again
