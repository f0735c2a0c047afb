"""The text in a picture's file: other programs read it, and --from-picture makes the same picture from it.

The grammar below is A1111's, modules/infotext_utils.py of v1.10 (its regular expressions, and what it does with them),
and the names of samplers are those of its modules/sd_samplers_kdiffusion.py and sd_samplers_timesteps.py.
"""

import hashlib
import json
import re
import shutil
import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import sample
from ldm import InputError, StableDiffusion
from ldm.formats import Adapter, Pair, picture_text, write_embedding, write_lora
from ldm.runtime import cli
from ldm.samplers import SAMPLERS

RE_PARAM = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
RE_IMAGESIZE = re.compile(r"^(\d+)x(\d+)$")
A1111_SAMPLERS = {"DDIM", "PLMS", "DDPM", "Euler", "Euler a", "Heun", "DPM++ 2M", "DPM++ 2M Karras"}


def a1111(text: str) -> dict[str, str]:
    """What A1111's PNG info shows of a text."""
    *lines, last = text.strip().split("\n")
    if len(RE_PARAM.findall(last)) < 3:
        lines, last = [*lines, last], ""
    shown = {"Prompt": [], "Negative prompt": []}
    part = "Prompt"
    for line in map(str.strip, lines):
        if line.startswith("Negative prompt:"):
            part, line = "Negative prompt", line[16:].strip()
        shown[part].append(line)
    shown = {name: "\n".join(part) for name, part in shown.items()}
    for name, value in RE_PARAM.findall(last):
        if value[:1] == '"' == value[-1:]:
            value = json.loads(value)
        if size := RE_IMAGESIZE.match(value):
            shown |= {f"{name}-1": size[1], f"{name}-2": size[2]}
        else:
            shown[name] = value
    return shown


PROMPTS = [
    "a photo of a cat",
    "a cat, red, (very: large:1.2), <lora:x:0.8>, Steps: 3, Sampler: none, Seed: 9",
    'a "quoted" cat, \\"twice\\", "',
    "first line\nsecond: line, more\n\nSteps: 20, Sampler: Euler, CFG scale: 7",
    "café, größer: £5",
    "赤い猫、雪の中\nкошка: снег, 🐈",
    "",
]
FACTS = {
    "prompt": "",
    "negative_prompt": "",
    "seed": 2**63 - 2,
    "sampler": "ddim",
    "steps": 25,
    "guidance_scale": 4.0,
    "guidance_rescale": 0.0,
    "eta": 0.0,
    "width": 64,
    "height": 48,
    "model": "f" * 64,
    "model_name": "v1-5",
    "model_hash": "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa",
}


@pytest.mark.parametrize("negative", PROMPTS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a1111_reads_every_field(prompt, negative):
    text = picture_text.to_text(FACTS | {"prompt": prompt, "negative_prompt": negative})
    assert a1111(text["parameters"]) == {
        "Prompt": prompt,
        "Negative prompt": negative,
        "Steps": "25",
        "Sampler": "DDIM",
        "CFG scale": "4.0",
        "Seed": str(2**63 - 2),
        "Size-1": "64",
        "Size-2": "48",
        "Model hash": "6ce0161689",
        "Model": "v1-5",
        "RNG": "CPU",
        "Version": "dreambooth-ldm",
    }


@pytest.mark.parametrize("name", ["a, b: c", 'x"y', '"quoted"', "犬\\n, 猫", " spaces "])
def test_a1111_reads_any_name_of_a_model(name):
    shown = a1111(picture_text.to_text(FACTS | {"model_name": name})["parameters"])
    assert shown["Model"] == name and shown["RNG"] == "CPU"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_have_a1111s_names(sampler):
    more = {"sampler": sampler, "eta": 0.5, "strength": 0.6}
    shown = a1111(picture_text.to_text(FACTS | more)["parameters"])
    assert shown["Sampler"] in A1111_SAMPLERS and shown["Denoising strength"] == "0.6"
    assert shown.get("Eta DDIM") == ("0.5" if sampler == "ddim" else None)
    assert len(set(picture_text.SAMPLER_NAMES.values())) == len(SAMPLERS)


@pytest.fixture
def png(tmp_path):
    """png(entries): the path of a small PNG file with these text entries."""

    def make(entries: dict[str, str], name: str = "given.png"):
        info = PngInfo()
        for key, value in entries.items():
            info.add_text(key, value)
        Image.new("RGB", (8, 8)).save(tmp_path / name, pnginfo=info)
        return tmp_path / name

    return make


@pytest.mark.parametrize("prompt", PROMPTS)
def test_both_forms_are_read_back(prompt, png):
    facts = FACTS | {"prompt": prompt, "negative_prompt": prompt + ", fog", "zero_terminal_snr": True, "dtype": "bf16"}
    text = picture_text.to_text(facts)
    assert not {"prompt", "workflow"} & text.keys()  # which ComfyUI takes for JSON
    assert picture_text.read_text(png(text)) == facts
    known = {name: facts[name] for name in ("prompt", "negative_prompt", "seed", "sampler", "steps", "guidance_scale")}
    known |= {"width": 64, "height": 48, "model_name": "v1-5", "model_hash": FACTS["model_hash"][:10]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert picture_text.read_text(png({"parameters": text["parameters"]})) == known


def test_a_text_of_a1111_is_followed_as_far_as_it_goes(png):
    text = (
        "masterpiece, 1girl\nin snow\nNegative prompt: lowres, bad\nhands\nSteps: 20, Sampler: DPM++ 2M, "
        'Schedule type: Karras, CFG scale: 7, Seed: 965400086, Size: 512x768, Model hash: 45dee52b1f, Model: "a, b", '
        'Clip skip: 2, Lora hashes: "x: 12, y: 34", Version: v1.10.1'
    )
    with pytest.warns(UserWarning, match=r"its Clip skip, Lora hashes, noise \(RNG is not CPU\) can't be followed"):
        found = picture_text.read_text(png({"parameters": text}))
    assert found == {
        "prompt": "masterpiece, 1girl\nin snow",
        "negative_prompt": "lowres, bad\nhands",
        "steps": 20,
        "sampler": "dpmpp_2m_karras",
        "guidance_scale": 7.0,
        "seed": 965400086,
        "width": 512,
        "height": 768,
        "model_hash": "45dee52b1f",
        "model_name": "a, b",
    }
    # Since 1.9 a schedule that A1111 chooses by itself is Karras for this sampler, so that ours says which one it is.
    for kind, sampler in (("Automatic", "dpmpp_2m_karras"), ("Uniform", "dpmpp_2m")):
        text = f"a\nSteps: 20, Sampler: DPM++ 2M, Schedule type: {kind}, CFG scale: 7, RNG: CPU"
        assert picture_text.read_text(png({"parameters": text}))["sampler"] == sampler
    text = picture_text.to_text(FACTS | {"sampler": "dpmpp_2m"})["parameters"]
    assert "Sampler: DPM++ 2M, Schedule type: Uniform, " in text
    assert picture_text.read_text(png({"parameters": "a cat, red: no settings"}))["prompt"] == "a cat, red: no settings"


# --from-picture


@pytest.fixture
def run(saved, tmp_path, monkeypatch, capsys):
    """run(flags...) runs sample.py with the small model. Returns the files' bytes by name, and clears the folder."""
    monkeypatch.chdir(tmp_path)

    def main(*flags: object, model: object = saved["official"]) -> dict[str, bytes]:
        sample.main(["--model", str(model), *map(str, flags)])
        made = {path.name: path.read_bytes() for path in (tmp_path / "samples").iterdir()}
        shutil.rmtree(tmp_path / "samples")
        capsys.readouterr()
        return made

    return main


SETTINGS = {
    "a batch": ["--prompt", "a cat", "--prompt", "赤い: snow,\nfog", "--num-images", 2, "--batch-size", 3, "--seed", 5],
    "all settings": "--prompt a --sampler ddim --eta 0.7 --guidance-scale 3.25 --guidance-rescale 0.5 --width 48 "
    "--negative-prompt fog --dtype bf16 --prediction-type v --zero-terminal-snr".split(),
}


@pytest.mark.parametrize("flags", SETTINGS.values(), ids=SETTINGS)
def test_a_picture_is_made_again_with_the_same_bits_and_text(flags, run, tmp_path):
    made = run("--steps", 3, *flags)
    for i, (name, content) in enumerate(made.items()):
        (tmp_path / name).write_bytes(content)
        again = run("--from-picture", name)
        assert [*again.values()] == [content], i


@pytest.mark.parametrize("sampler", ["euler_a", "dpmpp_2m_karras"])
def test_a1111s_form_alone_gives_the_same_picture(sampler, run, png, tmp_path):
    (content,) = run("--prompt", 'a "cat", red: very\nin snow', "--steps", 3, "--sampler", sampler).values()
    (tmp_path / "made.png").write_bytes(content)
    picture = Image.open(tmp_path / "made.png")
    png({"parameters": picture.text["parameters"]}, "text.png")
    (again,) = run("--from-picture", "text.png").values()
    (tmp_path / "again.png").write_bytes(again)
    assert np.array_equal(np.asarray(picture), np.asarray(Image.open(tmp_path / "again.png")))


def test_flags_override_the_picture(run, png, tmp_path, saved):
    (tmp_path / "made.png").write_bytes(run("--prompt", "a cat", "--steps", 3, "--seed", 4)["00000-4.png"])
    made = run("--from-picture", "made.png", "--prompt", "a dog", "--seed", "7", "--num-images", "2", "--steps", 2)
    assert sorted(made) == ["00000-7.png", "00001-8.png"]
    (tmp_path / "other.png").write_bytes(made["00001-8.png"])
    said = Image.open(tmp_path / "other.png").text
    assert (said["ldm.prompt"], said["ldm.steps"], said["ldm.batch_size"]) == ("a dog", "2", "1")
    unknown = png({"parameters": "a cat\nSteps: 3, Sampler: UniPC, Seed: 4, RNG: CPU"})
    with pytest.raises(InputError, match="unknown sampler 'UniPC'; there are.*not given are those of.*given.png"):
        run("--from-picture", unknown)
    run("--from-picture", unknown, "--sampler", "heun")


def test_another_model_is_named_in_a_warning(run, random_model, tmp_path):
    (tmp_path / "made.png").write_bytes(run("--prompt", "a cat", "--steps", 1)["00000-0.png"])
    random_model(1).save(tmp_path / "other.safetensors")
    with pytest.warns(UserWarning, match=r"made\.png was made with another model, model \(\w{64}\); this one is"):
        run("--from-picture", "made.png", model="other.safetensors")


@pytest.fixture
def additions(saved, tmp_path):
    """Two LoRAs of the same name and two embeddings of the same token, in the folders "a" and "b"."""
    layers = StableDiffusion.load(saved["official"]).lora_layers()
    name, layer = next((name, layer) for name, layer in layers.items() if "attn2_to_k" in name)
    for i, folder in enumerate("ab"):
        (tmp_path / folder).mkdir()
        pair = Pair(torch.ones(1, layer.in_features), torch.full((layer.out_features, 1), 0.1 * (i + 1)), 1.0)
        write_lora(tmp_path / folder / "lora.safetensors", Adapter({name: pair}).tensors(), {"format": "pt"})
        write_embedding(tmp_path / folder / "<v>.safetensors", "<v>", torch.full((1, 24), i + 1.0), {})


def test_loras_and_tokens_are_in_the_text_by_name_and_by_the_hashes_that_a1111_shows(additions, run, tmp_path):
    flags = ("--lora", "a/lora.safetensors:0.7", "--lora", "b/lora.safetensors", "--embedding", "a/<v>.safetensors")
    (tmp_path / "made.png").write_bytes(run("--prompt", "a <v>", "--steps", 1, *flags)["00000-0.png"])
    contents = [(tmp_path / folder / "lora.safetensors").read_bytes() for folder in "ab"]
    behind = [content[8 + int.from_bytes(content[:8], "little") :] for content in contents]
    hashes = [hashlib.sha256(content).hexdigest()[:12] for content in behind]  # A1111's addnet_hash_safetensors
    token = hashlib.sha256((tmp_path / "a" / "<v>.safetensors").read_bytes()).hexdigest()[:12]
    said = Image.open(tmp_path / "made.png").text
    shown = a1111(said["parameters"])
    assert shown["Lora hashes"] == f"lora: {hashes[0]}, lora: {hashes[1]}" and hashes[0] != hashes[1]
    assert shown["TI hashes"] == f"<v>: {token}"
    assert said["ldm.lora"] == "lora.safetensors:0.7, lora.safetensors:1" and said["ldm.tokens"] == "<v>"
    (again,) = run("--from-picture", "made.png", *flags).values()
    assert again == (tmp_path / "made.png").read_bytes()
    shutil.copy(tmp_path / "a" / "lora.safetensors", tmp_path / "renamed.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run("--from-picture", "made.png", "--lora", "renamed.safetensors:0.7", *flags[2:])


def test_a_picture_of_an_older_version_has_no_hashes(additions, run, png, tmp_path):
    made = run("--prompt", "a", "--steps", 1, "--lora", "a/lora.safetensors")
    (tmp_path / "made.png").write_bytes(made["00000-0.png"])
    text = Image.open(tmp_path / "made.png").text
    png({key: value for key, value in text.items() if key != "ldm.lora_hashes"}, "old.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run("--from-picture", "old.png", "--lora", "a/lora.safetensors")
    with pytest.warns(UserWarning, match=r"made with lora\.safetensors:1, and this one with lora\.safetensors:0\.5 = "):
        run("--from-picture", "old.png", "--lora", "a/lora.safetensors:0.5")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("a/lora.safetensors:0.7", "a/<v>.safetensors"), r"made with lora\.safetensors:0\.1 = lora: \w{12}, and this"),
        (("b/lora.safetensors:0.1", "a/<v>.safetensors"), r"lora: \w{12}, and this one with lora\.safetensors:0\.1 = "),
        (("a/lora.safetensors:0.1", "b/<v>.safetensors"), r"made with <v> = <v>: \w{12}, and this one with <v> = "),
    ],
)
def test_another_scale_lora_or_token_is_named_in_a_warning(flags, said, additions, run, tmp_path):
    made = run(
        "--prompt", "a <v>", "--steps", 1, "--lora", "a/lora.safetensors:0.1", "--embedding", "a/<v>.safetensors"
    )
    (tmp_path / "made.png").write_bytes(made["00000-0.png"])
    with pytest.warns(UserWarning, match=said) as warned:
        run("--from-picture", "made.png", "--lora", flags[0], "--embedding", flags[1])
    assert len(warned) == 1
    (tmp_path / "plain.png").write_bytes(run("--prompt", "a <v>", "--steps", 1)["00000-0.png"])
    with pytest.warns(UserWarning, match=r"plain\.png was made with no LoRA, and this one with lora"):
        run("--from-picture", "plain.png", "--lora", "a/lora.safetensors")


def test_a_picture_from_a_picture_asks_for_it(run, png, tmp_path):
    start = png({})
    flags = ("--prompt", "a cat", "--steps", 4, "--init-image", start, "--strength", "0.5")
    (tmp_path / "made.png").write_bytes(run(*flags)["00000-0.png"])
    with pytest.raises(InputError, match=r"made\.png was made from a picture given\.png: give it as --init-image"):
        run("--from-picture", "made.png")
    again = run("--from-picture", "made.png", "--init-image", start)
    assert [*again.values()] == [(tmp_path / "made.png").read_bytes()]


def test_a_strength_of_a1111_asks_for_the_picture_that_its_text_does_not_name(run, png, tmp_path):
    picture = png({"parameters": "a\nSteps: 2, Sampler: DDIM, Seed: 1, Denoising strength: 0.5, Size: 16x16, RNG: CPU"})
    with pytest.warns(UserWarning, match="has a strength: if it was made from a picture, give that as --init-image"):
        run("--from-picture", picture)
    with warnings.catch_warnings(action="error"):
        run("--from-picture", picture, "--init-image", picture)


OURS = {"ldm.prompt": "a cat", "ldm.steps": "3", "ldm.seed": "1"}
WRONG = {
    "nothing": ({}, "does not say how it was made"),
    "foreign": ({"Software": "GIMP"}, "does not say how it was made"),
    "steps": (OURS | {"ldm.steps": "many"}, "says steps 'many', which should be a whole number"),
    "digits": (OURS | {"ldm.seed": "9" * 100_000}, "says seed '9{80}', which should be a whole number"),
    "too many steps": (OURS | {"ldm.steps": "5000"}, "steps must be 1 to 999, not 5000"),
    "no batch": (OURS | {"ldm.batch_size": "0"}, "batch_size '0', which should be 1 or more"),
    "batch": (OURS | {"ldm.batch_size": "99999"}, "--batch-size 99999 is too much"),
    "nan": (OURS | {"ldm.guidance_scale": "nan"}, "--guidance-scale nan is not a number"),
    "text": (OURS | {"ldm.guidance_scale": "strong"}, "guidance_scale 'strong', which should be a number"),
    "type": (OURS | {"ldm.dtype": "int8"}, "dtype 'int8', which should be one of fp32"),
    "prediction": (OURS | {"ldm.prediction_type": "x0"}, "prediction_type 'x0', which should be one of eps, v"),
    "size": (OURS | {"ldm.width": "1000000000"}, "--width 1000000000 is too much"),
    "odd size": (OURS | {"ldm.height": "0"}, "height 0 is not a positive multiple"),
    "sampler": (OURS | {"ldm.sampler": "magic\n"}, "unknown sampler 'magic"),
    "prompt": (OURS | {"ldm.prompt": "a" * 1_000_000}, "a prompt has 1000000 letters"),
    "long": (OURS | {"ldm.prompt": "a" * 2_000_000}, "its text ldm.prompt is longer than"),
    "a1111": ({"parameters": "a\nSteps: 2, Sampler: DDIM, Seed: -1"}, "seed '-1', which should be a whole number"),
    "a1111 size": ({"parameters": "a\nSteps: 2, Sampler: DDIM, Size: 64"}, "height '', which should be a whole number"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_damaged_or_malicious_text_is_refused_in_one_line(name, png, saved, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    entries, words = WRONG[name]
    path = png(entries)
    with pytest.raises(SystemExit) as end, cli.reported("sample.py"):
        sample.main(["--model", str(saved["official"]), "--from-picture", str(path)])
    said = capsys.readouterr().err
    assert end.value.code == 2 and re.fullmatch(rf"sample\.py: error: .*{words}.*\n", said), said
    assert len(said) < 600 and not (tmp_path / "samples").exists()


def test_files_that_are_no_png_are_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    (tmp_path / "empty.png").touch()
    Image.new("RGB", (64, 64)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:60])
    for name in ("a.jpg", "empty.png", "cut.png"):
        with pytest.raises(InputError, match=rf"{name} can't be read as a PNG picture"):
            picture_text.read_text(tmp_path / name)
    with pytest.raises(InputError, match="absent.png can't be read"):
        picture_text.read_text(tmp_path / "absent.png")


@pytest.mark.parametrize("part", ["a", "a:", 'a:"', 'a: "b\\",', "a b-c/", ", ", "\\", 'x: "', "ab:,"])
def test_the_last_line_is_read_in_linear_time(part, png):
    """A1111's own expression takes time that grows with the square of such a line."""
    path = png({"parameters": "a cat\n" + part * (1_000_000 // len(part))})
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        picture_text.read_text(path)
    assert time.perf_counter() - began < 3
