"""A run that is out of memory ends with one line that names the phase and the flags that help."""

import sys

import pytest
from runs import ROOT, SMALL, run

# The process may use 400 MiB more than the imports take.
LIMITED = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, train
from ldm.runtime import cli
with cli.reported("train.py"):
    torch.zeros(64, 64) @ torch.zeros(64, 64)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (400 << 20),) * 2)
    train.main(sys.argv[1:])
"""
TRAINING = "give --gradient-checkpointing, --mixed-precision bf16, --use-8bit-adam or a lower --train-batch-size"
SAMPLING = "give --mixed-precision bf16 or a lower --sample-batch-size"
PHASES = {
    "while it made the sheet before": (("--num-validation-images", 100, "--resolution", 256), SAMPLING),
    "while it made class pictures": (("--num-class-images", 4000), SAMPLING),
    "while it trained": (("--train-batch-size", 4096, "--resolution", 64, "--num-class-images", 1), TRAINING),
}


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_out_of_memory_is_reported_with_the_phase_and_the_flags_that_help(phase, saved, photographs, tmp_path):
    flags, advice = PHASES[phase]
    flags = ("--model", saved["official"], "--instance-data-dir", photographs, *SMALL, *flags)
    flags = (*flags, "--sample-batch-size", 4000, "--output-dir", tmp_path / "run")
    done = run([sys.executable, "-c", LIMITED, *map(str, flags)], tmp_path, status=1)
    assert done.complaint == f"train.py: error: cpu ran out of memory {phase}; {advice}"
    assert not (tmp_path / "run" / "model.safetensors").exists()
