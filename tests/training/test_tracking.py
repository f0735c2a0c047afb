"""What the trackers get: numbers and sheets, as the trackers' own readers find them."""

import sys
import warnings
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from runs import SMALL, call

from ldm.training.tracking import Tracker


@pytest.fixture
def sheet(tmp_path):
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(tmp_path / "sheet.png")
    return tmp_path / "sheet.png"


def test_tensorboard_gets_numbers_and_sheets(sheet, tmp_path):
    pytest.importorskip("tensorboard", reason="needs the tracking extra")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = Tracker("tensorboard", tmp_path, {})
    tracker.numbers(3, {"step": 3, "drift": 0.25, "validation_loss": 0.5, "not_shown": ["x"]})
    tracker.picture(3, "sheet", sheet)
    tracker._writer.flush()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["drift", "validation_loss"]
    assert [(event.step, event.value) for event in events.Scalars("drift")] == [(3, 0.25)]
    image = events.Images("sheet")[0]
    assert (image.step, image.width, image.height) == (3, 4, 4)


def test_wandb_gets_numbers_and_sheets_and_a_failure_is_one_warning(sheet, tmp_path, monkeypatch):
    got = []
    run = SimpleNamespace(log=lambda values, step: got.append((step, values)))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: run, Image=lambda path: ("image", path)))
    tracker = Tracker("wandb", tmp_path, {})
    tracker.numbers(2, {"step": 2, "loss": 0.5})
    tracker.picture(2, "sheet", sheet)
    assert got == [(2, {"loss": 0.5}), (2, {"sheet": ("image", str(sheet))})]
    run.log = None
    with pytest.warns(UserWarning, match="the tracker gets no more metrics"):
        tracker.numbers(3, {"loss": 0.4})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracker.numbers(4, {"loss": 0.3})
        tracker.picture(4, "sheet", sheet)


def test_a_run_reports_losses_validations_speed_memory_and_sheets(saved, photographs, tmp_path, monkeypatch):
    """Weights & Biases drops what comes for an earlier step than the last, and keeps one number of a name and step."""
    got = []
    run = SimpleNamespace(log=lambda values, step: got.extend((step, name) for name in values))
    module = {"init": lambda **_: run, "Image": str, "__spec__": ModuleSpec("wandb", None)}
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(**module))
    flags = ("--validation-steps", 2, "--num-drift-images", 2, "--hold-out", 1, "--report-to", "wandb")
    base = ("--model", saved["official"], "--instance-data-dir", photographs, *SMALL, "--max-train-steps", 3)
    call(*base, *flags, "--output-dir", tmp_path / "run")
    assert [step for step, _ in got] == sorted(step for step, _ in got) and len(got) == len(set(got))
    names = [{name for at, name in got if at == step} for step in range(4)]
    step = {"loss", "subject_loss", "prior_loss", "grad_norm", "lr", "seconds", "pictures_per_second", "memory_gb"}
    validation = {"training_loss", "validation_loss", "class_loss", "drift", "diversity", "validation_seconds"}
    assert names == [{"sheet"} | validation, step, step | validation | {"sheet"}, step | validation | {"sheet"}]
