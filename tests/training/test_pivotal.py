"""A LoRA and a learned token in one run ("pivotal tuning"): both train and resume, and other programs read both."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import LATEST, LORA, SMALL, call, check_same, metrics, photograph, pixels, refused, weights
from safetensors.torch import load_file, save_file

import sample
from ldm import InputError, StableDiffusion, __main__, tokens
from ldm.formats import read_lora
from ldm.sampling import contact_sheet
from ldm.settings import Settings
from ldm.training import FullTuning, LoRATuning, tuning_of

TINY = Path(__file__).resolve().parents[2] / "weights" / "tiny" / "base"
WORDS = ("--placeholder-token", "[V]", "--initializer-token", "dog", "--num-vectors", 2, "--token-learning-rate", 1e-2)
BUNDLED = "bundle_emb.[V].string_to_param.*"


@pytest.fixture(scope="module")
def base(saved, tmp_path_factory) -> tuple:
    folder = photograph(tmp_path_factory.mktemp("a") / "b")
    tuned = (*LORA, *WORDS, "--instance-prompt", "a [V] dog", "--learning-rate", "1e-2")
    return ("--model", saved["official"], "--instance-data-dir", folder, *SMALL, *tuned)


@pytest.fixture(scope="module")
def made(base, tmp_path_factory) -> Path:
    """The folder of a run of four steps, with a checkpoint after the second."""
    folder = tmp_path_factory.mktemp("run") / "dog"
    call(*base, "--output-dir", folder, "--checkpointing-steps", 2)
    return folder


def begun(saved, **settings) -> tuple[StableDiffusion, LoRATuning | FullTuning]:
    words = {"placeholder_token": "[V]", "initializer_token": "dog", "num_vectors": 2, "instance_prompt": "a [V] dog"}
    sd = StableDiffusion.load(saved["official"])
    return sd, tuning_of(sd, Settings(**words | settings))


def test_a_checkpoint_holds_both_and_the_result_is_two_files(made, saved):
    last = load_file(made / "checkpoints" / "checkpoint-000004" / "lora.safetensors")
    lora, vectors = load_file(made / "lora.safetensors"), load_file(made / "[V].safetensors")
    assert vectors.keys() == {"[V]"} and torch.equal(vectors["[V]"], last.pop(BUNDLED))
    assert vectors["[V]"].shape == (2, 24) and vectors["[V]"].dtype == torch.float32
    assert lora.keys() == last.keys() and all(name.startswith("lora_") for name in lora)
    assert all(torch.equal(lora[name], last[name].half()) and lora[name].any() for name in lora)
    sd, tuning = begun(saved, lora_rank=2)
    before = tuning.token.vectors.detach()
    assert (vectors["[V]"] - before).abs().max() > 1e-3
    torch.testing.assert_close(vectors["[V]"].norm(dim=1), before.norm(dim=1), rtol=1e-5, atol=0)
    moments = load_file(made / "checkpoints" / "checkpoint-000004" / "training.safetensors")
    assert {name.partition("exp_avg.")[2] for name in moments if "exp_avg." in name} == tuning.trained.keys()


def test_only_adapters_and_vectors_train_and_both_in_fp32(saved):
    """Over a base in bf16. The vectors' gradient is that of a run without LoRA, which is zero at first."""
    sd, tuning = begun(saved, lora_rank=2, train_text_encoder=False)
    _, full = begun(saved)
    x, t, prompts = torch.randn(2, 4, 8, 8), torch.tensor([10, 700]), ["a [V] dog", "a dog"]
    for one in (tuning, full):
        one.prepare(("a [V] dog", "a dog"), torch.float32)
        one(x, t, prompts).square().mean().backward()
    assert torch.equal(tuning.token.vectors.grad, full.token.vectors.grad)

    sd, tuning = begun(saved, lora_rank=2)
    tuning.prepare(("a [V] dog", "a dog"), torch.bfloat16)
    assert tuning.text_encoder_trains
    with torch.no_grad():
        for lora in tuning.adapters.values():
            lora.lora_up.weight.normal_()
    with torch.autocast("cpu", torch.bfloat16):
        tuning(x, t, prompts).square().mean().backward()
    assert all(p.dtype == torch.float32 and p.grad.any() for p in tuning.trained.values())
    others = [p for p in (*sd.unet.parameters(), *sd.text_encoder.parameters()) if p is not tuning.token.vectors]
    assert {p.dtype for p in others} == {torch.bfloat16} and all(p.grad is None for p in others)


def test_the_token_has_its_own_learning_rate_and_stops_with_the_text_encoder(saved):
    given = {"lora_rank": 2, "token_learning_rate": 0.01, "text_encoder_stop_step": 7}
    _, tuning = begun(saved, **given)
    groups = tuning.parameter_groups(Settings(**given))
    assert [(group["name"], group["lr"], group["stop"]) for group in groups] == [
        ("unet", 1e-4, None), ("text encoder", 5e-5, 7), ("token", 0.01, 7)
    ]  # fmt: skip
    assert sum(len(group["params"]) for group in groups) == len(tuning.trained)


def slow(*flags: object) -> object:
    return pytest.param(flags, marks=pytest.mark.slow)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("--prior", "prediction"),
        slow(
            "--use-ema", "--mixed-precision", "fp16", "--gradient-accumulation-steps", 2, "--text-encoder-stop-step", 2
        ),
        slow("--mixed-precision", "bf16", "--no-train-text-encoder", "--prior", "prediction", "--random-crop"),
    ],
)
def test_a_resumed_run_equals_the_run_that_never_stopped(flags, base, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    call(*base, *flags, "--max-train-steps", 5, "--output-dir", whole)
    call(*base, *flags, "--max-train-steps", 3, "--output-dir", parts)
    call(*base, *flags, "--max-train-steps", 5, "--output-dir", parts, *LATEST)
    check_same(whole, parts)
    assert (whole / "[V].safetensors").read_bytes() == (parts / "[V].safetensors").read_bytes()
    if "prediction" in flags:  # of the model without the adapter, so that the first step has nothing to learn there
        first, *others = (line["prior_loss"] for line in metrics(whole))
        assert min(others) > 1e-8 and (first < 1e-10 or "bf16" in flags)


# Its pictures


def test_sample_py_makes_the_pictures_of_the_run(made, saved, tmp_path):
    """Those of the sheet that it made after training; with its two files, and with a checkpoint's one."""
    sheet = pixels(made / "sheets" / "after.png")
    checkpoint = made / "checkpoints" / "checkpoint-000004" / "lora.safetensors"
    both = ("--lora", made / "lora.safetensors", "--embedding", made / "[V].safetensors")
    for i, files in enumerate((both, ("--lora", checkpoint))):
        flags = ("--model", saved["official"], *files, "--prompt", "a [V] dog", "--output-dir", tmp_path / str(i))
        sample.main([str(flag) for flag in flags])
        with Image.open(tmp_path / str(i) / "00000-0.png") as picture:
            row = np.asarray(contact_sheet.grid([("a [V] dog (after)", [picture])])).astype(int)
        assert np.abs(row - sheet[: len(row)]).max() <= (2 if i == 0 else 1)  # a result is fp16, a checkpoint fp32
        picture = pixels(tmp_path / str(i) / "00000-0.png")
        sample.main(["--from-picture", str(tmp_path / str(i) / "00000-0.png"), *map(str, flags[:2]), *map(str, files),
                     "--output-dir", str(tmp_path / "again" / str(i))])  # fmt: skip
        assert (pixels(tmp_path / "again" / str(i) / "00000-0.png") == picture).all()


def test_diffusers_makes_our_picture_of_the_two_files(tmp_path):
    """On the embedded model. diffusers 0.42 takes all vectors of a token only if it is in small letters."""
    folder = photograph(tmp_path / "photographs")
    flags = ("--model", TINY, "--instance-data-dir", folder, "--instance-prompt", "a photo of <v> monster", *LORA)
    flags = (*flags, *WORDS, "--placeholder-token", "<v>", "--token-learning-rate", 0.2, "--learning-rate", 0.05)
    flags = (*flags, "--no-with-prior-preservation", "--resolution", 64, "--max-train-steps", 3, "--sample-steps", 1)
    call(*flags, "--num-validation-images", 1, "--output-dir", tmp_path / "run")
    sd = StableDiffusion.load(TINY)
    options = {"steps": 4, "guidance": 4.0, "height": 64, "width": 64}
    prompt, pictures = "a photo of <v> monster", []
    tokens.add_embedding(sd, tmp_path / "run" / "<v>.safetensors")
    for _ in range(2):
        pictures.append(np.asarray(sd.generate(prompt, **options)[0]).astype(int))
        sd.apply_lora(tmp_path / "run" / "lora.safetensors")
    assert np.abs(pictures[0] - pictures[1]).max() > 20  # the LoRA does change it

    diffusers = pytest.importorskip("diffusers", reason="needs the parity extra")
    pytest.importorskip("peft", reason="needs the parity extra")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(TINY, safety_checker=None)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(tmp_path / "run", weight_name="lora.safetensors")
    pipe.load_textual_inversion(str(tmp_path / "run" / "<v>.safetensors"))
    options = {"num_inference_steps": 4, "guidance_scale": 4.0, "height": 64, "width": 64}
    theirs = pipe(prompt, generator=torch.Generator().manual_seed(0), **options).images[0]
    assert np.abs(np.asarray(theirs).astype(int) - pictures[1]).max() <= 1


# The token in a LoRA's file


def test_the_command_line_tells_and_merges_the_token_of_a_checkpoint(made, saved, tmp_path, capsys):
    path = made / "checkpoints" / "checkpoint-000004" / "lora.safetensors"
    __main__.main(["lora", "inspect", str(path), "--model", str(saved["official"])])
    assert "token [V]: 2 vectors" in capsys.readouterr().out
    __main__.main(["lora", "convert", str(path), str(tmp_path / "plain.safetensors")])
    assert "not in it: token [V]" in capsys.readouterr().out and not read_lora(tmp_path / "plain.safetensors").tokens
    __main__.main(["lora", "merge", str(saved["official"]), str(tmp_path / "model.safetensors"), "--lora", str(path)])
    assert ", token [V]" in capsys.readouterr().out
    merged, sd = StableDiffusion.load(tmp_path / "model.safetensors"), StableDiffusion.load(saved["official"])
    assert tokens.add_bundled(sd, sd.apply_lora(path)) == ["[V]"]
    with torch.no_grad():
        one, other = merged.encode_prompt("a [V] dog"), sd.encode_prompt("a [V] dog")
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * other.abs().max().item())
    assert torch.equal(weights(tmp_path)[BUNDLED], load_file(path)[BUNDLED])


@pytest.mark.parametrize(
    ("vectors", "said"),
    [
        (torch.ones(2, 2, 2), r"holds \(2, 2, 2\) torch.float32, and an embedding is"),
        (torch.full((2, 24), float("nan")), "holds NaN or infinity"),
        (torch.ones(2, 25), "its vectors do not fit"),
    ],
)
def test_a_bad_token_in_a_lora_s_file_is_refused_in_one_line(vectors, said, made, saved, tmp_path):
    save_file(load_file(made / "lora.safetensors") | {BUNDLED: vectors}, tmp_path / "a.safetensors")
    sd = StableDiffusion.load(saved["official"])
    with pytest.raises(InputError, match=said) as error:
        tokens.add_bundled(sd, sd.apply_lora(tmp_path / "a.safetensors"))
    assert str(tmp_path / "a.safetensors") in str(error.value) and "\n" not in str(error.value)


def test_a_run_is_not_continued_with_another_token(base, made):
    assert "placeholder_token was '[V]' and is '[W]'" in refused(
        *base, "--output-dir", made, *LATEST, "--placeholder-token", "[W]", "--instance-prompt", "a [W] dog"
    )
