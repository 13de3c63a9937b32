"""A compiled library that is broken, of something else, or for another torch: one sentence."""

import ctypes
import hashlib
import re
import sysconfig
from pathlib import Path

import pytest
import torch

import nasa_kernels.ops  # noqa: F401, the schemas must be there before the libraries
from nasa_kernels import _cpu, _library
from nasa_kernels._cuda import extension

ROOT = Path(__file__).parents[2]

# a library of Python itself: it loads, and has nothing of ours
FOREIGN = next(Path(sysconfig.get_path("stdlib"), "lib-dynload").glob("_json*.so"), None)


@pytest.fixture(params=[_cpu, extension], ids=["cpu", "cuda"])
def module(request, monkeypatch):
    monkeypatch.delenv("NASA_CPU_ISA", raising=False)
    return request.param


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "does not load under torch"),
        (b"<html>not found</html>", "does not load under torch"),
        (FOREIGN and FOREIGN.read_bytes(), "is no library of this version of nasa-kernels"),
    ],
    ids=["empty", "text", "foreign"],
)
def test_it_is_said_in_a_sentence(module, content, reason, monkeypatch, tmp_path):
    if content is None:
        pytest.skip("this Python has no compiled module to take")
    path = tmp_path / module.LIBRARY.name
    path.write_bytes(content)
    monkeypatch.setattr(module, "LIBRARY", path)
    said = module.load.__wrapped__()
    assert said.startswith(f"{path.name} {reason}")
    assert said.endswith("; install nasa-kernels again") and "\n" not in said


def test_an_older_torch_is_told(module, monkeypatch, tmp_path):
    """The library must not even be opened: what it lacks there is found at the first call."""
    path = tmp_path / module.LIBRARY.name
    path.write_bytes(b"not opened")
    monkeypatch.setattr(module, "LIBRARY", path)
    monkeypatch.setattr(torch, "__version__", "2.7.1+cu126")
    assert module.load.__wrapped__() == (
        f"{path.name} needs torch 2.10 or newer, this is torch 2.7.1+cu126"
    )


@pytest.mark.parametrize(
    ("content", "built"),
    [
        (b"\0nasa_kernels ABI 999\0", "number 999"),
        (b"\0nasa_kernels ABI 0\0 nasa_kernels ABI 999\0", "number 0"),
        # before there was a number
        (b"\0nasa_kernels\0forward_cpu\0", "older ones"),
    ],
    ids=["newer", "older", "oldest"],
)
def test_a_library_of_other_sources_is_told_and_not_loaded(
    module, content, built, monkeypatch, tmp_path
):
    path = tmp_path / module.LIBRARY.name
    path.write_bytes(b"\x7fELF" + content)
    monkeypatch.setattr(module, "LIBRARY", path)
    monkeypatch.setattr(ctypes, "CDLL", lambda path: pytest.fail("it was loaded"))
    assert module.load.__wrapped__() == (
        f"{path.name} was built from another version of the sources: its operators are {built}, "
        f"those of this nasa-kernels are number {_library.ABI}; build it again from these sources, "
        "with pip install --no-build-isolation, or install nasa-kernels again"
    )


def test_the_number_of_the_operators_is_that_of_the_sources(module):
    header = (ROOT / "csrc" / "abi.h").read_text()
    assert f'#define NASA_ABI "{_library.ABI}"' in header
    for bindings in ("bindings.cpp", "cpu/bindings.cpp"):
        assert 'abi.h"' in (ROOT / "csrc" / bindings).read_text()
    if module.LIBRARY.is_file():
        assert _library._look_into(module.LIBRARY) == (True, _library.ABI)


# of the schemas that the libraries implement, by the number of csrc/abi.h
SCHEMAS = {1: "247cc22bdf58cb5c", 2: "adfe6f67c020788b"}


def test_a_schema_does_not_change_without_the_number():
    """Where this fails, raise `ABI` in nasa_kernels/_library.py and NASA_ABI in csrc/abi.h, and put
    the new digest beside the new number."""
    if (reason := _cpu.load()) is not None:
        pytest.skip(f"the CPU's schemas are those of its compiled kernels: {reason}")
    compiled = re.compile(r"m\.impl\(\"(\w+)\"")
    text = "".join(
        (ROOT / "csrc" / name).read_text() for name in ("bindings.cpp", "cpu/bindings.cpp")
    )
    names = sorted(compiled.findall(text))
    assert len(names) > 10 and "nag_cuda" in names and "nag_cpu" in names
    operators = [getattr(torch.ops.nasa_kernels, name).default for name in names]
    # types alone: the names of arguments are Python's
    types = "\n".join(
        f"{operator.name()} {[str(x.type) for x in operator._schema.arguments]}"
        for operator in operators
    )
    assert hashlib.sha256(types.encode()).hexdigest()[:16] == SCHEMAS[_library.ABI]
