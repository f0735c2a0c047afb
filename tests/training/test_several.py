"""Runs of two subjects with captions, buckets, masks and mirrored pictures: the same for every split, and resumed."""

import importlib
import re
import sys
from pathlib import Path

import pytest
from runs import LATEST, SMALL, call, check_same, command, losses, metrics, photograph, run

SIZES = ((48, 32), (48, 32), (32, 32), (30, 52))
SHORT = "--max-train-steps 2 --num-class-images 2 --sample-steps 1 --num-validation-images 1".split()
MORE = ("--aspect-ratio-buckets", "--random-flip", "--caption-dropout", "0.2", "--shuffle-tags", "--snr-gamma", "5")


@pytest.fixture
def base(saved, tmp_path) -> tuple:
    """The flags of a run with everything on. The dog's photographs have captions and a mask."""
    dog, cat = photograph(tmp_path / "dog", SIZES), photograph(tmp_path / "cat", SIZES[1:3])
    (dog / "0.txt").write_text("a sks dog, on grass, at night\n")
    (dog / "2.txt").write_text("a sks dog, in snow\n")
    mask = photograph(tmp_path / "masks", SIZES[:1]) / "0.png"
    mask.rename(dog / "0-mask.png")
    file = tmp_path / "subjects.toml"
    file.write_text(
        f"""
        [[subjects]]
        name = "dog"
        instance_data_dir = "{dog}"
        instance_prompt = "a sks dog"
        class_prompt = "a dog"
        weight = 2
        [[subjects]]
        name = "cat"
        instance_data_dir = "{cat}"
        instance_prompt = "a xyz cat"
        class_prompt = "a cat"
        num_class_images = 3
        """
    )
    usual = [flag for flag in SMALL if not flag.startswith(("--instance-prompt", "--class-prompt", "--resolution"))]
    return ("--config", file, "--model", saved["official"], *usual, "--resolution=32", *MORE)


def subject_losses(folder: Path) -> list[tuple[float, ...]]:
    names = ("loss", "subject_loss", "prior_loss", "subject_loss/dog", "subject_loss/cat")
    return [tuple(line.get(name, 0.0) for name in names) for line in metrics(folder)]


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--random-crop",)], ids=["kept latents", "random crops"])
def test_every_split_gives_the_same_losses(more, base, tmp_path):
    splits = [(1, 4, 1), (1, 1, 4), (2, 1, 2)] if more else [(1, 4, 1), (1, 1, 4), (2, 2, 1)]
    for processes, batch, accumulation in splits:
        split = ("--train-batch-size", batch, "--gradient-accumulation-steps", accumulation)
        line = (*base, *more, "--max-train-steps", 8, *split, "--output-dir", tmp_path / f"{processes}x{accumulation}")
        run(command(line, processes), tmp_path) if processes > 1 else call(*line)
    one, *others = (subject_losses(tmp_path / f"{processes}x{accumulation}") for processes, _, accumulation in splits)
    assert len(one) == 8 and max(line[0] for line in one) > 1.1 * min(line[0] for line in one)
    for other in others:
        for a, b in zip(one, other, strict=True):
            assert b == pytest.approx(a, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("more", [pytest.param(("--random-crop",), marks=pytest.mark.slow), ("--use-ema",)])
def test_a_run_resumes_to_the_same_bits(more, base, tmp_path):
    flags = (*base, *more, "--train-batch-size", 2)
    call(*flags, "--output-dir", tmp_path / "whole")
    call(*flags, "--max-train-steps", 2, "--output-dir", tmp_path / "parts")
    call(*flags, "--output-dir", tmp_path / "parts", *LATEST)
    check_same(tmp_path / "whole", tmp_path / "parts")
    assert subject_losses(tmp_path / "whole") == subject_losses(tmp_path / "parts")
    assert len(losses(tmp_path / "whole")) == 4


def test_losses_of_subjects_are_means_over_their_rows(base, tmp_path):
    """The subject's loss is the mean over all subject rows, here three of four for the dog in most steps."""
    call(*base, "--train-batch-size", 4, "--max-train-steps", 6, "--output-dir", tmp_path / "run")
    lines = metrics(tmp_path / "run")
    shares = []
    for line in lines:
        dog, cat = line.get("subject_loss/dog"), line.get("subject_loss/cat")
        if dog is None or cat is None:
            assert line["subject_loss"] == pytest.approx(dog or cat, rel=1e-5)
        else:
            share = 4 * (line["subject_loss"] - cat) / (dog - cat)  # rows of the dog
            assert share == pytest.approx(round(share), abs=1e-2) and 0 < round(share) < 4
            shares.append(round(share))
    assert shares and sorted(path.name for path in (tmp_path / "run" / "class").iterdir()) == ["cat", "dog"]
    assert len(list((tmp_path / "run" / "class" / "cat").glob("*.png"))) == 3
    assert len(list((tmp_path / "run" / "class" / "dog").glob("*.png"))) == 4


# The commands that the documentation has


@pytest.mark.slow
def test_two_subjects_prints_its_table(root, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(root / "weights" / "tiny")
    effect, script = importlib.import_module("effect"), importlib.import_module("two_subjects")
    monkeypatch.setattr(script, "COUNT", 2)
    monkeypatch.setattr(effect, "train", lambda output, flags: call(*flags, *SHORT, "--output-dir", output))
    monkeypatch.setattr(sys, "argv", ["two_subjects.py", "--work-dir", str(tmp_path)])
    script.main()
    table = capsys.readouterr().out.splitlines()[-7:]
    assert [len(line.split("|")) for line in table] == [7] * 7
    assert table[2].startswith("| drawings of the subjects | 100% |") and table[2].endswith("| 100% |")
    assert [line.split("|")[1].strip() for line in table[3:]] == [
        "base", "both in one run", "baron alone", "baron, then pip"
    ]  # fmt: skip


@pytest.mark.slow
def test_the_command_with_buckets_runs(root, tmp_path):
    text = (root / "weights" / "tiny" / "README.md").read_text(encoding="utf-8")
    (found,) = re.findall(r"^    python train.py (.*--aspect-ratio-buckets.*)$", text, re.M)
    call(*found.split(), *SHORT, "--output-dir", tmp_path / "run")
    assert len(metrics(tmp_path / "run")) == 2


def test_the_base_model_predicts_the_class_of_each_subject(base, tmp_path):
    """In the first step the model is the base model, so that it predicts for each class prompt what the base does."""
    flags = ("--prior", "prediction", "--train-batch-size", 4, "--max-train-steps", 2)
    call(*base, *flags, "--output-dir", tmp_path / "run")
    first, second = (line["prior_loss"] for line in metrics(tmp_path / "run"))
    assert first < 1e-10 < 1e-6 < second
