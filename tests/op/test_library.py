"""A compiled library that is broken, of something else, or for another torch: one sentence."""

import sysconfig
from pathlib import Path

import pytest
import torch

from nasa_kernels import _cpu
from nasa_kernels._cuda import extension

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
