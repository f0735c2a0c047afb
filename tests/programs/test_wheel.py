"""train.py and sample.py run on an installed wheel, not only in a checkout."""

import os
import shutil
import subprocess
import sys

import pytest
from runs import PROCESS, SMALL, losses


@pytest.mark.slow
def test_both_programs_run_on_an_installed_wheel(root, saved, photographs, tmp_path):
    """The programs run in a folder with nothing else in it, so that Python can import only the installed `ldm`."""
    source, site, home = tmp_path / "source", tmp_path / "site", tmp_path / "home"
    ignored = shutil.ignore_patterns(".git", "*.egg-info", "build", "runs", "tests", "weights", ".venv")
    shutil.copytree(root, source, ignore=ignored)
    pytest.importorskip("setuptools", reason="builds a wheel")
    options = ["--quiet", "--no-deps", "--no-build-isolation"]
    build = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", tmp_path, source]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel], check=True
    )
    home.mkdir()
    for program in ("train.py", "sample.py"):
        shutil.copy(root / program, home)

    def run(*words: object) -> str:
        environment = os.environ | PROCESS | {"PYTHONPATH": str(site)}
        done = subprocess.run(
            [sys.executable, *map(str, words)], cwd=home, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert str(site) in run("-c", "import ldm, ldm.preflight, ldm.report; print(ldm.__file__)")
    run("train.py", "--model", saved["official"], "--instance-data-dir", photographs, *SMALL, "--output-dir", "run")
    assert len(losses(home / "run")) == 4
    run("sample.py", "--model", "run/model.safetensors", "--prompt", "a sks dog")
    assert (home / "samples" / "00000-0.png").exists()
    assert "weights" in run("-m", "ldm", "--help")
    assert run("-m", "ldm", "report", "run") == "run/report.html\n"
    assert "sha256-" in (home / "run" / "report.html").read_text(encoding="utf-8")  # the style and script are there
