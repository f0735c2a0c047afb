"""Options of the loss, the noise and the timesteps: each against a formula that is written out here."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import LORA, SMALL, call, digest, latent_rows, metrics, refused
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils.data import default_collate

import sample
from ldm import StableDiffusion, __main__, rng
from ldm.config import ScheduleConfig
from ldm.dreambooth import dreambooth_loss, mask_weight
from ldm.images import load_picture
from ldm.schedule import Schedule

ZERO = "--rescale-betas-zero-snr"
V_ZERO = {"prediction": "v", "zero_terminal_snr": True, "spacing": "trailing"}


@pytest.fixture
def base(saved, photographs) -> tuple:
    return ("--model", saved["official"], "--instance-data-dir", photographs, *SMALL)


# Whole steps: the first step's losses, computed by hand from the photographs, the class pictures and the base model


def alphas_cumprod(zero: bool) -> np.ndarray:
    """DDPM's scaled linear schedule; with zero terminal SNR as in Lin et al. 2023, algorithm 1: sqrt(abar) is shifted
    so that it ends on 0, and scaled so that it begins as before. 2**-24 stands for 0, as in diffusers' Euler."""
    abar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    if not zero:
        return abar
    root = abar**0.5
    return np.maximum(((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2, 2.0**-24)


def squared(d, t):
    return d**2


def huber(c):
    """sd-scripts `conditional_loss` and diffusers' research script train_dreambooth, "huber" with a constant c."""
    return lambda d, t: 2 * c * ((d**2 + c**2).sqrt() - c)


def by_hand(base, folder, *, v=False, zero=False, low=0, high=1000, offset=0.0, error=squared, gamma=None, prior=False):
    """Both terms of step 1 for a batch of two, without our schedule and loss."""
    sd, abar, terms = StableDiffusion.load(base[1]), alphas_cumprod(zero), []
    for prompt, kind, pictures in (("a sks dog", "instance", Path(base[3])), ("a dog", "class", folder / "class")):
        is_predicted = prior and kind == "class"
        kind, pictures = ("instance", Path(base[3])) if is_predicted else (kind, pictures)
        paths, errors = sorted(pictures.glob("*.png")), []
        for index in range(2):
            generator = rng.generator(0, kind, "noise", index)
            spread, noise = torch.randn(2, 4, 8, 8, generator=generator)
            t = int(torch.randint(low, high, (), generator=generator))
            noise = noise + offset * torch.randn(4, 1, 1, generator=generator) if offset else noise
            image = load_picture(paths[rng.pick(0, kind, index, len(paths))], 32)[None]
            with torch.no_grad():
                posterior = sd.vae.encode(image)
                z = 0.25 * (posterior.mean + posterior.std * spread)
                a, s = abar[t] ** 0.5, (1 - abar[t]) ** 0.5
                x = a * z + s * noise
                found = sd.unet(x, torch.tensor([t]), sd.encode_prompt([prompt]))
                target = a * noise - s * z if v else noise
                if is_predicted:  # by the base model, at its own step of the same noise
                    old = alphas_cumprod(False)
                    known = max(abar[t], old[-1])
                    log_sigma = 0.5 * np.log((1 - old) / old)
                    step = np.interp(0.5 * math.log((1 - known) / known), log_sigma, np.arange(1000))
                    target = sd.unet(x, torch.tensor([step]).float(), sd.encode_prompt([prompt]))
                    if zero:
                        x0 = known**0.5 * x - (1 - known) ** 0.5 * target
                        target = (a * x - x0) / s  # a eps - s x0, with the eps of x = a x0 + s eps
            snr = abar[t] / (1 - abar[t])
            weight = 1.0 if gamma is None else min(snr, gamma) / (snr + 1 if v else snr)
            errors.append(weight * error((found - target).double(), t).mean().item())
        terms.append(sum(errors) / 2)
    return terms


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        (
            "--noise-offset 0.1 --min-timestep 600 --max-timestep 700 --loss huber --huber-c 0.3 --snr-gamma 2",
            {"offset": 0.1, "low": 600, "high": 700, "error": huber(0.3), "gamma": 2.0},
        ),
        (f"{ZERO} --min-timestep 900 --prediction-type v", {"v": True, "zero": True, "low": 900}),
        (
            f"{ZERO} --prediction-type v --prior prediction --loss-type huber --noise-offset 0.2 --snr-gamma 5",
            {"v": True, "zero": True, "prior": True, "error": huber(0.1), "offset": 0.2, "gamma": 5.0},
        ),
    ],
    ids=["all but zero SNR", "zero SNR", "zero SNR with --prior prediction"],
)
def test_the_first_losses_equal_those_computed_by_hand(flags, options, base, tmp_path):
    folder = tmp_path / "run"
    more = ("--resolution", 32, "--train-batch-size", 2, "--max-train-steps", 1, "--prior-loss-weight", "0.6")
    call(*base, *more, *flags.split(), "--output-dir", folder)
    expected, line = by_hand(base, folder, **options), metrics(folder)[0]
    # the prior term of a prediction is zero up to rounding where both schedules know the noise, so it is the smaller
    assert (line["subject_loss"], line["prior_loss"]) == pytest.approx(expected, rel=2e-5, abs=1e-8)
    assert line["loss"] == pytest.approx(expected[0] + 0.6 * expected[1], rel=2e-5)


# The noise and the timesteps of a row


def draws(**options):
    """The random part of the rows of three pictures, each also mirrored."""
    latents = torch.zeros(3, 2, 4, 8, 8)
    return replace(latent_rows("instance", latents, latents).draws, **options)


def test_a_noise_offset_shifts_each_channel_and_leaves_all_other_draws():
    plain, shifted = draws(), draws(noise_offset=0.3)
    shifts = []
    for index in range(500):
        a, b = plain[index], shifted[index]
        shift = b["noise"] - a["noise"]  # (4, 8, 8)
        assert (shift - shift[:, :1, :1]).abs().max() < 1e-6 and shift[:, 0, 0].unique().numel() == 4
        assert a.keys() == b.keys() and all(
            torch.equal(a[name], b[name]) for name in ("spread", "t", "picture", "view")
        )
        shifts.append(shift[:, 0, 0])
    shifts = torch.stack(shifts)
    assert shifts.mean().abs() < 0.03 and (shifts.std() / 0.3 - 1).abs() < 0.06


def test_the_timesteps_are_drawn_evenly_from_their_range():
    drawn = default_collate([draws(timesteps=range(200, 210))[i] for i in range(500)])["t"]
    counts = torch.bincount(drawn - 200, minlength=10)
    assert drawn.min() == 200 and drawn.max() == 209 and counts.min() > 25 and counts.max() < 80


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--min-timestep", 500, "--max-timestep", 500), "--min-timestep 500 and --max-timestep 500 hold no timestep"),
        (("--max-timestep", 1001), "should be from 0 to 1000"),
        (("--min-timestep", -1), "should be from 0 to 1000"),
        ((ZERO,), "needs a model that predicts v, and this one predicts eps"),
        (("--noise-offset", -1), "--noise-offset -1.0 is not a number from 0"),
        (("--noise-offset", "nan"), "--noise-offset nan is not a number from 0"),
        (("--huber-c", 0), "--huber-c 0.0 is not a positive number"),
        (("--unmasked-weight", 1.5), "--unmasked-weight 1.5 is not from 0 to 1"),
    ],
)
def test_impossible_values_are_refused_before_anything_is_written(flags, said, base, tmp_path):
    assert said in refused(*base, *flags, "--output-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


# The errors of a prediction


def some(rows=4):
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, rows, 4, 8, 8, generator=generator)
    mask = (torch.rand(rows, 1, 8, 8, generator=generator) * 3 - 1).clamp(0, 1)  # empty, full and partial places
    return prediction, target, mask, torch.arange(rows) >= rows // 2


def test_pseudo_huber_is_a_square_near_zero_and_a_line_far_away():
    prediction, target, _, is_class = some()
    d, c = (prediction - target).double(), 0.3
    expected = (2 * c * (torch.sqrt(d**2 + c**2) - c)).mean((1, 2, 3))
    found = dreambooth_loss(prediction, target, is_class, 0.5, huber_c=c)
    assert found.subject.item() == pytest.approx(expected[:2].mean().item(), rel=1e-5)
    assert found.prior.item() == pytest.approx(expected[2:].mean().item(), rel=1e-5)
    assert found.total.item() == pytest.approx(expected[:2].mean().item() + 0.5 * expected[2:].mean().item(), rel=1e-5)
    zero, no_class = torch.zeros(1, 4, 2, 2), torch.tensor([False])
    near, far = (dreambooth_loss(zero + x, zero, no_class, 1.0, huber_c=c) for x in (0.01, 100.0))
    assert near.total.item() == pytest.approx(0.01**2, rel=1e-3)
    assert far.total.item() == pytest.approx(2 * c * 100, rel=5e-3)


@pytest.mark.parametrize("outside", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("c", [None, 0.2])
def test_the_loss_counts_inside_the_mask_and_is_divided_by_its_mean(outside, c):
    """The weighted mean of each row's errors, sum(w e) / sum(w), with w = 1 inside the mask and `outside` outside."""
    prediction, target, mask, is_class = some()
    mask[2:] = 1.0  # the class prior
    row_weight = torch.tensor([0.5, 2.0, 1.5, 3.0])  # of min-SNR
    d = (prediction - target).double().numpy()
    error = d**2 if c is None else 2 * c * (np.sqrt(d**2 + c**2) - c)
    w = np.broadcast_to((mask + outside * (1 - mask)).double().numpy(), d.shape)
    rows = (w * error).sum((1, 2, 3)) / w.sum((1, 2, 3)) * row_weight.numpy()
    weight = mask_weight(mask, outside)
    found = dreambooth_loss(prediction, target, is_class, 0.7, row_weight, place_weight=weight, huber_c=c)
    expected = rows[:2].mean() + 0.7 * rows[2:].mean(), rows[:2].mean(), rows[2:].mean()
    assert [value.item() for value in found] == pytest.approx(expected, rel=1e-5)


def test_a_full_mask_changes_no_bit_and_an_empty_one_is_no_division_by_zero():
    prediction, target, mask, is_class = some()
    plain = dreambooth_loss(prediction, target, is_class, 1.0)
    for full in (mask_weight(torch.ones_like(mask), 0.1), mask_weight(mask, 1.0)):
        assert torch.equal(dreambooth_loss(prediction, target, is_class, 1.0, place_weight=full).total, plain.total)
    empty = torch.zeros_like(mask)
    torch.testing.assert_close(mask_weight(empty, 0.1), torch.ones_like(mask))
    assert torch.equal(mask_weight(empty, 0.0), empty)


def test_a_small_subject_is_learned_as_fast_as_a_large_one():
    """Where the error is the same everywhere inside the masks, the loss does not depend on their sizes."""
    masks = torch.zeros(2, 1, 8, 8)
    masks[0, :, :2, :2] = masks[1, :, :6, :6] = 1.0
    error = masks.expand(2, 4, 8, 8) * 3.0
    zero, no_class, weight = torch.zeros(1, 4, 8, 8), torch.tensor([False]), mask_weight(masks, 0.0)
    rows = [dreambooth_loss(error[[i]], zero, no_class, 1.0, place_weight=weight[[i]]) for i in range(2)]
    assert [row.total.item() for row in rows] == pytest.approx([9.0, 9.0], rel=1e-6)


# Zero terminal SNR


def test_the_base_model_is_asked_at_the_step_of_the_same_noise():
    """Latents with the distribution N(m, s^2) have an exact model, for every schedule."""
    old, new, m, s = Schedule(ScheduleConfig(prediction="v")), Schedule(ScheduleConfig(**V_ZERO)), 0.7, 0.4

    def exact(schedule):
        def v(x, t):
            abar = torch.tensor([schedule.alpha_bar(step) for step in t.tolist()]).view(-1, 1, 1, 1)
            a, sigma = abar.sqrt(), (1 - abar).sqrt()
            x0 = m + s**2 * a / (a**2 * s**2 + sigma**2) * (x - a * m)  # E[x_0 | x] of two Gaussians
            return (a * x - x0) / sigma

        return v

    x, t = torch.randn(6, 4, 2, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 300, 700, 850, 870])
    assert new.alphas_cumprod[870] > old.alphas_cumprod[-1]
    torch.testing.assert_close(new.ask(exact(old), old, x, t), exact(new)(x, t), rtol=1e-3, atol=1e-3)
    assert torch.equal(old.ask(exact(old), old, x, t), exact(old)(x, t))
    last = torch.full((6,), 999)
    a, sigma = old.alphas_cumprod[-1].sqrt().item(), (1 - old.alphas_cumprod[-1]).sqrt().item()
    x0 = m + s**2 * a / (a**2 * s**2 + sigma**2) * (x - a * m)  # pure noise, taken for the old schedule's last step
    torch.testing.assert_close(new.ask(exact(old), old, x, last), -x0, rtol=1e-2, atol=2e-3)


def test_diffusers_adds_the_same_noise_and_has_the_same_target():
    diffusers = pytest.importorskip("diffusers", reason="needs the parity extra")
    theirs = diffusers.DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=True
    )
    schedule = Schedule(ScheduleConfig(**V_ZERO))
    z, noise = torch.randn(2, 5, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 400, 900, 998, 999])
    close = {"rtol": 0, "atol": 2**-12 * 5}  # sqrt(abar) ends on 2**-12 here and on 0 there
    torch.testing.assert_close(schedule.add_noise(z, noise, t), theirs.add_noise(z, noise, t), **close)
    torch.testing.assert_close(schedule.target(z, noise, t), theirs.get_velocity(z, noise, t), **close)
    torch.testing.assert_close(schedule.add_noise(z[:4], noise[:4], t[:4]), theirs.add_noise(z, noise, t)[:4])


@pytest.fixture
def old_file(saved, tmp_path) -> Path:
    """A model of v that carries the tables of its own schedule, as official files do."""
    StableDiffusion.load(saved["official"], prediction="v").save(tmp_path / "v.safetensors")
    sd = StableDiffusion.load(tmp_path / "v.safetensors")
    assert "alphas_cumprod" in sd.source.extra
    return tmp_path / "v.safetensors"


def said(path: Path) -> tuple:
    schedule = StableDiffusion.load(path).config.schedule
    return schedule.prediction, schedule.zero_terminal_snr, schedule.spacing


def test_the_saved_model_says_it_and_is_sampled_so(old_file, photographs, tmp_path):
    flags = ("--model", old_file, "--instance-data-dir", photographs, *SMALL, "--num-class-images", 2)
    call(*flags, "--output-dir", tmp_path / "plain", "--max-train-steps", 1)
    call(*flags, ZERO, "--output-dir", tmp_path / "zero", "--max-train-steps", 1, "--layout", "diffusers")
    for name in ("class-00000.png", "class-00001.png"):  # made by the base model as it was trained
        assert digest(tmp_path / "plain" / "class" / name) == digest(tmp_path / "zero" / "class" / name)
    folder = tmp_path / "zero" / "model"
    file = tmp_path / "zero" / "checkpoints" / "checkpoint-000001" / "model.safetensors"
    assert said(old_file) == ("v", False, "leading")
    assert said(file) == said(folder) == ("v", True, "trailing")
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["rescale_betas_zero_snr"] is True and scheduler["timestep_spacing"] == "trailing"
    assert scheduler["prediction_type"] == "v_prediction"
    table = load_file(file)["alphas_cumprod"].numpy()
    np.testing.assert_allclose(table, alphas_cumprod(zero=True), rtol=1e-5, atol=2e-7)
    sample.main([*f"--model {file} --prompt a --steps 2 --output-dir {tmp_path}/pictures".split()])
    assert Image.open(next((tmp_path / "pictures").glob("*.png"))).text["ldm.zero_terminal_snr"] == "True"


def test_a_lora_says_it_and_is_sampled_and_merged_so(old_file, photographs, tmp_path):
    flags = ("--model", old_file, "--instance-data-dir", photographs, *SMALL, *LORA, "--prior", "prediction")
    call(*flags, ZERO, "--output-dir", tmp_path / "run", "--max-train-steps", 2)
    lora = tmp_path / "run" / "lora.safetensors"
    with safe_open(lora, "pt") as file:
        assert file.metadata()["ss_zero_terminal_snr"] == "True"  # kohya's name
    words = f"--model {old_file} --lora {lora} --prompt a --steps 2 --output-dir {tmp_path}/pictures".split()
    sample.main(words)
    assert Image.open(next((tmp_path / "pictures").glob("*.png"))).text["ldm.zero_terminal_snr"] == "True"
    __main__.main(["lora", "merge", str(old_file), str(tmp_path / "merged.safetensors"), "--lora", str(lora)])
    assert said(tmp_path / "merged.safetensors") == ("v", True, "trailing")


@pytest.mark.slow
def test_the_command_of_the_tiny_readme_runs(root, tmp_path):
    text = (root / "weights" / "tiny" / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^    python train.py (.*--noise-offset.*)$", text, re.M)
    short = "--max-train-steps 2 --num-class-images 2 --sample-steps 1 --num-validation-images 1 --output-dir"
    call(*command.split(), *short.split(), tmp_path / "run")
    assert len(metrics(tmp_path / "run")) == 2 and said(tmp_path / "run" / "model.safetensors") == (
        "v",
        True,
        "trailing",
    )
