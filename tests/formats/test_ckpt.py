"""A pickled .ckpt is read as it was saved, whatever classes it names. No code in it is run."""

import json
import os
import subprocess
import sys
import types
from collections import Counter, OrderedDict
from pathlib import Path

import hostile
import numpy
import pytest
import torch
from torch import Tensor

from ldm.errors import InputError
from ldm.formats import ckpt

GUARD = Path(__file__).with_name("guard.py")
LOADED = {"Tensor", "Stub", "_Storage", "OrderedDict", "dict", "list", "tuple", "Size", "dtype"}
LOADED |= {"str", "bytes", "int", "float", "bool", "NoneType"}
HARMLESS = {"open", "mmap.__new__", "builtins.id"}  # audit events; no import, no exec, no process


# Good files


def state_dict() -> dict[str, Tensor]:
    """Tensors of all types and memory layouts that checkpoints have; some of them share memory."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 4, generator=generator)
    tensors = {str(dtype): (base * 9).to(dtype) for dtype in (torch.float64, torch.float32, torch.float16)}
    tensors |= {str(dtype): (base * 9).to(dtype) for dtype in (torch.bfloat16, torch.int64, torch.int32, torch.int8)}
    tensors |= {str(dtype): base.abs().to(dtype) for dtype in (torch.uint8, torch.uint16, torch.bool, torch.complex64)}
    tensors |= {str(dtype): base.to(dtype) for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)}
    tensors |= {
        "transposed": base.T,
        "rows": base[::2],
        "tail": base[4:],
        "tied": base,
        "channels_last": _channels_last(),
    }
    tensors |= {
        "number": torch.tensor(4.5),
        "step": torch.tensor(7),
        "empty": torch.empty(0),
        "thin": torch.empty(3, 0),
    }
    return tensors | {"parameter": torch.nn.Parameter(base), "one": torch.arange(77).expand(1, -1)}


def _channels_last() -> Tensor:
    return torch.arange(2.0 * 3 * 4 * 5).view(2, 3, 4, 5).to(memory_format=torch.channels_last)


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether type, shape, strides and all bits are equal, also the bits of NaN."""
    same = a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
    return same and torch.equal(*(t.detach().reshape(-1).view(torch.uint8) for t in (a, b)))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_what_torch_reads(tmp_path, protocol):
    saved = {"state_dict": OrderedDict(state_dict()), "epoch": 3, "big": 2**70, "rate": 1e-4, "name": "größe 模型"}
    saved |= {"none": None, "flags": [True, False, (1, (2.5, "x"))], "shape": torch.Size([2, 3]), 7: {None: -1}, "": {}}
    saved |= {"module": torch.nn.Linear(3, 2).state_dict(), "dtype": torch.bfloat16}  # with its _metadata
    path = tmp_path / "模型.ckpt"
    torch.save(saved, path, pickle_protocol=protocol)
    ours = ckpt.read_pickle(path)
    theirs = torch.load(path, weights_only=False)  # weights_only=True can't read protocol 4; the file is our own
    for part in ("state_dict", "module"):
        a, b = ours.pop(part), theirs.pop(part)
        assert type(a) is OrderedDict and list(a) == list(b)
        assert all(equal(a[key], b[key]) for key in b)
    assert ours == theirs and type(ours["shape"]) is torch.Size


def test_tensors_share_memory_as_saved_and_writing_to_them_leaves_the_file_unchanged(tmp_path):
    path = tmp_path / "x.ckpt"
    torch.save(state_dict(), path)
    before, read = path.read_bytes(), ckpt.read_pickle(path)
    read["tied"][4, 0] = 123.0
    assert read["transposed"][0, 4] == read["tail"][0, 0] == read["rows"][2, 0] == read["parameter"][4, 0] == 123.0
    assert not read["parameter"].requires_grad and read["torch.float32"][4, 0] != 123.0
    assert path.read_bytes() == before


def test_reads_a_checkpoint_like_the_official_ones(tmp_path, monkeypatch):
    """A small sd-v1-4.ckpt. Besides the weights it names classes of Lightning, which can't be imported here."""

    class ModelCheckpoint: ...

    class DictConfig:
        def __init__(self):
            self.__dict__ = {"_parent": self, "_content": {"unet_config": [1, 2]}}

    names = {ModelCheckpoint: "pytorch_lightning.callbacks.model_checkpoint", DictConfig: "omegaconf.dictconfig"}
    with monkeypatch.context() as installed:
        for kind, module in names.items():
            kind.__module__, kind.__qualname__ = module, kind.__name__
            for parent in ("pytorch_lightning", "pytorch_lightning.callbacks", "omegaconf", module):
                installed.setitem(sys.modules, parent, types.ModuleType(parent))
            setattr(sys.modules[module], kind.__name__, kind)
        callbacks = {ModelCheckpoint: {"monitor": "val/loss", "best_model_score": torch.tensor(0.13)}}
        optimizer = {"state": {0: {"step": 470000, "exp_avg": torch.ones(3)}}, "param_groups": [{"params": [0]}]}
        rest = {"scalar": numpy.float64(0.5), "set": {1, 2}, "counter": Counter("aab"), "bytes": b"\x00\xff"}
        tree = {"epoch": 26, "global_step": 470000, "pytorch-lightning_version": "1.4.2", "state_dict": state_dict()}
        tree |= {"callbacks": callbacks, "optimizer_states": [optimizer], "lr_schedulers": [{"last_epoch": 1}]}
        torch.save(tree | {"hyper_parameters": DictConfig(), "rest": rest}, tmp_path / "x.ckpt")

    with pytest.raises(Exception, match="Weights only load failed.*|Unsupported global"):
        torch.load(tmp_path / "x.ckpt", weights_only=True)
    read = ckpt.read_pickle(tmp_path / "x.ckpt")
    assert not any(module.startswith(("pytorch_lightning", "omegaconf")) for module in sys.modules)
    assert all(equal(tensor, read["state_dict"][key]) for key, tensor in state_dict().items())
    assert (read["epoch"], read["global_step"], read["lr_schedulers"]) == (26, 470000, [{"last_epoch": 1}])
    assert read["optimizer_states"][0]["state"][0]["exp_avg"].tolist() == [1.0, 1.0, 1.0]
    ((callback, state),) = read["callbacks"].items()
    assert repr(callback) == "<stub 'pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint'>"
    assert state["monitor"] == "val/loss" and state["best_model_score"] == torch.tensor(0.13)
    config = read["hyper_parameters"]
    assert config.name == "omegaconf.dictconfig.DictConfig" and config.state["_parent"] is config
    assert config.state["_content"] == {"unet_config": [1, 2]}
    assert {type(thing) for thing in read["rest"].values()} == {ckpt.Stub}


# Malicious and damaged files


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, dict]:
    """guard.py's report on each hostile file, and on good files that were damaged."""
    folder = tmp_path_factory.mktemp("hostile")
    for name, (content, _) in hostile.FILES.items():
        (folder / f"{name}.ckpt").write_bytes(content)
    honest = hostile.saved({"state_dict": {"w": torch.arange(4.0)}, "more": state_dict(), "Counter": Counter("aab")})
    for kind, contents in {"cut": hostile.cut(honest), "mutant": hostile.mutants(honest, 400)}.items():
        for i, content in enumerate(contents):
            (folder / f"{kind}-{i}.ckpt").write_bytes(content)
    torch.save({"w": torch.zeros(64 << 18)}, folder / "0-large.ckpt")  # it is read first because of its name
    done = subprocess.run([sys.executable, GUARD, folder], cwd=folder, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list(folder.rglob("canary"))
    return {Path(report["file"]).stem: report for report in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", hostile.FILES)
def test_a_hostile_file_is_refused_or_runs_nothing(reports, name):
    report, says = reports[name], hostile.FILES[name][1]
    if says is None:
        assert report["error"] is None
        assert "w" in report or name in hostile.RAW
    else:
        assert says in report["error"] and "\n" not in report["error"] and len(report["error"]) < 500
    assert set(report["events"]) <= HARMLESS and report["imports"] == 0
    assert set(report["types"]) <= LOADED


def test_weights_are_read_as_stored(reports):
    assert reports["global-reduce"]["w"] == "tensor([0., 1., 2., 3.])"
    assert reports["weights-nan"]["w"] == "tensor([nan, inf, nan, inf])"
    assert reports["weights-float8"]["w"] == "tensor([0., 1., 2., 3.], dtype=torch.float8_e4m3fn)"


def test_memory_is_bounded(reports):
    """Reading any file takes less than 200 MB; reading 64 MB of good weights takes less than 16 MB."""
    assert max(report["megabytes"] for report in reports.values()) < 200
    assert reports["0-large"]["error"] is None and reports["0-large"]["megabytes"] < 16


def test_a_truncated_file_is_refused(reports):
    errors = [report["error"] for name, report in reports.items() if name.startswith("cut-")]
    assert len(errors) > 190 and all(errors)


def test_a_damaged_file_is_refused_or_runs_nothing(reports):
    mutants = [report for name, report in reports.items() if name.startswith("mutant-")]
    assert len(mutants) == 400 and 100 < sum(bool(report["error"]) for report in mutants) < 390
    for report in mutants:
        assert set(report["types"]) <= LOADED and "\n" not in (report["error"] or "")
        assert set(report["events"]) <= HARMLESS and report["imports"] == 0


def test_the_attacks_work_on_pythons_own_unpickler(tmp_path):
    """The attacks in WORKING run their command when Python's own unpickler reads the file."""
    working = [*hostile.WORKING, *hostile.WORKING_REFUSED]
    for name in working:
        (tmp_path / f"{name}.ckpt").write_bytes(hostile.FILES[name][0])
    subprocess.run([sys.executable, GUARD, tmp_path, "--trust"], cwd=tmp_path, capture_output=True, check=True)
    assert [name for name in working if not (tmp_path / f"{name}.d" / "canary").exists()] == []


def test_folders_missing_files_and_pipes_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.ckpt")
    for path, says in (
        (tmp_path, "is a folder"),
        (tmp_path / "x.ckpt", "no such file"),
        (tmp_path / "pipe.ckpt", "is a pipe, socket or device"),
    ):
        with pytest.raises(InputError, match=says):
            ckpt.read_pickle(path)
