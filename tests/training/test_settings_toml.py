"""RUN/config.toml holds every setting, and repeats the run to the same bits."""

import os
import shlex
import sys
import tomllib
from dataclasses import fields, replace
from pathlib import Path

import pytest
from runs import LATEST, SMALL, call, check_same, checkpoints, refused

import train
from ldm.dreambooth import Trainable
from ldm.settings import Settings
from ldm.settings.toml import ONCE, to_toml
from ldm.training import FullTuning, options
from ldm.training.continuity import what_trains

# A run of two steps on the embedded model, with its own prompts and photographs.
FEW = "--max-train-steps 2 --num-class-images 2 --sample-steps 1 --num-validation-images 1 --train-batch-size 1".split()


@pytest.mark.slow
def test_the_settings_of_the_embedded_model_repeat_its_run_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call(*FEW)
    first, second = (tmp_path / folder / "runs" / "dreambooth" for folder in (".", "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    call("--config", "../runs/dreambooth/config.toml")  # takes a new folder by itself
    check_same(first, second)
    assert (first / "config.json").read_text() == (second / "config.json").read_text()


@pytest.mark.slow
def test_the_settings_of_a_run_repeat_it_without_its_folder_and_checkpoint(saved, photographs, tmp_path, monkeypatch):
    """Class pictures that lie in the run's folder are used again; a run that was resumed is repeated from the start."""
    monkeypatch.chdir(tmp_path)
    shown = os.path.relpath(photographs)
    call("--model", saved["official"], "--instance-data-dir", shown, *SMALL, "--output-dir", "a",
         "--class-data-dir", "a/class", "--max-train-steps", 2)  # fmt: skip
    call("--config", "a/config.toml", *LATEST, "--max-train-steps", 4)  # resumes in its own folder
    assert checkpoints(Path("a")) == [2, 4]
    call("--config", "a/config.toml", "--output-dir", "b")
    check_same(Path("a"), Path("b"))
    assert not Path("b/class").exists()
    assert "is not empty; give a new folder" in refused("--config", "a/config.toml", "--output-dir", "a")


TEXTS = ('a "sks" dog', "C:\\dog\\", "tab\tand\x7f and \x00", "wörter 犬 🐕", "two\nlines", "# no comment = 3")


def test_what_is_written_is_read_back(tmp_path):
    some = {"str": TEXTS[0], "float": 1.5e-7, "int": 3, "tuple": TEXTS, "bool": True}
    for given in (
        {},
        {f.name: not f.default for f in fields(Settings) if isinstance(f.default, bool)},
        {f.name: some["float"] for f in fields(Settings) if isinstance(f.default, float)},
        *(
            {"instance_prompt": text, "validation_prompt": (text,), "model": f"/{i}/{text}"}
            for i, text in enumerate(TEXTS)
        ),
        {"validation_prompt": TEXTS, "snr_gamma": 5.0, "lora_rank": 4, "seed": 2**62, "learning_rate": 1e16},
    ):
        settings = replace(Settings(), **given)
        path = tmp_path / "config.toml"
        path.write_text(to_toml(settings, path, 1), encoding="utf-8")
        assert Settings(**options._read_toml(path)) == replace(
            settings, **{name: None for name in ONCE[:2]}, dry_run=False
        )


def test_every_setting_is_in_the_file_once_and_under_its_group(tmp_path):
    text = to_toml(Settings(), tmp_path / "config.toml", 1)
    assert tomllib.loads(text)
    names = [line.removeprefix("# ").split(" =")[0] for line in text.splitlines() if " =" in line]
    assert sorted(names) == sorted(f.name for f in fields(Settings) if f.name not in ONCE)
    titles = [line[2:] for line in text.splitlines() if line.startswith("# ") and line[2].isupper()]
    assert titles[-len(Settings.groups()) :] == [group.__doc__ for group, _ in Settings.groups()]


def test_the_file_says_how_many_processes_repeat_it(tmp_path):
    assert "torchrun --nproc-per-node 2 train.py --config " in to_toml(Settings(), tmp_path / "my runs" / "c.toml", 2)
    assert f"python train.py --config '{tmp_path}/my runs/c.toml'" in to_toml(
        Settings(), tmp_path / "my runs" / "c.toml", 1
    )


@pytest.mark.parametrize(("mine", "program"), [(True, "my kv.py"), (False, "train.py")])
def test_the_file_names_the_program_of_the_users_own_trainable(mine, program, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tools/my kv.py", "--dry-run"])
    kind = type("KeysAndValues", (Trainable,), {}) if mine else FullTuning
    assert what_trains(kind.__new__(kind)) == {"tuning": kind.__name__, "program": program}
    assert f"python {shlex.quote(program)} --config " in to_toml(Settings(), tmp_path / "c.toml", 1, program)


TINY = [
    ("--instance-data-dir pip --instance-prompt x", {"validation_data_dir": None}),
    ("--instance-data-dir pip --validation-data-dir held", {"validation_data_dir": "held"}),
    ("--hold-out 1", {"validation_data_dir": None, "hold_out": 1, "instance_prompt": "a photo of sks monster"}),
    ("--instance-prompt x", {"validation_data_dir": str(train.TINY.parent / "validation")}),  # of the same photographs
    ("--config two.toml", {"validation_data_dir": None, "instance_data_dir": None}),
]


@pytest.mark.parametrize(("flags", "expected"), TINY)
def test_the_embedded_models_held_out_pictures_are_of_its_own_photographs(flags, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    subject = '[[subjects]]\ninstance_data_dir = "{0}"\ninstance_prompt = "{0} monster"\n'
    Path("two.toml").write_text('class_prompt = "monster"\n' + subject.format("a") + subject.format("b"))
    settings = vars(options.parse(flags.split(), train.TINY))
    assert {name: settings[name] for name in expected} == expected


def test_help_shows_each_flag_once_and_the_ten_that_most_people_need_first(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    groups = capsys.readouterr().out.split("\n\n")
    assert groups[3].startswith("What most people need first:")
    flags = [line.split()[0].rstrip(",") for group in groups for line in group.splitlines() if line.startswith("  --")]
    with_flags = [f for f in fields(Settings) if not f.metadata["in_file_only"]]
    assert len(flags) == len(set(flags)) == len(with_flags) + 1  # and --config
    assert sum(line.startswith("  --") for line in groups[3].splitlines()) == len(options.FIRST) == 10
    assert {group.__doc__ for group, _ in Settings.groups()} <= {group.split(":\n")[0] for group in groups}
