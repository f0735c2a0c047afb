"""The parts of DreamBooth: the loss, the parameters that train, the rows of a batch, the class pictures."""

import hashlib
import json
from collections import Counter

import numpy as np
import pytest
import torch
from runs import latent_rows, pixels, sample_rows

from ldm import InputError, rng
from ldm.data import Example, encode_pictures
from ldm.data.rows import Rows
from ldm.dreambooth import dreambooth_loss
from ldm.images import load_picture, read_picture
from ldm.runtime.processes import World
from ldm.settings import Settings
from ldm.training import ClassPictures, FullTuning, Run
from ldm.training.class_pictures import FLAGS

pytestmark = pytest.mark.filterwarnings("ignore:skipped")

RECIPE = {
    "prompt": "a photo of a dog",
    "sampler": "ddim",
    "steps": 3,
    "guidance_scale": 4.0,
    "resolution": 32,
    "model": "f" * 64,
}
ALONE = World(0, 1, torch.device("cpu"))

# The loss


def test_the_loss_is_equation_2():
    """numpy gives the same E|x - x'|^2 over subject rows + lambda E|x - x'|^2 over class rows, in any row order."""
    rng = np.random.default_rng(0)
    prediction, target = rng.normal(size=(2, 5, 4, 3, 2))
    is_class = np.array([False, True, True, False, True])
    subject = ((prediction - target)[~is_class] ** 2).mean()
    prior = ((prediction - target)[is_class] ** 2).mean()
    found = dreambooth_loss(*(torch.tensor(a) for a in (prediction, target, is_class)), prior_weight=0.7)
    np.testing.assert_allclose([x.item() for x in found], [subject + 0.7 * prior, subject, prior], rtol=1e-6)


def test_rows_are_weighted_and_the_mean_of_no_rows_is_zero():
    prediction, target = torch.randn(2, 4, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    error = (prediction - target).square().mean((1, 2, 3))
    weight = torch.tensor([0.5, 2.0, 0.0, 3.0])
    is_class = torch.tensor([False, False, True, True])
    loss, subject, prior = dreambooth_loss(prediction, target, is_class, 2.0, weight)
    torch.testing.assert_close(subject, (error * weight)[:2].mean())
    torch.testing.assert_close(prior, (error * weight)[2:].mean())
    torch.testing.assert_close(loss, subject + 2.0 * prior)
    loss, subject, prior = dreambooth_loss(prediction, target, torch.zeros(4, dtype=torch.bool), 1.0)
    assert prior == 0 and loss == subject and torch.isclose(loss, error.mean())


def test_the_loss_is_computed_in_fp32():
    prediction = torch.full((1, 4, 8, 8), 300.0, dtype=torch.float16)  # 300 squared overflows fp16
    loss, _, _ = dreambooth_loss(prediction, torch.zeros_like(prediction), torch.tensor([False]), 1.0)
    assert loss.dtype == torch.float32 and loss == 90000.0


@pytest.mark.parametrize("text_encoder", [True, False])
def test_the_autoencoder_is_frozen_and_the_text_encoder_trains_if_asked(text_encoder, random_model):
    sd = random_model()
    settings = Settings(train_text_encoder=text_encoder)
    parameters = {id(parameter) for parameter in FullTuning(sd, settings).parameters()}
    expected = [sd.unet, sd.text_encoder] if text_encoder else [sd.unet]
    assert parameters == {id(parameter) for network in expected for parameter in network.parameters()}
    for network in sd.networks().values():
        assert all(p.requires_grad == (network in expected) for p in network.parameters())


# Random draws depend on the row only


def rows(kind: str = "instance", count: int = 3, seed: int = 0) -> Rows:
    mean = torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1, 1).expand(count, 1, 4, 2, 2) * 100
    return latent_rows(kind, mean, torch.full_like(mean, 0.5), seed)


@pytest.mark.parametrize("cuts", [[4, 4], [1] * 8, [5, 3]])
def test_a_row_does_not_depend_on_the_split_of_the_batch(cuts):
    whole = sample_rows(rows(seed=7), 0, 8)
    parts, first = [], 0
    for count in cuts:
        parts.append(sample_rows(rows(seed=7), first, count))
        first += count
    for a, b in zip(whole, map(torch.cat, zip(*parts, strict=True)), strict=True):
        assert torch.equal(a, b)


def test_each_epoch_takes_every_picture_once_in_a_new_order():
    latents = sample_rows(rows(count=5), 0, 40)[0]
    taken = (latents.mean((1, 2, 3)) / 100).round().int().view(8, 5)
    assert all(sorted(epoch) == list(range(5)) for epoch in taken.tolist())
    assert len({tuple(epoch) for epoch in taken.tolist()}) > 4


def test_draws_follow_the_forward_process_and_differ_by_seed_kind_and_row():
    latents, noise, steps = sample_rows(rows(count=1), 0, 2000)
    assert abs(latents.mean()) < 0.02 and abs(latents.std() - 0.5) < 0.01  # the posterior's standard deviation
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1.0) < 0.01
    assert abs((latents * noise).mean()) < 0.02  # independent
    assert steps.min() < 10 and steps.max() > 989 and steps.dtype == torch.int64
    assert max(Counter((steps // 100).tolist()).values()) < 270 and steps.float().mean().sub(499.5).abs() < 25
    others = [(rows("instance", seed=1), 0), (rows("class"), 0), (rows("instance"), 1)]
    noises = [noise[:1], *(sample_rows(other, index, 1)[1] for other, index in others)]
    assert len({tuple(n.flatten().tolist()) for n in noises}) == 4


def test_random_numbers_are_the_same_on_every_machine_and_in_every_version():
    """A number is the first 8 bytes of the key's SHA-256, halved. Resumed runs and class pictures rely on it."""
    digest = hashlib.sha256(b"(0, 'class picture', 0)").hexdigest()
    assert rng.number(0, "class picture", 0) == int(digest[:16], 16) // 2 == 4141674004654951706


def test_pictures_are_encoded_to_the_scaled_posterior(random_model, photographs):
    sd, paths = random_model(), sorted(photographs.iterdir())
    examples = [Example(read_picture(path), "") for path in paths]
    made = encode_pictures(sd, examples, (32, 32), flip=False, progress=lambda: None)
    assert made.mean.shape == made.std.shape == (3, 1, 4, 8, 8) and not made.mean.requires_grad
    with torch.no_grad():
        posterior = sd.vae.encode(load_picture(paths[1], 32)[None])
    torch.testing.assert_close(made.mean[1], posterior.mean * 0.25)
    torch.testing.assert_close(made.std[1], posterior.std * 0.25)


# Class pictures


def make(sd, folder, count, batch_size=2, seed=0, **recipe) -> ClassPictures:
    pictures = ClassPictures(folder, count, seed, RECIPE | recipe)
    pictures.generate(run(folder, batch_size), sd)
    return pictures


def run(folder, batch_size) -> Run:
    return Run(Settings(sample_batch_size=batch_size, output_dir=str(folder.parent / "run")), ALONE)


def test_the_manifest_says_how_the_class_pictures_were_made(random_model, tmp_path):
    sd = random_model()
    pictures = make(sd, tmp_path / "class", 3)
    assert [p.name for p in pictures.paths] == ["class-00000.png", "class-00001.png", "class-00002.png"]
    manifest = json.loads((tmp_path / "class" / "manifest.json").read_text())
    seeds = {f"class-{i:05d}.png": rng.number(0, "class picture", i) for i in range(3)}
    assert manifest == {**RECIPE, "seed": 0, "pictures": seeds}
    assert sorted(p.name for p in (tmp_path / "class").iterdir()) == [*seeds, "manifest.json"]  # and nothing else
    alone = sd.generate(RECIPE["prompt"], steps=3, guidance=4.0, sampler="ddim", seeds=[seeds["class-00001.png"]])[0]
    assert np.abs(pixels(pictures.paths[1]) - np.asarray(alone).astype(int)).max() <= 1


def test_class_picture_i_does_not_depend_on_their_number_or_the_batch_size(random_model, tmp_path):
    sd = random_model()
    few, many = make(sd, tmp_path / "a", 2, 2), make(sd, tmp_path / "b", 5, 3)
    for a, b in zip(few.paths, many.paths, strict=False):
        assert np.abs(pixels(a) - pixels(b)).max() <= 1
    assert np.abs(pixels(many.paths[0]) - pixels(many.paths[1])).max() > 20
    other = make(sd, tmp_path / "c", 1, seed=1)
    assert np.abs(pixels(few.paths[0]) - pixels(other.paths[0])).max() > 20


def test_an_interrupted_generation_resumes_to_the_same_pictures(random_model, tmp_path, monkeypatch):
    sd = random_model()
    whole = make(sd, tmp_path / "whole", 5)
    generate, calls = sd.generate, []

    def interrupted(*args, **kwargs):
        calls.append(kwargs["seeds"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    monkeypatch.setattr(sd, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(sd, tmp_path / "class", 5)
    (tmp_path / "class" / ".class-00002.png.tmp").write_bytes(b"half a picture")  # as a power cut leaves it
    pictures = ClassPictures(tmp_path / "class", 5, 0, RECIPE)
    assert pictures.missing() == ["class-00002.png", "class-00003.png", "class-00004.png"]
    pictures.generate(run(tmp_path / "class", 2), sd)
    assert len(calls) == 4  # no picture is made twice
    assert pictures.missing() == [] and len(pictures.paths) == 5
    for a, b in zip(whole.paths, pictures.paths, strict=True):
        assert a.name == b.name and a.read_bytes() == b.read_bytes()


def test_a_lost_picture_is_made_again_and_the_others_are_not_touched(random_model, tmp_path):
    sd = random_model()
    pictures = make(sd, tmp_path, 4)
    bytes_, times = pictures.paths[1].read_bytes(), [p.stat().st_mtime_ns for p in pictures.paths]
    pictures.paths[1].unlink()
    again = make(sd, tmp_path, 4)
    assert again.paths == pictures.paths and again.paths[1].read_bytes() == bytes_
    assert [p.stat().st_mtime_ns for p in again.paths][::2] == times[::2]


def test_the_users_own_photographs_count_and_only_the_missing_ones_are_made(random_model, photographs):
    sd = random_model()
    before = {path.name: path.read_bytes() for path in photographs.iterdir()}
    (photographs / ".DS_Store").write_bytes(b"junk")
    assert [p.name for p in make(sd, photographs, 2).paths] == ["0.png", "1.png"]
    assert not (photographs / "manifest.json").exists()  # nothing was generated
    names = [p.name for p in make(sd, photographs, 5).paths]
    assert names == ["0.png", "1.png", "2.png", "class-00000.png", "class-00001.png"]
    assert [p.name for p in make(sd, photographs, 6).paths] == [*names, "class-00002.png"]
    assert [p.name for p in make(sd, photographs, 4).paths] == names[:4]
    assert all((photographs / name).read_bytes() == content for name, content in before.items())


def test_a_folder_with_only_junk_files_counts_as_empty(random_model, tmp_path):
    (tmp_path / ".DS_Store").write_bytes(b"junk")
    assert len(make(random_model(), tmp_path, 1).paths) == 1
    assert len(make(random_model(), tmp_path, 1).paths) == 1


@pytest.mark.parametrize("name", [*RECIPE, "seed"])
def test_class_pictures_made_differently_are_refused_with_the_difference_and_the_flag(name, random_model, tmp_path):
    make(random_model(), tmp_path, 1)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    other = {"prompt": "a cat", "sampler": "ddpm", "model": "0" * 64}.get(name, 64)
    with pytest.raises(InputError) as error:
        ClassPictures(tmp_path, 2, other if name == "seed" else 0, RECIPE | ({} if name == "seed" else {name: other}))
    old = {**RECIPE, "seed": 0}[name]
    for word in (name, repr(old), repr(other), FLAGS[name], "--class-data-dir", str(tmp_path)):
        assert word in str(error.value)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"prompt": "a photo of a dog"}', "PICTURES"])
def test_a_damaged_manifest_is_refused(text, tmp_path):
    record = json.dumps({**RECIPE, "seed": 0, "pictures": [1, 2]})
    (tmp_path / "manifest.json").write_text(record if text == "PICTURES" else text)
    with pytest.raises(InputError, match=r"manifest\.json is damaged: .*; give another --class-data-dir"):
        ClassPictures(tmp_path, 2, 0, RECIPE)
