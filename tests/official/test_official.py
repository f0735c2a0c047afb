"""Our networks on the official weights give the numbers that others have published for them.

    LDM_WEIGHTS=/data/models pytest -m slow tests/official/test_official.py -rs

The files are in weights/ or in the folder LDM_WEIGHTS. A test whose file is missing is skipped and names the file.
facts/official.json has the numbers: a recipe in words, its result, the tolerance, and who published it. Here each
recipe is a function of a model of any width. Without the files the recipes run on narrow random models: some are
compared with diffusers, and all must find that such a model does not give the published numbers.
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_noise import CARDS, cuda_randn
from runs import slow_after
from torch import Tensor, nn

from ldm import StableDiffusion
from ldm.formats import names
from ldm.unet import timestep_embedding

FACTS = {
    entry["id"]: entry
    for entry in json.loads((Path(__file__).parent.parent / "facts/official.json").read_text())["entries"]
}
FILES = {
    "1.1": ("sd-v1-1.ckpt", "sd-v1-1-full-ema.ckpt"),
    "1.4": ("sd-v1-4.ckpt", "sd-v1-4-full-ema.ckpt"),
    "1.5": (
        "v1-5-pruned-emaonly.safetensors",
        "v1-5-pruned-emaonly.ckpt",
        "v1-5-pruned.safetensors",
        "v1-5-pruned.ckpt",
    ),
    "2.0-base": ("512-base-ema.safetensors", "512-base-ema.ckpt"),
    "2.0": ("768-v-ema.safetensors", "768-v-ema.ckpt"),
}
FILES["1"] = (*FILES["1.5"], *FILES["1.4"], *FILES["1.1"])  # they have the same text encoder
BOTH_UNETS = ("sd-v1-1-full-ema", "sd-v1-4-full-ema", "v1-5-pruned")
Recipe = Callable[[StableDiffusion], Tensor]


# The text encoder


def ends(rows: Tensor) -> Tensor:
    """The first and last three columns."""
    return torch.cat([rows[:, :3], rows[:, -3:]], dim=1)


def embeddings(sd: StableDiffusion) -> Tensor:
    table = sd.text_encoder.text_model.embeddings
    tokens = ends(table.token_embedding.weight[[49406, 320, 1674, 49407]])
    return torch.cat([tokens, ends(table.position_embedding.weight[[0, 1, 2, 74, 75, 76]])])


def embedding_sums(sd: StableDiffusion) -> Tensor:
    ids = torch.tensor([[49406, 320, *[49407] * 75]])
    return ends(sd.text_encoder.text_model.embeddings(ids)[0][[0, 1, 76]])


def rows_of(prompt: str) -> Recipe:
    return lambda sd: ends(sd.encode_prompt([prompt])[0][[0, 1, 2, 74, 75, 76]])


def five_sums(sd: StableDiffusion) -> Tensor:
    model, ones = sd.text_encoder.text_model, torch.ones(1, 2, sd.config.text.width)
    outputs = (
        model.embeddings(torch.tensor([[0, 1], [49406, 49407]])),
        model.final_layer_norm(ones),
        model.encoder.layers[0](ones),
        model.encoder.layers[0].mlp(ones),
        sd.text_encoder(torch.tensor([[0, 1], [4, 5], [49406, 49407]])),
    )
    return torch.stack([output.sum() for output in outputs])


def peek(tensor: Tensor) -> Tensor:
    """One number that summarises a tensor, as in TorchSharp's tests."""
    flat = tensor.flatten().double()
    return (flat * torch.arange(len(flat), dtype=torch.float64).sqrt()).sum() / flat.sum()


def cat_and_dog(sd: StableDiffusion) -> Tensor:
    ids = torch.tensor([[49406, 320, 1125, 539, 320, 2368, 49407], [49406, 320, 1125, 539, 320, 1929, 49407]])
    states = sd.text_encoder(ids)
    return torch.stack([peek(states), peek(states[:, -1])])


# The autoencoder


def decoded(seed: int) -> Recipe:
    def recipe(sd: StableDiffusion) -> Tensor:
        z = torch.from_numpy(cuda_randn((3, 4, 64, 64), seed))
        return sd.vae.decode(z[-1:])[-1, -2:, :2, -2:]  # pictures are independent of each other: the last one is enough

    return recipe


def keras_encoder(sd: StableDiffusion) -> Tensor:
    norms = [module for module in sd.vae.modules() if isinstance(module, nn.GroupNorm)]
    for norm in norms:
        norm.eps = 1e-5
    mean = sd.vae.encode(torch.ones(1, 3, 128, 128)).mean
    for norm in norms:
        norm.eps = 1e-6
    return sd.config.vae.scale_factor * mean[0, :, 1, 0]


# The UNet, with ones as input


def unet_part(name: str) -> Recipe:
    """A part of the UNet, under diffusers' name: "up1" is its up_blocks[1] and our output_blocks 3 to 5."""

    def recipe(sd: StableDiffusion) -> Tensor:
        unet, n = sd.unet, sd.config.sample_size
        (a, b, _, d), emb = sd.config.unet.channels, torch.ones(1, 4 * sd.config.unet.channels[0])
        context = torch.ones(1, 77, sd.config.unet.context_dim)
        transformer = unet.input_blocks[1][1]
        block = transformer.transformer_blocks[0]

        def up(first: int, h: Tensor, skips: list[Tensor]) -> Tensor:
            size = torch.Size([2 * side for side in h.shape[-2:]])
            for i in range(3):
                h = unet.output_blocks[first + i](torch.cat([h, skips.pop()], 1), emb, context, size)
            return h[0, :6, 0, 0]

        def down(first: int, last: int, h: Tensor) -> Tensor:
            for i in range(first, last + 1):
                h = unet.input_blocks[i](h, emb, context)
            return h

        ones = torch.ones
        return {
            "time": lambda: unet.time_embed(ones(1, a))[0, :6],
            "conv_in": lambda: unet.input_blocks[0][0](ones(1, 4, n, n))[0, 0, 0, :6],
            "to_q": lambda: block.attn1.to_q(ones(1, a))[0, :6],
            "to_out": lambda: block.attn1.to_out[0](ones(1, a))[0, :6],
            "norm1": lambda: block.norm1(ones(1, 1, a))[0, 0, :5],
            "gn": lambda: transformer.norm(ones(1, a, n, n))[0, :5, 0, 0],
            "attn1": lambda: block.attn1(*[ones(1, n * n, a)] * 2)[0, 0, :5],
            "ff": lambda: block.ff(ones(1, 2, a))[0, 0, :5],
            "block": lambda: block(ones(1, n * n, a), context)[0, 0, :5],
            "spatial": lambda: transformer(ones(1, a, n, n), context)[0, :5, 0, 0],
            "res": lambda: unet.input_blocks[1][0](ones(1, a, n, n), emb)[0, :5, 0, 0],
            "down0": lambda: down(1, 3, ones(1, a, n, n))[0, 0, 0, :6],
            "mid": lambda: unet.middle_block(ones(1, d, n // 8, n // 8), emb, context)[0, :6, 0, 0],
            "down3": lambda: down(10, 11, ones(1, d, n // 8, n // 8))[0, :6, 0, 0],
            "up0": lambda: up(0, ones(1, d, n // 8, n // 8), [ones(1, d, n // 8, n // 8)] * 3),
            "up1": lambda: up(3, ones(1, d, n // 4, n // 4), [ones(1, w, n // 4, n // 4) for w in (b, d, d)]),
            "full": lambda: unet(ones(1, 4, n, n), torch.tensor([981]), context)[0, 0, 0, :6],
        }[name]()

    return recipe


def unet_of_noise(seed: int, t: int) -> Recipe:
    """(cards, 8): one row for each card, since the context depends on the card and the source does not name it."""

    def recipe(sd: StableDiffusion) -> Tensor:
        n, width = sd.config.sample_size, sd.config.unet.context_dim
        x = torch.from_numpy(cuda_randn((4, 4, n, n), seed))[-1:]
        found = []
        for blocks in CARDS.values():
            context = torch.from_numpy(cuda_randn((4, 77, width), seed, blocks))[-1:]
            found.append(sd.unet(x, torch.tensor([t]), context)[-1, -2:, -2:, :2].flatten())
        return torch.stack(found)

    return recipe


# Pictures


def picture(prompt: str, sampler: str, steps: int, guidance: float = 7.5) -> Recipe:
    def recipe(sd: StableDiffusion) -> Tensor:
        n = sd.config.sample_size
        latents = torch.from_numpy(np.random.RandomState(0).standard_normal((1, 4, n, n)))
        return blue(sd, prompt, sampler, steps, guidance, latents)[-3:, -3:]

    return recipe


def squirrel(sd: StableDiffusion) -> Tensor:
    n = sd.config.sample_size
    latents = torch.randn(1, 4, n, n, generator=torch.Generator().manual_seed(0))
    return blue(sd, "A painting of a squirrel eating a burger", "ddim", 20, 7.5, latents)[253:256, 253:256]


def blue(sd: StableDiffusion, prompt: str, sampler: str, steps: int, guidance: float, latents: Tensor) -> Tensor:
    """The blue channel (H, W) in [0, 1]."""
    images = sd.generate(prompt, sampler=sampler, steps=steps, guidance=guidance, latents=latents, output="tensor")
    return (images[0, 2] / 2 + 0.5).clamp(0, 1)


# The weights


def two_points(sd: StableDiffusion) -> Tensor:
    bias = sd.text_encoder.text_model.encoder.layers[8 % sd.config.text.layers].mlp.fc1.bias
    weight = sd.vae.decoder.up[0].block[1].conv2.weight
    return torch.stack([tensor.flatten()[42:46] for tensor in (bias, weight)])


def fingerprints(sd: StableDiffusion) -> Tensor:
    tables = {"unet": names.unet_table(sd.config.unet), "vae": names.vae_table(sd.config.vae), "text_encoder": None}
    networks = {"unet": sd.unet, "vae": sd.vae, "text_encoder": sd.text_encoder}
    found = []
    for place in FACTS["weights_fingerprints_sd2"]["recipe"].split(": ")[1].split():
        part, name = place.split("/")
        if tables[part] is not None:
            name = names.rename(name, names.invert(tables[part]))
        elif sd.config.text.layers < 23:
            name = re.sub(r"layers\.\d+\.", "layers.0.", name)
        found.append(peek(networks[part].state_dict()[name]))
    return torch.stack(found)


ASTRONAUT = "a photograph of an astronaut riding a horse"
RECIPES: dict[str, Recipe] = {
    "clipL_notebook_embeddings": embeddings,
    "clipL_notebook_sums": embedding_sums,
    "clipL_kerascv": lambda sd: sd.encode_prompt(["a caterpillar smoking a hookah while sitting on a mushroom"])[
        0, 1, :5
    ],
    "clipL_notebook_puppy": rows_of("A picture of a puppy."),
    "clipL_onnx_tutorial": rows_of("make a picture of green tree with flowers around it and a red sky"),
    "clipL_julia": five_sums,
    "vae_dec_13": decoded(13),
    "vae_dec_37": decoded(37),
    "vae_enc_kerascv": keras_encoder,
    "unet_v14_s33": unet_of_noise(33, 4),
    "unet_v14_s47": unet_of_noise(47, 0),
    "unet_v15_s33": unet_of_noise(33, 4),
    "unet_v15_s47": unet_of_noise(47, 0),
    "pipe_v14_ddim": picture(ASTRONAUT, "ddim", 3),
    "pipe_v14_pndm": picture(ASTRONAUT, "plms", 3),
    "pipe_v11_pndm": picture(ASTRONAUT, "plms", 3),
    "pipe_onnx_v15_ddim": picture("open neural network exchange", "ddim", 10),
    "pipe_onnx_v14_pndm": picture("A painting of a squirrel eating a burger", "plms", 10, 6.0),
    "weights_points_sd2base": two_points,
    "openclipH_torchsharp": cat_and_dog,
    "weights_fingerprints_sd2": fingerprints,
    "pipe_sd2base_pndm": picture(ASTRONAUT, "plms", 3),
    "pipe_sd2v_default": squirrel,
}
RECIPES |= {id: unet_part(id.removeprefix("unet15_ones_")) for id in FACTS if id.startswith("unet15_ones_")}


@torch.no_grad()
def found(id: str, sd: StableDiffusion) -> Tensor:
    """The result of the recipe, (1, N), or (cards, N) where the noise depends on the card."""
    fact = FACTS[id]
    rows = RECIPES[id](sd).double().reshape(-1, len(fact["expected"]))
    assert len(rows) == (len(CARDS) if "card's" in fact["recipe"] else 1)
    return rows


def agree(id: str, rows: Tensor, expected: list[float]) -> None:
    """Raises AssertionError if no row is within the entry's tolerance of the expected numbers."""
    fact, expected = FACTS[id], torch.tensor(expected, dtype=torch.float64)
    assert rows.isfinite().all()
    worst = ((rows - expected).abs() / (fact["atol"] + fact["rtol"] * expected.abs())).amax(1).min()
    assert worst <= 1, f"{id}: {worst:.3g} times the tolerance; found {rows.tolist()}, published {expected.tolist()}"


@lru_cache(maxsize=1)
def load(path: Path) -> StableDiffusion:
    prediction = "eps" if path.stem == "512-base-ema" else None
    return StableDiffusion.load(path, ema=path.stem in BOTH_UNETS, prediction=prediction)


@pytest.mark.slow
@pytest.mark.parametrize("id", sorted(FACTS, key=lambda id: FACTS[id]["model"]))
def test_the_official_weights_give_the_published_numbers(id, root):
    folder = Path(os.environ.get("LDM_WEIGHTS", root / "weights"))
    wanted = FILES[FACTS[id]["model"]]
    there = [folder / name for name in wanted if (folder / name).exists()]
    if not there:
        pytest.skip(f"needs {' or '.join(wanted)} in {folder}; see weights/README.md")
    agree(id, found(id, load(there[0])), FACTS[id]["expected"])


# Tests that need no files


def test_there_is_a_recipe_for_every_published_number():
    assert RECIPES.keys() == FACTS.keys() and len(FACTS) == 40
    assert all(fact["source"] and fact["recipe"] and fact["model"] in FILES for fact in FACTS.values())


def thin(narrow, id: str) -> StableDiffusion:
    """A narrow random model of the entry's family whose pictures are 256x256."""
    family = {"2.0-base": "sd2", "2.0": "sd2_v"}.get(FACTS[id]["model"], "sd1")
    sd = narrow(family)
    sd.config = replace(sd.config, sample_size=32)
    return sd


@pytest.mark.parametrize("id", slow_after(2, FACTS))
def test_a_recipe_runs_and_distinguishes_another_model_from_the_official_one(id, narrow):
    fact, rows = FACTS[id], found(id, thin(narrow, id))
    with pytest.raises(AssertionError, match="times the tolerance"):
        agree(id, rows, fact["expected"])
    right = rows[-1]
    agree(id, rows, right.tolist())
    for i in range(len(right)):
        wrong = right.clone()
        wrong[i] += 1.5 * (fact["atol"] + fact["rtol"] * wrong[i].abs())
        if wrong[i] != right[i]:
            with pytest.raises(AssertionError, match="times the tolerance"):
                agree(id, rows[-1:], wrong.tolist())


@pytest.fixture
def theirs(narrow, tmp_path):
    """theirs(sd): the same model in diffusers."""
    diffusers = pytest.importorskip("diffusers", reason="needs the parity extra")

    def make(sd: StableDiffusion):
        sd.save(tmp_path / "model", "diffusers")
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "model")
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.mark.parametrize(
    "id", slow_after(1, ["pipe_v14_ddim", "pipe_v14_pndm", "pipe_onnx_v14_pndm", "pipe_sd2v_default"])
)
def test_recipes_for_pictures_equal_those_of_diffusers_tests(id, narrow, theirs):
    import diffusers

    sd = thin(narrow, id)
    pipe = theirs(sd)
    if "pndm" in id:
        pipe.scheduler = diffusers.PNDMScheduler.from_config(pipe.scheduler.config)
    prompt = ASTRONAUT if "v14" in id and "onnx" not in id else "A painting of a squirrel eating a burger"
    latents = torch.from_numpy(np.random.RandomState(0).standard_normal((1, 4, 32, 32))).float()
    if "sd2v" in id:
        latents = torch.randn((1, 4, 32, 32), generator=torch.manual_seed(0))
    steps, guidance = {"pipe_onnx_v14_pndm": (10, 6.0), "pipe_sd2v_default": (20, 7.5)}.get(id, (3, 7.5))
    arguments = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "np"}
    image = pipe(prompt, latents=latents, **arguments).images
    corner = image[0, 253:256, 253:256, -1] if "sd2v" in id else image[0, -3:, -3:, -1]
    with torch.no_grad():
        np.testing.assert_allclose(RECIPES[id](sd).numpy(), corner, atol=1e-4)
    assert corner.std() > 1e-3


@torch.no_grad()
def test_recipes_for_parts_equal_the_published_commands_for_diffusers(narrow, theirs):
    sd = thin(narrow, "unet15_ones_full")
    unet, ones = theirs(sd).unet, torch.ones
    emb, context = ones(1, 64), ones(1, 77, 24)
    transformer, x, y = unet.down_blocks[0].attentions[0], ones(1, 48, 8, 8), ones(1, 48, 4, 4)
    block = transformer.transformer_blocks[0]
    commands = {
        "time": lambda: unet.time_embedding(ones(1, 16))[0, :6],
        "conv_in": lambda: unet.conv_in(ones(1, 4, 32, 32))[0, 0, 0, :6],
        "to_q": lambda: block.attn1.to_q(ones(1, 16))[0, :6],
        "to_out": lambda: block.attn1.to_out[0](ones(1, 16))[0, :6],
        "norm1": lambda: block.norm1(ones(1, 1, 16))[0, 0, :5],
        "gn": lambda: transformer.norm(ones(1, 16, 32, 32))[0, :5, 0, 0],
        "attn1": lambda: block.attn1(ones(2, 1024, 16))[0, 0, :5],
        "ff": lambda: block.ff(ones(1, 2, 16))[0, 0, :5],
        "block": lambda: block(ones(1, 1024, 16), encoder_hidden_states=context)[0, 0, :5],
        "spatial": lambda: transformer(ones(1, 16, 32, 32), encoder_hidden_states=context).sample[0, :5, 0, 0],
        "res": lambda: unet.down_blocks[0].resnets[0](ones(1, 16, 32, 32), emb)[0, :5, 0, 0],
        "down0": lambda: unet.down_blocks[0](ones(1, 16, 32, 32), emb, context)[0][0, 0, 0, :6],
        "mid": lambda: unet.mid_block(y, emb, context)[0, :6, 0, 0],
        "down3": lambda: unet.down_blocks[3](y, emb)[0][0, :6, 0, 0],
        "up0": lambda: unet.up_blocks[0](y, (y, y, y), emb)[0, :6, 0, 0],
        "up1": lambda: unet.up_blocks[1](x, (ones(1, 32, 8, 8), x, x), emb, context)[0, :6, 0, 0],
        "full": lambda: unet(ones(1, 4, 32, 32), 981, context).sample[0, 0, 0, :6],
    }
    assert {f"unet15_ones_{name}" for name in commands} == {id for id in FACTS if id.startswith("unet15_")}
    for name, command in commands.items():
        torch.testing.assert_close(unet_part(name)(sd), command(), atol=1e-5, rtol=1e-5, msg=name)


def test_the_timestep_embedding_equals_the_published_one():
    """JuliaNeuralGraphics/Diffusers.jl@64aed844 test/model_load_utils.jl. It does not depend on weights."""
    expected = [0.6799572, -0.7984292, 0.57806414, -0.67470044, 0.9926904, 0.8710014]
    found = timestep_embedding(torch.tensor([981]), 320)[0, :6]
    torch.testing.assert_close(found, torch.tensor(expected), atol=2e-4, rtol=0)


# The noise of CUDA devices


def test_cuda_noise_equals_the_published_draws_of_cards():
    """These first numbers depend on no card: pytorch/pytorch#158398, #143086; diffusers v0.7's test of latents."""
    noise = cuda_randn((64, 2048), 42, blocks=168)
    np.testing.assert_allclose(noise[0, :3], [0.1940, 2.1614, -0.1721], atol=6e-5)
    np.testing.assert_allclose(noise[0, -3:], [1.4540, -2.7733, -0.8932], atol=6e-5)
    np.testing.assert_allclose(noise[1, :3], [-0.4574, 0.8063, 0.1580], atol=6e-5)
    np.testing.assert_allclose(noise[1, -3:], [0.1124, 0.2769, -1.2535], atol=6e-5)
    np.testing.assert_allclose(cuda_randn((12,), 1)[:3], [-0.2963, 2.6764, -0.1408], atol=6e-5)
    # diffusers v0.7 printed latents after the first of PNDM's 50 steps, which changes them little
    after = [1.8285, 1.2857, -0.1024, 1.2406, -2.3068, 1.0747, -0.0818, -0.6520, -2.9506]
    np.testing.assert_allclose(cuda_randn((1, 4, 64, 64), 0)[0, -3:, -3:, -1].ravel(), after, atol=0.02)


def test_cuda_noise_of_many_elements_depends_on_the_card():
    """pytorch/pytorch#143086: the last three of 49*12*112*144 numbers on an H100 and on an A100."""
    for card, last in {"H100": [-0.6970, -0.7780, 0.3267], "A100": [0.1549, -0.6797, -0.1656]}.items():
        noise = cuda_randn((49 * 12 * 112 * 144,), 1, CARDS[card])
        np.testing.assert_allclose(noise[:3], [-0.2963, 2.6764, -0.1408], atol=6e-5)
        np.testing.assert_allclose(noise[-3:], last, atol=6e-5)
