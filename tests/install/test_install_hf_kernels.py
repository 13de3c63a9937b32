"""The layout of Hugging Face's kernels: made by one command, loaded beside the package itself."""

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from support.cases import make_inputs

from nasa_kernels import nasa_attention
from nasa_kernels.testing import Shape

ROOT = Path(__file__).parents[2]
SHAPE = Shape("small", 2, 9, 2, 16, 5, 7)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    out = tmp_path_factory.mktemp("kernels")
    subprocess.run([sys.executable, ROOT / "tools" / "hf_kernel.py", out], check=True)
    return out


def load(folder, name):
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def kernel(repository):
    """The variant that the package `kernels` does not load here: one build loads once."""
    return load(repository / "build" / "torch-cuda", "a_build_of_nasa")


ALLOWED = {"torch", "triton"} | sys.stdlib_module_names


def test_it_imports_nothing_but_torch_and_itself(repository):
    """Relative imports, the standard library, torch and Triton: what the layout allows."""
    files = list((repository / "build").rglob("*.py"))
    assert len(files) > 40
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for name in names:
                assert name.partition(".")[0] in ALLOWED, f"{path}: {name}"


@pytest.mark.parametrize("variant", ["cpu", "cuda"])
def test_its_metadata(repository, variant):
    metadata = json.loads(
        (repository / "build" / f"torch-{variant}" / "metadata.json").read_text(encoding="utf-8")
    )
    assert metadata["name"] == "nasa-kernels" and metadata["backend"] == {"type": variant}
    assert metadata["id"].isidentifier()


def test_it_computes_what_the_package_does(kernel):
    inputs = make_inputs(SHAPE, torch.float32, "cpu")
    for x in inputs.values():
        x.requires_grad_()
    results = []
    for attend in (kernel.nasa_attention, nasa_attention):
        o = attend(**inputs, alpha=0.5)
        o.square().sum().backward()
        results.append([o.detach(), *(x.grad for x in inputs.values())])
        for x in inputs.values():
            x.grad = None
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    # operators of its own, in a namespace of its own
    name = kernel.ops.FORWARD["cpu"].name()
    assert name.startswith("nasa_kernels_cuda_") and name.endswith("::forward_cpu")


def test_its_layer(kernel):
    inputs = make_inputs(SHAPE, torch.float32, "cpu")
    layer = kernel.layers.NasaAttention()
    assert torch.equal(layer(**inputs, alpha=0.5), kernel.nasa_attention(**inputs, alpha=0.5))


def test_it_loads_as_a_kernel(repository, monkeypatch):
    """By the package `kernels`, without the network, under its own id."""
    kernels = pytest.importorskip("kernels", reason="the package kernels is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    module = kernels.get_local_kernel(repository)
    inputs = make_inputs(SHAPE, torch.float32, "cpu")
    o = module.nasa_attention(**inputs, alpha=0.5)
    torch.testing.assert_close(o, nasa_attention(**inputs, alpha=0.5), rtol=1e-4, atol=1e-5)

    monkeypatch.setenv("LOCAL_KERNELS", f"org/nasa-kernels={repository}")
    again = kernels.get_kernel("org/nasa-kernels", version=0, trust_remote_code=True)
    assert torch.equal(again.nasa_attention(**inputs, alpha=0.5), o)


def test_kernelize_takes_its_layer(repository):
    kernels = pytest.importorskip("kernels", reason="the package kernels is not installed")

    @kernels.use_kernel_forward_from_hub("NasaAttention")
    class Plain(torch.nn.Module):
        def forward(self, q, k_pos, v_pos, k_neg, v_neg, alpha, mask_pos=None, mask_neg=None):
            raise AssertionError("not replaced")

    place = kernels.LocalLayerRepository(repo_path=repository, layer_name="NasaAttention")
    with kernels.use_kernel_mapping({"NasaAttention": {"cpu": place}}):
        layer = kernels.kernelize(Plain(), mode=kernels.Mode.INFERENCE, device="cpu")
    inputs = make_inputs(SHAPE, torch.float32, "cpu")
    o = layer(**inputs, alpha=0.5)
    torch.testing.assert_close(o, nasa_attention(**inputs, alpha=0.5), rtol=1e-4, atol=1e-5)


# ---- the sources for the kernel-builder ----------------------------------------------------------

# what the builder's own header of this name does, for one compilation
REGISTRATION = """
#pragma once
#include <Python.h>
#define STABLE_TORCH_LIBRARY_IMPL_EXPAND(NAME, DEVICE, MODULE) \\
    STABLE_TORCH_LIBRARY_IMPL(NAME, DEVICE, MODULE)
#define NASA_JOIN_(A, B) A##B
#define NASA_JOIN(A, B) NASA_JOIN_(A, B)
#define REGISTER_EXTENSION(NAME) \\
    PyMODINIT_FUNC NASA_JOIN(PyInit_, NAME)() { \\
        static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "nasa", nullptr, 0, nullptr}; \\
        return PyModule_Create(&module); \\
    }
"""
NAME = "_nasa_kernels_cuda_1a2b3c4"


@pytest.fixture(scope="module")
def aot(tmp_path_factory):
    out = tmp_path_factory.mktemp("aot")
    subprocess.run([sys.executable, ROOT / "tools" / "hf_kernel.py", "--aot", out], check=True)
    return out


def test_the_builder_gets_every_source_and_no_other(aot):
    text = (aot / "build.toml").read_text(encoding="utf-8")
    assert "@" not in text.partition("[general]")[2]
    listed = set(re.findall(r'"((?:csrc|torch-ext)/[^"]+)"', text))
    there = {str(path.relative_to(aot)) for path in (aot / "csrc").iterdir()}
    assert listed == there | {"torch-ext/torch_binding.cpp"}
    # one more file of kernels must be in the list of cmake/cuda.cmake
    assert {path.name for path in (ROOT / "csrc").glob("*.cu")} == {
        Path(name).name for name in listed if name.endswith(".cu")
    }
    library = aot / "torch-ext" / "nasa_kernels" / "_cuda" / "extension.py"
    assert '.glob("_nasa_kernels_*.so"))' in library.read_text(encoding="utf-8")
    assert not (aot / "torch-ext" / "nasa_kernels" / "_ops.py").exists()


def test_the_binding_compiles_under_the_builders_names(aot):
    """As a Python module of its name, its operators in the namespace of its name."""
    compiler, include = shutil.which("g++"), Path(sysconfig.get_path("include"))
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    cuda = [Path(x) / "include" for x in homes if x and (Path(x) / "include/cuda.h").is_file()]
    if compiler is None or not (include / "Python.h").is_file() or not cuda:
        pytest.skip("needs g++, Python.h and the headers of a CUDA toolkit")
    (aot / "torch-ext" / "registration.h").write_text(REGISTRATION, encoding="utf-8")
    torch_headers = Path(torch.__file__).parent / "include"
    subprocess.run(
        [
            compiler, "-std=c++17", "-O0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Werror",
            "-Wno-attributes", "-DTORCH_TARGET_VERSION=0x020b000000000000",
            f"-DTORCH_EXTENSION_NAME={NAME}", "-DPy_LIMITED_API=0x030a0000",
            "-isystem", torch_headers, "-isystem", cuda[0], "-isystem", include,
            "-c", aot / "torch-ext" / "torch_binding.cpp", "-o", aot / "binding.o",
        ],
        check=True,
    )  # fmt: skip
    content = (aot / "binding.o").read_bytes()
    assert f"PyInit_{NAME}".encode() in content and f"\0{NAME}\0".encode() in content
    # nothing is registered under the package's own name
    assert b"\0nasa_kernels\0" not in content
