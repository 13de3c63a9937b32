"""No module imports another in a circle, inside of functions included."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def imports_of(package: Path) -> dict[str, set[str]]:
    """Module -> the modules of its package that it imports, wherever in its text."""
    files = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found: dict[str, set[str]] = {name: set() for name in files}
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                # a name is a module of the package, or something in one
                inside = [f"{node.module}.{alias.name}" for alias in node.names]
                wanted = [x if x in files else node.module for x in inside]
            else:
                continue
            found[name] |= {x for x in wanted if x in files and x != name}
    return found


def circle_in(graph: dict[str, set[str]]) -> list[str] | None:
    """A path that comes back to where it began, or None."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str] | None:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        for other in sorted(graph[name]):
            if (found := visit(other, [*path, name])) is not None:
                return found
        done.add(name)
        return None

    return next((c for name in sorted(graph) if (c := visit(name, [])) is not None), None)


@pytest.mark.parametrize("package", ["nasa_kernels", "bench"])
def test_there_is_no_circle(package):
    graph = imports_of(ROOT / package)
    assert len(graph) > 10 and sum(map(len, graph.values())) > 20
    # an importer of `package.module` gets the package's own __init__ first, which may import all
    graph[package] = set()
    assert circle_in(graph) is None


def test_a_circle_is_found(tmp_path):
    package = tmp_path / "p"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text("from p import b")
    (package / "b.py").write_text("def f():\n    from p.a import g\n")
    assert circle_in(imports_of(package)) == ["p.a", "p.b", "p.a"]
    (package / "b.py").write_text("")
    assert circle_in(imports_of(package)) is None


@pytest.mark.parametrize("package", ["bench", "python/nasa_diffusers", "python/nasa_distill"])
def test_what_is_private_stays_private(package):
    """Nothing outside of nasa_kernels imports a module of it, or a name, that begins with _."""
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                private = [x for x in name.split(".")[1:] if x[0] == "_" and x[:2] != "__"]
                assert not (name.startswith("nasa_kernels") and private), f"{path}: {name}"
