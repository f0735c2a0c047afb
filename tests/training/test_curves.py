"""The number of processes, the batch size and gradient accumulation do not change the loss curve."""

import shutil
from pathlib import Path

import pytest
import torch
from runs import LORA, SMALL, call, command, digest, losses, run
from safetensors.torch import load_file

LONG = ("--max-train-steps", 24, "--random-flip", "--snr-gamma", "5", "--num-class-images", 7)


@pytest.fixture
def base(saved, photographs) -> tuple:
    return ("--model", saved["official"], "--instance-data-dir", photographs, *SMALL)


def pictures(folder: Path) -> dict[str, str]:
    return {path.name: digest(path) for path in folder.glob("class-*.png")}


@pytest.mark.slow
def test_accumulation_gives_the_same_losses(base, tmp_path):
    call(*base, *LONG, "--train-batch-size", 4, "--output-dir", tmp_path / "one")
    call(*base, *LONG, "--gradient-accumulation-steps", 4, "--output-dir", tmp_path / "four")
    one, four = losses(tmp_path / "one"), losses(tmp_path / "four")
    assert len(one) == 24 and one == pytest.approx(four, rel=1e-6)
    assert max(one) - min(one) > 0.1  # the curve is not flat


@pytest.mark.slow
def test_every_split_of_the_batch_gives_the_same_losses(base, tmp_path):
    """The splits combine processes and accumulation, and the text encoder trains too."""
    curves, made = {}, []
    for processes, batch, accumulation in [(1, 4, 1), (2, 2, 1), (4, 1, 1), (1, 1, 4), (2, 1, 2)]:
        folder = tmp_path / f"{processes}x{batch}x{accumulation}"
        cut = ("--train-batch-size", batch, "--gradient-accumulation-steps", accumulation, "--output-dir", folder)
        run(command([*base, *LONG, *cut], processes), tmp_path)
        curves[folder.name] = losses(folder)
        made.append(pictures(folder / "class"))
    one = curves["1x4x1"]
    apart = {name: max(abs(a - b) / b for a, b in zip(curve, one, strict=True)) for name, curve in curves.items()}
    print(apart)
    assert len(one) == 24 and max(apart.values()) < 1e-6
    assert len(made[0]) == 7 and all(others == made[0] for others in made)


@pytest.mark.slow
def test_the_text_encoder_stops_on_all_processes(base, tmp_path):
    base = (*base, "--text-encoder-stop-step", 3, "--max-train-steps", 8)
    run(command([*base, "--train-batch-size", 2, "--output-dir", tmp_path / "one"]), tmp_path)
    run(command([*base, "--output-dir", tmp_path / "two"], 2), tmp_path)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)


TOKEN = ("--placeholder-token", "[V]", "--initializer-token", "dog", "--num-vectors", 2, "--token-learning-rate", 1e-2)
WAYS = {
    "token alone": (*TOKEN, "--train", "token"),
    "token and networks": TOKEN,
    "token and LoRA": (*TOKEN, *LORA, "--gradient-accumulation-steps", 2, "--text-encoder-stop-step", 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_token_learns_the_same_in_two_processes_which_resume_to_the_same_bits(way, base, tmp_path):
    base = (*base, "--instance-prompt", "a [V] dog", *WAYS[way], "--checkpointing-steps", 2)
    run(command([*base, "--output-dir", tmp_path / "two"], 2), tmp_path)
    call(*base, "--train-batch-size", 2, "--output-dir", tmp_path / "one")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)
    shutil.copytree(tmp_path / "two", tmp_path / "again")
    half = tmp_path / "two" / "checkpoints" / "checkpoint-000002"
    flags = ("--output-dir", tmp_path / "again", "--resume-from-checkpoint", half)
    run(command([*base, *flags], 2), tmp_path)
    assert losses(tmp_path / "again") == losses(tmp_path / "two")
    one, again = (
        {str(path.relative_to(folder)): load_file(path) for path in folder.rglob("*.safetensors")}
        for folder in (tmp_path / "two", tmp_path / "again")
    )
    assert one.keys() == again.keys() and "[V].safetensors" in one
    for name, tensors in one.items():
        assert all(torch.equal(tensor, again[name][key]) for key, tensor in tensors.items())


@pytest.mark.slow
def test_a_batch_may_have_more_rows_than_there_are_pictures(base, tmp_path):
    base = (*base, "--num-class-images", 2, "--gradient-checkpointing")
    for path in sorted(Path(base[3]).iterdir())[1:]:
        path.unlink()
    run(command([*base, "--train-batch-size", 6, "--output-dir", tmp_path / "one"]), tmp_path)
    run(command([*base, "--train-batch-size", 3, "--output-dir", tmp_path / "two"], 2), tmp_path)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)


@pytest.mark.slow
def test_two_processes_complete_a_folder_of_class_pictures(base, tmp_path):
    base = (*base, "--num-class-images", 7, "--max-train-steps", 1)
    run(command([*base, "--output-dir", tmp_path / "alone"]), tmp_path)
    whole = pictures(tmp_path / "alone" / "class")
    assert len(whole) == 7
    folder = tmp_path / "class"
    shutil.copytree(tmp_path / "alone" / "class", folder)
    for i in (1, 2, 4, 6):
        (folder / f"class-{i:05d}.png").unlink()
    there = {path: path.stat().st_mtime_ns for path in folder.glob("class-*.png")}
    (folder / "notes.txt").write_text("mine")
    (folder / ".DS_Store").write_bytes(b"junk")
    (folder / "more").mkdir()
    (folder / ".class-00004.png.tmp").write_bytes(b"half a picture")
    run(command([*base, "--class-data-dir", folder, "--output-dir", tmp_path / "two"], 2), tmp_path)
    assert pictures(folder) == whole
    assert {path: path.stat().st_mtime_ns for path in there} == there  # no picture is made twice
    others = {path.name for path in folder.iterdir()} - whole.keys()
    assert others == {"notes.txt", ".DS_Store", "more", "manifest.json"}
