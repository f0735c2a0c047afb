"""Validation while it trains: losses of held-out pictures, language drift, sheets, the best model.

Training does not notice any of it, and a run that was stopped and resumed has the same numbers.
"""

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from runs import (
    LATEST,
    LORA,
    ROOT,
    SMALL,
    call,
    check_same,
    checkpoints,
    command,
    digest,
    leftovers,
    losses,
    photograph,
    pixels,
    refused,
    run,
    slow_after,
    timeless,
    weights,
)

import train
from ldm import StableDiffusion, images
from ldm.data.inpainting import widen
from ldm.images import load_picture
from ldm.preflight import predict
from ldm.runtime import World
from ldm.sampling import contact_sheet
from ldm.sampling.contact_sheet import MARGIN
from ldm.training import Precision, Run, TrainingState, parse, sheets, tuning_of
from ldm.training.ema import EMA
from ldm.validation import advise, best, grid
from ldm.validation.drift import Drift, diversity, drift

EVERY = ("--validation-steps", 2, "--num-drift-images", 2)
TOKEN = ("--instance-prompt", "a [V] dog", "--placeholder-token", "[V]", "--initializer-token", "dog")
FUSED = ("--fused-backward", "--max-grad-norm", 0)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> Path:
    """A folder with two pictures that are no photographs of the run."""
    folder = photograph(tmp_path_factory.mktemp("held") / "out", [(24, 24)] * 5)
    for i in range(3):  # the same as the photographs, but for their size
        (folder / f"{i}.png").unlink()
    return folder


@pytest.fixture(scope="module")
def base(saved, tmp_path_factory) -> tuple:
    return ("--model", saved["official"], "--instance-data-dir", photograph(tmp_path_factory.mktemp("a") / "b"), *SMALL)


@pytest.fixture(scope="module")
def every(held_out) -> tuple:
    return (*EVERY, "--validation-data-dir", held_out)


@pytest.fixture(scope="module")
def made(base, every, tmp_path_factory) -> Path:
    """A run of four steps with a checkpoint after each step."""
    folder = tmp_path_factory.mktemp("run") / "once"
    call(*base, *every, "--checkpointing-steps", 1, "--output-dir", folder)
    return folder


@pytest.fixture(scope="module")
def made_by_two(base, every, tmp_path_factory) -> Path:
    """The same by two processes, with twice the batch."""
    folder = tmp_path_factory.mktemp("two") / "once"
    run(command([*base, *every, "--checkpointing-steps", 1, "--output-dir", folder], 2), folder.parent)
    return folder


def validations(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]


def check_same_validation(a: Path, b: Path) -> None:
    """Checks that two runs have measured the same numbers, and have the same sheets and the same best model."""
    assert timeless(validations(a)) == timeless(validations(b))
    for folder, pattern in (("sheets", "*.png"), ("best", "*")):
        files = [{path.name: digest(path) for path in (run / folder).glob(pattern)} for run in (a, b)]
        assert files[0] == files[1] and files[0]


def test_a_run_has_a_line_for_each_validation_and_a_sheet_for_each_in_between(made):
    lines = validations(made)
    assert [line["step"] for line in lines] == [0, 2, 4]
    names = {"step", "seconds", "training_loss", "validation_loss", "class_loss", "drift", "diversity"}
    assert all(line.keys() == names for line in lines)
    assert (lines[0]["drift"], lines[0]["diversity"]) == (0.0, 1.0)
    assert all(lines[2][name] != lines[0][name] for name in names)
    found = {path.name for path in (made / "sheets").iterdir()}
    assert found >= {"after.png", "before.png", "before_after.png", "step-000002.png", "steps.png"}
    assert not found & {"step-000000.png", "step-000004.png"}


def test_the_sheet_of_all_steps_has_a_row_for_each_step_and_a_column_for_each_prompt(made):
    """Cells are 128 pixels along, eight times the pictures; a label of 13 letters' height stands above each row."""
    row = 128 + 13 + 3 * MARGIN
    steps = pixels(made / "sheets" / "steps.png")
    prompts = json.loads(Image.open(made / "sheets" / "steps.png").text["ldm.prompts"])
    expected = np.asarray(contact_sheet.grid([("", [Image.new("RGB", (128, 128))] * 2)], prompts))
    head = len(expected) - row
    assert len(prompts) == 2 and head >= 13 and len(np.unique(expected[:head])) > 10  # there is ink
    assert np.array_equal(steps[:head], expected[:head])
    assert steps.shape == (head + 3 * row, 2 * (128 + MARGIN) + MARGIN, 3)
    for r, name in enumerate(("before", "step-000002", "after")):
        sheet = pixels(made / "sheets" / f"{name}.png")
        for prompt in range(2):
            top, left = head + r * row + row - 128 - MARGIN, MARGIN + prompt * (128 + MARGIN)
            cell = sheet[prompt * row + row - 128 - MARGIN :][:128, MARGIN : MARGIN + 128]
            assert (steps[top : top + 128, left : left + 128] == cell).all()


def test_the_sheet_of_all_steps_leaves_out_the_pictures_of_other_prompts(made, base, every, tmp_path):
    again, prompts = shutil.copytree(made, tmp_path / "again"), ("a green dog", "snow")
    given = [word for prompt in prompts for word in ("--validation-prompt", prompt)]
    call(*base, *every, *given, "--max-train-steps", 6, "--output-dir", again, *LATEST)
    steps = contact_sheet.grid([("after training", [Image.new("RGB", (128, 128))] * 2)], prompts)
    assert Image.open(again / "sheets" / "steps.png").size == steps.size


def grid_loss(sd: StableDiffusion, pictures: list[tuple[Path, str]], base: StableDiffusion | None = None) -> float:
    """The loss of pictures with these prompts, in DDPM's equations; where `base` is given it predicts the target."""
    errors = []
    for i, (path, prompt) in enumerate(pictures):
        with torch.no_grad():
            latents = sd.encode_images(load_picture(path, 16)[None])
            for row in range(i * grid.CELLS, (i + 1) * grid.CELLS):
                t, noise = grid.draw(0, row, latents.shape[1:], 1000)
                abar = sd.schedule.alphas_cumprod[t].item()
                noisy, t = abar**0.5 * latents + (1 - abar) ** 0.5 * noise, torch.tensor([t])
                target = noise if base is None else base.unet(noisy, t, base.encode_prompt(prompt))
                errors.append((sd.unet(noisy, t, sd.encode_prompt(prompt)) - target).square().mean().item())
    return sum(errors) / len(errors)


def test_the_losses_are_those_of_the_saved_model_on_the_grid(made, base, held_out):
    """For a model that predicts eps."""
    sd = StableDiffusion.load(made / "model.safetensors")
    kinds = {
        "training_loss": [(path, "a sks dog") for path in sorted(Path(base[3]).iterdir())],
        "validation_loss": [(path, "a sks dog") for path in sorted(held_out.iterdir())],
        "class_loss": [(path, "a dog") for path in sorted((made / "class").glob("*.png"))],
    }
    for name, pictures in kinds.items():
        assert validations(made)[-1][name] == pytest.approx(grid_loss(sd, pictures), rel=1e-5), name


@pytest.mark.slow
def test_the_loss_of_a_predicted_prior_has_the_class_of_each_photograph_s_subject(base, saved, tmp_path):
    tables, pictures = "", []
    for name in ("dog", "cat"):
        folder = photograph(tmp_path / name, [(32, 32)] * 2)
        tables += f'[[subjects]]\ninstance_data_dir = "{folder}"\n'
        tables += f'instance_prompt = "a sks {name}"\nclass_prompt = "a {name}"\n'
        pictures += [(path, f"a {name}") for path in sorted(folder.iterdir())]
    (tmp_path / "subjects.toml").write_text(tables)
    usual = [flag for flag in SMALL if not flag.startswith(("--instance-prompt", "--class-prompt"))]
    flags = ("--prior", "prediction", "--learning-rate", "1e-3", "--max-train-steps", 2, "--validation-steps", 2)
    flags = (*usual, *flags, "--num-drift-images", 0, "--output-dir", tmp_path / "run")
    call("--config", tmp_path / "subjects.toml", *base[:2], *flags)
    first, last = (line["class_loss"] for line in validations(tmp_path / "run"))
    sd, before = (StableDiffusion.load(path) for path in (tmp_path / "run" / "model.safetensors", saved["official"]))
    assert first < 1e-10 and last == pytest.approx(grid_loss(sd, pictures, before), rel=1e-4)


def test_a_picture_of_the_grid_has_two_timesteps_in_each_eighth():
    drawn = [grid.draw(7, row, (4, 8, 8), 1000) for row in range(2 * grid.CELLS)]
    for picture in range(2):
        steps = [t for t, _ in drawn[picture * grid.CELLS : (picture + 1) * grid.CELLS]]
        assert sorted(t // 125 for t in steps) == sorted([*range(8), *range(8)])
    noise = torch.stack([noise for _, noise in drawn])
    assert len(noise.flatten(1).unique(dim=0)) == len(noise)
    assert noise.mean().item() == pytest.approx(0, abs=0.03) and noise.std().item() == pytest.approx(1, abs=0.03)
    again = grid.draw(7, 5, (4, 8, 8), 1000)
    assert again[0] == drawn[5][0] and torch.equal(again[1], noise[5])
    assert not torch.equal(grid.draw(8, 5, (4, 8, 8), 1000)[1], noise[5])


@pytest.mark.parametrize(
    "flags",
    slow_after(
        1,
        [
            (("--use-ema", "--ema-decay", "0.5"),),
            (LORA,),
            ((*TOKEN, "--train", "token"),),
            ((*TOKEN, *LORA),),
            (("--mixed-precision", "fp16"),),
            (FUSED,),
            (("--train-dtype", "bf16", "--use-ema", "--ema-decay", "0.5"),),
            (("--prior", "prediction", "--random-crop", "--snr-gamma", "5"),),
        ],
    ),
)
def test_training_does_not_notice_validation(flags, base, every, tmp_path):
    call(*base, *flags, *every, "--output-dir", tmp_path / "with")
    call(*base, *flags, "--output-dir", tmp_path / "without")
    check_same(tmp_path / "with", tmp_path / "without")
    states = [tmp_path / name / "checkpoints" / "checkpoint-000004" for name in ("with", "without")]
    assert digest(states[0] / "training.safetensors") == digest(states[1] / "training.safetensors")
    scalers = [json.loads((state / "state.json").read_text())["scaler"] for state in states]
    assert scalers[0] == scalers[1]


def test_averages_of_a_text_encoder_that_has_stopped_encode_prompts_anew(base, random_model):
    settings = parse([str(flag) for flag in (*base, "--use-ema", "--text-encoder-stop-step", 1)], train.TINY)
    sd, prompts = random_model(), ("a sks dog", "a dog")
    state = TrainingState(tuning_of(sd, settings), settings, Precision("no", torch.device("cpu")), "")
    state.trainable.prepare(prompts, torch.float32)
    state.step = 1
    assert state.start_step()  # of the second step, in which the text encoder no longer trains
    last = state.trainable.context(prompts)
    torch.testing.assert_close(last, sd.encode_prompt(prompts))
    for average in state.ema.averages.values():
        average.mul_(0.5)
    with state.averaged():
        assert (state.trainable.context(prompts) - last).abs().max() > 0.01
        torch.testing.assert_close(state.trainable.context(prompts), sd.encode_prompt(prompts))
    assert torch.equal(state.trainable.context(prompts), last)


@pytest.mark.parametrize("average", [(), ("--use-ema", "--ema-decay", "0.5")], ids=["last", "average"])
def test_prompts_first_seen_by_a_validation_are_the_same_in_training(average, base, every, tmp_path):
    """The text encoder has stopped, and most captions come for the first time since then when a validation has had all
    of them, with the average of the weights. A run that resumes behind it has no such captions."""
    folder = photograph(tmp_path / "captioned", [(32, 32)] * 12)
    for i in range(12):
        (folder / f"{i}.txt").write_text(f"a sks dog {'abcdefghijkl'[i]}")
    base = (*base, "--instance-data-dir", folder, "--learning-rate", "1e-2", "--text-encoder-stop-step", 1, *average)
    base = (*base, "--max-train-steps", 6, "--checkpointing-steps", 3)
    call(*base, *every, "--output-dir", tmp_path / "with")
    call(*base, "--output-dir", tmp_path / "without")
    check_same(tmp_path / "with", tmp_path / "without")
    again = shutil.copytree(tmp_path / "with", tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / "checkpoint-000006")
    call(*base, *every, "--output-dir", again, *LATEST)
    check_same(tmp_path / "with", again)
    check_same_validation(tmp_path / "with", again)


@pytest.mark.slow
def test_a_model_for_painting_in_begins_with_the_losses_of_the_model_that_it_was_made_of(
    made, base, every, random_model, tmp_path
):
    """It sees a mask of the whole picture, by weights that are still zero."""
    sd = random_model()
    widen(sd)
    sd.save(tmp_path / "nine.safetensors")
    own = shutil.copytree(made / "class", tmp_path / "class")
    (own / "manifest.json").unlink()  # which names the model of four channels
    flags = ("--model", tmp_path / "nine.safetensors", "--max-train-steps", 2, "--class-data-dir", own)
    call(*base, *every, *flags, "--output-dir", tmp_path / "run")
    assert timeless(validations(tmp_path / "run"))[0] == pytest.approx(timeless(validations(made))[0], rel=1e-5)


@pytest.mark.slow
def test_training_in_two_processes_does_not_notice_validation_and_measures_the_same(made_by_two, base, every, tmp_path):
    run(command([*base, "--output-dir", tmp_path / "without"], 2), tmp_path)
    check_same(made_by_two, tmp_path / "without")
    call(*base, *every, "--train-batch-size", 2, "--output-dir", tmp_path / "one")
    for one, two in zip(timeless(validations(tmp_path / "one")), timeless(validations(made_by_two)), strict=True):
        assert one == pytest.approx(two, rel=1e-6, abs=1e-6)


def test_a_resumed_run_measures_the_same(made, base, every, tmp_path):
    again = shutil.copytree(made, tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / "checkpoint-000004")
    (again / "sheets" / "after.png").unlink()
    call(*base, *every, "--checkpointing-steps", 1, "--output-dir", again, *LATEST)
    check_same(made, again)
    check_same_validation(made, again)
    check_same_report(made, again)


def check_same_report(*folders: Path) -> None:
    """Checks that two runs have the same report, but for times, the names of their folders and the disk's space."""
    texts = []
    for folder in folders:
        text = (folder / "report.html").read_text(encoding="utf-8").replace(f"<span>{folder.name}</span>", "")
        text = text.replace(f"{folder.parent}/", "").replace(
            f"{folder.name}/", "RUN/"
        )  # some are seen from their parent
        assert "Take step" in text and "training time</dt><dd>" in text
        texts.append(re.sub("training time</dt><dd>[^<]+<|[0-9.]+ GB are free", "", text).split("<"))
    assert [pair for pair in zip(*texts, strict=True) if len(set(pair)) > 1] == []


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "when", "step"), [(1, "before", 2), (2, "before", 2), (2, "after", 3)])
def test_a_run_stopped_by_a_signal_and_resumed_measures_the_same(processes, when, step, request, base, every, tmp_path):
    whole, parts = request.getfixturevalue("made" if processes == 1 else "made_by_two"), tmp_path / "parts"
    flags = [*base, *every, "--checkpointing-steps", 1, "--output-dir", parts]
    stops = Path(__file__).with_name("stops.py")
    done = run(command([when, *flags], processes, script=stops), tmp_path, PYTHONPATH=str(ROOT))
    assert f"stopped after step {step}" in done.out
    assert checkpoints(parts)[-1] == step
    assert [line["step"] for line in validations(parts)] == ([0] if when == "before" else [0, 2])
    assert "It is not finished" in (parts / "report.html").read_text(encoding="utf-8")
    run(command([*flags, *LATEST], processes), tmp_path)
    check_same(whole, parts)
    check_same_validation(whole, parts)
    check_same_report(whole, parts)


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def not_a_number() -> None:
    images.to_pil(torch.full((1, 3, 16, 16), torch.nan))


@pytest.mark.parametrize(
    ("failure", "said"),
    slow_after(
        1,
        [
            (out_of_memory, "cpu ran out of memory while it made the sheet of step 2"),
            (not_a_number, "a picture came out as NaN or infinity"),
        ],
    ),
)
def test_a_sheet_that_fails_costs_a_line_and_not_the_run(
    failure, said, made, base, every, tmp_path, monkeypatch, capsys
):
    draw = sheets.sample

    def failing(settings, sd, when, progress):
        if when == "step 2":
            failure()
        return draw(settings, sd, when, progress)

    monkeypatch.setattr(sheets, "sample", failing)
    call(*base, *every, "--checkpointing-steps", 1, "--output-dir", tmp_path / "run")
    assert f"warning: no sheet: {said}" in capsys.readouterr().out
    assert not (tmp_path / "run" / "sheets" / "step-000002.png").exists()
    assert timeless(validations(tmp_path / "run")) == timeless(validations(made))
    check_same(tmp_path / "run", made)


# The best model


def test_best_is_the_model_of_the_step_that_the_run_advises(made):
    lines = validations(made)
    step = advise(lines).step
    first, line = (next(line for line in lines if line["step"] == n) for n in (0, step))
    learned = 1 - line["training_loss"] / first["training_loss"]
    over = max(line["validation_loss"] / first["validation_loss"] - 1, 0)
    harm = max(line["drift"], 1 - line["diversity"], 0)
    about = json.loads((made / "best" / "best.json").read_text())
    assert about == {"step": step, "metric": "score", "value": pytest.approx(learned - over - harm)}
    kept, saved = weights(made / "best"), weights(made / "checkpoints" / f"checkpoint-{step:06d}")
    assert kept.keys() == saved.keys() and all(torch.equal(kept[name], saved[name]) for name in kept)
    StableDiffusion.load(made / "best" / "model.safetensors")


def test_best_may_be_the_model_of_the_lowest_held_out_loss():
    settings = SimpleNamespace(best_metric="validation_loss")
    losses = ((0, 0.1), (1, 0.4), (2, math.nan), (3, 0.3), (4, 0.3))  # the last is only as good as the one before
    lines = [{"step": step, "training_loss": 1.0 - step, "validation_loss": loss} for step, loss in losses]
    assert [best.is_best(lines[: i + 1], settings) for i in range(5)] == [False, True, False, True, False]


def test_a_run_that_was_killed_while_it_replaced_best_has_the_older_one(made, base, every, tmp_path):
    again = shutil.copytree(made, tmp_path / "again")
    (again / "best").rename(again / ".old-best")
    (again / ".tmp-best" / "best").mkdir(parents=True)
    call(*base, *every, "--output-dir", again, *LATEST)
    assert leftovers(again) == []
    check_same_validation(made, again)


def test_without_held_out_pictures_there_is_no_best_and_a_line_says_so(base, tmp_path, capsys):
    call(*base, *EVERY, "--max-train-steps", 2, "--no-with-prior-preservation", "--output-dir", tmp_path / "run")
    out = capsys.readouterr().out
    assert out.count("no best model is kept in best/") == 1 and not (tmp_path / "run" / "best").exists()
    assert validations(tmp_path / "run")[-1].keys() == {"step", "seconds", "training_loss", "drift", "diversity"}
    assert "advice: take step 2" in out


@pytest.mark.slow
def test_held_out_photographs_are_not_trained_on(base, tmp_path):
    """Two of three are held out: the run trains on the one that is left, as a run that has no other."""
    flags = ("--no-with-prior-preservation", "--max-train-steps", 2, "--output-dir")
    call(*base, "--validation-steps", 9, "--num-drift-images", 0, "--hold-out", 2, *flags, tmp_path / "run")
    names = list(json.loads((tmp_path / "run" / "config.json").read_text())["photographs"])
    held = list(json.loads((tmp_path / "run" / "config.json").read_text())["held_out"])
    assert sorted(names + held) == ["0.png", "1.png", "2.png"] and len(held) == 2
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(Path(base[3]) / names[0], alone)
    call(*base, *flags, tmp_path / "other", "--instance-data-dir", alone)
    assert losses(tmp_path / "run") == losses(tmp_path / "other")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--hold-out", 1), "held-out pictures need --validation-steps"),
        ((*EVERY, "--hold-out", 3), "--hold-out 3 leaves none of 3 photographs to train on"),
        ((*EVERY, "--hold-out", -1), "--hold-out -1 is not a whole number from 0"),
        ((*EVERY, "--num-drift-images", 1), "--num-drift-images 1 is not 0, nor a number from 2"),
        ((*EVERY, "--hold-out", 1, "--validation-data-dir", "x"), "both choose the held-out pictures"),
        ((*EVERY, "--validation-data-dir", "nowhere"), "nowhere is not a folder"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(flags, said, base, tmp_path):
    assert said in refused(*base, *flags, "--output-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_has_the_same_held_out_pictures(made, base, every, tmp_path):
    again, other = shutil.copytree(made, tmp_path / "again"), photograph(tmp_path / "other")
    flags = ("--validation-data-dir", other, "--output-dir", again, *LATEST)
    assert "held-out picture" in refused(*base, *EVERY, *flags)


# Language drift


def test_drift_is_0_at_the_base_and_1_at_the_photographs():
    base, photographs = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.full((5,), 3.0)
    assert drift(base, base, photographs) == pytest.approx(0.0, abs=1e-6)
    half = base + (photographs - base.mean(0)) / 2
    assert drift(half, base, photographs) == pytest.approx(0.5)
    assert drift(photographs.expand(4, 5), base, photographs) == pytest.approx(1.0)


def test_drift_takes_the_class_prompts_of_all_subjects_in_turn(base, saved, tmp_path):
    flags = (*base, *EVERY, "--num-drift-images", 5, "--output-dir", tmp_path / "run")
    settings = parse([str(word) for word in flags], train.TINY)
    trainable = tuning_of(StableDiffusion.load(saved["official"]), settings)
    photographs = grid.Part("training_loss", torch.zeros(1, 4, 8, 8), ("a sks dog",))
    prompts = ("a dog", "a cat", "a green car")
    with Run(settings, World(0, 1, torch.device("cpu"))) as run:
        turns = Drift(run, trainable, prompts, photographs).base
        alone = [Drift(run, trainable, [prompt], photographs).base for prompt in prompts]
    for number, features in enumerate(turns):
        found = [torch.allclose(features, of_one[number], rtol=0, atol=1e-5) for of_one in alone]
        assert found == [i == number % 3 for i in range(3)]


def test_diversity_is_the_mean_cosine_distance_of_pairs():
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    pairs = [(i, j) for i in range(7) for j in range(7) if i != j]
    expected = sum(1 - torch.cosine_similarity(x[i] - 1, x[j] - 1, dim=0).item() for i, j in pairs) / len(pairs)
    assert diversity(x, torch.ones(5)) == pytest.approx(expected, rel=1e-5)
    assert diversity(x[:1].expand(4, 5), torch.zeros(5)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averages_and_weights_have_their_bits_back_after_they_were_used(dtype):
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=dtype))
    ema = EMA({"w": weight}, 0.5)
    ema.averages["w"] = torch.tensor([0.1, 0.2, 0.3])
    with ema.applied():
        assert torch.equal(weight.detach(), torch.tensor([0.1, 0.2, 0.3]).to(dtype))
    assert torch.equal(weight.detach().float(), torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(ema.averages["w"], torch.tensor([0.1, 0.2, 0.3]))


def test_the_memory_that_a_run_predicts_has_the_half_of_the_unet_that_drift_needs(base, saved):
    sd = StableDiffusion.load(saved["official"])
    found = []
    for flags in ((), EVERY, (*EVERY, *LORA)):
        settings = parse([str(word) for word in (*base, *flags)], train.TINY)
        found.append(predict(sd, tuning_of, settings, torch.device("cpu")).weights)
    half = [p for n, p in sd.unet.named_parameters() if n.startswith(("time_embed", "input_blocks", "middle_block"))]
    assert found[1] - found[0] == sum(parameter.nbytes for parameter in half)
    assert found[2] < found[1]
