"""The package is a house: each room imports only from those below it."""

import ast
from pathlib import Path

LDM = Path(__file__).resolve().parent.parent / "ldm"

ROOMS = """errors
config tokenizer clip vae unet schedule samplers
names archive unpickle ckpt files folder weights
pictures model
draws data sheet cli precision distributed stop
dreambooth prior ema optim tracking settings state checkpoint run
__main__""".split()


def imported(path: Path) -> set[str]:
    """The rooms that a module imports, at its top or later."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "ldm":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ldm."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("ldm.")}
    return found


def test_imports_point_one_way():
    assert sorted(ROOMS) == sorted(path.stem for path in LDM.glob("*.py") if path.stem != "__init__")
    for i, room in enumerate(ROOMS):
        assert imported(LDM / f"{room}.py") <= set(ROOMS[:i]), room


def test_mathematics_knows_no_files_and_no_devices():
    """Rule 5: a loss is only mathematics, a sampler only a loop."""
    assert imported(LDM / "samplers.py") <= {"errors", "schedule"}
    for room in ("unet", "vae", "clip"):
        assert imported(LDM / f"{room}.py") == {"config"}
