"""Training a learned token, alone and with the networks: only its vectors change, a run resumes, others read it."""

import re
import warnings

import pytest
import torch
from runs import LATEST, SMALL, call, check_same, checkpoints, losses, refused, weights
from safetensors.torch import load_file

import train
from ldm import StableDiffusion, tokens
from ldm.formats import open_tensors
from ldm.settings import Settings
from ldm.training import TokenTuning, parse, tuning_of

WORDS = ("--placeholder-token", "[V]", "--initializer-token", "dog", "--num-vectors", 2, "--token-learning-rate", 1e-2)
ALONE = (*WORDS, "--train", "token")
BUNDLED, TABLE = "bundle_emb.[V].string_to_param.*", "text_model.embeddings.token_embedding.weight"


@pytest.fixture
def base(saved, photographs) -> tuple:
    prompt = ("--instance-prompt", "a [V] dog")
    return ("--model", saved["official"], "--instance-data-dir", photographs, *SMALL, *prompt)


def begun(saved, **settings) -> tuple[StableDiffusion, TokenTuning]:
    """The model, and the tuning of a token of two vectors."""
    words = {"placeholder_token": "[V]", "initializer_token": "dog", "num_vectors": 2, "instance_prompt": "a [V] dog"}
    sd = StableDiffusion.load(saved["official"])
    return sd, tuning_of(sd, Settings(**words | settings))


def test_a_token_begins_as_a_known_word(saved):
    """Before training its one vector gives the context of the initializer, to the bit."""
    sd = StableDiffusion.load(saved["official"])
    ids = sd.tokenizer.ids("dog")
    learned = tokens.begin(sd, "[V]", "dog")
    assert learned.vectors.shape == (len(ids), 24)
    assert torch.equal(sd.encode_prompt("a [v] in snow"), sd.encode_prompt("a dog in snow"))
    assert tokens.begin(sd, "<x>", "dog", 5).vectors.shape == (5, 24)


def test_only_the_new_vectors_get_a_gradient(saved):
    sd, tuning = begun(saved, train="token")
    tuning.prepare(("a [V] dog",), torch.float32)
    tuning(torch.randn(1, 4, 8, 8), torch.tensor([500]), ["a [V] dog"]).square().mean().backward()
    assert tuning.text_encoder_trains
    assert [p for p in sd.parameters().values() if p.grad is not None] == [tuning.token.vectors]
    assert tuning.token.vectors.grad.abs().min(1).values.min() > 0
    (group,) = tuning.parameter_groups(Settings())
    assert group["params"] == [tuning.token.vectors] and group["lr"] == 2e-3


def test_the_gradient_is_that_of_the_table_s_rows(saved):
    """The same prompt, with the vectors of a known word in the table itself: same prediction, same gradient."""
    sd, tuning = begun(saved, train="token", num_vectors=1, initializer_token="a")
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    tuning(x, t, ["[V] dog"]).square().mean().backward()
    plain = StableDiffusion.load(saved["official"])
    row = plain.tokenizer.ids("a")[0]
    plain.unet(x, t, plain.encode_prompt("a dog")).square().mean().backward()
    gradient = plain.text_encoder.text_model.embeddings.token_embedding.weight.grad[row]
    torch.testing.assert_close(tuning.token.vectors.grad[0], gradient, rtol=1e-5, atol=1e-6 * gradient.abs().max())


@pytest.mark.parametrize(
    "flags",
    [
        (),
        pytest.param(
            ("--use-ema", "--mixed-precision", "fp16", "--gradient-accumulation-steps", 2), marks=pytest.mark.slow
        ),
    ],
)
def test_a_run_of_the_token_alone_resumes_to_the_same_bits_and_writes_only_it(flags, base, saved, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    base = (*base, *ALONE, *flags)
    call(*base, "--max-train-steps", 6, "--output-dir", whole)
    call(*base, "--max-train-steps", 3, "--output-dir", parts, "--checkpointing-steps", 1)
    assert checkpoints(parts)[-1] == 3
    call(*base, "--max-train-steps", 6, "--output-dir", parts, *LATEST)
    assert losses(whole) == losses(parts) and len(losses(whole)) == 6
    assert not (whole / "class").exists()  # no class pictures were made

    a, b = (load_file(run / "[V].safetensors") for run in (whole, parts))
    assert a.keys() == b.keys() == {"[V]"} and a["[V]"].shape == (2, 24) and a["[V]"].dtype == torch.float32
    assert torch.equal(a["[V]"], b["[V]"])
    said = open_tensors(whole / "[V].safetensors")[1]
    assert said["modelspec.architecture"] == "stable-diffusion-v1/textual-inversion" and said["modelspec.title"]
    moments = load_file(parts / "checkpoints" / "checkpoint-000003" / "training.safetensors")
    assert {name for name in moments if name.startswith("optimizer.exp_avg")} == {
        "optimizer.exp_avg.[V]",
        "optimizer.exp_avg_sq.[V]",
    }
    assert not list(whole.glob("model*"))
    sd, tuning = begun(saved, train="token")  # what training began with
    before = tuning.token.vectors.detach()
    assert (a["[V]"] - before).abs().max() > 1e-3
    if not flags:  # an average of vectors is shorter than they are
        torch.testing.assert_close(a["[V]"].norm(dim=1), before.norm(dim=1), rtol=1e-5, atol=0)


@pytest.mark.slow
def test_a_token_trains_with_the_networks_and_is_in_the_model(base, saved, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    base = (*base, *WORDS)
    call(*base, "--output-dir", whole)
    call(*base, "--output-dir", parts, "--max-train-steps", 2)
    call(*base, "--output-dir", parts, *LATEST)
    check_same(whole, parts)
    sd, tuning = begun(saved)
    tuned = weights(whole)
    assert (tuned[BUNDLED] - tuning.token.vectors).abs().max() > 1e-3
    assert torch.equal(load_file(whole / "[V].safetensors")["[V]"], tuned[BUNDLED])
    model = StableDiffusion.load(whole / "model.safetensors")
    assert model.tokenizer.added == {"[V]": 2}
    checkpoint = StableDiffusion.load(whole / "checkpoints" / "checkpoint-000004")
    assert torch.equal(checkpoint.encode_prompt("a [V] dog"), model.encode_prompt("a [V] dog"))


def test_a_token_trains_with_the_unet_alone(base, saved, tmp_path):
    call(*base, *WORDS, "--no-train-text-encoder", "--max-train-steps", 2, "--output-dir", tmp_path / "run")
    tuned, before = weights(tmp_path / "run"), load_file(saved["official"])
    sd, tuning = begun(saved)
    assert (tuned[BUNDLED] - tuning.token.vectors).abs().max() > 1e-3
    changed = {name for name in before if not torch.equal(tuned[name], before[name])}
    assert changed and all(name.startswith("model.diffusion_model.") for name in changed)


@pytest.mark.slow
def test_diffusers_loads_the_token_of_a_run(base, saved, tmp_path):
    """In small letters: of "[V]" with two vectors diffusers 0.42 takes only the first (`maybe_convert_prompt`)."""
    diffusers = pytest.importorskip("diffusers", reason="needs the parity extra")
    words = ("--placeholder-token", "<v>", "--instance-prompt", "a <v> dog")
    call(*base, *ALONE, *words, "--max-train-steps", 2, "--output-dir", tmp_path / "run")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(saved["diffusers"])
    pipe.load_textual_inversion(str(tmp_path / "run" / "<v>.safetensors"))
    sd = StableDiffusion.load(saved["official"])
    assert tokens.add_embedding(sd, tmp_path / "run" / "<v>.safetensors") == "<v>"
    theirs = pipe.encode_prompt("a <v> dog", "cpu", 1, False)[0]
    torch.testing.assert_close(theirs, sd.encode_prompt("a <v> dog"), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--train", "token"), "--train token needs --placeholder-token"),
        (("--placeholder-token", "[V]"), "--placeholder-token needs --initializer-token"),
        ((*WORDS, "--instance-prompt", "a sks dog"), r"does not hold the placeholder token \[V\]"),
        ((*WORDS, "--placeholder-token", "the", "--instance-prompt", "the dog"), "there is a token the already"),
        ((*WORDS, "--placeholder-token", "[V]/x", "--instance-prompt", "a [V]/x dog"), "can't be a token"),
        ((*ALONE, "--lora-rank", 4), "--train token trains the token alone: leave out --lora-rank"),
        ((*WORDS, "--num-vectors", 300), "300 vectors"),
        ((*WORDS, "--num-vectors", 23), r"token \[V\] is to have 23 vectors, and a prompt has room for 22"),
        ((*WORDS, "--placeholder-token", "LoRA", "--instance-prompt", "a lora dog"), "the name of the run's own"),
        ((*WORDS, "--placeholder-token", "犬" * 51, "--instance-prompt", "a " + "犬" * 51), "can't be a token"),
        ((*WORDS, "--initializer-token", " "), "has no token to begin with"),
        ((*WORDS, "--token-learning-rate", 0), "is not a positive number"),
    ],
)
def test_what_can_t_train_is_refused_in_one_line(flags, said, base, tmp_path):
    assert re.search(said, refused(*base, *flags, "--output-dir", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_sheet_shows_the_subject_of_the_prompt(tmp_path):
    """Without a model, prompts for the embedded subject fill the sheet, but only if the subject is that one."""
    assert "a photo of sks monster" in parse([], train.TINY).validation_prompt
    assert parse(["--instance-prompt", "a photo of [V]"], train.TINY).validation_prompt == ()


def test_a_learning_rate_that_has_no_effect_is_a_warning(tmp_path):
    """One that is given as a flag. A file can serve several runs, and a run's own config.toml has every setting."""
    (tmp_path / "a.toml").write_text("learning_rate = 1e-3\n")
    known = [str(word) for word in (*ALONE, "--instance-prompt", "a [V] dog")]
    with pytest.warns(UserWarning, match="^--learning-rate has no effect with --train token; --token-learning"):
        parse([*known, "--learning-rate", "1e-3"], train.TINY)
    with warnings.catch_warnings(action="error"):
        parse([*known, "--config", str(tmp_path / "a.toml")], train.TINY)
        parse(known, train.TINY)
        parse([*known[:-4], *known[-2:], "--learning-rate", "1e-3"], train.TINY)
