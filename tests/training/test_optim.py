"""The parts of an update: loss weights, learning rates, random crops and flips."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import LORA, SMALL, call, check_same, collection, losses, metrics, weights

from ldm import StableDiffusion, rng
from ldm.data import Batches
from ldm.data.latents import encode
from ldm.data.rows import CropDraws, Rows
from ldm.dreambooth import min_snr_weight
from ldm.images import load_picture, read_picture
from ldm.runtime import World
from ldm.settings import Settings
from ldm.training import FullTuning, LoRATuning

UNET, TEXT = "model.diffusion_model.", "cond_stage_model."


@pytest.fixture
def base(saved, photographs) -> tuple:
    return ("--model", saved["official"], "--instance-data-dir", photographs, *SMALL)


def moved(before: dict, after: dict, prefix: str) -> float:
    """The largest change of a weight in the network with this prefix."""
    return max((after[key] - before[key]).abs().max().item() for key in after if key.startswith(prefix))


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_min_snr_weights_are_the_papers(prediction):
    """Hang et al. 2023: min(SNR, gamma) times the error of x_0: SNR^-1 times that of eps, (SNR + 1)^-1 that of v."""
    snr = np.array([0.004, 0.5, 5.0, 1000.0])
    expected = np.minimum(snr, 5.0) / (snr if prediction == "eps" else snr + 1.0)
    found = min_snr_weight(torch.tensor(snr), 5.0, prediction)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    assert found[0] == 1.0 if prediction == "eps" else found[0] < 0.005


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_the_first_losses_equal_those_computed_by_hand(prediction, base, tmp_path):
    """DreamBooth's two terms, with each row weighted by its own step."""
    folder = tmp_path / "run"
    flags = ("--snr-gamma", "3", "--prior-loss-weight", "0.6", "--prediction-type", prediction, "--train-batch-size", 3)
    call(*base, *flags, "--resolution", 32, "--max-train-steps", 1, "--output-dir", folder)
    sd, terms = StableDiffusion.load(base[1]), []
    abar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    kinds = [("instance", "a sks dog", Path(base[3])), ("class", "a dog", folder / "class")]
    for kind, prompt, pictures in kinds:
        paths, errors = sorted(pictures.glob("*.png")), []
        for index in range(3):
            generator = rng.generator(0, kind, "noise", index)
            spread, noise = torch.randn(2, 4, 8, 8, generator=generator)
            t = int(torch.randint(1000, (), generator=generator))
            image = load_picture(paths[rng.pick(0, kind, index, len(paths))], 32)[None]
            with torch.no_grad():
                posterior = sd.vae.encode(image)
                z = 0.25 * (posterior.mean + posterior.std * spread)
                a, s, snr = abar[t] ** 0.5, (1 - abar[t]) ** 0.5, abar[t] / (1 - abar[t])
                found = sd.unet(a * z + s * noise, torch.tensor([t]), sd.encode_prompt([prompt]))
            target = noise if prediction == "eps" else a * noise - s * z
            weight = min(snr, 3.0) / (snr if prediction == "eps" else snr + 1)
            errors.append(weight * (found - target).double().square().mean().item())
        terms.append(sum(errors) / 3)
    line = metrics(folder)[0]
    assert (line["subject_loss"], line["prior_loss"]) == pytest.approx(terms, rel=1e-5)
    assert line["loss"] == pytest.approx(terms[0] + 0.6 * terms[1], rel=1e-5)


COSINE = [1e-4 * (0.5 + 0.5 * math.cos(math.pi * n / 4)) for n in range(4)]


@pytest.mark.parametrize(
    ("flags", "rates"),
    [
        (("--lr-scheduler", "constant"), [1e-4] * 6),
        (("--lr-warmup-steps", 4), [2.5e-5, 5e-5, 7.5e-5, 1e-4, 1e-4, 1e-4]),
        (("--lr-scheduler", "linear", "--lr-warmup-steps", 2), [5e-5, 1e-4, 1e-4, 7.5e-5, 5e-5, 2.5e-5]),
        (("--lr-scheduler", "cosine", "--lr-warmup-steps", 2), [5e-5, 1e-4, *COSINE]),
    ],
)
def test_learning_rates_follow_the_schedule(flags, rates, base, tmp_path):
    call(*base, *flags, "--max-train-steps", 6, "--output-dir", tmp_path / "run", "--no-with-prior-preservation")
    assert [line["lr"] for line in metrics(tmp_path / "run")] == pytest.approx(rates)


def test_the_text_encoder_has_its_own_learning_rate_and_last_step(base, tmp_path):
    """AdamW's first update moves a weight by the learning rate, whatever its gradient, plus the weight decay."""
    flags = ("--text-encoder-learning-rate", "1e-3", "--text-encoder-stop-step", 2, "--checkpointing-steps", 1)
    call(*base, *flags, "--output-dir", tmp_path / "run")
    steps = [weights(Path(base[1]).parent)]
    steps += [weights(tmp_path / "run" / "checkpoints" / f"checkpoint-{n:06d}") for n in (1, 2, 3)]
    text = [moved(a, b, TEXT) for a, b in zip(steps, steps[1:], strict=False)]
    unet = [moved(a, b, UNET) for a, b in zip(steps, steps[1:], strict=False)]
    assert 1e-3 < text[0] < 1.1e-3 and 1e-4 < unet[0] < 1.1e-4
    assert text[1] > 3e-4 and text[2] == 0.0  # not even by weight decay
    assert min(unet) > 3e-5


def test_a_text_encoder_that_has_stopped_does_not_run(base, tmp_path):
    """It runs once for both prompts in each of its two steps, once more after the second, and then never again."""
    calls = []

    def count(_, inputs, output):
        if not output.is_meta:  # else it is the prediction of the memory
            calls.append(output.shape)

    class Counted(FullTuning):
        def forward(self, *inputs):
            return self.counted(super().forward, *inputs)

        def after_stop(self):
            self.counted(super().after_stop)

        def counted(self, work, *inputs):
            hook = self.sd.text_encoder.register_forward_hook(count)
            result = work(*inputs)
            hook.remove()
            return result

    flags = ("--text-encoder-stop-step", 2, "--max-train-steps", 6)
    call(*base, *flags, "--output-dir", tmp_path / "run", tuning=Counted)
    assert len(calls) == 3


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--random-flip", "--random-crop"])
def test_random_flips_and_crops_change_the_losses_a_little(flag, base, tmp_path):
    call(*base, "--max-train-steps", 8, "--output-dir", tmp_path / "plain")
    call(*base, "--max-train-steps", 8, "--output-dir", tmp_path / "views", flag)
    plain, views = losses(tmp_path / "plain"), losses(tmp_path / "views")
    same = sum(a == b for a, b in zip(plain, views, strict=True))
    assert same < 8 and plain == pytest.approx(views, rel=0.2)


@pytest.mark.slow
def test_crops_are_a_function_of_seed_and_index(base, saved, photographs, tmp_path):
    """They do not depend on the split of the batch, the loader's processes or the other pictures of the batch."""
    base = (*base, "--random-crop", "--random-flip", "--max-train-steps", 6)
    call(*base, "--train-batch-size", 4, "--output-dir", tmp_path / "one")
    call(*base, "--train-batch-size", 2, "--gradient-accumulation-steps", 2, "--output-dir", tmp_path / "two")
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-6)

    paths, sd = sorted(photographs.iterdir()), StableDiffusion.load(saved["official"])
    pictures = collection([*map(read_picture, paths)], (32, 32), (4, 8, 8))
    draws = CropDraws(7, "instance", pictures, range(1000), flip=True)
    rows = Rows(draws, torch.device("cpu"), encode=partial(encode, sd))
    settings = Settings(random_crop=True, train_batch_size=3, seed=7)
    batches = Batches([rows], settings, World(0, 1, torch.device("cpu")))
    for step in (5, 6, 7):
        together = next(iter(batches.take(step)))
        for i in range(3):  # one row, computed by hand
            generator = rng.generator(7, "instance", "noise", 3 * step + i)
            spread, noise = torch.randn(2, 4, 8, 8, generator=generator)
            t = torch.randint(1000, (), generator=generator)
            x, y, mirrored = torch.rand(3, generator=generator).tolist()
            image = load_picture(paths[rng.pick(7, "instance", 3 * step + i, len(paths))], 32, (x, y))
            mean, std = encode(sd, (image.flip(2) if mirrored < 0.5 else image)[None])
            assert torch.equal(together.latents[i], (mean + std * spread)[0])
            assert torch.equal(together.noise[i], noise) and together.t[i] == t


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [(), ("--random-crop",), pytest.param((*LORA, "--random-crop"), marks=pytest.mark.slow)]
)
def test_photographs_that_change_during_training_change_nothing(flags, base, photographs, tmp_path):
    """Photographs are read once. With --random-crop every step decodes them, and the final sheet shows them."""

    class Damaging(LoRATuning if "--lora-rank" in flags else FullTuning):
        def prepare(self, *inputs):
            super().prepare(*inputs)
            for i, path in enumerate(photographs.iterdir()):
                path.unlink() if i else path.write_bytes(b"no picture any more")

    call(*base, *flags, "--output-dir", tmp_path / "whole")
    call(*base, *flags, "--output-dir", tmp_path / "run", tuning=Damaging)
    check_same(tmp_path / "whole", tmp_path / "run")
