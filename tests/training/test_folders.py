"""What a folder says beside captions: masks, focal points, kohya's folders, and several subjects in a settings file."""

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from runs import LATEST, SMALL, call, metrics, photograph, refused

import train
from ldm import InputError
from ldm.data import read_subjects
from ldm.data.examples import read_examples
from ldm.data.focus import camera_focus
from ldm.data.latents import centre_of
from ldm.data.masks import load_mask
from ldm.images import fit
from ldm.training import parse
from ldm.training.continuity import names_of

RUNS = ("captions", "kohya", "two")  # of README
PROMPTS = ("--instance-prompt", "a photo of sks dog", "--class-prompt", "a photo of a dog")


def subjects(*flags: object) -> list:
    return read_subjects(parse(["--model", "x", *map(str, flags)], train.TINY))


def picture(path: Path, size=(32, 32), colour=(200, 100, 50), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


# Masks


@pytest.mark.parametrize("name", ["0-mask.png", "0-masklabel.png", "0-mask.jpg", "0-mask.WEBP"])
def test_a_mask_belongs_to_its_photograph_and_is_none_itself(name, tmp_path, recwarn):
    folder = photograph(tmp_path / "dog")
    Image.new("L", (32, 32), 255).save(folder / name, format="PNG")
    examples = read_examples(folder, "a dog")
    assert [e.picture.path.name for e in examples] == ["0.png", "1.png", "2.png"]
    assert [e.mask.path.name if e.mask else None for e in examples] == [name, None, None]
    assert not recwarn.list


def test_a_mask_beside_no_photograph_is_a_photograph(tmp_path):
    folder = photograph(tmp_path / "dog")
    shutil.copy(folder / "0.png", folder / "zorro-mask.png")
    assert [e.picture.path.name for e in read_examples(folder, "a dog")] == [
        "0.png",
        "1.png",
        "2.png",
        "zorro-mask.png",
    ]


def test_a_mask_is_cut_as_its_photograph_and_averaged_over_each_latent(tmp_path):
    """The mask is the picture's brightness, so what the cut keeps of both has to agree."""
    ramp = np.linspace(0, 255, 64)[None].repeat(32, 0).round().astype(np.uint8)
    folder = tmp_path / "dog"
    folder.mkdir()
    for name in ("0.png", "0-mask.png"):
        Image.fromarray(ramp).save(folder / name)
    (folder / "0.json").write_text('{"focus": [0.9, 0.5]}')
    (example,) = read_examples(folder, "a dog")
    for size, centre in (((32, 32), centre_of(example, (32, 32))), ((32, 32), (0.2, 0.0)), ((64, 32), (0.5, 0.5))):
        shape = (4, size[1] // 8, size[0] // 8)
        pixels = np.asarray(fit(example.picture, *size, centre))[..., 0] / 255
        means = pixels.reshape(shape[1], 8, shape[2], 8).mean((1, 3))
        mask = load_mask(example, size, centre, shape)
        assert (mask.shape, mask.dtype) == ((1, *shape[1:]), torch.float32)
        np.testing.assert_allclose(mask[0], means, atol=1e-6)


def test_a_mask_may_be_smaller_in_any_mode_and_transparent_is_black(tmp_path):
    folder, half = tmp_path / "dog", np.zeros((16, 16), np.uint8)
    half[:, :8] = 255
    masks = {
        "L": Image.fromarray(half),
        "1": Image.fromarray(half).convert("1"),
        "I;16": Image.fromarray(half.astype(np.uint16) * 257),
        "P": Image.fromarray(half).convert("RGB").quantize(2),
        "RGBA": Image.merge("RGBA", [Image.new("L", (16, 16), 255)] * 3 + [Image.fromarray(half)]),
    }
    picture(folder / "0.png", (64, 64))
    for mode, mask in masks.items():
        mask.save(folder / "0-mask.png")
        assert Image.open(folder / "0-mask.png").mode == mode
        (example,) = read_examples(folder, "a dog")
        found = load_mask(example, (64, 64), (0.5, 0.5), (4, 8, 8))[0]
        assert found[:, :3].min() > 0.97 and found[:, 5:].max() < 0.03, mode


def test_without_a_mask_the_loss_counts_everywhere(tmp_path):
    example = read_examples(photograph(tmp_path / "dog"), "a dog")[0]
    assert torch.equal(load_mask(example, (32, 16), (0.5, 0.5), (4, 2, 4)), torch.ones(1, 2, 4))


def test_alpha_masks_takes_the_alpha_channel_where_there_is_no_file(tmp_path):
    folder, half = photograph(tmp_path / "dog"), np.zeros((32, 32), np.uint8)
    half[:16] = 255
    image = Image.open(folder / "0.png").convert("RGBA")
    image.putalpha(Image.fromarray(half))
    image.save(folder / "0.png")
    flags = ("--instance-data-dir", folder, *PROMPTS)
    assert subjects(*flags)[0].examples[0].mask is None
    first, second, _ = subjects(*flags, "--alpha-masks")[0].examples
    assert first.mask is first.picture and second.mask is None
    mask = load_mask(first, (32, 32), (0.5, 0.5), (4, 4, 4))[0]
    assert mask[:1].min() > 0.97 and mask[3:].max() < 0.03
    Image.new("L", (32, 32), 255).save(folder / "0-mask.png")
    assert subjects(*flags, "--alpha-masks")[0].examples[0].mask.path.name == "0-mask.png"
    (folder / "0.png").unlink()
    (folder / "0-mask.png").unlink()
    with pytest.raises(InputError, match="--alpha-masks: no photograph has an alpha channel"):
        subjects(*flags, "--alpha-masks")


def test_a_mask_of_another_shape_a_black_one_a_damaged_one_and_two_are_refused(tmp_path):
    folder = tmp_path / "dog"
    picture(folder / "0.png", (40, 32))

    def message() -> str:
        with pytest.raises(InputError, match="0-mask") as error:
            (example,) = read_examples(folder, "a dog")
            load_mask(example, (32, 32), (0.5, 0.5), (4, 4, 4))
        return str(error.value)

    mask = picture(folder / "0-mask.png", (32, 40))
    assert message().endswith(
        "0-mask.png has 32 x 40 pixels, and 0.png has 40 x 32; a mask should have its photograph's size, or that shape"
    )
    picture(mask, (40, 32), (1, 1, 1))
    assert "a mask is white, 255, where the subject is, and its brightest pixel is 1" in message()
    mask.write_bytes(b"nothing")
    assert "0-mask.png can't be read as a picture" in message()
    shutil.copy(picture(mask, (40, 32)), folder / "0-masklabel.png")
    assert "has two masks, 0-mask.png and 0-masklabel.png; take one away" in message()


# Focal points


def marked(size: tuple[int, int], at: tuple[float, float]) -> Image.Image:
    """A black picture with a white spot."""
    image = Image.new("RGB", size)
    x, y = round(at[0] * size[0]), round(at[1] * size[1])
    image.paste("white", (x - 3, y - 3, x + 3, y + 3))
    return image


def spot(image: Image.Image) -> tuple[float, float]:
    """Where the spot is, from 0 to 1."""
    light = np.asarray(image.convert("L"), dtype=float)
    light[light < 100] = 0
    y, x = np.indices(light.shape)
    return (x + 0.5).ravel() @ light.ravel() / light.sum() / light.shape[1], (
        (y + 0.5).ravel() @ light.ravel() / light.sum() / light.shape[0]
    )


def test_the_cut_is_around_the_focus_that_a_file_says(tmp_path):
    folder = tmp_path / "dog"
    folder.mkdir()
    for name, at in (("wide", (0.7, 0.5)), ("edge", (0.97, 0.5)), ("tall", (0.5, 0.3))):
        marked((80, 200) if name == "tall" else (200, 80), at).save(folder / f"{name}.png")
        (folder / f"{name}.json").write_text(json.dumps({"focus": at, "tags": ["dog"]}))
    flags = ("--instance-data-dir", folder, *PROMPTS)
    found = {e.picture.path.stem: e for e in subjects(*flags)[0].examples}
    for name, expected in (("wide", 0.5), ("tall", 0.5), ("edge", 1 - 0.03 * 200 / 80)):
        example = found[name]
        x, y = spot(fit(example.picture, 80, 80, centre_of(example, (80, 80))))
        assert (y if name == "tall" else x) == pytest.approx(expected, abs=0.02), name
    assert {e.focus for e in subjects(*flags, "--center-crop")[0].examples} == {None}


@pytest.mark.parametrize("tag", [0x9214, 0xA214])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_cameras_focal_point_turns_with_the_picture(orientation, tag, tmp_path):
    """EXIF 2.3: SubjectArea and SubjectLocation are of the picture as it is stored. Pillow turns the picture itself."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif.get_ifd(0x8769)[tag] = (150, 20, 30, 40) if tag == 0x9214 else (150, 20)
    marked((200, 80), (0.75, 0.25)).save(tmp_path / "0.jpg", exif=exif, quality=95)
    (example,) = read_examples(tmp_path, "a dog")
    seen = spot(ImageOps.exif_transpose(Image.open(tmp_path / "0.jpg")))
    assert example.focus == pytest.approx(seen, abs=0.01)


def test_focal_points_that_make_no_sense_are_left_out(tmp_path):
    def focus(point, size=None):
        exif = Image.Exif()
        tags = exif.get_ifd(0x8769)
        tags[0x9214] = point
        if size:
            tags[0xA002], tags[0xA003] = size
        Image.new("RGB", (200, 80)).save(tmp_path / "0.jpg", exif=exif)
        return camera_focus(read_examples(tmp_path, "a dog")[0].picture)

    assert focus((150, 20)) == (0.75, 0.25)
    assert focus((1500, 200), (2000, 800)) == (0.75, 0.25)  # resized since, with its tags as they were
    assert focus((150, 20), (800, 800)) is None  # cut since
    assert (
        focus((0, 0)) is None
        and focus((900, 20)) is None
        and focus((150,)) is None
        and focus((150, 20), (0, 0)) is None
    )


@pytest.mark.parametrize(
    "text", ['{"focus": [2, 0]}', '{"focus": "left"}', '{"focus": [NaN, 0]}', '{"focus": [0.5]}', "{"]
)
def test_a_wrong_focus_is_refused_and_other_programs_notes_are_not(text, tmp_path, recwarn):
    folder = photograph(tmp_path / "dog")
    (folder / "0.json").write_text(text)
    with pytest.raises(InputError, match=r"0\.json"):
        read_examples(folder, "a dog")
    for other in ('{"tags": "dog"}', "[1, 2]"):
        (folder / "0.json").write_text(other)
        assert read_examples(folder, "a dog")[0].focus is None
    assert not recwarn.list


# kohya's folders


@pytest.fixture
def kohya(tmp_path) -> Path:
    """A data-set folder as sd-scripts' documentation has it: train/<repeats>_<words>/ and reg/1_<class>/."""
    for name, count in (("10_sks dog", 3), ("2_zwx big cat", 2), ("4_sks dog", 1)):
        folder = photograph(tmp_path / "train" / name, [(32, 32)] * count)
        (folder / "0.npz").write_bytes(b"latents that its programs keep")
    (tmp_path / "train" / "10_sks dog" / "1.caption").write_text("{token} {class}, on the grass")
    for name in ("1_dog", "1_big cat"):
        photograph(tmp_path / "reg" / name)
    return tmp_path


def test_kohyas_folders_are_subjects_with_repeats_prompts_and_classes(kohya, recwarn):
    dog, cat = subjects("--train-data-dir", kohya / "train", "--reg-data-dir", kohya / "reg")
    assert (dog.name, dog.prompt, dog.class_prompt) == ("sks dog", "sks dog", "dog")
    assert (cat.name, cat.prompt, cat.class_prompt) == ("zwx big cat", "zwx big cat", "big cat")
    assert [e.repeats for e in dog.examples] == [10, 10, 10, 4] and [e.repeats for e in cat.examples] == [2, 2]
    assert (dog.weight, cat.weight) == (34, 4)  # rows of an epoch there
    assert [e.prompt for e in dog.examples] == ["sks dog", "sks dog, on the grass", "sks dog", "sks dog"]
    assert [Path(s.class_data_dir).name for s in (dog, cat)] == ["1_dog", "1_big cat"]
    assert not recwarn.list


def test_one_folder_of_kohyas_is_the_usual_single_subject(kohya):
    shutil.rmtree(kohya / "train" / "2_zwx big cat")
    shutil.rmtree(kohya / "train" / "4_sks dog")
    settings = parse(["--model", "x", "--train-data-dir", str(kohya / "train")], train.TINY)
    assert settings.subjects == () and Path(settings.instance_data_dir).name == "10_sks dog"
    assert (settings.instance_prompt, settings.class_prompt) == ("sks dog", "dog")
    tiny = parse(["--train-data-dir", str(kohya / "train"), "--class-prompt", "a photo of a dog"], train.TINY)
    assert (tiny.instance_prompt, tiny.class_prompt, tiny.resolution) == ("sks dog", "a photo of a dog", 64)


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        (
            "train/10_sks dog",
            r"10_sks dog is one of kohya's folders; give the folder that it is in, .*train, or a prompt",
        ),
        (".", r"holds no picture; .*train has 10_sks dog in it: give .*train"),
        ("train/10_sks dog/empty", "holds no picture; put the photographs"),
        (
            "more/above",
            r"above holds no picture, and .*above/photographs does; give that folder, or name .* 10_sks dog",
        ),
        ("more/mixed", r"mixed holds photographs, and 3_sks dog too; move"),
        ("more/single", r"subject 'sks' has no class_prompt|--class-prompt is missing"),
    ],
)
def test_the_wrong_level_of_folders_is_refused_with_the_right_one(folder, message, kohya):
    (kohya / "train" / "10_sks dog" / "empty").mkdir()
    for name in ("above/photographs", "mixed", "mixed/3_sks dog", "single/3_sks"):
        photograph(kohya / "more" / name)
    shutil.rmtree(kohya / "reg")
    flags = (
        ("--instance-prompt", "a", "--class-prompt", "b")
        if folder.endswith("empty") or folder.endswith("above")
        else ()
    )
    with pytest.raises(InputError, match=message) as error:
        subjects("--train-data-dir", kohya / folder, *flags)
    assert "\n" not in str(error.value)


def test_the_embedded_models_prompt_is_not_taken_for_one_of_kohyas_folders(kohya):
    with pytest.raises(InputError, match="10_sks dog is one of kohya's folders; give the folder that it is in"):
        parse(["--train-data-dir", str(kohya / "train" / "10_sks dog")], train.TINY)
    prompts = ["--instance-prompt", "a photo of sks dog"]
    assert parse(["--train-data-dir", str(kohya / "train" / "10_sks dog"), *prompts], train.TINY).subjects == ()


def test_class_folders_that_fit_no_class_and_a_prompt_beside_kohyas_are_refused(kohya):
    shutil.move(kohya / "reg" / "1_big cat", kohya / "reg" / "1_cow")
    with pytest.raises(InputError, match=r"reg holds 1_cow, 1_dog, and not one folder for 'big cat'"):
        subjects("--train-data-dir", kohya / "train", "--reg-data-dir", kohya / "reg")
    with pytest.raises(InputError, match="leave out --instance-prompt"):
        subjects("--train-data-dir", kohya / "train", "--instance-prompt", "a dog")


# [[subjects]]


def config(folder: Path, text: str) -> tuple:
    (folder / "two.toml").write_text(text)
    return ("--config", folder / "two.toml")


TWO = """class_prompt = "a photo of a dog"
validation_prompt = ["a photo of {token} {class} in the snow"]
[[subjects]]
instance_data_dir = "rex"
instance_prompt = "a photo of sks dog"
weight = 2
[[subjects]]
name = "tom"
instance-data-dir = "cat"
instance_prompt = "a photo of zwx cat"
class_prompt = "a photo of a cat"
num_class_images = 3
"""


def test_subjects_of_a_settings_file_have_their_own_keys_and_the_files_defaults(tmp_path):
    for name in ("rex", "cat"):
        photograph(tmp_path / name)
    rex, tom = subjects(*config(tmp_path, TWO), "--num-class-images", 7)
    assert (rex.name, rex.class_prompt, rex.num_class_images, rex.weight) == ("rex", "a photo of a dog", 7, 2.0)
    assert (tom.name, tom.class_prompt, tom.num_class_images, tom.weight) == ("tom", "a photo of a cat", 3, 1.0)
    settings = parse(list(map(str, config(tmp_path, TWO))), train.TINY)  # the embedded model's subject is left out
    assert settings.instance_data_dir is None and len(settings.subjects) == 2
    assert settings.validation_prompt == ("a photo of sks dog in the snow", "a photo of zwx cat in the snow")
    assert hash(settings) == hash(parse(list(map(str, config(tmp_path, TWO))), train.TINY))


WRONG = {
    "an unknown key": (("weight = 2", "wieght = 2"), r"\[\[subjects\]\] 1 has the key 'wieght'; there are name"),
    "no prompt": (('instance_prompt = "a photo of sks dog"', ""), r"\[\[subjects\]\] 1 has no instance_prompt"),
    "an empty folder": (('dir = "rex"', 'dir = ""'), r"\[\[subjects\]\] 1 has no instance_data_dir"),
    "a wrong type": (("weight = 2", 'weight = "2"'), "weight is '2', and should be a float"),
    "a weight of 0": (("weight = 2", "weight = 0"), "subject 'rex': weight is 0.0, and should be above 0"),
    "NaN": (("weight = 2", "weight = nan"), "weight is nan, and should be above 0"),
    "the same folder": (('dir = "cat"', 'dir = "rex"'), "subjects 'rex' and 'tom' have the same folder"),
    "the same prompt": (
        ("of zwx cat", "of sks dog"),
        "have the same prompt, 'a photo of sks dog', and would become one",
    ),
    "the same name": (('name = "tom"\ninstance-data-dir = "cat"', 'instance-data-dir = "b/rex"'), "two .* called rex"),
    "a path as a name": (('"tom"', '"../tom"'), r"'\.\./tom' can't be the name of a folder"),
    "no class": ((TWO.partition("[[")[0], ""), "subject 'rex' has no class_prompt"),
    "one table": (("[[subjects]]", "[subjects]"), r"write each under a line \[\[subjects\]\]|is not TOML"),
    "photographs as class": (
        ("weight = 2", 'class_data_dir = "cat"'),
        "is both a class_data_dir and the photographs of",
    ),
    "an unknown word": (("of sks dog", "of {sks} dog"), r"holds \{sks\}, which stands for nothing"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_wrong_subjects_are_refused_in_one_line(change, message, tmp_path):
    assert change[0] in TWO
    with pytest.raises(InputError, match=message) as error:
        parse(["--model", "x", *map(str, config(tmp_path, TWO.replace(*change)))], train.TINY)
    assert "\n" not in str(error.value)


def test_flags_of_one_subject_do_not_go_with_several(tmp_path):
    for flag, value in (("--instance-data-dir", "d"), ("--instance-prompt", "p"), ("--placeholder-token", "[V]")):
        with pytest.raises(InputError, match=rf"{flag} is for one subject"):
            parse(["--model", "x", *map(str, config(tmp_path, TWO)), flag, value], train.TINY)


def test_two_folders_of_one_name_are_one_subject(tmp_path):
    for name in ("rex", "cat"):
        photograph(tmp_path / name)
    text = TWO.replace('name = "tom"', 'name = "rex"\nrepeats = 5').replace("weight = 2\n", "")
    (rex,) = subjects(*config(tmp_path, text))
    assert [(e.prompt, e.repeats) for e in rex.examples] == [("a photo of sks dog", 1)] * 3 + [
        ("a photo of zwx cat", 5)
    ] * 3
    assert rex.weight == 18


# A run


@pytest.fixture
def two(saved, tmp_path) -> tuple:
    """A command that trains two subjects, one of them with a caption, a mask and a focal point."""
    for name in ("rex", "cat"):
        photograph(tmp_path / name)
    (tmp_path / "rex" / "0.txt").write_text("{token} {class} at home")
    picture(tmp_path / "rex" / "1-mask.png")
    (tmp_path / "rex" / "2.json").write_text('{"focus": [0.4, 0.5]}')
    small = [flag for flag in SMALL if "prompt" not in flag]
    flags = ("--model", saved["official"], *small, *config(tmp_path, TWO.replace("num_class_images = 3", "")))
    return *flags, "--output-dir", tmp_path / "run", "--max-train-steps", 2, "--checkpointing-steps", 1


@pytest.mark.slow
def test_what_a_folder_says_is_part_of_the_run(two, tmp_path):
    call(*two)
    assert {name for line in metrics(tmp_path / "run") for name in line} >= {"subject_loss/rex", "subject_loss/tom"}
    shutil.move(tmp_path / "rex", tmp_path / "moved")
    (tmp_path / "two.toml").write_text((tmp_path / "two.toml").read_text().replace('"rex"', '"moved"\nname = "rex"'))
    call(*two, *LATEST, "--max-train-steps", 3)  # a folder may move
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3]
    rex = tmp_path / "moved"
    for name, content, said in (
        ("0.txt", b"{token} {class} outside", "caption of moved/0.png has changed"),
        ("1-mask.png", picture(tmp_path / "other.png", colour="white").read_bytes(), "mask of moved/1.png has changed"),
        ("2.json", b'{"focus": [0.5, 0.5]}', "focal point of moved/2.png has changed"),
    ):
        before = (rex / name).read_bytes()
        (rex / name).write_bytes(content)
        assert refused(*two, *LATEST) == f"{tmp_path / 'run'} belongs to another run: {said}"
        (rex / name).write_bytes(before)
    (tmp_path / "two.toml").write_text((tmp_path / "two.toml").read_text().replace("weight = 2", "weight = 3"))
    assert refused(*two, *LATEST).endswith("belongs to another run: weight of subject rex was 2.0 and is 3.0")


def test_the_users_class_pictures_have_captions_too(saved, tmp_path, recwarn):
    own, dog = photograph(tmp_path / "class", [(32, 32)] * 4), photograph(tmp_path / "dog")
    (own / "2.txt").write_text("a dog in the snow")
    base = ("--model", saved["official"], "--instance-data-dir", dog, "--class-data-dir", own, *SMALL)
    base = (*base, "--max-train-steps", 1, "--output-dir", tmp_path / "run")
    call(*base)
    assert not [w for w in recwarn if "skipped" in str(w.message)]
    (own / "2.txt").write_text("a dog at night")
    assert refused(*base, *LATEST).endswith("belongs to another run: caption of class picture 2.png has changed")


@pytest.mark.slow
def test_a_run_of_two_subjects_is_repeated_by_its_settings_file(two, tmp_path):
    call(*two, "--caption-dropout", 0.5, "--shuffle-tags", "--random-flip")
    call("--config", tmp_path / "run" / "config.toml", "--output-dir", tmp_path / "again")
    first, again = ([line["loss"] for line in metrics(tmp_path / name)] for name in ("run", "again"))
    assert first == again


@pytest.mark.slow
def test_the_commands_of_the_readme_run(root, tmp_path, monkeypatch):
    """Those of its section about folders, with few steps, on the embedded model."""
    section = (root / "README.md").read_text(encoding="utf-8").partition("## What a folder of photographs says")[2]
    lines = [line.strip() for line in section.partition("\n## ")[0].splitlines() if line.startswith("    ")]
    commands = [line for line in lines if line.split()[0] in ("cp", "echo", "mkdir", "python")]
    assert sum("train.py" in line for line in commands) == 3
    (tmp_path / "weights").symlink_to(root / "weights")
    toml = [line for line in lines if line not in commands]
    (tmp_path / "two.toml").write_text("\n".join(toml))
    monkeypatch.chdir(tmp_path)
    small = "--max-train-steps 1 --num-class-images 4 --sample-steps 1 --num-validation-images 1".split()
    for line in commands:
        if "train.py" in line:
            call(*shlex.split(line)[2:], *small)
        else:
            subprocess.run(line, shell=True, check=True, env=os.environ | {"PYTHONPATH": str(root)})
    captions, kohya, two = (json.loads((tmp_path / "runs" / n / "config.json").read_text()) for n in RUNS)
    assert (
        captions["captions"]["0.png"] == "a photo of sks monster on the grass" and captions["captions"]["1.png"] is None
    )
    assert two["validation_prompt"] == ["a photo of sks monster at night", "a photo of zwx monster at night"]
    assert (kohya["instance_prompt"], kohya["class_prompt"]) == ("sks monster", "a photo of a monster")
    assert [subject["name"] for subject in two["subjects"]] == ["monster", "pip"]


def test_names_of_files_in_two_folders_differ(tmp_path):
    assert names_of([tmp_path / "a" / "0.png", tmp_path / "a" / "1.png"]) == ["0.png", "1.png"]
    assert names_of([tmp_path / "a" / "0.png", tmp_path / "b" / "0.png"]) == ["a/0.png", "b/0.png"]
