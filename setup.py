"""Package metadata, and calls of CMake for the compiled kernels.

`pip install --no-build-isolation .` after torch. The kernels for CPUs are built where there are a
C++ compiler and CMake, those for GPUs where there is an nvcc as well; an install without either
works, on PyTorch's own attention and on Triton. NASA_KERNELS_CPU=1 and NASA_KERNELS_CUDA=1 make
what is missing, or a build that fails, an error; 0 leaves the kernels out. NASA_CUDA_ARCHS ("9.0a")
builds for one's own GPU alone.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "nasa_kernels/__init__.py").read_text())[1]

# NumPy: Triton 3.6 fails with 2.4 in its interpreter, in which the tests run kernels.
DIFFUSERS = [
    # 5.24 of transformers asks for a peft, 0.22, that is not out
    *("diffusers>=0.35,<0.43", "transformers>=4.53,!=5.24.*", "accelerate>=1.0", "peft>=0.17"),
    *("pillow>=10", "tqdm"),
]
DISTILL = [*DIFFUSERS, "safetensors", "matplotlib>=3.8"]
DEMO = ["rich>=13", "numpy"]
# nvidia-ml-py: the clock of the GPU around a measurement
BENCH = [*DEMO, "matplotlib>=3.8", "nvidia-ml-py"]
TEST = [
    *("pytest>=8", "pytest-timeout", "pytest-xdist", "hypothesis>=6.100"),
    *("triton>=3.6,<3.10", "numpy<2.4", "ruff", "mypy", "cmake>=3.22", "ninja"),
]

# One nvcc for all: `pip install nasa-kernels[cuda-build]` brings it without a CUDA toolkit.
CUDA_BUILD = ["cuda-toolkit[nvcc,cudart,crt,nvvm,cccl]==13.0.*", "cmake>=3.22", "ninja"]


def find_nvcc() -> Path | None:
    """$CUDA_HOME, then the toolkit, then the PyPI packages, then PATH."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    nvidia = importlib.util.find_spec("nvidia")
    homes += [f"{p}/cu13" for p in (nvidia and nvidia.submodule_search_locations) or ()]
    candidates = [Path(home) / "bin" / "nvcc" for home in homes if home]
    found = shutil.which("nvcc")
    candidates += [Path(found)] if found else []
    return next((path for path in candidates if path.is_file()), None)


def mode_of(variable: str) -> str:
    mode = os.environ.get(variable, "auto")
    if mode not in ("auto", "0", "1"):
        raise ValueError(f"{variable} must be auto, 0 or 1, got {mode!r}")
    return mode


def chosen_nvcc() -> Path | None:
    """The nvcc to build with, or None to install without the CUDA C++ kernels."""
    mode = mode_of("NASA_KERNELS_CUDA")
    nvcc = find_nvcc() if mode != "0" else None
    if mode == "1" and nvcc is None:
        raise RuntimeError(
            "NASA_KERNELS_CUDA=1 but there is no nvcc: set CUDA_HOME, or pip install "
            f"'{CUDA_BUILD[0]}'"
        )
    return nvcc


# cmake and ninja may come from PyPI, beside this Python
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


def missing_for_cpu() -> str | None:
    """What the kernels for CPUs cannot be built without, or None."""
    if importlib.util.find_spec("torch") is None:
        return "torch, against which they are built, is not installed"
    if shutil.which("cmake", path=PATH) is None:
        return "there is no cmake; pip install cmake"
    compilers = (os.environ.get("CXX", "").split() or [""])[0], "c++", "g++", "clang++"
    if not any(shutil.which(name, path=PATH) for name in compilers if name):
        return "there is no C++ compiler; on Debian: apt install g++"
    return None


def builds_for_cpu() -> bool:
    """Whether to build the kernels for CPUs."""
    mode = mode_of("NASA_KERNELS_CPU")
    if mode == "0":
        print("nasa-kernels: NASA_KERNELS_CPU=0: without the CPU kernels")
        return False
    reason = missing_for_cpu()
    if reason is not None and mode == "1":
        raise RuntimeError(f"NASA_KERNELS_CPU=1 but {reason}")
    if reason is not None:
        print(f"nasa-kernels: without the CPU kernels: {reason}")
    return reason is None


class CMakeBuild(build_ext):
    """`_cpu_C.so` and `_C.so` are made by CMakeLists.txt; here are only the paths."""

    def get_ext_filename(self, name: str) -> str:
        return name.replace(".", "/") + ".so"  # no Python ABI in it, and none in its name

    def build_extension(self, ext: Extension) -> None:
        if ext.name == CUDA:
            options = ["-DNASA_CPU=OFF", "-DNASA_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={chosen_nvcc()}"]
            if archs := os.environ.get("NASA_CUDA_ARCHS"):
                options.append(f"-DNASA_CUDA_ARCHS={archs.replace(' ', ';')}")
            self.cmake(ext, "cuda", options)
            return
        try:
            self.cmake(ext, "cpu", [])
        except (subprocess.CalledProcessError, OSError) as error:
            # an old library beside new schemas would be worse than none
            (ROOT / "nasa_kernels/_cpu_C.so").unlink(missing_ok=True)
            raise CompileError(f"without the CPU kernels, whose build failed: {error}") from error

    def cmake(self, ext: Extension, folder: str, options: list[str]) -> None:
        torch = importlib.util.find_spec("torch")
        if torch is None:
            raise RuntimeError("the compiled kernels are built against torch: install torch first")
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = ROOT / "build" / folder
        ninja = ["-G", "Ninja"] if shutil.which("ninja", path=PATH) else []
        location = f"-DNASA_TORCH_DIR={torch.submodule_search_locations[0]}"
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
        for command in (
            ["cmake", "-S", ROOT, "-B", build, *ninja, location, *options],
            ["cmake", "--build", build, "-j", jobs],
            ["cmake", "--install", build, "--prefix", target],
        ):
            subprocess.run(command, check=True, env=os.environ | {"PATH": PATH})


class Wheel(bdist_wheel):
    """The stable ABI of torch and no Python ABI: one wheel for every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return ("py3", "none", tag[2])


CPU, CUDA = "nasa_kernels._cpu_C", "nasa_kernels._C"
extensions = []
if builds_for_cpu():
    # optional: a build that fails is a warning
    optional = mode_of("NASA_KERNELS_CPU") != "1"
    extensions.append(Extension(CPU, sources=[], optional=optional))
if chosen_nvcc():
    extensions.append(Extension(CUDA, sources=[]))
else:
    print("nasa-kernels: no nvcc, or NASA_KERNELS_CUDA=0: without the CUDA C++ kernels")

setup(
    name="nasa-kernels",
    version=VERSION,
    description="Negative prompts for one-step and few-step diffusion models: fused NASA attention",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["nasa_kernels", "nasa_kernels.*"]),
        *find_packages("python"),
    ],
    package_dir={
        "nasa_kernels": "nasa_kernels",
        "nasa_diffusers": "python/nasa_diffusers",
        "nasa_distill": "python/nasa_distill",
    },
    package_data={
        "nasa_kernels": ["py.typed"],
        "nasa_diffusers": ["py.typed"],
        "nasa_distill": ["models/*/*", "models/*/*/*"],
    },
    ext_modules=extensions,
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
    install_requires=["torch>=2.10,<2.16"],
    extras_require={
        "triton": ["triton>=3.6,<3.10"],
        "cuda-build": CUDA_BUILD,
        "diffusers": DIFFUSERS,
        "distill": DISTILL,
        "demo": [*DISTILL, *DEMO],
        "bench": [*DIFFUSERS, *BENCH],
        "test": [*DISTILL, *DEMO, *BENCH, *TEST],
    },
)
