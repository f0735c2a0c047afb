"""Text to picture and picture to picture equal diffusers, with every sampler and with guidance settings."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from runs import slow_after

import sample
from ldm import InputError, images, samplers
from ldm.guidance import guided
from ldm.samplers import SAMPLERS
from ldm.schedule import Schedule

PROMPTS, SEEDS = ["a photo of a red cat", "snow"], [3, 14]


@pytest.fixture(scope="module")
def sd(random_model):
    return random_model()


@pytest.fixture(scope="module")
def zero_snr(random_model):
    """The same weights, used to predict v on a schedule with zero terminal SNR."""
    sd = random_model()
    schedule = replace(sd.config.schedule, prediction="v", zero_terminal_snr=True, spacing="trailing")
    sd.config = replace(sd.config, schedule=schedule)
    sd.schedule = Schedule(schedule)
    return sd


@pytest.fixture(scope="module")
def folders(sd, zero_snr, tmp_path_factory):
    """A folder that has both models as diffusers folders, "eps" and "v"."""
    folder = tmp_path_factory.mktemp("folders")
    for name, model in {"eps": sd, "v": zero_snr}.items():
        model.save(folder / name, "diffusers")
    return folder


@pytest.fixture
def with_diffusers(folders, scheduler_of_diffusers):
    """with_diffusers(kind, model, sampler, options...) returns the pictures of a diffusers pipeline of this kind."""
    diffusers = pytest.importorskip("diffusers", reason="needs the parity extra")

    def make(kind: str, model: str, sampler: str, **options) -> list[Image.Image]:
        pipe = getattr(diffusers, kind).from_pretrained(folders / model)
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = scheduler_of_diffusers(sampler, pipe.scheduler.config)
        generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
        return pipe(PROMPTS, generator=generators, negative_prompt=["a blur"] * 2, **options).images

    return make


@pytest.fixture(scope="module")
def image() -> Image.Image:
    """Soft patches of colour, 32x32."""
    noise = torch.randint(256, (5, 5, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Image.fromarray(noise.numpy()).resize((32, 32), Image.Resampling.BICUBIC)


def assert_same(ours: list[Image.Image], theirs: list[Image.Image]):
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max() <= 1
        assert np.asarray(a).std() > 10  # the picture has more than one colour


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_pictures_equal_those_of_diffusers(sampler, sd, with_diffusers):
    theirs = with_diffusers("StableDiffusionPipeline", "eps", sampler, num_inference_steps=8)
    assert_same(sd.generate(PROMPTS, negative_prompt="a blur", steps=8, sampler=sampler, seeds=SEEDS), theirs)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler", "dpmpp_2m", "dpmpp_2m_karras"])
def test_zero_terminal_snr_and_guidance_rescale_equal_those_of_diffusers(sampler, zero_snr, with_diffusers):
    theirs = with_diffusers("StableDiffusionPipeline", "v", sampler, num_inference_steps=8, guidance_rescale=0.7)
    ours = zero_snr.generate(
        PROMPTS, negative_prompt="a blur", steps=8, sampler=sampler, seeds=SEEDS, guidance_rescale=0.7
    )
    assert_same(ours, theirs)


# Without plms: diffusers starts it at the wrong step, because its list contains one step twice and is cut by count.
@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "plms"])
@pytest.mark.parametrize("strength", slow_after(1, [0.3, 0.8, 1.0]))
def test_pictures_from_a_picture_equal_those_of_diffusers(strength, sampler, sd, with_diffusers, image):
    theirs = with_diffusers(
        "StableDiffusionImg2ImgPipeline",
        "eps",
        sampler,
        image=image,
        strength=strength,
        num_inference_steps=10,
    )
    ours = sd.generate(
        PROMPTS,
        negative_prompt="a blur",
        steps=10,
        sampler=sampler,
        seeds=SEEDS,
        init_image=images.to_tensor(image),
        strength=strength,
    )
    assert_same(ours, theirs)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_strength_is_the_fraction_of_steps_that_change_the_picture(sampler, sd, image):
    start = images.to_tensor(image)
    kept = sd.decode_latents(sd.encode_images(start[None], torch.Generator().manual_seed(5))).detach()
    calls, distances = [], []
    for strength in (0.0, 0.2, 1.0):
        calls.clear()
        made = sd.generate(
            "snow",
            seeds=[5],
            steps=10,
            sampler=sampler,
            init_image=start,
            strength=strength,
            output="tensor",
            progress=lambda: calls.append(1),
        )
        assert len(calls) == samplers.find(sampler).evaluations(round(10 * strength))
        distances.append((made - kept).square().mean().item())
    assert distances[0] < 1e-8 and distances[1] < 0.8 * distances[2]


def test_a_picture_is_encoded_once_for_all_seeds(sd, image, monkeypatch):
    encoded, encode = [], sd.vae.encode
    monkeypatch.setattr(sd.vae, "encode", lambda images: encoded.append(len(images)) or encode(images))
    start = {"init_image": images.to_tensor(image), "strength": 0.0, "output": "latent"}
    batch = sd.generate("snow", seeds=[3, 4, 5], **start)
    assert encoded == [1] and (batch[0] - batch[1]).abs().max() > 0.01
    assert torch.equal(batch[1:2], sd.generate("snow", seeds=[4], **start))


def test_guidance_rescale_restores_the_standard_deviation_of_the_prompts_prediction():
    without, with_prompt = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = without + 9.0 * (with_prompt - without)
    torch.testing.assert_close(guided(without, with_prompt, 9.0), plain)
    torch.testing.assert_close(guided(without, with_prompt, 9.0, 1.0).std((1, 2, 3)), with_prompt.std((1, 2, 3)))
    half = (guided(without, with_prompt, 9.0, 1.0) + plain) / 2
    torch.testing.assert_close(guided(without, with_prompt, 9.0, 0.5), half)


# On the command line


@pytest.fixture
def run(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *flags: sample.main(["--model", str(folders / "eps"), "--prompt", "a cat", "--steps", "5", *flags])


def test_sample_py_starts_from_a_picture_of_any_shape(run, sd, image, tmp_path):
    image.resize((90, 40)).save(tmp_path / "wide.jpg")
    run("--init-image", "wide.jpg", "--strength", "0.6", "--height", "16", "--width", "48", "--sampler", "heun")
    made = Image.open(tmp_path / "samples" / "00000-0.png")
    assert made.size == (48, 16)
    assert {"ldm.init_image": "wide.jpg", "ldm.strength": "0.6", "ldm.sampler": "heun"}.items() <= made.text.items()
    start = images.to_tensor(images.fit("wide.jpg", 48, 16))
    expected = sd.generate("a cat", steps=5, init_image=start, strength=0.6, sampler="heun")
    assert np.array_equal(np.asarray(made), np.asarray(expected[0]))


def test_sample_py_lists_the_samplers_without_a_model(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sample.main(["--sampler", "help", "--model", "nowhere"])
    assert capsys.readouterr().out.split("\n")[:-1] == samplers.listing().split("\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (("--init-image", "nowhere.png"), "nowhere.png"),
        (("--init-image", "a.png", "--strength", "1.2"), "strength 1.2"),
        (("--guidance-rescale", "-0.1"), "--guidance-rescale -0.1"),
        (("--guidance-rescale", "nan"), "--guidance-rescale nan"),
    ],
)
def test_sample_py_refuses_wrong_flags_and_writes_nothing(flags, complaint, run, tmp_path):
    with pytest.raises(InputError, match=complaint):
        run(*flags)
    assert not list(tmp_path.iterdir())
