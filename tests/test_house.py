"""The structure of the package: imports go in one direction, wings have public names, files and functions are short.

python tests/test_house.py      prints the sizes that these tests check
"""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LDM = ROOT / "ldm"

# In reading order. The name of a wing, a folder of ldm/, stands for all of its modules.
FLOORS = """errors runtime rng config tokenizer clip vae tiling unet schedule samplers guidance images
formats lora model sampling settings tokens dreambooth data training validation preflight report __main__""".split()

# One room a line, in the order of imports.
WINGS = {
    "runtime": """
        streams
        cli
        files
        reading
        memory
        graphs
        compiling
        threads
        signals
        progress
        processes
    """,
    "formats": """
        names
        archive
        unpickle
        ckpt
        modelspec
        tensors
        checks
        embedding
        source
        folder_config
        single
        card
        folder
        layouts
        picture_text
        lora_names
        lora_file
    """,
    "sampling": """
        contact_sheet
        flags
        recipe
    """,
    "settings": """
        setting
        subjects
        data
        training
        loss
        output
        validation
        settings
        toml
    """,
    "data": """
        captions
        variation
        focus
        beside
        examples
        masks
        subjects
        kohya
        mixture
        buckets
        sorting
        latents
        inpainting
        rows
        batches
    """,
    "training": """
        precision
        numbers
        ema
        optimizer
        piecewise
        tracking
        full_tuning
        token_tuning
        tuning
        options
        state
        content
        checkpoint
        continuity
        claim
        pace
        log
        saver
        run
        class_pictures
        sheets
    """,
    "validation": """
        grid
        drift
        advice
        best
        validation
    """,
    "preflight": """
        note
        prompts
        photographs
        ledger
        memory
        preflight
    """,
    "report": "markup numbers scale chart pictures record story commands document page compare file upkeep",
}


def imported(path: Path) -> set[str]:
    """The modules of the package that a module imports, anywhere in it: "rng", "formats.names", ..."""
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


def test_imports_go_in_one_direction():
    assert len(FLOORS) - len(WINGS) - 1 <= 16  # modules directly in ldm/, without __main__
    assert sorted(WINGS) == sorted(path.parent.name for path in LDM.glob("*/__init__.py"))
    modules = {path.stem for path in LDM.glob("*.py")} - {"__init__"}
    assert sorted(FLOORS) == sorted(modules | WINGS.keys())
    for i, floor in enumerate(FLOORS):
        above = set(FLOORS[:i])
        files = [LDM / f"{floor}.py"] if floor not in WINGS else sorted((LDM / floor).glob("*.py"))
        for path in files:
            outside = {name.partition(".")[0] for name in imported(path)} - {floor}
            assert outside <= above, f"{path.relative_to(LDM)} imports {outside - above}"


def test_imports_go_in_one_direction_within_a_wing():
    for wing, names in WINGS.items():
        rooms = names.split()
        assert sorted(rooms) == sorted(path.stem for path in (LDM / wing).glob("*.py") if path.stem != "__init__")
        for i, room in enumerate(rooms):
            found = imported(LDM / wing / f"{room}.py")
            inside = {name.removeprefix(f"{wing}.") for name in found if name.startswith(f"{wing}.")}
            assert inside <= set(rooms[:i]), f"{wing}/{room} imports {inside - set(rooms[:i])}"


def test_samplers_and_networks_import_no_files_and_no_devices():
    assert imported(LDM / "samplers.py") <= {"errors", "schedule"}
    for room in ("unet", "vae", "clip"):
        assert imported(LDM / f"{room}.py") == {"config"}


def test_a_wing_is_entered_through_its_public_names():
    public = {f"{wing}.{name}" for wing in WINGS for name in importlib.import_module(f"ldm.{wing}").__all__}
    for path in [ROOT / "train.py", ROOT / "sample.py", *LDM.rglob("*.py")]:
        wing = path.parent.name if path.parent != LDM else ""
        inner = {name for name in imported(path) if "." in name and name.partition(".")[0] != wing} - public
        assert not inner, f"{path.relative_to(ROOT)} imports {inner}"


def test_the_docstring_of_a_wing_names_its_modules():
    for wing, names in WINGS.items():
        tree = ast.parse((LDM / wing / "__init__.py").read_text(encoding="utf-8"))
        text = ast.get_docstring(tree)
        assert all(name in text for name in names.split()), wing


# Sizes. All lines of a file count, also docstrings and comments.

TABLES = {"config_files"}  # functions that only contain a table of names


def functions(path: Path) -> dict[str, tuple[int, int]]:
    """{function: (lines, parameters without self)} of a file."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            parameters = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            lines = node.end_lineno - node.lineno + 1
            found[node.name] = max(found.get(node.name, (0, 0)), (lines, len(set(parameters) - {"self", "cls"})))
    return found


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def class_lines(path: Path, name: str) -> int:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    node = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    return node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("path", sorted(LDM.rglob("*.py")), ids=lambda path: str(path.relative_to(LDM)))
def test_no_file_and_no_function_of_the_package_is_long(path):
    assert lines(path) <= 300
    long = {name: size for name, (size, _) in functions(path).items() if size > 50 and name not in TABLES}
    assert not long


def test_the_training_program_is_short():
    assert lines(ROOT / "train.py") <= 230
    assert max(count for _, count in functions(ROOT / "train.py").values()) <= 4
    assert class_lines(LDM / "training" / "run.py", "Run") <= 150


def main() -> None:
    files = sorted(LDM.rglob("*.py"))
    longest = max(((size, f"{name} in {path.relative_to(ROOT)}") for path in files
                   for name, (size, _) in functions(path).items() if name not in TABLES))  # fmt: skip
    print(f"modules directly in ldm/, without __init__ and __main__: {len(FLOORS) - len(WINGS) - 1}")
    print(f"wings: {', '.join(f'{wing} {len(names.split())}' for wing, names in WINGS.items())}")
    print(f"longest file of ldm/: {max((lines(path), str(path.relative_to(ROOT))) for path in files)}")
    print(f"longest function of ldm/, without tables of names: {longest}")
    print(f"train.py: {lines(ROOT / 'train.py')} lines; parameters of its functions:", end=" ")
    print(", ".join(f"{name} {count}" for name, (_, count) in functions(ROOT / "train.py").items()))
    print(f"class Run: {class_lines(LDM / 'training' / 'run.py', 'Run')} lines")


if __name__ == "__main__":
    main()
