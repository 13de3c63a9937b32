"""ComfyUI as a library on the CPU: a tree of it on PYTHONPATH, and stand-ins for what it imports
and these tests do not use.

`make test` puts the tree there, `NASA_COMFYUI` names another one.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
from comfyui import stand_ins

ROOT = Path(__file__).parents[2]
if tree := os.environ.get("NASA_COMFYUI"):
    sys.path.insert(0, tree)
HAS_COMFYUI = importlib.util.find_spec("comfy") is not None
if not HAS_COMFYUI:
    collect_ignore_glob = ["test_comfy_*.py"]


def pytest_terminal_summary(terminalreporter):
    if not HAS_COMFYUI:
        terminalreporter.write_line("No ComfyUI on PYTHONPATH: the tests of its nodes did not run.")
    elif "NASA_COMFYUI_SERVER" not in os.environ:
        terminalreporter.write_line("ComfyUI's own server did not run: make comfyui-test.")


def _start() -> None:
    stand_ins.put()
    # ComfyUI reads its options from the command line, when it is first imported
    given, sys.argv = sys.argv, [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args  # noqa: F401

    sys.argv = given


if HAS_COMFYUI:
    _start()


@pytest.fixture(scope="session")
def pack():
    """The node pack as ComfyUI loads it: a folder, imported by its path."""
    folder = ROOT / "integrations" / "comfyui"
    spec = importlib.util.spec_from_file_location(
        "nasa_pack", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["nasa_pack"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model():
    from comfyui.tiny import tiny

    return tiny("wan")


@pytest.fixture
def texts(model):
    return [model.text(n, seed) for n, seed in ((20, 1), (13, 2), (9, 3))]
