"""Text files are read and written as UTF-8: what Python takes unasked is the locale's encoding."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [
    ROOT / "setup.py",
    *(
        path
        for folder in ("nasa_kernels", "python", "bench", "tools", "integrations")
        for path in (ROOT / folder).rglob("*.py")
    ),
]


def without_encoding(source: str) -> list[int]:
    """Lines that open a text file in the encoding of the locale."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        is_method = isinstance(node.func, ast.Attribute)
        if name not in ("read_text", "write_text", "open") or any(
            keyword.arg in ("encoding", None) for keyword in node.keywords
        ):
            continue
        if name == "open":
            position = 0 if is_method else 1
            given = [*node.args[position : position + 1]]
            given += [keyword.value for keyword in node.keywords if keyword.arg == "mode"]
            modes = [x.value for x in given if isinstance(x, ast.Constant)]
            owner = getattr(getattr(node.func, "value", None), "id", "")
            if any("b" in str(mode) for mode in modes) or owner in ("Image", "webbrowser", "os"):
                continue
        found.append(node.lineno)
    return found


def test_every_text_file_is_utf8():
    assert len(SOURCES) > 100
    found = {path: without_encoding(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert not {str(path.relative_to(ROOT)): lines for path, lines in found.items() if lines}


@pytest.mark.parametrize(
    ("source", "is_found"),
    [
        ("path.read_text()", True),
        ("path.read_text(errors='replace')", True),
        ("path.read_text(encoding='utf-8')", False),
        ("path.open()", True),
        ("path.open('rb')", False),
        ("open(path, 'w')", True),
        ("open(path, mode='wb')", False),
        ("Image.open(path)", False),
    ],
)
def test_what_is_found(source, is_found):
    assert bool(without_encoding(source)) == is_found
