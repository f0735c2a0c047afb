"""The package is a house: ideas on top, machinery in wings, and each imports only from those above it."""

import ast
from pathlib import Path

LDM = Path(__file__).resolve().parent.parent / "ldm"

# In reading order. A wing stands for all of its modules.
FLOORS = """errors rng config tokenizer clip vae unet schedule samplers guidance images
runtime formats model dreambooth training __main__""".split()

WINGS = {
    "runtime": "cli files threads signals processes",
    "formats": "names archive unpickle ckpt tensors checks source folder_config single folder layouts",
    "training": "precision ema optimizer tracking settings batches class_pictures state checkpoint run",
}


def imported(path: Path) -> set[str]:
    """The modules of the package that a module imports, at its top or later: "rng", "formats.names", ..."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "ldm":
            inside = node.module.partition(".")[2]
            for alias in node.names:
                name = ".".join(filter(None, (inside, alias.name)))
                is_module = (LDM / name.replace(".", "/")).with_suffix(".py").exists() or (LDM / name).is_dir()
                found.add(name if is_module else inside)
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("ldm.")}
    return found - {""}


def test_imports_point_one_way():
    assert sorted(WINGS) == sorted(path.parent.name for path in LDM.glob("*/__init__.py"))
    modules = {path.stem for path in LDM.glob("*.py")} - {"__init__"}
    assert sorted(FLOORS) == sorted(modules | WINGS.keys())
    for i, floor in enumerate(FLOORS):
        above = set(FLOORS[:i])
        files = [LDM / f"{floor}.py"] if floor not in WINGS else sorted((LDM / floor).glob("*.py"))
        for path in files:
            outside = {name.partition(".")[0] for name in imported(path)} - {floor}
            assert outside <= above, f"{path.relative_to(LDM)} imports {outside - above}"


def test_imports_point_one_way_within_a_wing():
    for wing, names in WINGS.items():
        rooms = names.split()
        assert sorted(rooms) == sorted(path.stem for path in (LDM / wing).glob("*.py") if path.stem != "__init__")
        for i, room in enumerate(rooms):
            inside = {name.removeprefix(f"{wing}.") for name in imported(LDM / wing / f"{room}.py") if wing in name}
            assert inside <= set(rooms[:i]), f"{wing}/{room} imports {inside - set(rooms[:i])}"


def test_other_modules_import_the_formats_by_their_public_names():
    for path in sorted(LDM.rglob("*.py")):
        if path.parent.name != "formats":
            assert not [name for name in imported(path) if name.startswith("formats.")], path


def test_mathematics_knows_no_files_and_no_devices():
    assert imported(LDM / "samplers.py") <= {"errors", "schedule"}
    for room in ("unet", "vae", "clip"):
        assert imported(LDM / f"{room}.py") == {"config"}
