"""What the trackers get: numbers and sheets, as the trackers' own readers find them."""

import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

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
