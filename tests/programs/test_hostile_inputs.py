"""Whatever a file holds, reading it works or is refused in one line, in bounded time and memory. No process starts.

LDM_FUZZ_SEED=7 LDM_FUZZ_COUNT=5000 pytest -m slow tests/programs/test_hostile_inputs.py   # other cases
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

FUZZ = Path(__file__).with_name("fuzz.py")
SEED, COUNT = os.environ.get("LDM_FUZZ_SEED", "0"), int(os.environ.get("LDM_FUZZ_COUNT", "5000"))
# In two processes that take about the same time.
HALVES = (
    "single diffusers loras".split(),
    "shards ckpt tokenizer checkpoints run_config toml prompts manifest pictures picture_text".split(),
)


def fuzz(readers: list[str], count: int) -> list[dict]:
    """The reports on `count` cases of each of these readers, from one process."""
    command = [sys.executable, str(FUZZ), SEED, str(count), *readers]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(reports: list[dict], readers: list[str], count: int) -> None:
    """Every reader had its cases, was right in all, and has neither read all nor refused all."""
    assert [report["reader"] for report in reports] == readers
    for report in reports:
        assert not report["wrong"], (SEED, report["reader"], report["wrong"])
        assert report["read"] + report["refused"] == count and report["read"] and report["refused"], report


def test_some_damaged_files_of_each_kind_are_read_or_refused_in_one_line():
    readers = [reader for half in HALVES for reader in half]
    check(fuzz(readers, 20), readers, 20)


@pytest.mark.slow
def test_many_damaged_files_of_each_kind_are_read_or_refused_in_one_line(capsys):
    count = COUNT
    with ThreadPoolExecutor(len(HALVES)) as pool:
        halves = list(pool.map(lambda readers: fuzz(readers, count), HALVES))
    with capsys.disabled():
        for report in (report for half in halves for report in half):
            print(f"\nseed {SEED}, {json.dumps(report)}", end="")
    for readers, reports in zip(HALVES, halves, strict=True):
        check(reports, readers, count)
