"""Learned tokens: files of diffusers, A1111 and kohya give the pictures that diffusers makes with them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import pixels
from safetensors.torch import load_file, save_file

import sample
from ldm import InputError, StableDiffusion, tokens

FACTS = Path(__file__).parent.parent / "facts" / "embeddings"
FILES = {
    "learned_embeds.safetensors": "learned_embeds",
    "learned_embeds_2_vectors.safetensors": "learned_embeds_2_vectors",
    "baron_a1111.pt": "learned_embeds_2_vectors",
    "baron_a1111.safetensors": "learned_embeds_2_vectors",
}
PROMPT = "a photo of a red {} in the snow"


@pytest.fixture(scope="module")
def tiny(root) -> Path:
    return root / "weights" / "tiny" / "base"


@pytest.mark.parametrize("file", FILES)
def test_pictures_equal_those_of_diffusers(file, tiny):
    sd = StableDiffusion.load(tiny)
    assert tokens.add_embedding(sd, FACTS / file, "<baron>") == "<baron>"
    (picture,) = sd.generate(PROMPT.format("<baron>"), steps=10, guidance=4.0, seeds=[0])
    assert np.abs(np.asarray(picture).astype(int) - pixels(FACTS / f"{FILES[file]}.png")).max() <= 1


def test_sample_py_adds_tokens_and_says_so_in_the_picture(tmp_path):
    """Files of A1111 name the token by the name of the file."""
    shutil.copy(FACTS / "baron_a1111.pt", tmp_path / "knight.pt")
    files = ("--embedding", str(tmp_path / "knight.pt"), "--embedding", str(FACTS / "learned_embeds.safetensors"))
    how = ("--steps", "10", "--output-dir", str(tmp_path / "out"), "--prompt")
    sample.main([*files, *how, PROMPT.format("KNIGHT")])
    sample.main([*files, *how, PROMPT.format("<baron>")])
    for i, name in enumerate(("learned_embeds_2_vectors", "learned_embeds")):
        path = tmp_path / "out" / f"{i:05d}-0.png"
        assert np.abs(pixels(path) - pixels(FACTS / f"{name}.png")).max() <= 1
        assert Image.open(path).text["ldm.tokens"] == "knight <baron>"
    with pytest.raises(InputError, match="was made with learned tokens knight <baron>: give their --embedding"):
        sample.main(["--from-picture", str(path), "--output-dir", str(tmp_path / "again")])
    sample.main([*files, "--from-picture", str(path), "--output-dir", str(tmp_path / "again")])
    assert (pixels(tmp_path / "again" / "00000-0.png") == pixels(path)).all()


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_a_saved_model_has_its_tokens(layout, tiny, tmp_path):
    sd = StableDiffusion.load(tiny)
    before = sd.state()
    tokens.add_embedding(sd, FACTS / "learned_embeds_2_vectors.safetensors")
    tokens.add_embedding(sd, FACTS / "learned_embeds.safetensors", "[V]")
    path = tmp_path / ("model.safetensors" if layout == "official" else "model")
    sd.save(path, layout)
    again = StableDiffusion.load(path)
    assert again.tokenizer.added == sd.tokenizer.added == {"<baron>": 2, "[V]": 1}
    state, expected = again.state(), sd.state()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)
    prompts = ["<baron> and [v], <Baron>_1"]
    assert torch.equal(again.tokenizer(prompts), sd.tokenizer(prompts))
    if layout == "official":  # for other programs a single file is the model without the token, and one tensor more
        stored = load_file(path)
        assert {name for name in stored if name.startswith("bundle_emb.")} == {
            "bundle_emb.<baron>.string_to_param.*",
            "bundle_emb.[V].string_to_param.*",
        }
        assert all(torch.equal(stored[name], before[name]) for name in before)


def test_diffusers_opens_the_saved_folder_with_the_tokens(tiny, tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="needs the parity extra")
    sd = StableDiffusion.load(tiny)
    tokens.add_embedding(sd, FACTS / "learned_embeds_2_vectors.safetensors")
    sd.save(tmp_path / "model", "diffusers")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(0)
    prompt = PROMPT.format("<baron>")
    # without a loaded file diffusers expands the prompt only if it is asked to
    expanded = pipe.maybe_convert_prompt(prompt, pipe.tokenizer)
    assert pipe.tokenizer(expanded).input_ids == [sd.tokenizer.bos_id, *sd.tokenizer.ids(prompt), sd.tokenizer.eos_id]
    size = {"num_inference_steps": 10, "guidance_scale": 4.0, "height": 64, "width": 64}
    picture = pipe(prompt, **size, generator=generator).images[0]
    assert np.abs(np.asarray(picture).astype(int) - pixels(FACTS / "learned_embeds_2_vectors.png")).max() <= 1
    # and what diffusers writes is read here
    pipe.save_pretrained(tmp_path / "theirs")
    theirs = StableDiffusion.load(tmp_path / "theirs")
    assert theirs.tokenizer.added == {"<baron>": 2}
    assert all(torch.equal(tensor, sd.state()[name]) for name, tensor in theirs.state().items())


@pytest.mark.parametrize("words", ["a [V] dog", "[v][V]_1x", "a[V]", "\u00e9 <Baron>, <baron>_2", "it's [V]."])
def test_ids_equal_those_of_transformers(words, tiny):
    transformers = pytest.importorskip("transformers", reason="needs the parity extra")
    theirs = transformers.CLIPTokenizer.from_pretrained(tiny / "tokenizer")
    theirs.add_tokens(["[V]", "<baron>", "<baron>_1", "<baron>_2"])
    ours = StableDiffusion.load(tiny).tokenizer.plus("[V]").plus("<baron>", 3)
    expanded = words.replace("<Baron>", "<baron> <baron>_1 <baron>_2")  # as diffusers does before it tokenizes
    assert [ours.bos_id, *ours.ids(words), ours.eos_id] == theirs(expanded).input_ids


def test_what_does_not_fit_into_a_prompt_is_named(tiny):
    tokenizer = StableDiffusion.load(tiny).tokenizer.plus("[V]", 20)
    assert tokenizer.dropped("a [V] dog") == ""
    assert tokenizer.dropped("dog [V] and [V] on the beach") == "[V] on the beach"
    with pytest.warns(UserWarning, match="dropped: "):
        ids = tokenizer(["dog [V] and [V] on the beach"])[0].tolist()
    before, first = tokenizer.ids("dog [V] and"), len(tokenizer.vocab)
    room = 30 - len(before)
    assert 0 < room < 20 and ids == [tokenizer.bos_id, *before, *range(first, first + room), tokenizer.eos_id]


class Command:
    """An object whose pickle runs a command when it is loaded in the usual way."""

    def __reduce__(self):
        import os

        return os.system, ("touch pwned",)


def bad_files() -> dict[str, tuple[object, str]]:
    """name -> what is saved, and what is said of it."""
    vectors = torch.zeros(2, 128)
    nan = vectors.clone()
    nan[1, 3] = float("nan")
    return {
        "sd2.safetensors": ({"x1": torch.zeros(1, 1024)}, "is for Stable Diffusion 2, and the model is for a text"),
        "nan.safetensors": ({"x1": nan}, "holds NaN or infinity"),
        "two.safetensors": ({"x1": vectors, "x2": vectors.clone()}, "holds 2 tensors"),
        "sdxl.safetensors": ({"clip_l": vectors, "clip_g": torch.zeros(2, 1280)}, "is for SDXL"),
        "long.safetensors": ({"x1": torch.zeros(76, 128)}, "1 to 75 vectors"),
        "flat.safetensors": ({"x1": torch.zeros(1, 2, 128)}, "1 to 75 vectors"),
        "whole.safetensors": ({"x1": torch.zeros(2, 128, dtype=torch.int64)}, "1 to 75 vectors"),
        "monster.safetensors": ({"emb_params": vectors}, "there is a token monster already"),
        "space.safetensors": ({"a b": vectors}, "can't be a token"),
        "ng deep.safetensors": ({"emb_params": vectors}, "no . or - begins; rename the file"),
        "path.safetensors": ({"../x1": vectors}, "can't be a token"),
        "code.pt": ({"string_to_param": {"*": Command()}}, "holds 0 tensors"),
        "code.bin": (Command(), "holds no embedding"),
        "empty.pt": ({"string_to_param": {}}, "holds 0 tensors"),
    }


@pytest.mark.parametrize("name", bad_files())
def test_a_bad_file_is_refused_in_one_line_and_runs_nothing(name, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, said = bad_files()[name]
    save_file(content, name) if name.endswith(".safetensors") else torch.save(content, name)
    sd = StableDiffusion.load(tiny)
    with pytest.raises(InputError) as error:
        tokens.add_embedding(sd, name)
    assert said in str(error.value) and name in str(error.value) and "\n" not in str(error.value)
    assert not Path("pwned").exists() and sd.tokenizer.added == {} and not sd.text_encoder.text_model.embeddings.learned


def test_a_token_is_added_once(tiny):
    sd = StableDiffusion.load(tiny)
    tokens.add_embedding(sd, FACTS / "learned_embeds_2_vectors.safetensors")
    for name in ("<baron>", "<BARON>", "<baron>_1"):
        with pytest.raises(InputError, match=f"there is a token {name} already"):
            tokens.add_embedding(sd, FACTS / "learned_embeds.safetensors", name)
    tokens.add_embedding(sd, FACTS / "learned_embeds.safetensors", "[V]")
    with pytest.raises(InputError, match=r"there is a token \[v\] already"):  # prompts are read in small letters
        tokens.add_embedding(sd, FACTS / "learned_embeds.safetensors", "[v]")
    with pytest.raises(InputError, match="missing"):
        tokens.add_embedding(sd, "missing.txt")


def test_the_first_files_of_textual_inversion_are_read(tmp_path):
    """Those hold a ParameterDict, which torch pickles as an object."""
    vectors = torch.randn(2, 128)
    tree = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": torch.nn.ParameterDict({"*": vectors})}
    torch.save(tree, tmp_path / "cat-toy.pt")
    from ldm.formats import read_embedding

    token, found = read_embedding(tmp_path / "cat-toy.pt")
    assert token == "cat-toy" and torch.equal(found, vectors)
