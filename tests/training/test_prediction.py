"""The memory that a run is said to need is what a process grows by, and what autograd and AdamW really keep."""

import re
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from growth import BASE, CPU, SETTINGS, check_growth, on_meta, predicted
from runs import SMALL, call, slow_after
from torch import nn

from ldm import StableDiffusion
from ldm.config import SD1
from ldm.dreambooth import Trainable
from ldm.preflight import memory, predict
from ldm.preflight.memory import Rehearsal
from ldm.runtime import World
from ldm.training import FullTuning, optimizer, options
from ldm.training.precision import Precision

GPU = torch.device("cuda")
LARGE = {"resolution": 128, "train_batch_size": 2}


EMBEDDED = {
    "fp32": {"train_batch_size": 4},
    "accumulation, UNet alone": LARGE | {"gradient_accumulation_steps": 2, "train_text_encoder": False},
    "bf16, average": LARGE | {"mixed_precision": "bf16", "use_ema": True},
    "checkpointing": LARGE | {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("case", slow_after(0, EMBEDDED))
def test_the_process_grows_by_the_prediction_on_the_embedded_model(case, tmp_path):
    check_growth(str(BASE), StableDiffusion.load(BASE), [EMBEDDED[case]], tmp_path)


@pytest.mark.parametrize("flags", [{}, {"mixed_precision": "bf16"}, {"gradient_checkpointing": True}])
def test_the_forward_pass_without_numbers_keeps_what_autograd_keeps(flags, random_model):
    """Real tensors, each storage once, as autograd saves them. The ledger also counts the prediction, and t."""
    settings = replace(SETTINGS, resolution=64, train_batch_size=2, **flags)
    sd = random_model()
    trainable, precision = FullTuning(sd, settings), Precision(settings.mixed_precision, CPU)
    known = {parameter.untyped_storage().data_ptr() for parameter in sd.parameters().values()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    prompts = [settings.instance_prompt] * 2 + [settings.class_prompt] * 2
    noisy, t = torch.randn(4, *sd.latent_shape(64, 64)), torch.arange(4)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), precision.autocast():
        prediction = trainable(noisy, t, prompts)

    rehearsal = Rehearsal(random_model(), FullTuning, settings, CPU)
    with rehearsal._ledger() as ledger, rehearsal.kernels:
        noisy = rehearsal._noisy(4)
        with rehearsal.kernels.autocast():
            predicted = rehearsal.trainable(noisy, torch.empty(4, dtype=torch.long, device="meta"), prompts)
    assert predicted.dtype == prediction.dtype
    assert ledger.now == pytest.approx(sum(storage.nbytes() for storage in kept.values()), rel=0.05)


@pytest.mark.parametrize("eight_bit", [False, True])
def test_moments_are_those_that_adamw_keeps(eight_bit):
    if eight_bit:
        pytest.importorskip("bitsandbytes", reason="needs the bitsandbytes extra")
    sizes = [(64, 64, 3, 3), (4095,), (4097,), (130, 100)]
    parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
    adamw = optimizer.adamw([{"params": parameters, "lr": 1e-3, "stop": None}], eight_bit)
    for parameter in parameters:
        kept = optimizer.kept_of(adamw, parameter)
        real = sum(
            value.nbytes
            for name, value in kept.items()
            if isinstance(value, torch.Tensor) and not name.startswith(("qmap", "step"))
        )
        assert (memory.moment_bytes_8bit if eight_bit else memory.moment_bytes)(parameter) == real


class Adapters(Trainable):
    """Trains two matrices beside each query of the UNet, whose own weights are stored in the compute type."""

    def __init__(self, sd, settings):
        extra = {}
        for name, module in sd.unet.named_modules():
            if name.endswith("to_q"):
                down, up = nn.Linear(module.in_features, 4, bias=False), nn.Linear(4, module.out_features, bias=False)
                module.register_forward_hook(lambda _, x, y, down=down, up=up: y + up(down(x[0])))
                extra |= {f"{name}.down": down.weight, f"{name}.up": up.weight}
        super().__init__(sd, settings, extra)

    def prepare(self, prompts, dtype):
        super().prepare(prompts, dtype)
        self.sd.freeze(self.sd.unet, dtype)


def test_parameters_that_are_not_the_models_own_train_over_a_frozen_model_in_16_bits():
    sd = on_meta(SD1)
    settings = replace(SETTINGS, resolution=512, mixed_precision="bf16", train_batch_size=1)
    found = predicted(sd, settings, GPU, Adapters)
    numbers = sum(p.numel() for network in (sd.unet, sd.text_encoder, sd.vae.decoder) for p in network.parameters())
    assert found.weights == pytest.approx(2 * numbers, rel=0.01)
    assert 0 < found.moments < 0.01 * found.weights and found.gradients < 0.01 * found.weights
    assert found.total < 6e9


@pytest.mark.slow
@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_what_a_flag_saves_is_what_the_prediction_with_it_saves(device, random_model):
    """Each part answers to the flag that is for it, and to no other."""
    sd = random_model()
    settings = replace(SETTINGS, train_batch_size=4, use_ema=True)
    plain = predicted(sd, settings, device)
    trained = sum(p.nbytes for network in (sd.unet, sd.text_encoder) for p in network.parameters())
    assert plain.average == trained and plain.moments == 2 * trained
    with_flag = {
        flag: predicted(sd, changed, device)
        for flag, changed in memory.savers(settings, device).items()
        if "sample" not in flag
    }
    assert all(found.total < plain.total for found in with_flag.values())
    assert with_flag["--no-use-ema"].average == 0
    assert with_flag["--no-train-text-encoder"].moments == 2 * sum(p.nbytes for p in sd.unet.parameters())
    for flag in ("--gradient-checkpointing", "--train-batch-size 2"):
        assert with_flag[flag].moments == plain.moments


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_flags_that_save_memory_are_flags_of_train_py(device, root):
    plain = options.parse([], root / "weights" / "tiny" / "train.toml")
    for flag, changed in memory.savers(replace(plain, use_ema=True), device).items():
        found = options.parse(["--use-ema", *flag.split()], root / "weights" / "tiny" / "train.toml")
        assert asdict(found) == asdict(changed)


def test_train_py_says_how_much_memory_the_run_needs(saved, photographs, tmp_path, capsys):
    call("--model", saved["official"], "--instance-data-dir", photographs, *SMALL, "--max-train-steps", 1,
         "--output-dir", tmp_path / "run")  # fmt: skip
    out = capsys.readouterr().out
    assert len(re.findall(r"^memory +about ", out, re.MULTILINE)) == 1
    assert not re.search(r"^memory +warning", out, re.MULTILINE)


@pytest.mark.slow
def test_a_warning_names_the_flags_that_help_from_the_one_that_saves_most(random_model, monkeypatch):
    settings = replace(SETTINGS, train_batch_size=64)
    run = SimpleNamespace(settings=settings, world=World(0, 1, CPU))
    monkeypatch.setattr(memory, "available", lambda device: 100_000_000)
    (warning,) = [note.text for note in memory.memory_notes(run, random_model(), FullTuning) if note.warning]
    begin, _, flags = warning.partition("; ")
    assert begin == "cpu has 0.10 GB for it"
    saved = {part.partition(" saves ")[0]: float(part.split()[-2]) for part in flags.split(", ")}
    assert list(saved.values()) == sorted(saved.values(), reverse=True)
    assert {"--gradient-checkpointing", "--mixed-precision bf16", "--train-batch-size 32"} <= saved.keys()


def test_the_prediction_is_the_largest_of_the_moments_of_a_run(random_model):
    sd = random_model()
    many = replace(SETTINGS, resolution=128, sample_batch_size=16)
    assert "samples" in predict(sd, FullTuning, many, GPU).moment
    assert predict(sd, FullTuning, replace(many, sample_batch_size=1, train_batch_size=16), GPU).moment.endswith("step")


def test_class_pictures_need_memory_only_where_they_are_made(random_model):
    def needed(**changes) -> int:
        settings = replace(SETTINGS, num_validation_images=1, num_class_images=64, sample_batch_size=16, **changes)
        return memory.Rehearsal(random_model(), FullTuning, settings, GPU).class_pictures().total

    without = needed(with_prior_preservation=False)
    assert needed(prior="prediction") == without < needed()
