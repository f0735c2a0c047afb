"""Painting in: the mask's part equals diffusers' inpainting pipeline, and the rest of the picture keeps its bits."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from runs import slow_after

import sample
from ldm import InputError, StableDiffusion, images
from ldm.samplers import SAMPLERS

PROMPTS, SEEDS = ["a photo of a red cat", "snow"], [3, 14]
# Without plms: diffusers starts it at the wrong step, because its list contains one step twice and is cut by count.
COMPARED = [name for name in SAMPLERS if name != "plms"]


@pytest.fixture(scope="module")
def models(random_model, randomised) -> dict[int, StableDiffusion]:
    """By the UNet's input channels: an ordinary model, and one for painting in. Pictures are 32x32, latents 8x8."""
    plain, nine = random_model(), StableDiffusion(random_model().config.for_painting_in(), random_model().tokenizer)
    for network in nine.networks().values():
        randomised(network, 5).eval()
    nine.unet.load_state_dict({n: t for n, t in plain.unet.state_dict().items() if "input_blocks.0" not in n}, False)
    nine.vae.load_state_dict(plain.vae.state_dict())
    nine.text_encoder.load_state_dict(plain.text_encoder.state_dict())
    return {4: plain, 9: nine}


@pytest.fixture(scope="module")
def image() -> Image.Image:
    """Soft patches of colour, 32x32."""
    noise = torch.randint(256, (5, 5, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Image.fromarray(noise.numpy()).resize((32, 32), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def mask() -> Image.Image:
    """An ellipse, white on black, that ends between latents."""
    mask = Image.new("L", (32, 32))
    ImageDraw.Draw(mask).ellipse((5, 2, 26, 19), fill=255)
    return mask


def as_bool(mask: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(mask.convert("L")))[None] >= 128


@pytest.fixture(scope="module")
def with_diffusers(models, tmp_path_factory, scheduler_of_diffusers):
    """with_diffusers(channels, sampler, options...) returns the pictures of diffusers' inpainting pipeline."""
    diffusers = pytest.importorskip("diffusers", reason="needs the parity extra")
    folder = tmp_path_factory.mktemp("folders")
    for channels, sd in models.items():
        sd.save(folder / str(channels), "diffusers")
    pipes = {c: diffusers.StableDiffusionInpaintPipeline.from_pretrained(folder / str(c)) for c in models}
    config = pipes[4].scheduler.config

    def make(channels: int, sampler: str, image: Image.Image, **options) -> list[Image.Image]:
        pipe = pipes[channels]
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = scheduler_of_diffusers(sampler, config)
        generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
        if channels == 4:  # diffusers encodes the masked picture for such a model too, which it never sees
            options["masked_image_latents"] = torch.zeros(2, 4, 8, 8)
        again = {"image": [image] * 2, "negative_prompt": ["a blur"] * 2, "generator": generators}  # a picture a seed
        return pipe(PROMPTS, height=32, width=32, **again, **options).images

    return make


def ours(sd: StableDiffusion, sampler: str, image: Image.Image | None = None, **options) -> list[Image.Image]:
    start = {} if image is None else {"init_image": images.to_tensor(image)}
    return sd.generate(PROMPTS, negative_prompt="a blur", seeds=SEEDS, sampler=sampler, **start, **options)


def array(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


@pytest.mark.parametrize("sampler", COMPARED)
@pytest.mark.parametrize("channels, strength", slow_after(2, [(4, 1.0), (9, 0.6), (4, 0.6), (9, 1.0)]))
def test_painting_in_equals_diffusers_inside_the_mask_and_the_picture_outside(
    channels, strength, sampler, models, with_diffusers, image, mask
):
    theirs = with_diffusers(channels, sampler, image, mask_image=mask, strength=strength, num_inference_steps=8)
    made = ours(models[channels], sampler, image, mask=as_bool(mask), strength=strength, steps=8)
    inside = as_bool(mask)[0].numpy()
    for a, b in zip(map(array, made), map(array, theirs), strict=True):
        assert np.abs(a - b)[inside].max() <= 1
        assert np.array_equal(a[~inside], array(image)[~inside])
        assert np.abs(a - array(image))[inside].mean() > 10  # the mask's part is another


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("channels", [4, 9])
def test_latents_equal_those_of_diffusers_everywhere(channels, guidance, models, with_diffusers, image, mask):
    options = {"mask_image": mask, "guidance_scale": guidance, "num_inference_steps": 5, "eta": 0.5}
    theirs = with_diffusers(channels, "ddim", image, **options)  # which pastes nothing
    z = ours(models[channels], "ddim", image, mask=as_bool(mask), guidance=guidance, steps=5, eta=0.5, output="latent")
    for a, b in zip(images.to_pil(models[channels].decode_latents(z).detach()), theirs, strict=True):
        assert np.abs(array(a) - array(b)).max() <= 1


def test_a_model_for_painting_in_paints_all_of_a_picture_from_a_prompt_alone(models, with_diffusers, image):
    white = Image.new("L", (32, 32), 255)
    theirs = with_diffusers(9, "dpmpp_2m", image, mask_image=white, num_inference_steps=6)
    for a, b in zip(ours(models[9], "dpmpp_2m", steps=6), theirs, strict=True):
        assert np.abs(array(a) - array(b)).max() <= 1
    noise = torch.randn(1, 4, 6, 8)
    assert models[9].generate("snow", steps=2, latents=noise, output="tensor").shape == (1, 3, 24, 32)


def test_plms_shows_the_model_the_noised_picture_outside_the_mask(models, image, mask, monkeypatch):
    sd, seen = models[4], []
    forward = sd.unet.forward
    monkeypatch.setattr(sd.unet, "forward", lambda x, t, c: seen.append((x[:1], int(t[0]))) or forward(x, t, c))
    z = sd.encode_images(images.to_tensor(image)[None], generator := torch.Generator().manual_seed(3))
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    start = {"init_image": images.to_tensor(image), "mask": as_bool(mask)}
    made = sd.generate("snow", steps=4, sampler="plms", seeds=[3], output="latent", **start)
    outside = ~as_bool(mask)[:, ::4, ::4].expand(4, -1, -1)
    assert len(seen) == 5 and torch.equal(seen[0][0], noise)
    for x, t in seen[1:]:
        torch.testing.assert_close(x[0][outside], sd.schedule.add_noise(z, noise, t)[0][outside])
    assert torch.equal(made[0][outside], z[0][outside])


@pytest.mark.parametrize("channels", [4, 9])
def test_strength_0_returns_the_picture(channels, models, image, mask):
    start = {"init_image": images.to_tensor(image), "strength": 0.0, "output": "latent"}
    z = models[channels].encode_images(start["init_image"][None], torch.Generator().manual_seed(3))
    for given in ({}, {"mask": as_bool(mask)}):
        made = models[channels].generate("snow", seeds=[3], steps=4, **start, **given)
        torch.testing.assert_close(made, z)


@pytest.mark.parametrize("channels", [4, 9])
def test_a_picture_painted_in_depends_on_its_seed_alone(channels, models, image, mask):
    start = {"init_image": images.to_tensor(image), "mask": as_bool(mask), "sampler": "euler_a", "output": "tensor"}
    both = models[channels].generate("snow", seeds=[3, 14], steps=4, **start)
    one = models[channels].generate("snow", seeds=[14], steps=4, **start)
    torch.testing.assert_close(both[1:], one, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"init_image": None}, "a mask without init_image"),
        ({"mask": torch.ones(1, 32, 32)}, r"mask is float32 \(1, 32, 32\), and should be bool \(1, 32, 32\)"),
        ({"mask": torch.ones(32, 32, dtype=bool)}, r"mask is bool \(32, 32\), and should be bool \(1, 32, 32\)"),
        ({"mask": torch.ones(1, 32, 24, dtype=bool)}, r"mask is bool \(1, 32, 24\)"),
        ({"mask": torch.zeros(1, 32, 32, dtype=bool)}, "the mask is empty"),
        ({"mask": (torch.arange(32) == 2).expand(1, 32, 32)}, "too fine: it covers the top left pixel of no square"),
        ({"strength": 1.5}, "strength 1.5"),
    ],
)
@pytest.mark.parametrize("channels", slow_after(1, [4, 9]))
def test_masks_that_say_nothing_are_refused(channels, change, said, models, image, mask):
    given = {"init_image": images.to_tensor(image), "mask": as_bool(mask)} | change
    with pytest.raises(InputError, match=said):
        models[channels].generate("snow", steps=2, **given)


# On the command line


@pytest.fixture
def run(models, tmp_path, image, mask, monkeypatch):
    """run(flags...) runs sample.py on the ordinary model, in a folder with pictures and masks of all modes."""
    models[4].save(tmp_path / "model.safetensors")
    image.save(tmp_path / "photo.png")
    image.resize((96, 48)).save(tmp_path / "wide.png")
    mask.save(tmp_path / "mask.png")
    mask.point(lambda v: 255 if v else 0, "1").save(tmp_path / "one_bit.png")
    Image.fromarray(np.asarray(mask).astype(np.uint16) * 257).save(tmp_path / "sixteen_bits.png")
    Image.merge("RGBA", (mask, mask, mask, Image.new("L", mask.size, 255))).save(tmp_path / "opaque.png")
    Image.merge("RGBA", (mask, mask, mask, mask)).save(tmp_path / "transparent.png")
    Image.new("L", mask.size).save(tmp_path / "black.png")
    monkeypatch.chdir(tmp_path)
    common = ("--model", "model.safetensors", "--prompt", "a cat", "--steps", "3", "--init-image")
    return lambda photo, *flags: sample.main([*common, photo, *flags])


def test_sample_py_changes_only_what_the_mask_covers(run, models, image, mask, tmp_path):
    for name in ("mask.png", "one_bit.png", "sixteen_bits.png", "opaque.png"):
        run("photo.png", "--mask", name, "--output-dir", name[:-4])
    made = Image.open(tmp_path / "mask" / "00000-0.png")
    assert {"ldm.init_image": "photo.png", "ldm.mask": "mask.png", "ldm.strength": "1.0"}.items() <= made.text.items()
    expected = models[4].generate("a cat", steps=3, init_image=images.to_tensor(image), mask=as_bool(mask))[0]
    assert np.array_equal(array(made), array(expected))
    outside = ~as_bool(mask)[0].numpy()
    assert np.array_equal(array(made)[outside], array(image)[outside])
    for folder in ("one_bit", "sixteen_bits", "opaque"):
        assert np.array_equal(array(made), array(Image.open(tmp_path / folder / "00000-0.png")))
    again = ("--from-picture", "mask/00000-0.png", "--output-dir", "again")
    with pytest.raises(InputError, match=r"was painted in a mask mask.png: give it as --mask"):
        run("photo.png", *again)
    run("photo.png", "--mask", "mask.png", *again)
    assert np.array_equal(array(made), array(Image.open(tmp_path / "again" / "00000-0.png")))


def test_picture_and_mask_are_cut_at_the_same_place(run, mask, tmp_path, capsys):
    mask.resize((96, 48)).save(tmp_path / "wide_mask.png")
    run("wide.png", "--mask", "wide_mask.png", "--height", "24")  # cut from 96x48 to 64x48, 4:3, and halved
    assert "wide.png is resized and cut from 96 x 48 to 32 x 24" in capsys.readouterr().out
    made = array(Image.open(tmp_path / "samples" / "00000-0.png"))
    photo, cut = (array(images.fit(tmp_path / name, 32, 24)) for name in ("wide.png", "wide_mask.png"))
    changed = (made != photo).any(-1)
    assert changed.any() and not changed[cut[..., 0] < 128].any()


@pytest.mark.parametrize(
    "flags, said",
    [
        (("photo.png", "--mask", "nowhere.png"), "nowhere.png"),
        (("photo.png", "--mask", "model.safetensors"), "model.safetensors can't be read as a picture"),
        (("wide.png", "--mask", "mask.png"), "mask.png has 32 x 32 pixels, and the picture has 96 x 48"),
        (("photo.png", "--mask", "black.png"), "--mask black.png: the mask is empty"),
        (("photo.png", "--mask", "transparent.png"), "transparent.png has transparent parts; save it without"),
    ],
)
def test_sample_py_refuses_masks_that_it_can_not_use(flags, said, run, tmp_path):
    with pytest.raises(InputError, match=said) as error:
        run(*flags)
    assert "\n" not in str(error.value) and not (tmp_path / "samples").exists()


def test_sample_py_refuses_a_mask_without_a_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="--mask m.png needs --init-image"):
        sample.main(["--prompt", "a cat", "--mask", "m.png"])
    assert not list(tmp_path.iterdir())
