"""A resumed run equals the run that never stopped, bit for bit. A checkpoint of another run is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import (
    BOTH,
    LATEST,
    LORA,
    SMALL,
    call,
    check_same,
    checkpoints,
    command,
    leftovers,
    losses,
    metrics,
    photograph,
    refused,
    result,
    run,
    slow_after,
    weights,
)
from safetensors.torch import load_file

import sample
from ldm import InputError
from ldm.clip import TextEncoder
from ldm.settings import Settings
from ldm.training.claim import choose

ALL = ("--random-flip", "--use-ema", "--ema-decay", "0.9", "--snr-gamma", "5", "--lr-warmup-steps", "5")


@pytest.fixture(scope="module")
def base(request, saved, tmp_path_factory) -> tuple:
    folder = photograph(tmp_path_factory.mktemp("a") / "b")
    tuned = getattr(request, "param", ())  # the flags of BOTH, or those of full tuning
    return ("--model", saved["official"], "--instance-data-dir", folder, *SMALL, *tuned)


@pytest.fixture(scope="module")
def made(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "once"
    call(*base, "--output-dir", folder, "--checkpointing-steps", 1)
    return folder


@pytest.fixture
def once(made, tmp_path) -> Path:
    """A copy of a run of four steps with a checkpoint after each step."""
    return shutil.copytree(made, tmp_path / "once")


EVERYWHERE = (*LORA, "--lora-targets", "all", "--lora-conv-rank", 1)


@pytest.mark.parametrize(
    ("stop", "flags"),
    slow_after(
        1,
        [
            (2, ()),  # within an epoch: three photographs, four class pictures, one of each a step
            (3, ("--num-class-images", 3)),  # exactly at the end of an epoch
            (3, ("--train-batch-size", 2, "--gradient-accumulation-steps", 2, *ALL)),
            (3, ("--text-encoder-stop-step", 2, "--text-encoder-learning-rate", "1e-3")),  # after that step
            (3, ("--mixed-precision", "fp16", "--no-train-text-encoder")),
            (3, ("--mixed-precision", "bf16", "--random-crop", "--random-flip")),
            (3, (*LORA, "--train-batch-size", 2, "--gradient-accumulation-steps", 2, *ALL)),
            (3, (*EVERYWHERE, "--mixed-precision", "fp16", "--gradient-checkpointing")),
            (3, (*LORA, "--text-encoder-stop-step", 2, "--mixed-precision", "bf16", "--random-crop")),
        ],
    ),
)
def test_a_resumed_run_equals_the_run_that_never_stopped(stop, flags, base, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    call(*base, *flags, "--max-train-steps", 5, "--output-dir", whole)
    call(*base, *flags, "--max-train-steps", stop, "--output-dir", parts, "--checkpointing-steps", 1)
    call(*base, *flags, "--max-train-steps", 5, "--output-dir", parts, *LATEST)
    check_same(whole, parts)
    assert leftovers(parts) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [ALL, ("--mixed-precision", "fp16", *ALL), (*LORA, "--mixed-precision", "fp16", *ALL)],
    ids=["fp32", "fp16", "lora"],
)
def test_a_run_stopped_at_each_of_twelve_steps_equals_the_run_that_never_stopped(flags, base, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(command([*base, *flags, "--max-train-steps", 12, "--output-dir", whole]), tmp_path)
    for step in range(1, 13):
        flags_ = (*flags, "--max-train-steps", step, "--output-dir", parts, "--checkpointing-steps", 1, *LATEST)
        run(command([*base, *flags_]), tmp_path)
        assert checkpoints(parts)[-1] == step
    check_same(whole, parts)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tuning"), [("no", ()), ("fp16", ()), ("no", LORA)], ids=["no", "fp16", "lora"])
def test_two_processes_with_accumulation_resume_to_the_same_bits(precision, tuning, base, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    base = (
        *base,
        *tuning,
        "--mixed-precision",
        precision,
        "--gradient-accumulation-steps",
        3,
        "--checkpointing-steps",
        2,
    )
    run(command([*base, "--output-dir", whole], 2), tmp_path)
    run(command([*base, "--output-dir", parts, "--max-train-steps", 2], 2), tmp_path)
    shutil.copytree(parts, tmp_path / "alone")
    run(command([*base, "--output-dir", parts, *LATEST], 2), tmp_path)
    check_same(whole, parts)

    # Another number of processes with the same global batch gives the same run, except for the last bits.
    flags = ("--train-batch-size", 2, "--output-dir", tmp_path / "alone", *LATEST)
    run(command([*base, *flags]), tmp_path)
    assert losses(tmp_path / "alone") == pytest.approx(losses(whole), rel=1e-6 if precision == "no" else 1e-2)
    message = refused(*base, "--train-batch-size", 4, "--output-dir", tmp_path / "alone", *LATEST)
    assert "global_batch was 6 and is 12" in message


@pytest.mark.slow
def test_a_run_with_eight_bit_adam_resumes_to_the_same_bits(base, tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs the bitsandbytes extra")
    base = (*base, "--use-8bit-adam", "--learning-rate", "1e-3")
    call(*base, "--output-dir", tmp_path / "whole")
    call(*base, "--output-dir", tmp_path / "parts", "--max-train-steps", 2, "--checkpointing-steps", 2)
    call(*base, "--output-dir", tmp_path / "parts", *LATEST)
    check_same(tmp_path / "whole", tmp_path / "parts")
    training = load_file(tmp_path / "parts" / "checkpoints" / "checkpoint-000002" / "training.safetensors")
    assert torch.uint8 in {tensor.dtype for tensor in training.values()}


@pytest.mark.slow
def test_a_run_of_sd2_resumes_with_its_text_encoder(random_model, base, tmp_path):
    """The official file names and stacks the text encoder's tensors differently from the program."""
    sd = random_model()
    sd.config = replace(sd.config, text=replace(sd.config.text, activation="gelu", pad_id=0))
    sd.text_encoder = TextEncoder(sd.config.text)
    sd.save(tmp_path / "sd2.safetensors")
    base = (*base, "--model", tmp_path / "sd2.safetensors")
    call(*base, "--output-dir", tmp_path / "whole")
    call(*base, "--output-dir", tmp_path / "parts", "--max-train-steps", 2, "--checkpointing-steps", 2)
    call(*base, "--output-dir", tmp_path / "parts", *LATEST)
    check_same(tmp_path / "whole", tmp_path / "parts")


# Which checkpoint a run resumes from


def test_sample_py_makes_pictures_with_every_checkpoint(once, tmp_path):
    assert checkpoints(once) == [1, 2, 3, 4]
    made = []
    for step in checkpoints(once):
        folder = tmp_path / str(step)
        flags = ("--prompt", "a sks dog", "--steps", "1", "--height", "16", "--width", "16")
        path = once / "checkpoints" / f"checkpoint-{step:06d}"
        sample.main(["--model", str(path), *flags, "--output-dir", str(folder)])
        made.append(Image.open(folder / "00000-0.png").tobytes())
    assert len(set(made)) == 4


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "name", "damage"),
    slow_after(
        3,
        [
            ((), "model.safetensors", truncate),
            ((), "training.safetensors", flip),
            ((), "state.json", Path.unlink),
            ((), "metrics.jsonl", truncate),
            ((), "SHA256SUMS", flip),
            ((), "SHA256SUMS", Path.unlink),
            (LORA, "lora.safetensors", truncate),
            (LORA, "training.safetensors", flip),
        ],
    ),
    indirect=["base"],
)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_taken(name, damage, once, base, tmp_path, capsys):
    whole = losses(once)
    newest = once / "checkpoints" / "checkpoint-000004"
    damage(newest / name)
    message = refused(*base, "--output-dir", tmp_path / "new", "--resume-from-checkpoint", newest)
    assert str(newest) in message and "damaged" in message and not (tmp_path / "new").exists()

    limit = ("--checkpointing-steps", 2, "--checkpoints-total-limit", 1)
    with pytest.warns(match=f"checkpoint {newest} is damaged: {name}"):
        call(*base, "--output-dir", once, "--max-train-steps", 6, *LATEST, *limit)
    assert "resuming from" in (said := capsys.readouterr().out) and "checkpoint-000003" in said
    assert losses(once)[:4] == whole and len(losses(once)) == 6
    assert checkpoints(once) == [6] and leftovers(once) == []


@pytest.mark.slow
@pytest.mark.parametrize("base", BOTH, indirect=True)
@pytest.mark.filterwarnings("ignore:checkpoint")
def test_a_damaged_later_checkpoint_does_not_count_towards_the_limit(once, base):
    truncate(result(once / "checkpoints" / "checkpoint-000004"))
    limit = ("--checkpointing-steps", 2, "--checkpoints-total-limit", 1, "--max-train-steps", 3)
    (once / "checkpoints" / "checkpoint-000003").rename(once / "checkpoints" / "mine")
    call(*base, "--output-dir", once, *LATEST, *limit)
    assert checkpoints(once) == [3, 4]  # the one to keep is that of the last step, not the damaged one ahead of it
    call(*base, "--output-dir", once, *LATEST, *limit, "--max-train-steps", 4)
    assert checkpoints(once) == [4] and len(losses(once)) == 4


@pytest.mark.parametrize("base", BOTH, indirect=True)
@pytest.mark.filterwarnings("ignore:checkpoint")
def test_a_run_whose_checkpoints_are_all_damaged_is_refused(once, base):
    before = (once / "metrics.jsonl").read_bytes()
    for path in (once / "checkpoints").iterdir():
        truncate(result(path))
    assert "no checkpoint" in refused(*base, "--output-dir", once, *LATEST)
    assert (once / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_an_older_checkpoint_resumes_in_its_own_folder_and_in_a_new_one(once, base, tmp_path, monkeypatch):
    whole, older = losses(once), once / "checkpoints" / "checkpoint-000002"
    call(*base, "--output-dir", tmp_path / "new", "--resume-from-checkpoint", older)
    assert losses(tmp_path / "new") == whole
    monkeypatch.chdir(tmp_path)  # without --output-dir the run resumes in the checkpoint's own folder
    call(*base, "--resume-from-checkpoint", older, "--checkpointing-steps", 4, "--max-train-steps", 3)
    assert losses(once) == whole[:3] and checkpoints(once) == [1, 2, 3, 4] and not (tmp_path / "runs").exists()
    call(*base, "--output-dir", once, *LATEST)
    assert losses(once) == whole  # 4 is the latest checkpoint and has its own metrics
    message = refused(*base, "--output-dir", once, *LATEST, "--max-train-steps", 3)
    assert "checkpoint-000004 is beyond --max-train-steps 3" in message


def test_a_checkpoint_that_is_named_and_not_there_is_looked_for_in_the_run(tmp_path):
    for name in ("checkpoint-000001", "checkpoint-000003"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "config.json").write_text("{}")
    settings = Settings(output_dir=str(tmp_path), resume_from_checkpoint="checkpoint-000009")
    said = "checkpoints/checkpoint-000009 is no checkpoint folder; the newest is checkpoint-000003"
    with pytest.raises(InputError, match=f"--resume-from-checkpoint {tmp_path}/{said}"):
        choose(settings)


@pytest.mark.slow
def test_runs_without_output_dir_are_numbered_and_latest_resumes_the_last(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = ("--max-train-steps", 1, "--no-with-prior-preservation", "--checkpointing-steps", 1)
    for _ in range(3):
        call(*base, *one)
    shutil.rmtree(tmp_path / "runs" / "dreambooth-2")
    call(*base, *one)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["dreambooth", "dreambooth-3", "dreambooth-4"]
    call(*base, *one, *LATEST, "--max-train-steps", 2)
    assert [len(losses(tmp_path / "runs" / name)) for name in ("dreambooth-3", "dreambooth-4")] == [1, 2]


@pytest.mark.parametrize("base", BOTH, indirect=True)
def test_latest_starts_from_the_base_model_where_there_is_no_checkpoint(base, tmp_path, capsys):
    """A job can then be started and restarted with one command line. A finished model is not trained again."""
    folder = tmp_path / "new"
    call(*base, "--output-dir", folder, *LATEST, "--max-train-steps", 1)
    assert f"no checkpoint in {folder / 'checkpoints'} yet: starting from the base model" in capsys.readouterr().out
    assert len(losses(folder)) == 1 and checkpoints(folder) == [1]
    shutil.rmtree(folder / "checkpoints" / "checkpoint-000001")
    assert "holds a finished run's model" in refused(*base, "--output-dir", folder, *LATEST, "--max-train-steps", 2)
    result(folder).unlink()
    (folder / "metrics.jsonl").open("a").write('{"step": 2, "lo')  # a config.json, half a line, and no checkpoint
    call(*base, "--output-dir", folder, *LATEST, "--max-train-steps", 2)
    assert len(losses(folder)) == 2


@pytest.mark.slow
def test_a_checkpoint_is_given_by_its_name_by_a_link_or_in_a_config_file(once, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole, name = losses(once), "checkpoint-000002"
    (tmp_path / "link").symlink_to(once / "checkpoints" / name)
    (tmp_path / "more.toml").write_text(f'resume_from_checkpoint = "{once.name}/checkpoints/{name}"')
    for flags in (
        ("--output-dir", once, "--resume-from-checkpoint", name),
        ("--resume-from-checkpoint", "link"),
        ("--config", "more.toml"),
    ):
        call(*base, *flags)
        assert losses(once) == whole and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("path", ["nowhere", "/", "/x"])
def test_a_missing_checkpoint_is_refused_and_leaves_no_folder(path, base, tmp_path):
    message = refused(*base, "--output-dir", tmp_path / "new", "--resume-from-checkpoint", path)
    assert message.startswith("--resume-from-checkpoint") and not (tmp_path / "new").exists()


def test_a_missing_checkpoint_begins_no_new_run(once, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "nowhere is no checkpoint folder" in refused(*base, "--resume-from-checkpoint", "nowhere")
    assert not (tmp_path / "runs").exists()
    shutil.copytree(once / "checkpoints" / "checkpoint-000002", tmp_path / "alone" / "there" / "copy")
    alone = ("--resume-from-checkpoint", "alone/there/copy")
    assert "does not lie in a run's folder: give --output-dir" in refused(*base, *alone)
    shutil.copytree(once, tmp_path / "runs" / "dreambooth")
    message = refused(*base, "--resume-from-checkpoint", "checkpoint-000009")
    assert "runs/dreambooth/checkpoints/checkpoint-000009 is no checkpoint folder; the newest is" in message


def test_a_refused_checkpoint_leaves_no_new_folder(once, base, tmp_path):
    older = once / "checkpoints" / "checkpoint-000002"
    flags = ("--resume-from-checkpoint", older, "--learning-rate", "2e-4")
    assert "learning_rate was" in refused(*base, "--output-dir", tmp_path / "new", *flags)
    assert not (tmp_path / "new").exists()


# What makes it another run


DIFFERENCES = [
    (("--train-batch-size", 2), "global_batch was 1 and is 2"),
    (("--instance-prompt", "a zwx dog"), "instance_prompt was 'a sks dog' and is 'a zwx dog'"),
    (
        ("--learning-rate", "2e-4", "--snr-gamma", 5),
        "snr_gamma was None and is 5.0; learning_rate was 0.0001 and is 0.0002",
    ),
    (("--mixed-precision", "bf16"), "mixed_precision was 'no' and is 'bf16'"),
    (("--use-ema",), "use_ema was False and is True"),
    (("--lr-scheduler", "cosine"), "lr_scheduler was 'constant' and is 'cosine'"),
]


@pytest.mark.slow
def test_a_checkpoint_of_another_run_is_refused_with_the_differences(once, base, tmp_path):
    last = once / "checkpoints" / "checkpoint-000004"
    for flags, difference in DIFFERENCES:
        message = refused(*base, "--output-dir", once, *LATEST, *flags)
        assert message == f"{once} belongs to another run: {difference}"
        assert refused(*base, "--output-dir", tmp_path / "new", "--resume-from-checkpoint", last, *flags) == (
            f"{last} belongs to another run: {difference}"
        )


def test_another_model_or_other_photographs_are_another_run(once, base, random_model, tmp_path):
    random_model(1).save(tmp_path / "other.safetensors")
    message = refused(*base, "--output-dir", once, *LATEST, "--model", tmp_path / "other.safetensors")
    assert "base was" in message or "generated with model" in message
    shutil.copytree(base[3], tmp_path / "moved")
    call(*base, "--output-dir", once, *LATEST, "--instance-data-dir", tmp_path / "moved")  # the folder may move
    (tmp_path / "moved" / "1.png").unlink()
    message = refused(*base, "--output-dir", once, *LATEST, "--instance-data-dir", tmp_path / "moved")
    assert message.endswith("belongs to another run: photograph 1.png is missing")


def test_the_length_of_a_schedule_is_part_of_the_run(base, tmp_path):
    base = (*base, "--output-dir", tmp_path / "run", "--lr-scheduler", "linear", "--checkpointing-steps", 2)
    call(*base)
    assert "max_train_steps was 4 and is 6" in refused(*base, *LATEST, "--max-train-steps", 6)


def test_a_folder_with_something_else_in_it_is_refused(once, base, tmp_path):
    assert "not empty" in refused(*base, "--output-dir", once)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    assert "no config.json" in refused(*base, "--output-dir", tmp_path / "mine", *LATEST)
    (once / "config.json").write_text('{"seed": ')
    assert "config.json is damaged" in refused(*base, "--output-dir", once, *LATEST)


def test_the_raw_weights_are_in_the_checkpoint_and_the_average_in_the_model(base, tmp_path):
    """EMA with the warm-up of LitEma: decay min(d, (1 + n) / (10 + n)) at the n-th update."""
    folder = tmp_path / "run"
    call(*base, "--output-dir", folder, "--use-ema", "--ema-decay", "0.2", "--checkpointing-steps", 1)
    name = "model.diffusion_model.out.2.weight"
    raw = [weights(folder / "checkpoints" / f"checkpoint-{step:06d}")[name].double() for step in (1, 2, 3, 4)]
    average = weights(Path(base[1]).parent)[name].double()
    for n, weight in enumerate(raw, start=1):
        decay = min(0.2, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(weights(folder)[name].double(), average, rtol=1e-6, atol=1e-7)
    assert (average - raw[-1]).abs().max() > 1e-5


def test_each_checkpoint_has_the_metrics_up_to_it(once):
    for step in checkpoints(once):
        folder = once / "checkpoints" / f"checkpoint-{step:06d}"
        assert metrics(folder) == metrics(once)[:step]
        assert json.loads((folder / "state.json").read_text())["step"] == step
