"""A run with --lora-rank trains adapters alone, over a frozen base, and writes a file that other programs read."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import LATEST, LORA, SMALL, call, checkpoints, losses, photograph, refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sample
import train
from ldm import StableDiffusion
from ldm.formats import read_lora
from ldm.settings import Settings
from ldm.training import LoRATuning, checkpoint, parse

TINY = Path(__file__).resolve().parents[2] / "weights" / "tiny" / "base"
FACTS = Path(__file__).resolve().parents[1] / "facts" / "lora"


@pytest.fixture(scope="module")
def base(saved, tmp_path_factory) -> tuple:
    folder = photograph(tmp_path_factory.mktemp("a") / "b")
    return ("--model", saved["official"], "--instance-data-dir", folder, *SMALL, *LORA, "--learning-rate", "1e-2")


@pytest.fixture(scope="module")
def made(base, tmp_path_factory) -> Path:
    """The folder of a run of four steps with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("run") / "dog"
    call(*base, "--output-dir", folder, "--checkpointing-steps", 1)
    return folder


def test_a_run_writes_one_small_file_and_checkpoints_without_the_base(made, saved):
    assert not list(made.rglob("model.safetensors")) and checkpoints(made) == [1, 2, 3, 4]
    last = made / "checkpoints" / "checkpoint-000004"
    one, other = load_file(made / "lora.safetensors"), load_file(last / "lora.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name].half()) for name in one)
    assert {tensor.dtype for tensor in other.values()} == {torch.float32}
    layers = StableDiffusion.load(saved["official"]).lora_layers()
    ends = (".lora_down.weight", ".lora_up.weight", ".alpha")
    names = [name for name in layers if "attentions" in name or "text_model" in name]
    assert one.keys() == {name + end for name in names for end in ends}
    assert all(tensor.any() for tensor in one.values())  # also every `up` has left zero
    with safe_open(made / "lora.safetensors", "pt") as file:
        said = file.metadata()
    assert {k: v for k, v in said.items() if k.startswith("ss_")} == {
        "ss_v2": "False",
        "ss_base_model_version": "sd_v1",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "2",
        "ss_network_alpha": "2",
        "ss_output_name": "dog",
        "ss_sd_model_name": "model.safetensors",
    }
    assert said["ldm.step"] == "4" and json.loads(said["ldm.sampling"])["steps"] == 1


def test_only_adapters_have_gradients_and_moments_and_the_base_keeps_its_bits(saved, made):
    sd = StableDiffusion.load(saved["official"])
    before = {name: tensor.clone() for name, tensor in sd.state().items()}
    settings = Settings(lora_rank=2, train_text_encoder=True)
    trainable = LoRATuning(sd, settings)
    trainable.prepare(("a dog", "a sks dog"), torch.bfloat16)
    with torch.no_grad():
        for lora in trainable.adapters.values():
            lora.lora_up.weight.normal_()
    with torch.autocast("cpu", torch.bfloat16):
        trainable(torch.randn(2, 4, 8, 8), torch.tensor([10, 700]), ["a dog", "a sks dog"]).square().mean().backward()
    networks = (*sd.unet.parameters(), *sd.text_encoder.parameters())
    assert {p.dtype for p in networks} == {torch.bfloat16} and all(p.grad is None for p in networks)
    assert all(p.dtype == torch.float32 and p.grad.any() for p in trainable.trained.values())
    for name, tensor in sd.state().items():
        if not name.startswith("first_stage_model."):
            assert torch.equal(tensor, before[name].bfloat16())
    moments = load_file(made / "checkpoints" / "checkpoint-000002" / "training.safetensors")
    trained = {f"optimizer.{kind}.{name}" for name in trainable.trained for kind in ("step", "exp_avg", "exp_avg_sq")}
    assert moments.keys() == trained


def test_the_gradients_are_those_of_peft():
    """The same adapter in diffusers' UNet by peft: equal within 1e-5 of the largest gradient."""
    diffusers = pytest.importorskip("diffusers", reason="needs the parity extra")
    peft = pytest.importorskip("peft", reason="needs the parity extra")
    theirs = diffusers.UNet2DConditionModel.from_pretrained(TINY / "unet")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    theirs.add_adapter(config)
    sd = StableDiffusion.load(TINY)
    settings = Settings(lora_rank=4, lora_alpha=6.0, lora_targets="attention", train_text_encoder=False)
    trainable = LoRATuning(sd, settings)
    generator = torch.Generator().manual_seed(0)
    pairs = {}
    with torch.no_grad():
        for name, module in theirs.named_modules():
            if "lora_A" in (children := dict(module.named_children())):
                ours = trainable.adapters["lora_unet_" + name.replace(".", "_")]
                down, up = children["lora_A"].default.weight, children["lora_B"].default.weight
                for a, b in ((down, ours.lora_down.weight), (up, ours.lora_up.weight)):
                    a.copy_(torch.randn(a.shape, generator=generator) / 8)
                    b.copy_(a)
                    pairs[name, len(pairs)] = a, b
    assert len(pairs) == len(trainable.trained) == 64
    x, t = torch.randn(2, 4, 16, 16, generator=generator), torch.tensor([3, 700])
    context = trainable.context(("a cat", "a red car"))
    trainable(x, t, ["a cat", "a red car"]).square().mean().backward()
    theirs(x, t, context).sample.square().mean().backward()
    scale = max(a.grad.abs().max() for a, _ in pairs.values())
    assert scale > 0 and max((a.grad - b.grad).abs().max() for a, b in pairs.values()) <= 1e-5 * scale


@pytest.mark.parametrize("more", [(), ("--lora-targets", "all", "--lora-conv-rank", 1)], ids=["usual", "convolutions"])
def test_diffusers_opens_the_file_and_makes_our_picture(more, tmp_path):
    """A run on the embedded model at rank 4. Its file has under 400 kB."""
    folder = photograph(tmp_path / "photographs")
    flags = ("--model", TINY, "--instance-data-dir", folder, "--instance-prompt", "a photo of sks monster")
    flags = (*flags, "--no-with-prior-preservation", "--resolution", 64, "--max-train-steps", 3, "--sample-steps", 1)
    flags = (*flags, "--num-validation-images", 1, "--lora-rank", 4, "--learning-rate", 0.05)
    call(*flags, *more, "--output-dir", tmp_path / "run")
    path = tmp_path / "run" / "lora.safetensors"
    assert path.stat().st_size < 400_000
    sd = StableDiffusion.load(TINY)
    options = {"steps": 4, "guidance": 4.0, "height": 64, "width": 64}
    without = np.asarray(sd.generate("a photo of sks monster", **options)[0]).astype(int)
    sd.apply_lora(path, 0.9)
    ours = np.asarray(sd.generate("a photo of sks monster", **options)[0]).astype(int)
    assert np.abs(ours - without).max() > 20

    diffusers = pytest.importorskip("diffusers", reason="needs the parity extra")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(TINY, safety_checker=None)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(tmp_path / "run", weight_name="lora.safetensors", adapter_name="ours")
    pipe.set_adapters(["ours"], [0.9])
    options = {"num_inference_steps": 4, "guidance_scale": 4.0, "height": 64, "width": 64}
    theirs = pipe("a photo of sks monster", generator=torch.Generator().manual_seed(0), **options).images[0]
    assert np.abs(np.asarray(theirs).astype(int) - ours).max() <= 1


# A checkpoint with another content


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:checkpoint")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(min(t)), "missing tensor lora_te"),
        (lambda t: t.update(more=torch.ones(1)), "unknown tensor more"),
        (lambda t: t.update({max(t): torch.ones(3, 3)}), "and should be"),
        (lambda t: t.update({max(t): t[max(t)].double()}), "torch.float64, and should be"),
        (lambda t: t[max(t)].fill_(float("nan")), "holds NaN or infinity"),
    ],
    ids=["missing", "unknown", "shape", "type", "nan"],
)
def test_a_checkpoint_whose_adapter_is_none_of_this_run_is_refused(change, words, made, base, tmp_path):
    folder = shutil.copytree(made / "checkpoints" / "checkpoint-000002", tmp_path / "checkpoint-000002")
    tensors = load_file(folder / "lora.safetensors")
    change(tensors)
    save_file(tensors, folder / "lora.safetensors")
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    sums = [line if "lora" not in line else f"{checkpoint.sha256(folder / line[66:])}  {line[66:]}" for line in lines]
    (folder / "SHA256SUMS").write_text("\n".join(sums) + "\n")
    message = refused(*base, "--output-dir", tmp_path / "new", "--resume-from-checkpoint", folder)
    assert words in message and not (tmp_path / "new").exists()


def test_a_run_is_not_resumed_with_another_adapter(made, base):
    for flags, words in (
        (("--lora-rank", 3), "lora_rank was 2 and is 3"),
        (("--lora-alpha", 1), "lora_alpha was None and is 1.0"),
        (("--lora-targets", "all"), "lora_targets was 'transformer' and is 'all'"),
        (("--lora-targets", "all", "--lora-conv-rank", 1), "lora_conv_rank was None and is 1"),
    ):
        assert words in refused(*base, "--output-dir", made, *LATEST, *flags)


# Settings


def settings(*flags: object) -> Settings:
    return parse([str(flag) for flag in ("--model", "a", "--instance-data-dir", "b", *SMALL[:2], *flags)], train.TINY)


def test_a_lora_has_learning_rates_of_its_own(saved):
    assert settings().learning_rate == 2e-6
    given = settings(*LORA)
    assert given.learning_rate == 1e-4 and settings(*LORA, "--learning-rate", "3e-4").learning_rate == 3e-4
    groups = LoRATuning(StableDiffusion.load(saved["official"]), given).parameter_groups(given)
    assert [group["lr"] for group in groups] == [1e-4, 5e-5]
    given = settings(*LORA, "--text-encoder-learning-rate", "1e-5")
    groups = LoRATuning(StableDiffusion.load(saved["official"]), given).parameter_groups(given)
    assert [group["lr"] for group in groups] == [1e-4, 1e-5]
    with pytest.warns(UserWarning, match="--learning-rate 9e-06 is low for a LoRA; 0.0001 is usual"):
        settings(*LORA, "--learning-rate", "9e-6")


def test_the_names_of_other_programs_flags_are_known():
    assert settings("--rank", 8).lora_rank == settings("--network_dim", 8).lora_rank == 8
    assert settings("--rank", 8, "--network_alpha", 1).lora_alpha == 1.0
    assert settings("--rank", 8, "--lora_targets", "all", "--conv_dim", 2).lora_conv_rank == 2


def test_convolutions_may_have_a_rank_of_their_own(saved, tmp_path):
    """As kohya's conv_dim: of the 3x3 ones alone, with the same alpha / rank, and said so in the file's header."""
    given = settings("--lora-rank", 4, "--lora-alpha", 6, "--lora-targets", "all", "--lora-conv-rank", 2)
    tuning = LoRATuning(StableDiffusion.load(saved["official"]), given)
    pairs = tuning.adapter().pairs
    assert {(pair.down.shape[2:] == (3, 3), pair.rank, pair.alpha) for pair in pairs.values()} == {
        (True, 2, 3.0),
        (False, 4, 6.0),
    }
    tuning.result(tmp_path / "lora.safetensors", given, {})
    said = read_lora(tmp_path / "lora.safetensors").metadata
    assert said["ss_network_dim"] == "4" and said["ss_network_alpha"] == "6"
    assert json.loads(said["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "3"}


def test_impossible_loras_are_refused(base, tmp_path):
    for flags, words in (
        (("--lora-rank", 0), "0 is not 1 or more"),
        (("--lora-rank", 1025), "--lora-rank 1025 is too much: it should be at most 1024"),
        (("--lora-alpha", 0), "--lora-alpha 0.0 is not a positive number"),
        (("--lora-alpha", "nan"), "--lora-alpha nan is not a positive number"),
        (("--lora-targets", "everything"), "invalid choice: 'everything'"),
        (("--lora-conv-rank", 2), "--lora-conv-rank is for the 3x3 convolutions, which only --lora-targets all trains"),
        (("--lora-targets", "all", "--lora-conv-rank", 0), "0 is not 1 or more"),
        (("--lora-alpha", "1e-9"), "--lora-alpha 1e-09 is too little: it should be at least 1e-06"),
    ):
        assert words in refused(*base, *flags, "--output-dir", tmp_path / "run")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--lora-alpha", 4), "--lora-alpha has no effect without --lora-rank"),
        (("--lora-targets", "all"), "--lora-targets has no effect without --lora-rank"),
        (("--num-vectors", 3), "--num-vectors has no effect without --placeholder-token"),
        (("--token-learning-rate", 1e-3), "--token-learning-rate has no effect without --placeholder-token"),
        (
            ("--no-train-text-encoder", "--text-encoder-learning-rate", 1e-5),
            "has no effect with --no-train-text-encoder",
        ),
        (
            ("--no-train-text-encoder", "--text-encoder-stop-step", 9),
            "--text-encoder-stop-step has no effect with --no-train-text-encoder",
        ),
        (("--initializer-token", "dog"), "--initializer-token has no effect without --placeholder-token"),
        (("--ema-decay", 0.99), "--ema-decay has no effect without --use-ema"),
        (("--huber-c", 1), "--huber-c has no effect without --loss huber"),
        (("--no-with-prior-preservation", "--prior-loss-weight", 0.5), "--prior-loss-weight has no effect without a"),
        (
            ("--prior", "prediction", "--num-class-images", 9),
            "--num-class-images has no effect with --prior prediction",
        ),
        ((*LORA, "--layout", "diffusers"), "--layout has no effect on a LoRA or a token"),
    ],
)
def test_a_setting_without_effect_is_told(flags, said):
    with pytest.warns(UserWarning, match=said) as warned:
        settings(*flags)
    assert len(warned) == 1


def test_the_embedded_models_lora_has_settings_of_its_own():
    """Those of weights/tiny/lora.toml, unless a model is given; no rank of convolutions where these do not train."""

    def known(*flags: object) -> tuple:
        given = parse([str(flag) for flag in flags], train.TINY)
        return given.lora_targets, given.lora_conv_rank, given.learning_rate, given.text_encoder_learning_rate

    assert known() == ("transformer", None, 2e-4, 2e-5)
    assert known("--lora-rank", 4) == ("all", 1, 2e-3, 5e-4)
    assert known("--lora-rank", 4, "--lora-targets", "attention", "--learning-rate", 3e-3) == (
        ("attention", None, 3e-3, 5e-4)
    )
    assert known("--config", train.TINY, "--lora-rank", 4) == ("transformer", None, 2e-4, 2e-5)


# sample.py


def test_sample_py_applies_loras_and_samples_as_their_run(made, saved, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved_to = tmp_path / "samples"
    flags = ["--model", str(saved["official"]), "--prompt", "a sks dog"]

    def pictures(*more: object) -> tuple[bytes, str | None]:
        before = set(saved_to.glob("*.png"))
        sample.main([*flags, *map(str, more)])
        (new,) = set(saved_to.glob("*.png")) - before
        picture = Image.open(new)
        assert picture.size == (16, 16)
        return picture.tobytes(), picture.text.get("ldm.lora")

    lora = made / "lora.safetensors"
    plain = pictures("--steps", 1, "--guidance-scale", 1, "--height", 16, "--width", 16)
    with_lora = pictures("--lora", lora)  # 1 step, guidance 1, 16 px: from the run
    assert "sampling as in the model's training run: ddim, 1 steps, guidance 1.0, 16 px" in capsys.readouterr().out
    assert with_lora[0] != plain[0] and with_lora[1] == "lora.safetensors:1" and plain[1] is None
    assert pictures("--lora", f"{lora}:0")[0] == plain[0]
    halves = pictures("--lora", f"{lora}:0.5", "--lora", f"{lora}:0.5")
    assert halves[1] == "lora.safetensors:0.5, lora.safetensors:0.5" and halves[0] != plain[0]
    last = made / "checkpoints" / "checkpoint-000004" / "lora.safetensors"
    raw, rounded = (np.frombuffer(p[0], np.uint8).astype(int) for p in (pictures("--lora", last), with_lora))
    assert np.abs(raw - rounded).max() <= 2  # the result is fp16


def test_two_halves_of_a_lora_are_the_whole(made, saved):
    sd = StableDiffusion.load(saved["official"])
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([500]), sd.encode_prompt("a sks dog").detach()
    results = []
    for scales in ((1.0,), (0.5, 0.5)):
        for scale in scales:
            sd.apply_lora(made / "lora.safetensors", scale)
        with torch.no_grad():
            results.append(sd.unet(x, t, context))
        sd.remove_lora()
    assert torch.allclose(*results, rtol=0, atol=1e-5 * results[0].abs().max().item())


def test_the_losses_of_a_lora_run_begin_at_the_base_models(made, base, tmp_path):
    """`up` is zero at first: the first loss is that of full tuning, to the bit."""
    full = tuple(flag for flag in base if flag not in LORA)
    call(*full, "--max-train-steps", 1, "--output-dir", tmp_path / "full")
    assert losses(tmp_path / "full")[0] == losses(made)[0]
