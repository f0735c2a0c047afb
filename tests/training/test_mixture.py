"""Rows of several subjects, shapes, captions and masks: who has which turn, what is cut, the same for all splits."""

import io
import itertools
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d

from ldm import InputError
from ldm.data import Batches, Example, Subject, make_rows, sort_class_pictures, sort_photographs
from ldm.data.buckets import bucket_of, bucket_sizes, bucket_step, cut_around, cut_away
from ldm.data.mixture import Mixture, turn_of
from ldm.data.sorting import sizes_of_photographs
from ldm.images import Picture, fit, upright_size
from ldm.runtime import Stop, World, progress_bar
from ldm.settings import Settings
from ldm.training import FullTuning

CPU = torch.device("cpu")
BAR = partial(progress_bar, Stop())


# Turns


@pytest.mark.parametrize("weights", [(1,), (1, 1), (3, 1), (5, 0, 2), (1, 2, 3, 4), (97, 2, 1)])
def test_turns_are_those_of_websters_rule(weights):
    """The next turn is for the largest weight / (2 n + 1), n the turns so far: here in exact numbers, one by one."""
    turns = [0] * len(weights)
    for turn in range(300):
        best = max(Fraction(weight, 2 * n + 1) for weight, n in zip(weights, turns, strict=True))
        item = [Fraction(weight, 2 * n + 1) for weight, n in zip(weights, turns, strict=True)].index(best)
        assert turn_of(weights, turn) == (item, turns[item])
        turns[item] += 1
        due = [(turn + 1) * weight / sum(weights) for weight in weights]
        assert max(abs(n - d) for n, d in zip(turns, due, strict=True)) < 1


def test_all_rows_of_a_step_share_a_bucket_and_each_place_is_taken_once():
    mixture = Mixture(((3.0, 1.0), (0.0, 2.0)), rows=4)  # the first subject has pictures in one bucket alone
    places = [mixture.at(index) for index in range(600)]
    for step in range(150):
        assert len({place.bucket for place in places[4 * step : 4 * step + 4]}) == 1
    count = Counter((place.bucket, place.subject) for place in places)
    assert count == {(0, 0): 300, (0, 1): 100, (1, 1): 200}  # as the shares
    for (bucket, subject), rows in count.items():
        assert [p.turn for p in places if (p.bucket, p.subject) == (bucket, subject)] == list(range(rows))


# Buckets

# Sizes in pixels that cameras, phones and programs make, upright as photographs are seen.
USUAL = [
    (4032, 3024), (3024, 4032), (4000, 3000), (3456, 4608),  # phones and compact cameras, 4:3
    (6000, 4000), (4000, 6000), (5472, 3648), (4288, 2848),  # cameras, 3:2
    (3840, 2160), (1920, 1080), (1080, 1920), (4624, 2604),  # videos and phones, 16:9
    (1440, 1440), (1080, 1080), (1080, 1350), (2048, 1152),  # squares, 4:5 and 16:9 of networks
]  # fmt: skip


@pytest.mark.parametrize("resolution", [512, 768])
def test_buckets_cut_little_away_and_squares_cut_much(resolution):
    sizes = bucket_sizes(resolution, 64)
    for width, height in sizes:
        assert width % 64 == height % 64 == 0 and 0.8 * resolution**2 <= width * height <= resolution**2
        assert (height, width) in sizes
    cut = [cut_away(size, bucket_of(size, sizes, 64)) for size in USUAL]
    square = [cut_away(size, (resolution, resolution)) for size in USUAL]
    assert sum(cut) / len(cut) < 0.05 and max(cut) <= 0.1
    assert sum(square) / len(square) > 0.25
    assert bucket_of((1440, 1440), sizes, 64) == (resolution, resolution)


def test_what_is_cut_away_is_what_fit_cuts():
    """A photograph whose left third is black: what is left of the black part is what `fit` has kept of it."""
    image = Image.new("L", (300, 100), 255)
    image.paste(0, (0, 0, 100, 100))
    kept = (np.asarray(fit(picture(image), 200, 100)) < 128).mean()
    assert kept == pytest.approx((100 - 300 * cut_away((300, 100), (200, 100)) / 2) / 200, abs=0.01)
    assert cut_away((300, 100), (200, 100)) == pytest.approx(1 / 3)
    assert cut_away((100, 300), (64, 64)) == pytest.approx(2 / 3)


def test_photographs_are_not_enlarged_without_upscale():
    sizes = bucket_sizes(512, 64)
    assert bucket_of((300, 200), sizes, 64) == (576, 384)
    assert bucket_of((300, 200), sizes, 64, upscale=False) == (256, 192)
    assert bucket_of((6000, 4000), sizes, 64, upscale=False) == (576, 384)
    for size in [(300, 200), (10_000, 255), (511, 540), (70, 4000)]:
        bucket = bucket_of(size, sizes, 64, upscale=False)
        assert all(side <= own and side % 64 == 0 for side, own in zip(bucket, size, strict=True))
        assert bucket[0] * bucket[1] <= 512**2
    with pytest.raises(InputError, match="63 x 500 pixels are too few"):
        bucket_of((63, 500), sizes, 64, upscale=False)


def test_the_step_of_buckets_is_64_for_stable_diffusion_and_8_for_the_embedded_model():
    assert [bucket_step(8, 4, 512), bucket_step(8, 4, 768), bucket_step(4, 3, 64)] == [64, 64, 8]


@pytest.mark.parametrize("focus", [(0.9, 0.5), (0.1, 0.2), (0.5, 0.97), (0.0, 1.0)])
@pytest.mark.parametrize("size", [(900, 300), (300, 900)])
def test_every_random_cut_holds_the_focus(focus, size):
    for where in itertools.product((0.0, 0.3, 1.0), repeat=2):
        x, y = cut_around(focus, size, (100, 100), where)
        scale = 100 / 300
        spare = size[0] * scale - 100, size[1] * scale - 100
        at = focus[0] * size[0] * scale - x * spare[0], focus[1] * size[1] * scale - y * spare[1]
        assert all(-1e-6 <= place <= 100 + 1e-6 for place in at)


def test_a_photograph_stored_on_its_side_is_measured_as_it_is_seen():
    exif = Image.Exif()
    exif[274] = 6
    file = io.BytesIO()
    Image.new("RGB", (60, 40)).save(file, "JPEG", exif=exif)
    assert upright_size(Picture(Path("a.jpg"), file.getvalue())) == (40, 60)


# Rows


def picture(image: Image.Image, name: str = "a.png") -> Picture:
    file = io.BytesIO()
    image.save(file, "PNG")
    return Picture(Path(name), file.getvalue())


def noise(size: tuple[int, int], seed: int) -> Image.Image:
    small = torch.randint(256, (4, 4, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(small.numpy()).resize(size)


def example(size: tuple[int, int], seed: int, prompt: str, **options) -> Example:
    return Example(picture(noise(size, seed), f"{seed}.png"), prompt, **options)


def dog_and_cat() -> list[Subject]:
    """Photographs of three shapes. The cat's rows are a third; one dog is repeated, one has a mask, one a focus."""
    left = Image.new("L", (48, 32), 0)
    left.paste(255, (0, 0, 24, 32))
    dogs = [
        example((48, 32), 0, "a sks dog"),
        example((48, 32), 1, "a sks dog, on grass, at night", repeats=2, mask=picture(left)),
        example((32, 32), 2, "a sks dog in snow"),
    ]
    cats = [example((32, 32), 3, "a xyz cat"), example((32, 50), 4, "a xyz cat on a table", focus=(0.5, 0.1))]
    return [Subject("dog", dogs, "a sks dog", "a dog", weight=2.0), Subject("cat", cats, "a xyz cat", "a cat")]


def class_pictures(counts=(5, 3)) -> list[list[Example]]:
    return [
        [example((32, 32), 10 + i, prompt) for i in range(count)]
        for count, prompt in zip(counts, ("a dog", "a cat"), strict=True)
    ]


def settings_of(*, batch=1, parts=1, **options) -> Settings:
    options = {"resolution": 32, "aspect_ratio_buckets": True, "seed": 3, **options}
    return Settings(train_batch_size=batch, gradient_accumulation_steps=parts, **options)


def batches_of(sd, settings: Settings, world: World) -> Batches:
    rows = settings.train_batch_size * settings.gradient_accumulation_steps * world.size
    photographs = sort_photographs(dog_and_cat(), settings, sd, rows)
    kinds = {"instance": photographs, "class": sort_class_pictures(photographs, class_pictures())}
    rows = [make_rows(sd, settings, kind, pictures, BAR) for kind, pictures in kinds.items()]
    return Batches(rows, settings, world)


def rows_of_steps(sd, processes: int, batch: int, parts: int, steps: range, **options) -> list[list[tuple]]:
    """All rows of each step, in the order of their noise: everything that a batch says of them."""
    settings = settings_of(batch=batch, parts=parts, **options)
    worlds = [batches_of(sd, settings, World(rank, processes, CPU)) for rank in range(processes)]
    found = []
    for step in steps:
        rows = []
        for b in itertools.chain(*(batches.take(step) for batches in worlds)):
            columns = (b.noise, b.latents, b.mask, b.t, b.subject, b.is_class)
            rows += [(*map(torch.clone, row[:-1]), row[-1]) for row in zip(*columns, b.prompts, strict=True)]
        found.append(sorted(rows, key=lambda row: row[0].flatten()[0].item()))
    return found


@pytest.mark.parametrize("crop", [False, True], ids=["kept latents", "random crops"])
def test_a_step_has_the_same_rows_for_every_split_and_after_a_resume(crop, random_model):
    """Bit for bit: noise, latents, masks, steps, subjects and prompts, with everything on."""
    sd, options = random_model(), {"random_crop": crop, "random_flip": True}
    whole = rows_of_steps(sd, 1, 4, 1, range(6), **options)
    splits = [(2, 1, 2)] if crop else [(4, 1, 1), (2, 2, 1), (1, 1, 4), (2, 1, 2)]
    for others, first in [(rows_of_steps(sd, *split, range(6), **options), 0) for split in splits] + [
        (rows_of_steps(sd, 1, 4, 1, range(3, 6), **options), 3)
    ]:
        for one, other in zip(whole[first:], others, strict=True):
            assert len(one) == len(other) == 8
            for a, b in zip(one, other, strict=True):
                assert all(torch.equal(x, y) for x, y in zip(a[:-1], b[:-1], strict=True)) and a[-1] == b[-1]
    assert len({rows[0][0].shape for rows in whole}) == 3  # and the steps have had all shapes


def test_rows_have_the_shares_of_subjects_and_photographs_and_the_class_of_their_subject(random_model):
    steps = rows_of_steps(random_model(), 1, 4, 1, range(90), random_flip=True)
    rows = [row for step in steps for row in step]
    subjects = Counter(int(row[4]) for row in rows if not row[5])
    assert sum(subjects.values()) == 360 and abs(subjects[0] - 240) <= 4
    prompts = Counter(row[-1] for row in rows if not row[5])
    assert prompts["a sks dog, on grass, at night"] == pytest.approx(2 * prompts["a sks dog"], abs=4)
    assert prompts["a xyz cat"] == pytest.approx(prompts["a xyz cat on a table"], abs=4)
    assert prompts["a sks dog in snow"] == pytest.approx(60, abs=4)
    for step in steps:
        kinds = [Counter(int(row[4]) for row in step if bool(row[5]) == is_class) for is_class in (False, True)]
        assert kinds[0] == kinds[1]
        assert all(row[-1] == ("a dog", "a cat")[int(row[4])] for row in step if row[5])


def test_a_mask_is_cut_and_mirrored_with_its_photograph(random_model):
    """The photograph is its own mask here, so that the mask of a row is its own grey values."""
    sd, grey = random_model(), noise((96, 32), 7).convert("L")
    dogs = [Example(picture(grey), "a dog", mask=picture(grey)), example((32, 32), 8, "a dog")]
    settings = settings_of(random_crop=True, random_flip=True, aspect_ratio_buckets=False)
    photographs = sort_photographs([Subject("dog", dogs, "a dog")], settings, sd, 1)
    draws = make_rows(sd, settings, "instance", photographs, BAR).draws
    rows = [draws[index] for index in range(24)]
    masks = [row["mask"] for row in rows]
    own = [(row["image"].mean(0, keepdim=True) + 1) / 2 for row in rows]
    full = [bool((mask == 1).all()) for mask in masks]
    assert sum(full) == 12  # those of the photograph without a mask
    for mask, grey, is_full in zip(masks, own, full, strict=True):
        assert is_full or torch.allclose(mask, avg_pool2d(grey, 4), atol=0.01)


def test_without_a_mask_batches_have_none(random_model):
    sd, settings = random_model(), settings_of()
    photographs = sort_photographs([Subject("cat", [example((32, 32), 1, "a cat")], "a cat")], settings, sd, 1)
    batches = Batches([make_rows(sd, settings, "instance", photographs, BAR)], settings, World(0, 1, CPU))
    batch = next(iter(batches.take(0)))
    assert batch.mask is None and batch.subject.tolist() == [0]


def test_class_pictures_are_dealt_out_to_the_buckets_of_their_subject(random_model):
    sd, settings = random_model(), settings_of()
    photographs = sort_photographs(dog_and_cat(), settings, sd, 4)
    assert [bucket.size for bucket in photographs.buckets] == [(24, 36), (32, 32), (36, 24)]
    pictures = sort_class_pictures(photographs, class_pictures((40, 1)))
    dogs = [len(bucket.decks[0]) for bucket in pictures.buckets]
    assert dogs == [0, 10, 30]  # a quarter of the dogs is square, the repeated one counts twice
    assert [len(bucket.decks[1]) for bucket in pictures.buckets] == [1, 1, 0]  # one picture for two buckets
    for own, of_class in zip(photographs.buckets, pictures.buckets, strict=True):
        assert own.size == of_class.size and list(map(bool, own.decks)) == list(map(bool, of_class.decks))


def test_each_photograph_is_cut_to_the_nearest_shape_or_to_the_square(random_model):
    sd, examples = random_model(), [one for subject in dog_and_cat() for one in subject.examples]
    sizes = [sizes_of_photographs(replace(settings_of(), aspect_ratio_buckets=on), sd) for on in (True, False)]
    assert [sizes[0](one) for one in examples] == [(36, 24), (36, 24), (32, 32), (32, 32), (24, 36)]
    assert {sizes[1](one) for one in examples} == {(32, 32)}
    small = example((3, 50), 0, "a dog")
    with pytest.raises(InputError, match="0.png: 3 x 50 pixels are too few"):
        sizes_of_photographs(settings_of(upscale=False), sd)(small)


# Prompts


def test_a_frozen_text_encoder_encodes_each_caption_once(random_model):
    sd, calls = random_model(), []
    trainable = FullTuning(sd, Settings(train_text_encoder=False))
    captions = [f"a dog {i}" for i in range(70)]
    sd.text_encoder.register_forward_hook(lambda _, inputs, output: calls.append(len(output)))
    trainable.prepare((*captions, ""), torch.float32)
    assert sum(calls) == 71
    found = trainable.context([captions[3], "", captions[3], captions[69]])
    assert sum(calls) == 71
    with torch.no_grad():
        expected = sd.encode_prompt([captions[3], "", captions[3], captions[69]])
    torch.testing.assert_close(found, expected)
    calls.clear()
    trainable.context(["tags, in another order"] * 2)  # of which there is no end: they are not kept
    trainable.context(["tags, in another order"])
    assert calls == [1, 1]


def test_gradients_of_a_text_encoder_that_trains_reach_every_row(random_model):
    sd = random_model()
    prompts = ["a dog", "a cat", "a dog", "a red dog"]
    context = FullTuning(sd, Settings()).context(prompts)
    torch.testing.assert_close(context, sd.encode_prompt(prompts))
    weight = sd.text_encoder.text_model.embeddings.token_embedding.weight
    (found,) = torch.autograd.grad(context.square().sum(), weight)
    (expected,) = torch.autograd.grad(sd.encode_prompt(prompts).square().sum(), weight)
    torch.testing.assert_close(found, expected)
