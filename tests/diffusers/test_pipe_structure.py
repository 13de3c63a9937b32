"""The modules of nasa_diffusers: nobody imports in a circle, and families remember nothing."""

import ast
import graphlib
from pathlib import Path

import nasa_diffusers
import pytest
import torch
from joint_cases import flux
from nasa_diffusers import nasa
from nasa_diffusers.families import FAMILIES

ROOT = Path(nasa_diffusers.__file__).parent


def name_of(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in ROOT.rglob("*.py")}


def imported(path):
    """The modules of the package that a file imports, for its annotations only as well."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            parts = [f"{node.module}.{alias.name}" for alias in node.names]
            # the names of a package are those of its own file
            yield from ({part for part in parts if part in MODULES} or {node.module})
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)


def test_no_module_imports_itself_in_a_circle():
    graph = {name: set(imported(path)) for name, path in MODULES.items()}
    assert len(graph) > 30 and "nasa_diffusers.layer" in graph["nasa_diffusers.families.base"]
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert order.index("nasa_diffusers.methods") < order.index("nasa_diffusers.layer")


@torch.no_grad()
def test_a_family_remembers_nothing_of_a_call():
    """There is one object of each for all pipelines."""
    before = [dict(vars(family)) for family in FAMILIES]
    case = flux()
    with nasa(case.pipe, "blurry", alpha=torch.rand(4, 6), cfg=False, max_sequence_length=8):
        case()
    assert [vars(family) for family in FAMILIES] == before
    for family in FAMILIES:
        for cls in type(family).__mro__[:-1]:
            members = {k: x for k, x in vars(cls).items() if not k.startswith("__")}
            kept = [name for name, x in members.items() if hasattr(x, "__setitem__")]
            assert not kept, f"{cls.__name__}: {kept}"


@torch.no_grad()
@pytest.mark.parametrize("method", ["grids", "targets"])
def test_where_image_tokens_lie_is_looked_at_once_a_run(method, monkeypatch):
    """FLUX.1 says it in a tensor, which the pipelines hand over again in every step."""
    from nasa_diffusers.families import flux as family

    looked_at = {"grids": "grid_of", "targets": "targets_of"}[method]
    seen, stock = [], getattr(family, looked_at)
    monkeypatch.setattr(family, looked_at, lambda ids: seen.append(ids) or stock(ids))
    case = flux()
    region = torch.rand(4, 6)
    with nasa(case.pipe, "blurry", alpha=region, cfg=False, max_sequence_length=8) as handle:
        case(), case()
        assert len(seen) == 1
        case(img_ids=case.inputs["img_ids"].clone())
        assert len(seen) == 2
        del handle
    with nasa(case.pipe, "blurry", alpha=region, cfg=False, max_sequence_length=8):
        case()
    assert len(seen) == 3
