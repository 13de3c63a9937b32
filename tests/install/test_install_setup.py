"""setup.py on other systems: what it would build there, by running it without its last line."""

import runpy
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import setuptools

SETUP = Path(__file__).parents[2] / "setup.py"


@pytest.fixture
def read(monkeypatch, tmp_path):
    """What setup.py passes to setup() on `platform`, with a CUDA toolkit and torch `torch`."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.touch()
    given = {}

    def read(platform: str, torch: str, **variables: str) -> dict:
        for name in ("NASA_KERNELS_CUDA", "NASA_KERNELS_CPU"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"CUDA_HOME": str(tmp_path), **variables}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "platform", platform)
        monkeypatch.setattr("importlib.metadata.version", lambda name: torch)
        monkeypatch.setattr("shutil.which", lambda name, path=None: f"/usr/bin/{name}")
        monkeypatch.setattr(setuptools, "setup", lambda **metadata: given.update(metadata))
        spec = ModuleSpec("torch", None, is_package=True)
        monkeypatch.setattr(
            "importlib.util.find_spec", lambda name: spec if name == "torch" else None
        )
        runpy.run_path(str(SETUP))
        return given

    return read


@pytest.mark.parametrize(
    ("platform", "torch", "built"),
    [
        ("linux", "2.13.0+cpu", ["_cpu_C", "_C"]),
        ("linux", "2.16.0", ["_cpu_C", "_C"]),
        ("linux", "2.10.0+cu128", ["_cpu_C", "_C"]),
        # older headers have not what the libraries use
        ("linux", "2.7.1", []),
        ("darwin", "2.13.0", ["_cpu_C"]),
        # GNU flags and library names
        ("win32", "2.13.0", []),
    ],
)
def test_what_is_built(read, platform, torch, built, capsys):
    extensions = read(platform, torch)["ext_modules"]
    assert [extension.name.rpartition(".")[2] for extension in extensions] == built
    assert capsys.readouterr().out.count("without the") == 2 - len(built)


@pytest.mark.parametrize(
    ("platform", "torch", "reason"),
    [
        ("win32", "2.13.0", "NASA_KERNELS_CUDA=1 but .* they are built on Linux alone"),
        ("linux", "2.9.1", "they are built against torch 2.10 or newer, torch 2.9.1 is installed"),
    ],
)
def test_asked_for_and_impossible(read, platform, torch, reason):
    with pytest.raises(RuntimeError, match=reason):
        read(platform, torch, NASA_KERNELS_CUDA="1")


def test_left_out(read, capsys):
    metadata = read("linux", "2.13.0", NASA_KERNELS_CUDA="0", NASA_KERNELS_CPU="0")
    assert metadata["ext_modules"] == []
    assert "without the CUDA C++ kernels: NASA_KERNELS_CUDA=0" in capsys.readouterr().out
