"""diffusers opens a folder that we saved, and makes the same pictures with it."""

import logging
import warnings

import numpy as np
import pytest
import torch

from ldm import StableDiffusion

diffusers = pytest.importorskip("diffusers", reason="needs the parity extra")
pytest.importorskip("transformers", reason="needs the parity extra")


@pytest.fixture(scope="module", params=[torch.float32, torch.float16], ids=["fp32", "fp16"])
def opened(request, random_model, tmp_path_factory):
    """A saved folder, the pipeline that diffusers makes from it, and all warnings that it prints."""
    path = tmp_path_factory.mktemp("saved") / "model"
    random_model().save(path, "diffusers", dtype=request.param)
    kind = diffusers.StableDiffusionPipeline  # importing it may warn about other packages, which does not count
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "py.warnings")]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for logger in loggers:
            logger.addHandler(handler)
        pipe = kind.from_pretrained(path)
        for logger in loggers:
            logger.removeHandler(handler)
    pipe.set_progress_bar_config(disable=True)
    return path, pipe, said + [str(w.message) for w in warned]


def test_a_saved_folder_opens_in_diffusers_without_a_warning(opened):
    assert opened[2] == []


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("sampler, eta", [("ddim", 0.0), ("ddim", 0.5), ("ddpm", 0.0)])
def test_diffusers_makes_the_same_pictures_from_a_saved_folder(sampler, eta, guidance, opened):
    path, pipe, _ = opened
    kind = {"ddim": diffusers.DDIMScheduler, "ddpm": diffusers.DDPMScheduler}[sampler]
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    prompts, seeds = ["a photo of a red cat", "snow"], [3, 14]
    theirs = pipe(
        prompts,
        negative_prompt=["a blur"] * 2,
        num_inference_steps=7,
        guidance_scale=guidance,
        eta=eta,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
    ).images
    sd = StableDiffusion.load(path)
    ours = sd.generate(
        prompts, negative_prompt="a blur", steps=7, guidance=guidance, sampler=sampler, eta=eta, seeds=seeds
    )
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max() <= 1
        assert np.asarray(a).std() > 10  # the picture has more than one colour
