"""The embedded model: golden numbers from diffusers, the scripts that made it, the first command of README."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from make_goldens import BASE, NUMBERS, PICTURE, PROMPTS, SAMPLING, STEPS, compute, digest, wave
from PIL import Image

from ldm import StableDiffusion

GOLDENS = json.loads(NUMBERS.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def sd() -> StableDiffusion:
    return StableDiffusion.load(BASE, dtype=torch.float32)


def furthest(a: Image.Image, b: Image.Image) -> int:
    return np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max()


def assert_golden(name: str, found: dict[str, list]) -> None:
    golden = GOLDENS[name]
    assert found["shape"] == golden["shape"]
    scale = np.abs(golden["values"]).max()
    np.testing.assert_allclose(found["values"], golden["values"], rtol=0, atol=2e-5 * scale, err_msg=name)


def test_the_golden_numbers_belong_to_these_weights(sd):
    assert sd.source_fingerprint() == GOLDENS["model"], "the weights have changed: python tests/make_goldens.py"


@torch.no_grad()
def test_networks_give_the_golden_numbers(sd):
    size = sd.config.sample_size
    context = sd.encode_prompt(PROMPTS)
    posterior = sd.vae.encode(wave(1, 3, sd.config.resolution, sd.config.resolution))
    assert_golden("text encoder", digest(context))
    assert_golden("unet", digest(sd.unet(wave(2, 4, size, size), torch.tensor(STEPS), context)))
    assert_golden("vae mean", digest(posterior.mean))
    assert_golden("vae std", digest(posterior.std))
    assert_golden("vae decoded", digest(sd.vae.decode(3.0 * wave(1, 4, size, size))))


def test_generate_gives_the_golden_picture(sd):
    picture = sd.generate(PROMPTS[0], steps=SAMPLING["steps"], guidance=SAMPLING["guidance"], seeds=[SAMPLING["seed"]])
    assert furthest(picture[0], Image.open(PICTURE)) <= 1


def test_diffusers_still_gives_the_golden_numbers():
    pytest.importorskip("diffusers", reason="needs the parity extra")
    pytest.importorskip("transformers", reason="needs the parity extra")
    outputs, picture = compute(BASE)
    for name, tensor in outputs.items():
        assert_golden(name, digest(tensor))
    assert furthest(picture, Image.open(PICTURE)) <= 1


def test_the_shipped_weights_are_small(root):
    shipped = subprocess.run(["git", "ls-files", "weights"], cwd=root, capture_output=True, text=True)
    if shipped.returncode != 0:
        pytest.skip("not a git checkout")
    assert sum((root / name).stat().st_size for name in shipped.stdout.splitlines()) < 14e6


@pytest.mark.slow
def test_the_scripts_make_a_model_from_drawings(root, tmp_path, monkeypatch):
    """Runs the scripts in the order of weights/tiny/README.md, with few drawings and one training step each."""
    scripts = root / "weights" / "tiny"

    def call(script: str, *flags: str) -> subprocess.CompletedProcess:
        command = [sys.executable, scripts / script, "--work-dir", tmp_path, "--minutes", "0.001", *flags]
        environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    for script, earlier in {"text_encoder.py": "dataset.py", "unet.py": "autoencoder.py"}.items():
        early = call(script)
        assert early.returncode == 2 and f"first run weights/tiny/{earlier}" in early.stderr, early.stderr
        assert len(early.stderr.splitlines()) == 1

    monkeypatch.syspath_prepend(scripts)
    import dataset

    dataset.write(tmp_path / "world", 600, wide=False)
    dataset.write(tmp_path / "wide", 20, wide=True)
    made = []
    order = "autoencoder.py, autoencoder.py --resume, text_encoder.py, judge.py, unet.py, unet.py --resume"
    for command in order.split(", "):
        done = call(*command.split())
        assert done.returncode == 0, done.stderr
        if command.startswith("unet.py"):
            made.append(StableDiffusion.load(tmp_path / "base").source_fingerprint())
    assert made[0] != made[1]
    assert StableDiffusion.load(BASE).source_fingerprint() == GOLDENS["model"], "a shipped file has changed"

    assert call("text_encoder.py").returncode == 0
    refused = call("unet.py", "--resume")
    assert refused.returncode == 2 and "another autoencoder or text encoder" in refused.stderr


@pytest.mark.slow
def test_the_first_command_of_the_readme_gives_a_model_that_diffusers_opens(root, tmp_path):
    """Two flags shorten the run. Everything else is as in weights/tiny/train.toml."""
    short = ["--max-train-steps", "3", "--num-class-images", "4"]
    done = subprocess.run(
        [sys.executable, root / "train.py", *short], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    out = tmp_path / "runs" / "dreambooth"
    settings = json.loads((out / "config.json").read_text())
    assert Path(settings["model"]) == BASE and Path(settings["instance_data_dir"]) == BASE.parent / "subject"
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3
    assert len(list((out / "class").glob("*.png"))) == 4
    sheet = Image.open(out / "sheets" / "before_after.png")
    assert min(sheet.size) > 500

    tuned = StableDiffusion.load(out / "model.safetensors")
    assert tuned.source_fingerprint() != GOLDENS["model"]
    sampling = {"sampler": "ddim", "steps": 25, "guidance_scale": 4.0, "resolution": 64}
    assert tuned.source.sampling() == sampling
    diffusers = pytest.importorskip("diffusers", reason="needs the parity extra")
    tuned.save(tmp_path / "folder", "diffusers")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "folder")
    prompts, seeds = [settings["instance_prompt"], settings["class_prompt"]], [11, 12]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    theirs = pipe(prompts, num_inference_steps=10, guidance_scale=4.0, generator=generators).images
    for a, b in zip(tuned.generate(prompts, steps=10, guidance=4.0, seeds=seeds), theirs, strict=True):
        assert furthest(a, b) <= 1
