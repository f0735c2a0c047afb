"""The report of a run: what it shows, and what it makes of folders that are empty, damaged, foreign or hostile."""

import io
import json
import re
import shlex
import shutil
import struct
import zlib
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import slow_after
from story import EVIL, Page, read_page, tell, train_run, validations

import sample
from ldm import InputError, __main__, report, training
from ldm.report import numbers
from ldm.report.scale import Scale
from ldm.runtime import cli


@pytest.fixture(scope="module")
def trained(saved, tmp_path_factory) -> Path:
    """A run of four steps, as train.py has left it."""
    folder = tmp_path_factory.mktemp("report")
    generator = torch.Generator().manual_seed(0)
    (folder / "photographs").mkdir()
    for i in range(3):
        pixels = torch.randint(256, (8, 8, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).resize((32, 32)).save(folder / "photographs" / f"{i}.png")
    with redirect_stdout(said := io.StringIO()):
        train_run(folder / "run", saved["official"], folder / "photographs")
    (folder / "said.txt").write_text(said.getvalue())
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of that run, with validations."""
    return tell(Path(shutil.copytree(trained, tmp_path / "run")))


def shown(*folders: Path) -> Page:
    return read_page(report.write(folders))


# What it shows


def test_train_ends_with_the_path_of_a_report(trained):
    assert (trained.parent / "said.txt").read_text().splitlines()[-1] == f"report: {trained / 'report.html'}"
    page = read_page(trained / "report.html")
    assert len(page.all("img")) == 4  # base, tuned, photographs, class pictures
    assert "It ran all 4 steps and wrote model.safetensors." in page.text


def test_the_page_tells_the_story(run):
    page = shown(run)
    settings = json.loads((run / "config.json").read_text())
    for text in (
        "from 3 photographs of “a sks dog”",
        "4 class pictures of “a dog”",
        "Take step 2.",
        "“sks” is a rifle.",
        f"--config {run}/config.toml",
        f"sample.py --model {run}/best/model.safetensors",
    ):
        assert text in page.text
    names = [text for text in page.texts["th"] if text in settings]
    assert set(names) >= {"learning_rate", "resolution", "sampler", "gradient_checkpointing", "ema_decay", "loss"}
    (slider,) = page.all("input", type="range")
    assert slider["data-steps"] == "1 2 3 4"
    assert ["hidden" not in one for one in page.all("div", class_="frame")] == [False, False, False, True]


def test_the_page_needs_nothing_but_itself(run):
    text = report.write([run]).read_text(encoding="utf-8")
    page = Page(text)
    assert text.isprintable() or all(c.isprintable() or c == "\n" for c in text)
    for tag, attributes in page.elements:
        assert tag not in {"link", "iframe", "object", "embed", "base", "form"}
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/jpeg;base64,"))
    (policy,) = [one["content"] for one in page.all("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy and "http" not in policy
    assert "url(" not in page.texts["style"][0] and "@import" not in page.texts["style"][0]


def axis(page: Page, figure: str, kind: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """A chart's curves, in steps and values, as its drawing says: measured against the labels of its ticks."""
    text = next(part for part in figure.split("<svg")[1:] if f'class="{kind}"' in part.split(">")[0])
    ticks = {"x": [], "y": []}
    for x, y, which, label in re.findall(r'<text x="([\d.]+)" y="([\d.]+)" class="tick ([xy])">([^<]+)<', text):
        ticks[which].append((float(x if which == "x" else y), float(label.replace(",", ""))))
    (x0, a0), (x1, a1) = ticks["x"][0], ticks["x"][-1]
    scale = np.log if kind == "log" else np.asarray
    (y0, b0), (y1, b1) = [(y, scale(value)) for y, value in (ticks["y"][0], ticks["y"][-1])]
    curves = []
    for path in re.findall(r'<path d="(M[^"]+)" class="curve', text):
        x, y = np.array([point.split() for point in re.split("[ML]", path)[1:]], dtype=float).T
        values = b0 + (y - y0) / (y1 - y0) * (b1 - b0)
        curves.append(np.stack([a0 + (x - x0) / (x1 - x0) * (a1 - a0), np.exp(values) if kind == "log" else values]))
    return curves


@pytest.mark.parametrize("kind", ["log", "even"])
def test_curves_lie_where_the_ticks_say(run, kind):
    text = report.write([run]).read_text(encoding="utf-8")
    figure = next(part for part in text.split("<figure") if "Loss on fixed noise" in part)
    curves = axis(None, figure, kind)
    for curve, name in zip(curves, ("validation_loss", "training_loss", "class_loss"), strict=True):
        expected = np.array([[line["step"], line[name]] for line in validations()]).T
        np.testing.assert_allclose(curve[0], expected[0], atol=0.01)
        np.testing.assert_allclose(curve[1], expected[1], rtol=0.005, atol=0.001)


def test_ticks_are_round_and_inside():
    generator = np.random.default_rng(0)
    for _ in range(300):
        low, high = sorted(10.0 ** generator.uniform(-9, 9, 2))
        for log in (False, True):
            scale = Scale.around([low, high], log)
            ticks = scale.ticks()
            assert 2 <= len(ticks) <= 14, (low, high, log)
            assert all(-1e-9 <= scale.place(tick) <= 1 + 1e-9 for tick in ticks)
            digits = [f"{tick:.12e}".split("e")[0].rstrip("0") for tick in ticks if tick]
            assert max(len(number) for number in digits) <= 6
    assert Scale.around([]).ticks() and Scale.around([3.0]).ticks() and Scale.around([-1.0, 0.0], True).ticks()


def test_smoothing_is_the_mean_of_means():
    values = np.random.default_rng(0).normal(size=200)
    curve = [(float(i), float(value)) for i, value in enumerate(values)]
    once = [np.mean(values[max(0, i - 5) : i + 6]) for i in range(200)]
    twice = [np.mean(once[max(0, i - 5) : i + 6]) for i in range(200)]
    np.testing.assert_allclose([value for _, value in numbers.smooth(curve, 0.05)], twice, atol=1e-12)


def test_its_commands_run(run, tmp_path, monkeypatch):
    """The commands for a shell are taken from the page, and run in this process."""
    page = shown(run)
    found = [shlex.split(text) for text in page.texts["code"] if text.startswith("python ")]
    samples = [words[2:] for words in found if words[1] == "sample.py"]
    assert len(samples) == 2
    for i, words in enumerate(samples):
        sample.main([*words, "--steps", "1", "--output-dir", str(tmp_path / str(i))])
        assert len(list((tmp_path / str(i)).glob("*.png"))) >= 4
    (repeat,) = [words[2:] for words in found if words[1] == "train.py"]
    settings = json.loads(json.dumps(asdict(training.parse(repeat, Path("unused")))))
    assert settings == {
        name: value for name, value in json.loads((run / "config.json").read_text()).items() if name in settings
    } | {"output_dir": None}
    (convert,) = [words[3:] for words in found if words[1:3] == ["-m", "ldm"]]
    __main__.main(convert)
    assert (run / "diffusers" / "model_index.json").exists()


@pytest.mark.slow
def test_diffusers_runs_the_code_of_the_page(run):
    pytest.importorskip("diffusers", reason="needs the parity extra")
    page = shown(run)
    (convert,) = [shlex.split(text)[3:] for text in page.texts["code"] if text.startswith("python -m ldm")]
    __main__.main(convert)
    (code,) = [text for text in page.texts["code"] if "diffusers import" in text]
    exec(code, names := {})
    assert names["pipe"].tokenizer is not None


def test_a_run_that_was_killed_says_how_to_resume_it(run):
    (run / "model.safetensors").unlink()
    page = shown(run)
    assert "It is not finished: step 4 of 4 is the last one known." in page.text
    assert f"train.py --config {run}/config.toml --resume-from-checkpoint latest" in page.text
    assert f"sample.py --model {run}/checkpoints/" in page.text


def test_the_best_step_has_no_command_of_its_own_if_it_is_the_last(run):
    assert "best/model.safetensors" in shown(run).text
    (run / "best" / "best.json").write_text('{"step": 4}')
    assert "best/model.safetensors" not in shown(run).text


def test_paths_do_not_show_the_folders_above_the_working_folder_and_home(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    text = (run / "config.toml").read_text()
    table = f'[{{ name = "dog", instance_data_dir = "{run}/dog", instance_prompt = "x" }}]'
    (run / "config.toml").write_text(text.replace("subjects = []", f"subjects = {table}"))
    (run / "preflight.json").write_text("{")
    page = shown(run)
    assert str(tmp_path.parent) not in report.write([run]).read_text(encoding="utf-8")
    assert "name: dog, instance_data_dir: run/dog, instance_prompt: x" in page.text
    assert re.search("~/[^ ]+/photographs", page.text) and "preflight.json is damaged" in page.texts["li"][-1]


@pytest.mark.parametrize(
    "name, settings, words",
    [
        ("lora.safetensors", {"lora_rank": 4}, ["--lora", "load_lora_weights", "models/loras", "<lora:lora:1>"]),
        ("[V].safetensors", {"placeholder_token": "[V]", "train": "token"}, ["--embedding", "load_textual_inversion"]),
        (
            "[V].safetensors lora.safetensors",
            {"placeholder_token": "[V]", "lora_rank": 4},
            ["lora.safetensors --embedding", "load_lora_weights", "load_textual_inversion"],
        ),
        ("trained.safetensors", {}, []),
    ],
)
def test_each_way_of_training_has_its_own_commands(tmp_path, name, settings, words):
    (tmp_path / "config.json").write_text(json.dumps({"instance_prompt": "a [V]", "model": "base", **settings}))
    for file in name.split():
        (tmp_path / file).write_bytes(b"")
    page = shown(tmp_path)
    assert all(word in page.text for word in words)
    assert ("sample.py" in page.text) == bool(words)


@pytest.mark.parametrize(
    "results, settings, identity, words",
    [
        (
            "lora.safetensors [V].safetensors",
            {"placeholder_token": "[V]", "lora_rank": 4, "num_class_images": 1, "class_prompt": "a dog"},
            {"tuning": "LoRATuning"},
            [
                "A LoRA of rank 4 trained, with a new token [V], at a learning rate of 0.5.",
                "wrote lora.safetensors and [V].safetensors.",
                "1 class picture of “a dog”",
                "python train.py --config",
            ],
        ),
        (
            "trained.safetensors",
            {"train_text_encoder": True},
            {"tuning": "KeysAndValues", "program": "kv.py"},
            [
                "KeysAndValues trained, at a learning rate of 0.5.",
                "wrote trained.safetensors.",
                "python kv.py --config",
            ],
        ),
        ("model.safetensors", {"train_text_encoder": False}, {}, ["All weights of the UNet trained, at"]),
    ],
)
def test_the_story_says_what_trained_and_what_was_written(tmp_path, results, settings, identity, words):
    told = {"max_train_steps": 4, "with_prior_preservation": True, "learning_rate": 0.5, **settings, **identity}
    (tmp_path / "config.json").write_text(json.dumps(told))
    (tmp_path / "config.toml").write_text("max_train_steps = 4\n")
    for name in results.split():
        (tmp_path / name).write_bytes(b"")
    text = shown(tmp_path).text
    assert [part for part in words if part not in text] == []


# Several runs


def test_two_runs_are_compared(run, tmp_path, capsys):
    other = Path(shutil.copytree(run, tmp_path / "other"))
    text = (other / "config.toml").read_text().replace("learning_rate = 0.0001", "learning_rate = 0.5", 1)
    (other / "config.toml").write_text(text)
    __main__.main(["report", str(run), str(other)])
    path = tmp_path / "comparison.html"
    assert capsys.readouterr().out == f"{path}\n"
    page = read_page(path)
    assert "learning_rate" in page.texts["th"] and "sampler" not in page.texts["th"]
    assert {"0.0001", "0.5"} <= set(page.texts["td"])
    assert len(page.all("img")) == 2 * 5
    figure = next(part for part in path.read_text().split("<figure") if "Held-out loss" in part)
    assert len(axis(None, figure, "log")) == 2


def test_only_a_report_is_replaced(run, tmp_path):
    notes = tmp_path / "notes.html"
    notes.write_text("mine")
    with pytest.raises(InputError, match="is no report"):
        report.write([run], notes)
    assert notes.read_text() == "mine"
    assert report.write([run], tmp_path / "new.html") == report.write([run], tmp_path / "new.html")


# What hurts


def complaint(capsys, *words: object) -> str:
    """The one line with which python -m ldm report refuses; its status has to be 2."""
    with pytest.raises(SystemExit) as end, cli.reported("python -m ldm"):
        __main__.main(["report", *map(str, words)])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_what_is_no_run_is_refused_in_one_line(root, run, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    for folder in (empty, root / "weights" / "tiny", hub):
        assert "holds no run" in complaint(capsys, folder)
        assert "holds no run" in complaint(capsys, run, folder)
        assert not (folder / "report.html").exists()
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert "is a checkpoint; give the folder of its run" in complaint(capsys, checkpoint)
    for path in (tmp_path / "missing", run / "config.json", "x" * 5000, "a\0b"):
        complaint(capsys, path)


@pytest.mark.parametrize("damage", slow_after(2, ["missing", "cut", "noise", "folder"]))
def test_every_file_may_be_missing_or_damaged(run, damage, tmp_path):
    files = [path for path in run.rglob("*") if path.is_file() and "class" not in path.parts[:-1]]
    files = [path for path in files if "checkpoints" not in path.parts and path.name not in ("lock", "report.html")]
    assert len(files) >= 12
    for path in files:
        content = path.read_bytes()
        path.unlink()
        if damage == "cut":
            path.write_bytes(content[: len(content) // 2])
        elif damage == "noise":
            path.write_bytes(bytes(range(256)) * 4)
        elif damage == "folder":
            path.mkdir()
        page = shown(run)
        assert "a sks dog" in page.text
        if damage == "folder":
            path.rmdir()
        path.unlink(missing_ok=True)
        path.write_bytes(content)
    if damage == "missing":  # metrics alone make a run
        for path in [path for path in run.iterdir() if path.name != "metrics.jsonl"]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert "It is not finished: step 4" in shown(run).text


def test_metrics_of_nonsense_leave_gaps(run):
    lines = [
        '{"step": 1, "subject_loss": 0.5, "prior_loss": NaN, "lr": Infinity}',
        '{"step": 2, "subject_loss": "<b>", "prior_loss": -Infinity, "lr": [[[1]]]}',
        '{"step": 3, "subject_loss": 0.25, "prior_loss": true, "lr": 1e999}',
        f'{{"step": 4, "subject_loss": 1{"0" * 400}}}',
        f'{{"step": 5, "subject_loss": {"[" * 100}{"]" * 100}}}',
        '{"step": -1, "subject_loss": 1}',
        '{"step": 1.5, "subject_loss": 1}',
        '{"step": 1e400}',
        f'{{"step": {10**30}}}',
        '{"step": 6, "subject_loss": 0, "subject_loss": 1}',
        "[1]",
        "null",
        "\x00\x01",
        '{"step": 7, "subject_loss": -0.5, "subject_loss/<i>": 1e-320, "' + "k" * 100_000 + '": 1}',
        '{"step": 8, "subject_loss": 0.125, "seconds": NaN}',
    ]
    (run / "metrics.jsonl").write_bytes("\n".join(lines).encode())
    (run / "validation.jsonl").write_text('{"step": 3, "drift": NaN}\n{"step": "x"}\n{"step": 4, "drift": {}}\n')
    page = shown(run)
    paths = [one["d"] for one in page.all("path")]
    assert paths and not [d for d in paths if re.search("nan|inf|[^MLHVv0-9. e-]", d)]
    (subject, *_), *_ = [json.loads(one["data-chart"])["series"] for one in page.all("figure", class_="chart")]
    assert [step for step, _ in subject] == [1, 3, 8]
    assert all(0.125 <= value <= 0.5 for _, value in subject)
    assert "of its lines are no JSON object with a step" in page.text


def test_a_million_lines_are_read_in_part(run, monkeypatch):
    parsed = []
    parse = numbers.parse_json
    monkeypatch.setattr(numbers, "parse_json", lambda *words: parsed.append(0) or parse(*words))
    with (run / "metrics.jsonl").open("w") as file:
        file.writelines(
            f'{{"step": {i}, "subject_loss": {1 + i % 7}, "prior_loss": 0.5, "lr": 1e-4, "seconds": 1.0}}\n'
            for i in range(1, 1_000_001)
        )
    path = report.write([run])
    assert len(parsed) <= numbers.MAX_LINES + 10
    assert path.stat().st_size < 400_000
    page = read_page(path)
    assert "step 1,000,000" in page.text and "every 50th line is read" in page.text


def test_texts_never_become_markup(tmp_path):
    evil = tmp_path / "x'><b>"
    (evil / "sheets").mkdir(parents=True)
    (evil / "checkpoints" / "<i>").mkdir(parents=True)
    texts = ["instance_prompt", "class_prompt", "model", "sampler", "placeholder_token", EVIL]
    config = dict.fromkeys(texts, EVIL) | {"max_train_steps": 5, "with_prior_preservation": True}
    config |= {"validation_prompt": [EVIL] * 3, "subjects": [{"instance_prompt": EVIL}], "tuning": EVIL, "lr": [EVIL]}
    (evil / "config.json").write_text(json.dumps(config))
    (evil / "preflight.json").write_text(json.dumps([{"topic": EVIL, "text": EVIL, "warning": EVIL}]))
    (evil / "metrics.jsonl").write_text(json.dumps({"step": 1, f"subject_loss/{EVIL}": 0.5, "prior_loss": 1.0}) + "\n")
    (evil / f"{EVIL.replace('/', '')}.safetensors").write_bytes(b"")
    Image.new("RGB", (9, 9)).save(evil / "sheets" / "after.png")
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").write_text('{"instance_prompt": "x"}')
    for page in (shown(evil), shown(evil, plain)):
        assert len(page.all("script")) == 1 and not page.all("b", onerror="") and not page.all("i")
        assert page.texts["script"][0].startswith("// The page's only script")
        assert all(one["src"].startswith("data:") for one in page.all("img"))
        assert "alert(1)" in page.texts["title"][0] or "Comparison" in page.texts["title"][0]
        assert "\u202e" not in page.text and "\\u202e" in page.text
        ids = [one["id"] for _, one in page.elements if "id" in one]
        assert len(ids) == len(set(ids))


def test_links_out_of_the_folder_are_not_followed(run, tmp_path):
    secret = tmp_path / "secret"
    secret.mkdir()
    Image.new("RGB", (64, 64), "red").save(secret / "after.png")
    (secret / "metrics.jsonl").write_text('{"step": 77, "subject_loss": 0.777}\n')
    for path, target in (
        (run / "sheets" / "after.png", secret / "after.png"),
        (run / "metrics.jsonl", secret / "metrics.jsonl"),
        (run / "preflight.json", run / "preflight.json"),
    ):
        path.unlink()
        path.symlink_to(target)
    page = shown(run)
    assert "0.777" not in page.text and page.all("input", type="range")[0]["data-steps"] == "1 2 3"
    assert page.text.count("leads out of the run's folder") == 2
    link = tmp_path / "link"
    link.symlink_to(run)  # the folder itself may be a link
    assert "a sks dog" in shown(link).text


def bomb(path: Path, side: int) -> None:
    """A PNG file of a few bytes that says that it has very many pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))


def test_a_picture_that_is_too_large_or_of_another_kind_is_named(run):
    bomb(run / "sheets" / "step-000001.png", 60_000)
    bomb(run / "sheets" / "step-000002.png", 9_000)
    Image.new("RGB", (40, 40)).save(run / "sheets" / "step-000003.png", format="GIF")
    page = shown(run)
    for step in (1, 2, 3):
        assert f"step-{step:06d}.png can't be shown" in page.text
    assert len(page.all("p", class_="missing")) == 3


def test_the_page_stays_under_five_megabytes(run):
    noise = np.random.default_rng(0).integers(0, 256, (500, 500, 3), dtype=np.uint8)
    Image.fromarray(noise).save(run / "sheets" / "before.png")
    for step in range(5, 65):
        shutil.copy(run / "sheets" / "before.png", run / "sheets" / f"step-{step:06d}.png")
    path = report.write([run])
    assert 1_000_000 < path.stat().st_size < 5_000_000
    steps = read_page(path).all("input", type="range")[0]["data-steps"].split()
    assert len(steps) <= 25 and "2" in steps and "64" in steps  # the step to take, and the last one


def test_a_report_that_fails_costs_a_warning(saved, photographs, tmp_path, monkeypatch, capsys):
    def fail(*words):
        raise RuntimeError("the page\ndoes not want to")

    monkeypatch.setattr("ldm.report.upkeep.write", fail)
    monkeypatch.setattr("ldm.report.upkeep._save", fail)
    with pytest.warns(UserWarning, match="no report: the page does not want to"):
        folder = train_run(tmp_path / "run", saved["official"], photographs)
    assert (folder / "model.safetensors").exists() and not (folder / "report.html").exists()
