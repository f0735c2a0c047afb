"""What a run writes says what it is, how it was made and how it is used."""

import hashlib

import runs
from runs import SMALL
from safetensors import safe_open

from ldm import __main__


def header(path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_a_run_and_convert_write_a_card_and_the_entries_that_other_programs_show(photographs, saved, tmp_path):
    flags = ("--model", saved["official"], "--instance-data-dir", photographs, *SMALL, "--max-train-steps=1")
    flags += ("--num-class-images=1", "--layout=diffusers", "--output-dir", tmp_path / "run")
    runs.call(*flags)
    folder = tmp_path / "run" / "model"
    card = (folder / "README.md").read_text()
    for row in ("prompt of the subject | a sks dog", "training steps | 1", "base model | model", "seed | 0"):
        assert f"| {row} |\n" in card
    assert card.endswith("(samples.png)\n")
    assert runs.digest(folder / "samples.png") == runs.digest(tmp_path / "run" / "sheets" / "before_after.png")
    __main__.main(["weights", "convert", str(folder), str(tmp_path / "a.safetensors")])
    said = header(tmp_path / "a.safetensors")
    assert said["modelspec.title"] == said["modelspec.trigger_phrase"] == "a sks dog"
    assert said["modelspec.usage_hint"] == "The subject's prompt: a sks dog"
    assert said["modelspec.architecture"] == "stable-diffusion-v1" and said["modelspec.resolution"] == "32x32"
    content = (tmp_path / "a.safetensors").read_bytes()
    body = content[8 + int.from_bytes(content[:8], "little") :]
    assert said["modelspec.hash_sha256"] == "0x" + hashlib.sha256(body).hexdigest()
    checkpoint = header(tmp_path / "run" / "checkpoints" / "checkpoint-000001" / "model.safetensors")
    assert checkpoint["modelspec.trigger_phrase"] == "a sks dog"
