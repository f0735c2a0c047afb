"""sample.py and `generate`: a picture depends on its prompt and its seed, not on its batch."""

import json
import re

import numpy as np
import pytest
import runs
import torch
from PIL import Image
from runs import pixels, slow_after

import sample
from ldm import StableDiffusion, samplers
from ldm.errors import InputError, RunError


@pytest.fixture(scope="module")
def sd(random_model) -> StableDiffusion:
    return random_model()


@pytest.fixture
def run(saved, tmp_path, monkeypatch):
    """run(flags...) runs sample.py with the small model in an empty folder. Returns the names of the new files."""
    monkeypatch.chdir(tmp_path)

    def main(*flags: str) -> list[str]:
        sample.main(["--model", str(saved["official"]), "--steps", "2", *flags])
        return sorted(path.name for path in (tmp_path / "samples").iterdir())

    return main


def test_pictures_record_how_they_were_made(run, saved, tmp_path):
    prompt = 'a "photo" of a café\nat night, 夜'
    names = run("--prompt", prompt, "--seed", "41", "--num-images", "2", "--negative-prompt", "fog", "--height", "16")
    assert names == ["00000-41.png", "00001-42.png"]
    picture = Image.open(tmp_path / "samples" / "00001-42.png")
    assert (picture.size, picture.mode) == ((32, 16), "RGB")
    expected = {
        "ldm.prompt": prompt,
        "ldm.negative_prompt": "fog",
        "ldm.seed": "42",
        "ldm.sampler": "ddim",
        "ldm.eta": "0.0",
        "ldm.steps": "2",
        "ldm.guidance_scale": "7.5",
        "ldm.width": "32",
        "ldm.height": "16",
        "ldm.model": StableDiffusion.load(saved["diffusers"]).source_fingerprint(),
    }
    assert expected.items() <= picture.text.items()


SAMPLING = {"sampler": "euler", "steps": 3, "guidance_scale": 4.0, "resolution": 24}


@pytest.fixture
def sampled(saved, tmp_path, monkeypatch, capsys):
    """sampled(metadata, layout, flags...): the settings with which sample.py samples such a model, and its output."""

    def run(metadata: dict[str, str], layout: str, *flags: str) -> tuple[dict, list[str]]:
        name = {"official": "a.safetensors", "diffusers": "a", "checkpoint": "checkpoint-000003/model.safetensors"}
        path = tmp_path / name[layout]
        sd = StableDiffusion.load(saved["official"])
        sd.save(path, "diffusers" if layout == "diffusers" else "official", metadata=metadata)
        seen = {}

        def spy(self, prompts, **kwargs):
            names = ("sampler", "steps", "guidance", "height", "width")
            seen.update({name: kwargs[name] for name in names})
            return [Image.new("RGB", (8, 8))] * len(prompts)

        monkeypatch.setattr(StableDiffusion, "generate", spy)
        model = str(path.parent if layout == "checkpoint" else path)
        sample.main(["--model", model, "--prompt", "a", "--output-dir", str(tmp_path / "samples"), *flags])
        return seen, capsys.readouterr().out.splitlines()

    return run


@pytest.mark.parametrize("layout", ["official", "diffusers", "checkpoint"])
def test_a_tuned_model_is_sampled_as_its_training_run_sampled(layout, sampled):
    metadata = {"ldm.sampling": json.dumps(SAMPLING)}
    seen, lines = sampled(metadata, layout)
    assert seen == {"sampler": "euler", "steps": 3, "guidance": 4.0, "height": 24, "width": 24}
    assert lines[1] == "sampling as in the model's training run: euler, 3 steps, guidance 4.0, 24 px"
    seen, lines = sampled(metadata, layout, "--steps", "5", "--height", "16", "--sampler", "ddim")
    assert seen == {"sampler": "ddim", "steps": 5, "guidance": 4.0, "height": 16, "width": 24}
    assert lines[1] == "sampling as in the model's training run: guidance 4.0, 24 px"
    seen, lines = sampled({}, layout)
    assert seen == {"sampler": "ddim", "steps": 50, "guidance": 7.5, "height": 32, "width": 32}
    assert not any("training run" in line for line in lines)


@pytest.mark.parametrize(
    "text, ignored",
    slow_after(
        6,
        [
            ("{", "is damaged"),
            ("[" * 100_000, "is damaged"),
            ("[1]", "is damaged"),
            ('{"sampler": "magic"}', "sampler 'magic'"),
            ('{"sampler": ["ddim"]}', "sampler"),
            ('{"steps": 1000000000}', "steps 1000000000"),
            ('{"steps": 0}', "steps 0"),
            ('{"steps": true}', "steps True"),
            ('{"steps": 25.0}', "steps 25.0"),
            ('{"guidance_scale": NaN}', "guidance_scale nan"),
            ('{"guidance_scale": Infinity}', "guidance_scale inf"),
            ('{"guidance_scale": 1%s}' % ("0" * 400), "guidance_scale 1000"),
            ('{"guidance_scale": "7.5"}', "guidance_scale '7.5'"),
            ('{"resolution": 30}', "resolution 30"),
            ('{"resolution": -8}', "resolution -8"),
            ('{"resolution": 1048576}', "resolution 1048576"),
            ('{"resolution": [8, 8]}', "resolution"),
        ],
    ),
    ids=lambda value: value[:24],
)
def test_damaged_sampling_metadata_are_ignored_with_a_warning(text, ignored, sampled):
    with pytest.warns(UserWarning, match=f"its metadata ldm.sampling (says )?{ignored}.*ignored"):
        seen, lines = sampled({"ldm.sampling": text}, "official")
    assert seen == {"sampler": "ddim", "steps": 50, "guidance": 7.5, "height": 32, "width": 32}
    assert not any("training run" in line for line in lines)


def test_good_sampling_metadata_beside_damaged_ones_are_used(sampled):
    with pytest.warns(UserWarning, match="steps -1"):
        seen, _ = sampled({"ldm.sampling": json.dumps(SAMPLING | {"steps": -1, "more": 1})}, "official")
    assert seen == {"sampler": "euler", "steps": 50, "guidance": 4.0, "height": 24, "width": 24}


def test_the_embedded_model_is_sampled_with_the_settings_of_train_toml(root, tmp_path, monkeypatch):
    seen = {}

    def spy(self, prompts, **kwargs):
        seen.update(kwargs)
        return [Image.new("RGB", (8, 8))]

    monkeypatch.setattr(StableDiffusion, "generate", spy)
    sample.main(["--prompt", "a", "--output-dir", str(tmp_path)])
    assert [seen[name] for name in ("sampler", "steps", "guidance", "height")] == ["ddim", 25, 4.0, 64]


def test_nothing_is_overwritten(run, tmp_path):
    first = run("--prompt", "a", "--grid")
    before = {name: (tmp_path / "samples" / name).read_bytes() for name in first}
    (tmp_path / "samples" / "notes.txt").write_text("mine")
    (tmp_path / "samples" / "2024-holiday.png").write_bytes(b"mine")
    second = run("--prompt", "b", "--grid")
    assert first == ["00000-0.png", "grid-00000.png"]
    assert set(second) - set(first) == {"02025-0.png", "grid-00001.png", "notes.txt", "2024-holiday.png"}
    assert all((tmp_path / "samples" / name).read_bytes() == content for name, content in before.items())
    (tmp_path / "samples" / "grid-00000.png").unlink()
    assert "grid-00002.png" in run("--prompt", "c", "--grid")


def test_a_file_that_another_run_writes_meanwhile_is_not_overwritten(run, tmp_path, monkeypatch):
    def meanwhile(*args, **kwargs):
        (tmp_path / "samples" / "00001-1.png").write_bytes(b"another's")
        return [Image.new("RGB", (32, 32))] * 2

    monkeypatch.setattr(StableDiffusion, "generate", meanwhile)
    with pytest.raises(RunError, match=r"samples/00001-1\.png has come up meanwhile; give each run an --output-dir"):
        run("--prompt", "a", "--num-images", "2")
    assert (tmp_path / "samples" / "00001-1.png").read_bytes() == b"another's"
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {"00000-0.png", "00001-1.png"}


def test_a_picture_is_written_whole_or_not_at_all(run, tmp_path, monkeypatch):
    def cut_short(picture, path, **kwargs):
        path.write_bytes(b"\x89PNG")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", cut_short)
    with pytest.raises(RunError, match=r"samples/00000-0\.png can't be written: .*No space left on device"):
        run("--prompt", "a")
    assert not list((tmp_path / "samples").iterdir())


def test_running_out_of_memory_gives_one_line(run, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 GiB.")

    monkeypatch.setattr(StableDiffusion, "generate", full)
    advice = "lower --batch-size, or give --dtype bf16 or --vae-tiling"
    with pytest.raises(RunError, match=f"^cpu ran out of memory while it made pictures; {advice}$"):
        run("--prompt", "a")


def test_prompts_come_from_flags_and_from_a_file(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("\ufeffa cat\n\n  snow  \r\n", encoding="utf-8")
    names = run("--prompt", "a dog", "--prompts_file=prompts.txt", "--num-images", "2", "--batch_size", "3")
    texts = [Image.open(tmp_path / "samples" / name).text for name in names]
    shown = [(text["ldm.prompt"], text["ldm.seed"]) for text in texts]
    assert shown == [(prompt, seed) for prompt in ("a dog", "a cat", "snow") for seed in ("0", "1")]


def test_the_pictures_equal_those_of_generate_in_batches_of_any_size(run, sd, tmp_path):
    flags = ("--prompt", "a cat", "--prompt", "snow", "--num-images", "3", "--sampler", "ddpm", "--seed", "5")
    run(*flags, "--batch-size", "1", "--output-dir", "samples")
    run(*flags, "--batch-size", "4", "--output-dir", "samples")
    prompts, seeds = ["a cat"] * 3 + ["snow"] * 3, [5, 6, 7] * 2
    direct = sd.generate(prompts, seeds=seeds, sampler="ddpm", steps=2)
    for i, picture in enumerate(direct):
        one, four = (pixels(tmp_path / "samples" / f"{i + k:05d}-{seeds[i]}.png") for k in (0, 6))
        assert np.abs(one - four).max() <= 1 and np.abs(one - np.asarray(picture).astype(int)).max() <= 1


def test_zero_terminal_snr_is_for_models_that_predict_v_and_changes_their_pictures(run, random_model, tmp_path):
    with pytest.raises(InputError, match="predicts v"):
        run("--prompt", "a dog", "--zero-terminal-snr")
    v = ("--prompt", "a dog", "--prediction-type", "v_prediction")
    run(*v), run(*v, "--zero-terminal-snr")
    plain, zero = (tmp_path / "samples" / name for name in ("00000-0.png", "00001-0.png"))
    assert Image.open(zero).text["ldm.zero_terminal_snr"] == "True" and np.abs(pixels(plain) - pixels(zero)).max() > 5


@pytest.mark.slow
def test_two_processes_share_the_pictures(saved, tmp_path):
    flags = ["--model", saved["official"], "--steps", 2, "--prompt", "a dog", "--prompt", "snow", "--num-images", 3]
    flags += ["--batch-size", 2, "--grid", "--output-dir"]
    runs.run(runs.command([*flags, tmp_path / "two"], 2, script="sample.py"), tmp_path)
    runs.run(runs.command([*flags, tmp_path / "one"], script="sample.py"), tmp_path)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()} for folder in ("one", "two"))
    assert len(one) == 7 and two == one


def test_a_grid_has_a_row_for_each_prompt_and_a_column_for_each_seed(run, tmp_path):
    names = run("--prompt", "a cat", "--prompt", "snow", "--num-images", "3", "--grid")
    assert names == [f"{i:05d}-{i % 3}.png" for i in range(6)] + ["grid-00000.png"]
    sheet = Image.open(tmp_path / "samples" / "grid-00000.png").convert("RGB")
    assert sheet.width > 3 * 128 > sheet.width - 30 and sheet.height > 2 * 128  # cells enlarged to 128 pixels
    cells = [pixels(tmp_path / "samples" / name).reshape(-1, 3).mean(0) for name in names[:6]]
    width, height = (sheet.width - 4) // 3, sheet.height // 2
    for i, mean in enumerate(cells):
        left, top = 4 + (i % 3) * width, (i // 3) * height + (height - 128) - 2
        found = np.asarray(sheet.crop((left + 8, top + 8, left + 120, top + 116))).reshape(-1, 3).mean(0)
        assert np.abs(found - mean).max() < 20


def test_the_generator_of_the_seed_draws_first_the_latents_and_then_the_noise(sd, monkeypatch):
    seen = {}

    def spy(denoise, x, schedule, times, *, noise, **others):
        seen["x"], seen["noise"] = x, noise()
        return x

    monkeypatch.setitem(samplers.SAMPLERS, "spy", samplers.Sampler(spy))
    sd.generate("a cat", seeds=[7, 1234567890123], sampler="spy", output="latent", height=24, width=40)
    for row, seed in enumerate((7, 1234567890123)):
        generator = torch.Generator().manual_seed(seed)
        assert torch.equal(seen["x"][row], torch.randn(4, 6, 10, generator=generator))
        assert torch.equal(seen["noise"][row], torch.randn(4, 6, 10, generator=generator))
    given = torch.randn(1, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sd.generate("a", sampler="spy", output="latent", latents=given), given)
    assert seen["noise"].shape == given.shape


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_a_picture_does_not_depend_on_its_batch(sampler, sd):
    kwargs = dict(sampler=sampler, eta=0.5, steps=4, output="latent")
    batch = sd.generate(["a cat", "snow", "a dog"], seeds=[3, 4, 5], **kwargs)
    alone = sd.generate("snow", seeds=[4], **kwargs)
    torch.testing.assert_close(batch[1:2], alone, rtol=0, atol=1e-5 * batch.abs().max().item())
    assert (batch[0] - batch[1]).abs().max() > 1


def test_guidance_doubles_the_batch_except_at_scale_1(sd, monkeypatch):
    """eps = eps("") + w (eps(prompt) - eps("")), Ho & Salimans 2022."""
    monkeypatch.setitem(samplers.SAMPLERS, "one", samplers.Sampler(lambda denoise, x, *_, **__: denoise(x, 300)))
    sizes, forward = [], sd.unet.forward
    monkeypatch.setattr(sd.unet, "forward", lambda x, t, c: (sizes.append(len(x)), forward(x, t, c))[1])
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    given = dict(negative_prompt="fog", latents=x, sampler="one", output="latent")
    eps = [sd.generate(["a cat", "snow", ""], guidance=w, **given) for w in (0.0, 1.0, 5.0)]
    assert sizes == [6, 3, 6]
    with torch.no_grad():
        alone = forward(x, torch.full((3,), 300), sd.encode_prompt(["fog"] * 3))
    torch.testing.assert_close(eps[0], alone, rtol=0, atol=1e-5 * alone.abs().max().item())
    scale = 1e-4 * eps[2].abs().max().item()
    torch.testing.assert_close(eps[2], eps[0] + 5.0 * (eps[1] - eps[0]), rtol=0, atol=scale)
    assert (eps[0] - eps[1]).abs().max() > 0.01


@pytest.mark.parametrize(
    "latents, init_image, said",
    [
        ((1, 4, 6, 8), (3, 32, 32), r"latents are \(4, 6, 8\) each, and init_image \(3, 32, 32\) makes \(4, 8, 8\)"),
        ((4, 8, 8), None, r"latents are \(4, 8, 8\), and should be \(B, 4, h, w\)"),
        ((), None, r"latents are \(\), and should be \(B, 4, h, w\)"),
        ((1, 3, 8, 8), None, r"latents are \(1, 3, 8, 8\), and should be \(B, 4, h, w\)"),
        ((1, 4, 0, 8), None, r"latents are \(1, 4, 0, 8\), and should be"),
        (None, (1, 3, 32, 32), r"init_image is \(1, 3, 32, 32\), and should be \(3, H, W\)"),
        (None, (1, 32, 32), r"init_image is \(1, 32, 32\), and should be \(3, H, W\)"),
        (None, (3, 32, 30), "width 30 is not a positive multiple of 4 pixels; take 32"),
        (None, (3, 0, 32), "height 0 is not a positive multiple of 4 pixels; take 4"),
    ],
)
def test_latents_and_pictures_that_sampling_can_not_start_from_are_refused(latents, init_image, said, sd):
    given = {"latents": latents, "init_image": init_image}
    with pytest.raises(InputError, match=said):
        sd.generate("a", steps=2, **{name: torch.zeros(shape) for name, shape in given.items() if shape is not None})


def test_latents_that_are_not_finite_give_an_error_instead_of_a_picture(sd):
    diverged = torch.full((1, 4, 8, 8), float("nan"))
    with pytest.raises(RunError, match=r"NaN or infinity: fp16 is too narrow for the model \(take bf16 or fp32\)"):
        sd.generate("a cat", steps=1, latents=diverged)


def test_lists_of_length_one_are_broadcast(sd):
    kwargs = dict(steps=1, output="latent")
    assert sd.generate(["a", "b", "c"], **kwargs).shape == (3, 4, 8, 8)
    assert sd.generate("a", seeds=[1, 2], **kwargs).shape == (2, 4, 8, 8)
    tensor = sd.generate("a", steps=1, output="tensor", height=20, width=44)
    assert tensor.shape == (1, 3, 20, 44) and tensor.dtype == torch.float32
    picture = sd.generate("a", steps=1, height=20, width=44)[0]
    expected = ((tensor[0] / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0)
    assert np.array_equal(np.asarray(picture), expected.numpy().astype(np.uint8))
    with pytest.raises(ValueError, match=re.escape("2 prompts, 3 seeds and 1 latents do not pair up")):
        sd.generate(["a", "b"], seeds=[1, 2, 3])


def test_half_precision_makes_nearly_the_same_pictures(run, tmp_path):
    run("--prompt", "a cat", "--guidance-scale", "2")
    run("--prompt", "a cat", "--guidance-scale", "2", "--dtype", "bf16")
    a, b = (pixels(tmp_path / "samples" / name) for name in ("00000-0.png", "00001-0.png"))
    assert np.abs(a - b).mean() < 4 < np.abs(a - a.mean()).mean()
