"""A run's folder for the tests of the report: what train.py has written, and sheets and validations made by hand."""

import json
import math
import shutil
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image
from runs import SMALL, call

EVIL = "\"'></title><script>alert(1)</script><img src=x onerror=alert(2)>\u202e&lt;"
STEPS = range(0, 5)


def train_run(folder: Path, model: Path, photographs: Path, *flags: object) -> Path:
    """Trains four steps."""
    call("--model", model, "--instance-data-dir", photographs, *SMALL, *flags, "--output-dir", folder)
    return folder


def validations() -> list[dict]:
    """Lines of validation.jsonl: the held-out loss is lowest at step 2, and drift grows."""
    return [
        {
            "step": step,
            "seconds": 1.0,
            "validation_loss": [0.9, 0.6, 0.5, 0.7, 0.8][step],
            "training_loss": 0.9 * math.exp(-step / 2),
            "class_loss": 0.4 + step / 100,
            "drift": 0.05 * step**2,
            "diversity": 1 - 0.03 * step,
        }
        for step in STEPS
    ]


def tell(folder: Path) -> Path:
    """Adds to a run's folder what its validations would have written."""
    lines = [json.dumps(line) + "\n" for line in validations()]
    (folder / "validation.jsonl").write_text("".join(lines))
    for step in (1, 2, 3):
        color = (60 * step, 40, 200 - 40 * step)
        Image.new("RGB", (140, 300), color).save(folder / "sheets" / f"step-{step:06d}.png")
    notes = [{"topic": "identifier", "text": "“sks” is a rifle.", "warning": True}, {"topic": "steps", "text": "Few."}]
    (folder / "preflight.json").write_text(json.dumps(notes))
    (folder / "best").mkdir()
    shutil.copy(folder / "model.safetensors", folder / "best")
    (folder / "best" / "best.json").write_text('{"step": 2, "metric": "validation_loss", "value": 0.5}')
    return folder


def tell_by_hand(folder: Path, prompt: str = "a sks dog") -> Path:
    """Makes a run's folder without training: settings, metrics, the sheet after training, and what `tell` adds."""
    (folder / "sheets").mkdir(parents=True)
    settings = {"instance_prompt": prompt, "class_prompt": "a dog", "max_train_steps": 4, "model": prompt}
    settings |= {"with_prior_preservation": True, "learning_rate": 1e-4, "resolution": 64}
    (folder / "config.json").write_text(json.dumps(settings))
    metrics = [{"step": step, "subject_loss": 1 / step, "prior_loss": 0.4, "lr": 1e-4} for step in STEPS if step]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    for name, color in (("before", "olive"), ("after", "teal")):
        Image.new("RGB", (900, 400), color).save(folder / "sheets" / f"{name}.png")
    (folder / "model.safetensors").write_bytes(b"")
    return tell(folder)


class Page(HTMLParser):
    """What a browser would see: elements as (tag, attributes), and the text of each kind of element."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in <{tag}>"
        self.elements.append((tag, dict(attrs)))
        self.texts.setdefault(tag, [])
        if tag not in ("meta", "input", "img", "wbr", "br"):
            self._open.append(tag)
            self.texts[tag].append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        for tag in dict.fromkeys(self._open):
            self.texts[tag][-1] += data

    def all(self, tag: str, **attributes: str) -> list[dict]:
        """The attributes of all elements of a tag that have these."""
        wanted = {key.rstrip("_"): value for key, value in attributes.items()}
        return [found for name, found in self.elements if name == tag and wanted.items() <= found.items()]

    @property
    def text(self) -> str:
        return " ".join(self.texts["body"][0].split())


def read_page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))
