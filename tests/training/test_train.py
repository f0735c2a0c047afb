"""train.py from the command line to the tuned model, on a small random model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import latent_rows, metrics, sample_rows

import train
from ldm import StableDiffusion
from ldm.config import SD1
from ldm.data.rows import Rows
from ldm.dreambooth import dreambooth_loss
from ldm.images import load_picture
from ldm.training import parse

SUBJECT, CLASS = "a photo of sks dog", "a photo of a dog"
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
SHORT = "--resolution 32 --num-class-images 3 --sample-steps 2 --num-validation-images 2 --max-train-steps 3"


@pytest.fixture
def run(saved, photographs, tmp_path):
    """run(flags) trains the small model in this process, with these and the usual flags. Returns the run's folder."""

    def main(flags: str = "", name: str = "run") -> Path:
        given = ["--model", saved["official"], "--instance-data-dir", photographs, "--output-dir", tmp_path / name]
        prompts = ["--instance-prompt", SUBJECT, "--class-prompt", CLASS]
        train.main([str(word) for word in given] + prompts + SHORT.split() + flags.split())
        return tmp_path / name

    return main


def changed(a: dict, b: dict) -> set[str]:
    """The prefixes of the networks that differ."""
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    return {prefix for prefix in (UNET, VAE, TEXT) if any(name.startswith(prefix) for name in different)}


@pytest.mark.slow
def test_a_command_line_of_the_diffusers_script_works(saved, photographs, root, tmp_path):
    command = f"""{sys.executable} {root}/train.py --pretrained_model_name_or_path={saved["diffusers"]}
        --instance_data_dir={photographs} --output_dir=out --with_prior_preservation --prior_loss_weight=0.5
        --resolution=32 --train_batch_size=2 --learning_rate=1e-3 --max_train_steps=3 --num_class_images=3
        --sample_batch_size=2 --train_text_encoder --seed=7 --sample_steps 2 --num_validation_images 2""".split()
    command += [f"--instance_prompt={SUBJECT}", f"--class_prompt={CLASS}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "out/model.safetensors" in done.stdout and "out/sheets/before_after.png" in done.stdout
    assert "training: 100%" in done.stderr and "Traceback" not in done.stderr and "Warning" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "photographs"]
    out = tmp_path / "out"

    config = json.loads((out / "config.json").read_text())
    expected = dict(learning_rate=1e-3, train_batch_size=2, prior_loss_weight=0.5, seed=7, class_prompt=CLASS)
    assert expected.items() <= config.items()
    lines = metrics(out)
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line["loss"] == pytest.approx(line["subject_loss"] + 0.5 * line["prior_loss"], rel=1e-5)
        assert line["prior_loss"] > 0 and line["grad_norm"] > 0
    for name in ("before", "after", "before_after"):
        with Image.open(out / "sheets" / f"{name}.png") as sheet:
            sheet.load()
    made = sorted(path.name for path in (out / "class").iterdir())
    assert made == [f"class-{i:05d}.png" for i in range(3)] + ["manifest.json"]
    base, tuned = StableDiffusion.load(saved["diffusers"]), StableDiffusion.load(out / "model.safetensors")
    assert changed(base.state(), tuned.state()) == {UNET, TEXT}
    assert tuned.config == base.config and tuned.tokenizer.vocab == base.tokenizer.vocab


@pytest.mark.slow
def test_the_same_command_gives_the_same_bits_in_either_layout(run):
    official, folder = run("--layout official", "a"), run("--layout diffusers", "b")
    assert not (official / "model").exists() and not (folder / "model.safetensors").exists()
    a, b = StableDiffusion.load(official / "model.safetensors"), StableDiffusion.load(folder / "model")
    assert changed(a.state(), b.state()) == set() and a.source_fingerprint() == b.source_fingerprint()
    sampling = {"sampler": "ddim", "steps": 2, "guidance_scale": 7.5, "resolution": 32}
    assert a.source.sampling() == b.source.sampling() == sampling  # the defaults of sample.py
    c = StableDiffusion.load(run("--seed 1", "c") / "model.safetensors")
    assert changed(a.state(), c.state()) == {UNET, TEXT}


def test_without_prior_preservation_there_are_no_class_pictures(run, saved):
    out = run("--no-with-prior-preservation --no-train-text-encoder")
    assert not (out / "class").exists()
    assert all(line["prior_loss"] == 0 and line["loss"] == line["subject_loss"] for line in metrics(out))
    base, tuned = StableDiffusion.load(saved["official"]), StableDiffusion.load(out / "model.safetensors")
    assert changed(base.state(), tuned.state()) == {UNET}


def test_class_pictures_are_shared_between_runs(run, tmp_path):
    run(f"--class-data-dir {tmp_path}/class", "a")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "class").iterdir()}
    run(f"--class-data-dir {tmp_path}/class --prior-loss-weight 2", "b")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "class").iterdir()} == times
    a, b = metrics(tmp_path / "a")[0], metrics(tmp_path / "b")[0]
    assert a["prior_loss"] == b["prior_loss"] and b["loss"] == pytest.approx(a["loss"] + a["prior_loss"], rel=1e-5)


def test_a_settings_file_has_relative_paths_and_flags_override_it(saved, photographs, tmp_path, monkeypatch):
    place = tmp_path / "dog"
    place.mkdir()
    (place / "model").symlink_to(saved["diffusers"])
    (place / "photographs").symlink_to(photographs)
    (place / "dog.toml").write_text(
        f'model = "model"\ninstance_data_dir = "photographs"\ninstance-prompt = "{SUBJECT}"\noutput_dir = "run"\n'
        "with_prior_preservation = false\nresolution = 32\nlearning_rate = 1\nmax_train_steps = 100\nsample_steps = 1\n"
        'num_validation_images = 1\nvalidation_prompt = ["a", "b"]\nlayout = "diffusers"\n'
    )
    monkeypatch.chdir(tmp_path)
    train.main(["--config", "dog/dog.toml", "--max_train_steps", "2", "--learning-rate=1e-4"])
    assert [line["step"] for line in metrics(place / "run")] == [1, 2]
    config = json.loads((place / "run" / "config.json").read_text())
    assert (config["learning_rate"], config["validation_prompt"]) == (1e-4, ["a", "b"])
    StableDiffusion.load(place / "run" / "model")


def test_without_a_model_train_toml_applies_and_with_one_the_defaults_for_sd(root, tmp_path):
    tiny = parse([], train.TINY)
    assert Path(tiny.model) == root / "weights" / "tiny" / "base"
    assert Path(tiny.instance_data_dir).is_dir() and tiny.resolution == 64
    sd = parse("--model x --instance-data-dir d --instance-prompt sks --class-prompt dog".split(), train.TINY)
    assert (sd.learning_rate, sd.max_train_steps, sd.num_class_images) == (2e-6, 800, 200)
    assert (sd.prior_loss_weight, sd.resolution, sd.train_text_encoder) == (1.0, SD1.resolution, True)


def encoded(sd_mean_std, paths: list[Path], kind: str, seed: int = 0) -> Rows:
    moments = [sd_mean_std(load_picture(path, 32)[None]) for path in paths]
    mean, std = (torch.stack(part) for part in zip(*moments, strict=True))
    return latent_rows(kind, mean, std, seed)


@pytest.mark.slow
def test_training_lowers_both_losses(run, saved, photographs):
    out = run("--max-train-steps 60 --learning-rate 2e-3 --train-batch-size 2")
    losses = []
    for path in (saved["official"], out / "model.safetensors"):
        sd = StableDiffusion.load(path)

        def moments(image, vae=sd.vae, scale=0.25):
            posterior = vae.encode(image)
            return posterior.mean * scale, posterior.std * scale

        kinds = {"instance": sorted(photographs.iterdir()), "class": sorted((out / "class").glob("*.png"))}
        with torch.no_grad():
            drawn = [sample_rows(encoded(moments, paths, kind, 99), 0, 30) for kind, paths in kinds.items()]
            z, noise, t = (torch.cat(column) for column in zip(*drawn, strict=True))
            context = sd.encode_prompt([SUBJECT, CLASS]).repeat_interleave(30, dim=0)
            prediction = sd.unet(sd.schedule.add_noise(z, noise, t), t, context)
        losses.append(dreambooth_loss(prediction, noise, torch.arange(60) >= 30, 1.0)[1:])
    (subject, prior), (subject_after, prior_after) = losses
    assert subject_after < 0.75 * subject and prior_after < 0.75 * prior


def test_steps_equal_those_written_out_with_diffusers_and_transformers(run, saved, photographs):
    """The steps of diffusers' train_dreambooth.py with --train_text_encoder --with_prior_preservation."""
    diffusers = pytest.importorskip("diffusers", reason="needs the parity extra")
    transformers = pytest.importorskip("transformers", reason="needs the parity extra")
    out = run("--max-train-steps 4 --learning-rate 1e-3 --train-batch-size 2 --prior-loss-weight 0.7")

    folder = saved["diffusers"]
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    text_encoder = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    scheduler = diffusers.DDPMScheduler.from_pretrained(folder / "scheduler")

    def moments(image):
        posterior = vae.encode(image).latent_dist
        return posterior.mean * vae.config.scaling_factor, posterior.std * vae.config.scaling_factor

    with torch.no_grad():
        subject_rows = encoded(moments, sorted(photographs.iterdir()), "instance")
        class_rows = encoded(moments, sorted((out / "class").glob("*.png")), "class")
    ids = tokenizer([SUBJECT] * 2 + [CLASS] * 2, padding="max_length", truncation=True, return_tensors="pt").input_ids
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    for step, line in enumerate(metrics(out)):
        drawn = sample_rows(subject_rows, 2 * step, 2), sample_rows(class_rows, 2 * step, 2)
        latents, noise, timesteps = (torch.cat(column) for column in zip(*drawn, strict=True))
        context = text_encoder(ids, return_dict=False)[0]
        noisy = scheduler.add_noise(latents, noise, timesteps)
        subject, prior = unet(noisy, timesteps, context, return_dict=False)[0].chunk(2)
        target, target_prior = noise.chunk(2)
        subject_loss = torch.nn.functional.mse_loss(subject, target)
        prior_loss = torch.nn.functional.mse_loss(prior, target_prior)
        loss = subject_loss + 0.7 * prior_loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected = {"loss": loss, "subject_loss": subject_loss, "prior_loss": prior_loss, "grad_norm": norm}
        for name, value in expected.items():
            assert line[name] == pytest.approx(value.item(), rel=1e-4), (step, name)
