"""Training with compiled blocks computes what it computes without."""

import shutil

import pytest
from runs import SMALL, call, command, losses, run

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")]


def test_two_processes_learn_as_without(saved, photographs, tmp_path):
    base = (
        "--model",
        saved["official"],
        "--instance-data-dir",
        photographs,
        *SMALL,
        "--max-train-steps",
        2,
        "--gradient-checkpointing",
    )
    call(*base, "--train-batch-size", 2, "--output-dir", tmp_path / "one")
    done = run(command([*base, "--compile", "--output-dir", tmp_path / "two"], 2), tmp_path)
    assert done.status == 0, done.err
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
