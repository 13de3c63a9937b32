"""The extension without a GPU: it loads under any torch, registers its kernels, says what it needs.

Looks at `nasa_kernels/_C.so`, or the file in $NASA_CUDA_LIBRARY.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.cuda_emulation import (
    HEAD_DIMS,
    keys_shared_bytes,
    long_shared_bytes,
    padded,
    queries_shared_bytes,
)

import nasa_kernels.ops  # noqa: F401, the schemas must be there before the kernels
from nasa_kernels import backends
from nasa_kernels._cuda import extension

ROOT = Path(__file__).parents[2]
LIBRARY = Path(os.environ.get("NASA_CUDA_LIBRARY", extension.LIBRARY))
needs_library = pytest.mark.skipif(
    not LIBRARY.is_file(), reason=f"no {LIBRARY.name}: built without CUDA C++"
)


@pytest.fixture
def library(monkeypatch):
    monkeypatch.setattr(extension, "LIBRARY", LIBRARY)
    cached = [function for function in vars(extension).values() if hasattr(function, "cache_clear")]
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@needs_library
def test_it_loads_and_registers_its_kernels(library):
    assert extension.load() is None
    joint = ("forward_joint", "nag_joint", "joint_statistics", "joint_queries", "joint_keys")
    joint += ("forward_image", "attention_image", "nag_image")
    for name in ("forward_cuda", "nag_cuda", "backward_cuda", *(f"{step}_cuda" for step in joint)):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"nasa_kernels::{name}", "CUDA")


@needs_library
def test_it_says_why_it_does_not_run_here(library):
    reason = extension.why_not(torch.device("cpu"))
    assert reason == "it runs on NVIDIA GPUs, not on cpu tensors"


def test_an_install_without_it_says_so(monkeypatch):
    monkeypatch.setattr(extension, "LIBRARY", ROOT / "no" / "_C.so")
    extension.load.cache_clear()
    extension.why_not.cache_clear()
    assert extension.why_not(torch.device("cuda", 0)) == extension.NOT_BUILT
    extension.load.cache_clear()
    extension.why_not.cache_clear()


RELEASED = ("8.0", "9.0a", "10.0", "12.0+PTX")


@pytest.mark.parametrize(
    ("capability", "runs"),
    [
        *[((7, 5), False), ((8, 0), True), ((8, 6), True), ((8, 7), True), ((8, 9), True)],
        *[((9, 0), True), ((10, 0), True), ((10, 3), True), ((11, 0), False)],
        *[((12, 0), True), ((12, 1), True), ((13, 0), True)],
    ],
)
def test_which_gpus_have_code(capability, runs):
    assert extension.has_code(RELEASED, *capability) == runs


def test_code_for_one_gpu_is_for_no_other():
    assert extension.has_code(["9.0a"], 9, 0)
    assert not extension.has_code(["9.0a"], 9, 1)
    assert not extension.has_code(["8.6"], 8, 0)
    assert extension.has_code(["8.6"], 8, 9)
    assert not extension.has_code(["8.6"], 9, 0)
    assert extension.has_code(["8.6+PTX"], 9, 0)


@pytest.mark.parametrize(
    ("capability", "driver", "reason"),
    [
        ((9, 0), 13000, None),
        ((9, 0), 13020, None),
        ((9, 0), 14000, None),
        ((8, 6), 12090, "CUDA 13.0, and the driver serves CUDA 12.9; update the driver, or build"),
        ((11, 0), 13000, "compute capability 11.0, only for 8.0, 9.0a, 10.0, 12.0+PTX"),
        ((7, 5), 13000, "its kernels need compute capability 8.0, this GPU has 7.5"),
    ],
    ids=str,
)
def test_what_the_gpu_and_its_driver_must_have(monkeypatch, capability, driver, reason):
    extension.why_not.cache_clear()
    monkeypatch.setattr(extension, "load", lambda: None)
    monkeypatch.setattr(extension, "_architectures", lambda: RELEASED)
    monkeypatch.setattr(extension, "_cuda_versions", lambda: (13000, driver))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = extension.why_not(torch.device("cuda", 0))
    extension.why_not.cache_clear()
    assert found is None if reason is None else reason in found


@needs_library
def test_it_knows_its_runtime_and_its_architectures(library):
    text = (ROOT / "cmake" / "cuda.cmake").read_text()
    built = re.search(r'NASA_CUDA_ARCHS "(.*?)"', text)[1]
    assert set(extension._architectures()) <= {
        *built.split(";"),
        *os.environ.get("NASA_CUDA_ARCHS", "").split(),
    }
    runtime, driver = extension._cuda_versions()
    assert runtime >= 12000
    if not torch.cuda.is_available():
        assert driver == 0


@needs_library
def test_shared_memory_is_what_the_kernels_ask_for():
    ask = ctypes.CDLL(str(LIBRARY)).nasa_kernels_shared_bytes
    for d in (1, 33, 40, 72, *HEAD_DIMS):
        size = padded(d)
        assert ask(d, False) == long_shared_bytes(size)
        assert ask(d, True) == max(queries_shared_bytes(size), keys_shared_bytes(size))


@needs_library
def test_a_head_dim_that_does_not_fit_is_refused_with_a_reason(library, monkeypatch):
    class Ada:
        shared_memory_per_block_optin = 101376

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Ada)
    device = torch.device("cuda", 0)
    assert extension.why_not_head_dim(device, 160) is None
    assert extension.why_not_head_dim(device, 160, backward=True) is None
    assert "bytes of shared memory for head_dim 256" in extension.why_not_head_dim(device, 256)
    assert "head_dim of 1 to 256" in backends.why_not_head_dim("cuda", device, 264)


@needs_library
@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_it_needs_no_cuda_library_and_no_python():
    """What it links is in every torch; the driver and the runtime's version do not matter."""
    text = subprocess.run(["readelf", "-d", LIBRARY], capture_output=True, text=True, check=True)
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", text.stdout))
    system = r"lib(stdc\+\+|m|gcc_s|c|dl|rt|pthread)\.so.*|ld-linux.*"
    left = {name for name in needed if not re.fullmatch(system, name)}
    assert left == {"libtorch.so", "libtorch_cpu.so", "libc10.so"}


@needs_library
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_it_uses_the_stable_abi_alone():
    text = subprocess.run(["nm", "-DuC", LIBRARY], capture_output=True, text=True, check=True)
    unstable = [line for line in text.stdout.splitlines() if re.search(r"\b(at|c10)::", line)]
    assert not unstable


def setup(mode: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"NASA_KERNELS_CUDA": mode} | env,
    )  # fmt: skip


def test_setup_says_that_it_leaves_the_kernels_out():
    done = setup("0")
    assert done.returncode == 0
    assert "without the CUDA C++ kernels" in done.stdout


def test_setup_refuses_an_unknown_mode():
    done = setup("maybe")
    assert done.returncode != 0
    assert "NASA_KERNELS_CUDA must be auto, 0 or 1, got 'maybe'" in done.stderr
