"""The prior term from the base model's own prediction, which needs no class pictures."""

import pytest
import torch
from runs import LATEST, SMALL, call, losses, metrics, refused
from safetensors.torch import load_file

from ldm import StableDiffusion, rng
from ldm.images import load_picture

PREDICTION = ("--prior", "prediction")


@pytest.fixture
def base(saved, photographs) -> tuple:
    return ("--model", saved["official"], "--instance-data-dir", photographs, *SMALL)


def test_it_makes_no_class_pictures_and_begins_at_zero(base, tmp_path):
    """Before the first update the model is the base model, and agrees with its prediction."""
    call(*base, *PREDICTION, "--output-dir", tmp_path / "run", "--learning-rate", "1e-3")
    assert not (tmp_path / "run" / "class").exists()
    lines = metrics(tmp_path / "run")
    assert lines[0]["prior_loss"] < 1e-10 and all(line["prior_loss"] > 1e-8 for line in lines[1:])


def test_the_loss_is_that_of_the_formula(base, saved, photographs, tmp_path):
    """The second step's losses, written out: same noisy latents, class prompt, target = the base's prediction."""
    flags = (*base, *PREDICTION, "--prior-loss-weight", 0.5, "--learning-rate", "1e-3", "--max-train-steps", 2)
    call(*flags, "--checkpointing-steps", 1, "--output-dir", tmp_path / "run")
    line = metrics(tmp_path / "run")[1]
    before = StableDiffusion.load(saved["official"])
    after = StableDiffusion.load(tmp_path / "run" / "checkpoints" / "checkpoint-000001")
    pictures = sorted(photographs.iterdir())
    index = 1  # of the row of step 2
    generator = rng.generator(0, "instance", "noise", index)
    shape = before.latent_shape(16, 16)
    spread, noise = torch.randn((2, *shape), generator=generator)
    t = torch.randint(1000, (), generator=generator)
    image = load_picture(pictures[rng.pick(0, "instance", index, len(pictures))], 16)
    with torch.no_grad():
        posterior = before.vae.encode(image[None])
        x0 = (posterior.mean + posterior.std * spread) * before.config.vae.scale_factor
        abar = before.schedule.alphas_cumprod[t].float()
        noisy = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
        target = noise if before.config.schedule.prediction == "eps" else abar.sqrt() * noise - (1 - abar).sqrt() * x0
        subject = after.unet(noisy, t[None], after.encode_prompt("a sks dog")) - target
        prior = after.unet(noisy, t[None], after.encode_prompt("a dog"))
        prior = prior - before.unet(noisy, t[None], before.encode_prompt("a dog"))
    assert line["subject_loss"] == pytest.approx(subject.square().mean().item(), rel=1e-4)
    assert line["prior_loss"] == pytest.approx(prior.square().mean().item(), rel=1e-3)
    assert line["loss"] == pytest.approx(line["subject_loss"] + 0.5 * line["prior_loss"], rel=1e-5)


LORA = ("--lora-rank", 2, "--learning-rate", "1e-2")


def test_the_base_of_a_lora_is_the_model_without_it(base, tmp_path):
    """The first prior loss is zero; nothing of the base is copied, and the second loss is that of a copy."""
    call(*base, *PREDICTION, *LORA, "--output-dir", tmp_path / "run", "--gradient-checkpointing")
    lines = metrics(tmp_path / "run")
    assert lines[0]["prior_loss"] < 1e-10 and all(line["prior_loss"] > 1e-8 for line in lines[1:])


@pytest.mark.slow
@pytest.mark.parametrize("flags", [LORA, (), ("--mixed-precision", "bf16", "--random-crop", "--no-train-text-encoder")])
def test_a_resumed_run_equals_the_run_that_never_stopped(flags, base, tmp_path):
    flags = (*base, *PREDICTION, *flags, "--checkpointing-steps", 2)
    call(*flags, "--max-train-steps", 4, "--output-dir", tmp_path / "whole")
    call(*flags, "--max-train-steps", 2, "--output-dir", tmp_path / "parts")
    call(*flags, "--max-train-steps", 4, "--output-dir", tmp_path / "parts", *LATEST)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    name = "lora.safetensors" if "--lora-rank" in flags else "model.safetensors"
    one, other = load_file(tmp_path / "whole" / name), load_file(tmp_path / "parts" / name)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_without_prior_preservation_it_has_no_effect(base, tmp_path):
    for name, flags in (("plain", ()), ("prediction", PREDICTION)):
        call(*base, "--no-with-prior-preservation", *flags, "--output-dir", tmp_path / name)
    assert losses(tmp_path / "plain") == losses(tmp_path / "prediction")


def test_a_run_with_class_pictures_is_not_continued_with_the_prediction(base, tmp_path):
    call(*base, "--output-dir", tmp_path / "run", "--max-train-steps", 1)
    assert "prior was 'pictures'" in refused(*base, *PREDICTION, "--output-dir", tmp_path / "run", *LATEST)
