"""Training a model for painting in: random masks are a function of (seed, kind, index), and curves stay the same."""

import json
import math
import shlex

import numpy as np
import pytest
import torch
from PIL import Image
from runs import LATEST, LORA, SMALL, call, check_same, collection, command, losses, metrics, run
from torch.utils.data import default_collate

import sample
import train
from ldm import StableDiffusion, rng
from ldm.__main__ import main as tools
from ldm.data import Example, widen
from ldm.data.inpainting import draw_hole, draw_mask, keep_images
from ldm.data.rows import CropDraws, LatentDraws
from ldm.images import fit, read_picture, to_tensor


@pytest.fixture(scope="module")
def nine(random_model, tmp_path_factory):
    """A file of a model for painting in, whose weights for mask and masked picture are random too."""
    sd = random_model()
    widen(sd)
    with torch.no_grad():
        sd.unet.input_blocks[0][0].weight[:, 4:].normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    sd.save(path := tmp_path_factory.mktemp("nine") / "nine.safetensors")
    return path


@pytest.fixture
def base(nine, photographs) -> tuple:
    return ("--model", nine, "--instance-data-dir", photographs, *SMALL)


# Masks


def draws(count: int, height: int, width: int) -> torch.Tensor:
    return torch.stack([draw_mask(rng.generator(0, "test", i), height, width) for i in range(count)])


def test_a_quarter_of_the_masks_is_whole_and_the_others_cover_what_rectangles_and_ellipses_do():
    masks = draws(3000, 40, 56)
    assert masks.shape == (3000, 1, 40, 56) and masks.dtype == torch.bool
    share = masks.float().mean((1, 2, 3))
    assert (share == 1).float().mean().item() == pytest.approx(0.25, abs=0.03)
    # sides uniform from 0 to 1, independent: a mean of 1/4 of the picture, and pi/4 of that in an ellipse
    assert share[share < 1].mean().item() == pytest.approx((1 / 4 + math.pi / 16) / 2, abs=0.02)
    assert masks[share < 1].float().mean(0).std() > 0.05  # the middle is covered more often than the corners


def test_a_mask_is_one_rectangle_or_one_ellipse():
    filled = []
    for mask in draws(300, 48, 48):
        rows, columns = mask[0].any(1).nonzero().flatten(), mask[0].any(0).nonzero().flatten()
        if len(rows) < 12 or len(columns) < 12 or mask.all():
            continue
        box = mask[0, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].float().mean().item()
        filled.append(box)
    rectangles = [box for box in filled if box == 1]
    ellipses = [box for box in filled if box < 1]
    assert min(len(rectangles), len(ellipses)) > 40
    assert all(abs(box - math.pi / 4) < 0.06 for box in ellipses)


def test_a_rows_mask_depends_on_seed_kind_and_index_alone():
    one, again = (draw_hole((3, "class", 17), (32, 24), (4, 8, 6)) for _ in range(2))
    assert torch.equal(one["hole"], again["hole"]) and torch.equal(one["hole_spread"], again["hole_spread"])
    for other in ((4, "class", 17), (3, "instance", 17), (3, "class", 18)):
        assert not torch.equal(one["hole_spread"], draw_hole(other, (32, 24), (4, 8, 6))["hole_spread"])


def test_a_row_has_the_same_view_in_its_latents_and_in_its_picture(photographs):
    pictures = [read_picture(path) for path in sorted(photographs.iterdir())]
    examples = [Example(picture, "") for picture in pictures]
    kept = keep_images(examples, (32, 24), flip=True)
    assert kept.shape == (3, 2, 3, 24, 32) and torch.equal(kept[:, 1], kept[:, 0].flip(3))
    given = (0, "instance", collection(pictures, (32, 24), (4, 6, 8)), range(1000))
    row = LatentDraws(*given, views=2, images={(32, 24): kept}, holes=True)[5]
    image = to_tensor(fit(pictures[int(row["picture"])], 32, 24))
    assert row["hole"].shape == (1, 24, 32) and row["hole_spread"].shape == (4, 6, 8)
    torch.testing.assert_close(row["image"], image.flip(2) if row["view"] else image)


def test_other_models_draw_what_they_drew_without_masks(photographs):
    pictures = tuple(read_picture(path) for path in sorted(photographs.iterdir()))
    given = (0, "instance", collection(pictures, (32, 32), (4, 8, 8)), range(1000), 0.1)
    plain, holes = (CropDraws(*given, flip=True, holes=holes)[5] for holes in (False, True))
    assert holes.keys() - plain.keys() == {"hole", "hole_spread"}
    for name, column in plain.items():
        assert torch.equal(column, holes[name]) if isinstance(column, torch.Tensor) else column == holes[name]


# Runs


def test_the_first_loss_is_that_of_diffusers_networks(base, nine, photographs, tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="needs the parity extra")
    call(*base, "--output-dir", tmp_path / "run", "--max-train-steps", 1, "--seed", 3, "--train-batch-size", 2)
    sd = StableDiffusion.load(nine)
    sd.save(tmp_path / "folder", "diffusers")
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "folder", subfolder="unet")
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path / "folder", subfolder="vae")
    scheduler = diffusers.DDPMScheduler.from_pretrained(tmp_path / "folder", subfolder="scheduler")
    paths = {"instance": sorted(photographs.iterdir()), "class": sorted((tmp_path / "run" / "class").glob("*.png"))}
    prompts, found = {"instance": "a sks dog", "class": "a dog"}, {}
    for kind, files in paths.items():
        pictures = [read_picture(path) for path in files]
        images = {(16, 16): keep_images([Example(picture, "") for picture in pictures], (16, 16), False)}
        given = (3, kind, collection(pictures, (16, 16), (4, 4, 4)), range(1000))
        rows = LatentDraws(*given, images=images, holes=True)
        drawn = default_collate([rows[i] for i in range(2)])
        with torch.no_grad():
            clean, masked = (vae.encode(x).latent_dist for x in (drawn["image"], drawn["image"] * ~drawn["hole"]))
            x0, seen = ((d.mean + d.std * drawn[s]) * 0.25 for d, s in ((clean, "spread"), (masked, "hole_spread")))
            noisy = scheduler.add_noise(x0, drawn["noise"], drawn["t"])
            mask = torch.nn.functional.interpolate(drawn["hole"].float(), size=(4, 4))
            context = sd.encode_prompt([prompts[kind]] * 2)
            prediction = unet(torch.cat([noisy, mask, seen], 1), drawn["t"], context).sample
            found[kind] = (prediction - drawn["noise"]).square().mean().item()
    line = metrics(tmp_path / "run")[0]
    assert line["subject_loss"] == pytest.approx(found["instance"], rel=1e-4)
    assert line["prior_loss"] == pytest.approx(found["class"], rel=1e-4)


def test_class_pictures_are_painted_in_a_mask_of_the_whole_picture(base, nine, tmp_path):
    call(*base, "--output-dir", tmp_path / "run", "--max-train-steps", 1)
    seeds = [rng.number(0, "class picture", i) for i in (0, 1)]
    expected = StableDiffusion.load(nine).generate(
        "a dog", steps=1, guidance=1.0, seeds=seeds, init_image=torch.rand(3, 16, 16),
        mask=torch.ones(1, 16, 16, dtype=torch.bool),
    )  # fmt: skip
    for i, picture in enumerate(expected):
        assert Image.open(tmp_path / "run" / "class" / f"class-{i:05d}.png").tobytes() == picture.tobytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("--random-flip",),
        *(
            pytest.param(flags, marks=pytest.mark.slow)
            for flags in (("--random-crop", "--prior", "prediction"), (*LORA, "--mixed-precision", "bf16"))
        ),
    ],
)
def test_a_resumed_run_equals_the_run_that_never_stopped(flags, base, tmp_path):
    flags = (*base, *flags, "--checkpointing-steps", 2)
    call(*flags, "--output-dir", tmp_path / "whole")
    call(*flags, "--max-train-steps", 2, "--output-dir", tmp_path / "parts")
    call(*flags, "--output-dir", tmp_path / "parts", *LATEST)
    check_same(tmp_path / "whole", tmp_path / "parts")
    if "--lora-rank" not in flags:
        tuned, before = StableDiffusion.load(tmp_path / "whole" / "model.safetensors"), StableDiffusion.load(base[1])
        change = (tuned.unet.input_blocks[0][0].weight - before.unet.input_blocks[0][0].weight).abs().amax((0, 2, 3))
        assert tuned.config.unet.paints_in and (change > 1e-6).all()  # all nine channels train


def test_validation_measures_a_model_for_painting_in(base, tmp_path):
    held_out = ("--hold-out", 1, "--validation-steps", 1, "--num-drift-images", 2)
    call(*base, *held_out, "--max-train-steps", 1, "--output-dir", tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]
    assert all(line.keys() >= {"validation_loss", "training_loss", "class_loss", "drift"} for line in lines)


@pytest.mark.slow
def test_accumulation_gives_the_same_losses(base, tmp_path):
    base = (*base, "--random-flip", "--num-class-images", 3)
    call(*base, "--train-batch-size", 4, "--output-dir", tmp_path / "one")
    call(*base, "--gradient-accumulation-steps", 4, "--output-dir", tmp_path / "four")
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "four"), rel=1e-6)


@pytest.mark.slow
def test_processes_give_the_same_losses(base, tmp_path):
    run(command([*base, "--train-batch-size", 2, "--output-dir", tmp_path / "one"]), tmp_path)
    run(command([*base, "--output-dir", tmp_path / "two"], 2), tmp_path)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)


@pytest.mark.slow
def test_the_commands_of_readme_paint_in(root, tmp_path, monkeypatch):
    """The commands of the section, with fewer steps: each writes what the next one reads."""
    section = (root / "README.md").read_text(encoding="utf-8").split("## Painting in\n")[1].split("\n## ")[0]
    code = "\n".join(line for line in section.splitlines() if line.startswith("    "))
    commands = [shlex.split(text) for text in code.replace("\\\n", " ").splitlines()]
    assert [words[1] for words in commands] == ["sample.py", "-m", "train.py", "sample.py"]
    (tmp_path / "weights").symlink_to(root / "weights")
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    few = ("--max-train-steps=1", "--num-class-images=2", "--num-validation-images=1", "--sample-steps=1")
    programs = {"sample.py": (sample.main, ("--steps=2",)), "train.py": (train.main, few)}
    for words in commands:
        main, more = programs.get(words[1]) or (tools, ())
        main([*(words[3:] if words[1] == "-m" else words[2:]), *more])
    made = np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / "samples").glob("0*.png"))])
    outside = ~np.asarray(Image.open(root / "weights" / "tiny" / "mask.png"))
    picture = np.asarray(Image.open(root / "weights" / "tiny" / "subject" / "2.png").convert("RGB"))
    assert len(made) == 8 and (made[:, outside] == picture[outside]).all()
    assert (made[:, ~outside] != picture[~outside]).any((1, 2)).all()
