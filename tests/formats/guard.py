"""Reads files in a process of its own and reports what happens.

python tests/formats/guard.py FOLDER            reads each file with ckpt.read_pickle in limited memory; prints one line
                                                of JSON for each
python tests/formats/guard.py FOLDER --trust    reads each file's data.pkl with Python's unpickler, in a folder FILE.d
"""

import codecs
import copyreg
import gc
import json
import os
import pickle
import resource
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ldm.errors import InputError  # noqa: E402
from ldm.formats import ckpt  # noqa: E402

MEMORY = 1 << 30  # bytes beyond what the imports take
EXTENSIONS = {0x71: ("os", "system"), 0x171: ("posix", "system"), 0x10171: ("subprocess", "getoutput")}


def main(folder: Path, mode: str = "") -> None:
    for code, (module, name) in EXTENSIONS.items():
        copyreg.add_extension(module, name, code)
    files = sorted(path.absolute() for path in folder.iterdir() if path.is_file())
    if mode == "--trust":
        for path in files:
            unpickle(path)
        return
    codecs.lookup("raw-unicode-escape")  # load it now: pickletools needs it for opcodes that our reader refuses
    events, watching, before = set(), [], resident("VmRSS")
    sys.addaudithook(lambda event, _: watching and events.add(event))
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    gc.freeze()
    for path in files:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # peak memory counts from here
        start, modules = time.perf_counter(), len(sys.modules)
        report: dict[str, Any] = {"error": None}
        events.clear()
        watching.append(True)
        try:
            tree = ckpt.read_pickle(path)
        except InputError as error:
            report["error"], tree = str(error), None
        watching.clear()
        report["seconds"] = time.perf_counter() - start
        report["megabytes"] = (resident("VmHWM") - before) / 1024
        report["events"], report["imports"] = sorted(events), len(sys.modules) - modules
        report["types"] = types(tree)
        if isinstance(tree, dict) and isinstance(tree.get("state_dict"), dict):
            report["w"] = str(tree["state_dict"].get("w"))
        del tree
        print(json.dumps({"file": path.name} | report), flush=True)


def resident(field: str) -> int:
    """A field of /proc/self/status, in KiB."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])


def types(tree: Any) -> list[str]:
    """The types of all objects in a tree. Also reads the tensors: a view outside the file would crash."""
    found, seen, todo, looked = set(), set(), [tree], 0
    while todo:
        thing = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        found.add(type(thing).__name__)
        if isinstance(thing, torch.Tensor):
            looked += 1
            if looked < 1000:
                thing.clone()
        elif isinstance(thing, ckpt.Stub):
            todo += [thing.args, thing.state]
        elif isinstance(thing, dict):
            todo += [*thing, *thing.values()]
        elif isinstance(thing, (list, tuple)):
            todo += thing
    return sorted(found)


def unpickle(path: Path) -> None:
    """Reads the pickle with Python's unpickler, as a program without ckpt.py does."""

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, reference: Any) -> None:
            return None

    path.with_suffix(".d").mkdir()
    os.chdir(path.with_suffix(".d"))
    with zipfile.ZipFile(path) as file:
        try:
            Unpickler(file.open("archive/data.pkl")).load()
        except Exception as error:  # the attack has already run
            print(f"{path.name}: {error}", file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
