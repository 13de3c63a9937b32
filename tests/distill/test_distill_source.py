"""What the sources say of themselves: their layers, and the options that their hints name."""

import ast
import re
from pathlib import Path

import nasa_distill

ROOT = Path(nasa_distill.__file__).parent
REPOSITORY = Path(__file__).parents[2]
# a folder, and the folders that it may import from
LAYERS = {
    "train": {"train"},
    "world": {"train", "world"},
    "scores": {"train", "scores"},
    "demo": {"train", "world", "demo"},
}


def sources(folder=""):
    return sorted((ROOT / folder).rglob("*.py"))


def imported(path):
    """The folders of this package that a file imports from."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("nasa_distill."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.ImportFrom) and node.module == "nasa_distill":
            yield from (name.name for name in node.names)


def test_folders_import_one_way():
    found = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert found == {*LAYERS, "models"}
    for folder, allowed in LAYERS.items():
        for path in sources(folder):
            wrong = set(imported(path)) & set(LAYERS) - allowed
            assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"
    assert "world" in set().union(*map(imported, sources("demo")))


def test_every_folder_is_installed():
    """`find_packages` takes folders with an `__init__.py` and no others."""
    assert all((path.parent / "__init__.py").exists() for path in sources())


def test_names_of_modules_are_right():
    """Also where they stand in a text, as `nasa_distill.train.config` does."""
    pages = [*(REPOSITORY / "docs" / "distill").glob("*.md"), REPOSITORY / "README.md"]
    found = 0
    for path in (*sources(), *pages):
        for name in re.findall(r"nasa_distill(?:\.[a-z]\w*)+", path.read_text()):
            parts = name.split(".")[1:]
            exists = [(ROOT / "/".join(parts[:n])).with_suffix(".py") for n in (1, 2, 3)]
            folder = ROOT / "/".join(parts)
            assert folder.is_dir() or any(e.exists() for e in exists), f"{path.name}: {name}"
            found += 1
    assert found > 50
