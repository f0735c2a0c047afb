"""Masks of photographs, from NAME-mask.png to the loss of a step."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from runs import SMALL, call, losses, metrics, photograph

from ldm import StableDiffusion, rng
from ldm.images import load_picture

MORE = ("--resolution", 32, "--prior-loss-weight", "0.6", "--learning-rate", "1e-3")


def draw_masks(folder) -> dict[str, np.ndarray]:
    """Writes a mask beside each photograph of 32 x 32 but the last, of whole blocks of 4 x 4 pixels, which are one
    latent. Returns {photograph: (8, 8) of 0 and 1}."""
    masks = {}
    for i, path in enumerate(sorted(folder.iterdir())[:-1]):
        masks[path.name] = np.zeros((8, 8))
        masks[path.name][i : i + 3, 1 : 5 + i] = 1
        pixels = np.kron(masks[path.name], np.ones((4, 4))) * 255
        Image.fromarray(pixels.astype(np.uint8)).save(path.with_name(f"{path.stem}-mask.png"))
    return masks


@pytest.fixture
def base(saved, tmp_path) -> tuple:
    return ("--model", saved["official"], "--instance-data-dir", photograph(tmp_path / "masked"), *SMALL, *MORE)


def weighted_errors(base, masks, outside: float) -> list[float]:
    """sum(w e) / sum(w) of the first three photographs' rows at step 1; w is 1 inside the mask, `outside` outside."""
    sd, errors = StableDiffusion.load(base[1]), []
    paths = [path for path in sorted(base[3].iterdir()) if "mask" not in path.stem]
    for index in range(3):
        generator = rng.generator(0, "instance", "noise", index)
        spread, noise = torch.randn(2, 4, 8, 8, generator=generator)
        t = torch.randint(1000, (1,), generator=generator)
        path = paths[rng.pick(0, "instance", index, len(paths))]
        with torch.no_grad():
            posterior = sd.vae.encode(load_picture(path, 32)[None])
            z = 0.25 * (posterior.mean + posterior.std * spread)
            abar = sd.schedule.alphas_cumprod[t].float()
            found = sd.unet(abar.sqrt() * z + (1 - abar).sqrt() * noise, t, sd.encode_prompt(["a sks dog"]))
        error = (found - noise)[0].square().double().numpy()  # (4, 8, 8)
        w = np.broadcast_to(masks.get(path.name, np.ones((8, 8))) * (1 - outside) + outside, error.shape)
        errors.append((w * error).sum() / w.sum())
    return errors


@pytest.mark.parametrize("prior", ["pictures", "prediction"])
def test_the_first_losses_equal_those_computed_by_hand(prior, base, tmp_path):
    """Masks change the subject's term alone. The first prior loss of --prior prediction is zero with any mask."""
    flags = ("--train-batch-size", 3, "--max-train-steps", 2, "--prior", prior)
    call(*base, *flags, "--output-dir", tmp_path / "plain")
    masks = draw_masks(base[3])
    call(*base, *flags, "--unmasked-weight", "0.2", "--output-dir", tmp_path / "run")
    (plain, _), (line, second) = metrics(tmp_path / "plain"), metrics(tmp_path / "run")
    assert line["subject_loss"] == pytest.approx(np.mean(weighted_errors(base, masks, 0.2)), rel=2e-5)
    assert line["subject_loss"] != pytest.approx(plain["subject_loss"], rel=1e-2)
    assert line["prior_loss"] == plain["prior_loss"]
    assert second["prior_loss"] > 0


@pytest.mark.slow
def test_a_weight_of_1_outside_the_masks_changes_no_bit(base, tmp_path):
    flags = ("--max-train-steps", 2, "--train-batch-size", 2, "--no-with-prior-preservation")
    call(*base, *flags, "--output-dir", tmp_path / "plain")
    draw_masks(base[3])
    for name, outside in (("one", 1), ("half", 0.5)):
        call(*base, *flags, "--unmasked-weight", outside, "--output-dir", tmp_path / name)
    assert losses(tmp_path / "one") == losses(tmp_path / "plain") != losses(tmp_path / "half")


@pytest.mark.slow
def test_the_experiment_with_masks_runs_and_goes_on_where_it_stopped(root, tmp_path):
    """The command of weights/tiny/README.md, with one step a run."""
    assert "python weights/tiny/masks.py" in (root / "weights" / "tiny" / "README.md").read_text(encoding="utf-8")
    short = "--max-train-steps 1 --num-class-images 2 --sample-steps 1 --guidance-scale 1 --num-validation-images 1"
    command = [sys.executable, root / "weights" / "tiny" / "masks.py", "--work-dir", "masks", "--", *short.split()]
    numbers, tables, times = tmp_path / "masks" / "with-masks-seed-1" / "measures.json", [], []
    for _ in range(2):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        tables.append((tmp_path / "masks" / "masks.md").read_text(encoding="utf-8"))
        times.append(numbers.stat().st_mtime_ns)
    assert tables[0] == tables[1] and tables[0].count(", seed") == 6
    assert times[0] == times[1]  # measured once
    assert len(list((tmp_path / "masks" / "masked").iterdir())) == 8
