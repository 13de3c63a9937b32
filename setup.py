"""Package metadata, and calls of CMake for the compiled kernels.

`pip install --no-build-isolation .` after torch, against which they are built: those for CPUs where
there are a C++ compiler and CMake, those for GPUs on Linux where there is an nvcc as well. An
install without torch, as in pip's own build environment, or without either, works: on PyTorch's
own attention and on Triton. NASA_KERNELS_CPU=1 and NASA_KERNELS_CUDA=1 make what is missing, or a
build that fails, an error; 0 leaves the kernels out. NASA_CUDA_ARCHS ("9.0a") builds for one's own
GPU alone; NASA_OLD_GLIBC=1 builds for glibc 2.28 and later, as wheels are (cmake/old_glibc.cmake).
"""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


VERSION = re.search(r'__version__ = "(.+)"', text_of("nasa_kernels/__init__.py"))[1]


def description() -> str:
    """The README where its links and pictures lead nowhere: without either."""
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)\n*", "", text_of("README.md"))
    text = re.sub(r"<!--.*?-->\n*", "", text)
    return re.sub(r"\[([^\]]*)\]\((?!https?://)[^)]*\)", r"\1", text)


# NumPy: Triton 3.6 fails with 2.4 in its interpreter, in which the tests run kernels.
DIFFUSERS = [
    # 5.24 of transformers asks for a peft, 0.22, that is not out
    *("diffusers>=0.35,<0.43", "transformers>=4.53,!=5.24.*", "accelerate>=1.0", "peft>=0.17"),
    *("pillow>=10.1", "tqdm"),
]
DISTILL = [*DIFFUSERS, "safetensors", "matplotlib>=3.8"]
DEMO = ["rich>=13", "numpy"]
APP = [*DIFFUSERS, "gradio>=6,<7"]
# nvidia-ml-py: the clock of the GPU around a measurement
BENCH = [*DEMO, "matplotlib>=3.8", "nvidia-ml-py"]
TEST = [
    *("pytest>=8", "pytest-timeout", "pytest-xdist", "hypothesis>=6.100"),
    *("triton>=3.6,<3.10", "numpy<2.4", "ruff", "mypy", "cmake>=3.22", "ninja"),
]
TRITON = [
    "triton>=3.6,<3.10; sys_platform == 'linux'",
    "triton-windows>=3.6,<3.10; sys_platform == 'win32'",
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


# the oldest torch whose stable ABI has what the libraries use: CMakeLists.txt
OLDEST_TORCH = (2, 10)


def missing_torch() -> str | None:
    """Why nothing can be compiled against torch here, or None. It is not imported."""
    if importlib.util.find_spec("torch") is None:
        return (
            "torch, against which they are built, is not installed where this is built; install "
            "torch first and pip install --no-build-isolation"
        )
    version = importlib.metadata.version("torch")
    if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < OLDEST_TORCH:
        return f"they are built against torch 2.10 or newer, torch {version} is installed"
    return None


def missing_for_cuda() -> str | None:
    """What the kernels for GPUs cannot be built without, or None."""
    if not sys.platform.startswith("linux"):
        return "they are built on Linux alone"
    if find_nvcc() is None:
        return f"there is no nvcc; set CUDA_HOME, or pip install '{CUDA_BUILD[0]}'"
    return missing_torch()


# cmake and ninja may come from PyPI, beside this Python
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


def missing_for_cpu() -> str | None:
    """What the kernels for CPUs cannot be built without, or None."""
    if sys.platform == "win32":
        return "they are built on Linux and macOS alone"
    if (reason := missing_torch()) is not None:
        return reason
    if shutil.which("cmake", path=PATH) is None:
        return "there is no cmake; pip install cmake"
    compilers = (os.environ.get("CXX", "").split() or [""])[0], "c++", "g++", "clang++"
    if not any(shutil.which(name, path=PATH) for name in compilers if name):
        return "there is no C++ compiler; on Debian: apt install g++"
    return None


def builds(kernels: str, variable: str, missing: Callable[[], str | None]) -> bool:
    """Whether to build these kernels; what is missing is an error where `variable` is 1."""
    mode = mode_of(variable)
    reason = f"{variable}=0" if mode == "0" else missing()
    if reason is None:
        return True
    if mode == "1":
        raise RuntimeError(f"{variable}=1 but the {kernels} cannot be built: {reason}")
    print(f"nasa-kernels: without the {kernels}: {reason}")
    return False


class CMakeBuild(build_ext):
    """`_cpu_C.so` and `_C.so` are made by CMakeLists.txt; here are only the paths."""

    def get_ext_filename(self, name: str) -> str:
        return name.replace(".", "/") + ".so"  # no Python ABI in it, and none in its name

    def build_extension(self, ext: Extension) -> None:
        if ext.name == CUDA:
            options = ["-DNASA_CPU=OFF", "-DNASA_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={find_nvcc()}"]
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
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = ROOT / "build" / folder
        ninja = ["-G", "Ninja"] if shutil.which("ninja", path=PATH) else []
        location = f"-DNASA_TORCH_DIR={torch.submodule_search_locations[0]}"
        old_glibc = f"-DNASA_OLD_GLIBC={'ON' if mode_of('NASA_OLD_GLIBC') == '1' else 'OFF'}"
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
        for command in (
            ["cmake", "-S", ROOT, "-B", build, *ninja, location, old_glibc, *options],
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
if builds("CPU kernels", "NASA_KERNELS_CPU", missing_for_cpu):
    # optional: a build that fails is a warning
    optional = mode_of("NASA_KERNELS_CPU") != "1"
    extensions.append(Extension(CPU, sources=[], optional=optional))
if builds("CUDA C++ kernels", "NASA_KERNELS_CUDA", missing_for_cuda):
    extensions.append(Extension(CUDA, sources=[]))

setup(
    name="nasa-kernels",
    version=VERSION,
    description="Negative prompts for one-step and few-step diffusion models: fused NASA attention",
    long_description=description(),
    long_description_content_type="text/markdown",
    author="The authors of nasa-kernels",
    license_expression="Apache-2.0",
    keywords="diffusion, negative prompt, attention, few-step, Triton, CUDA, PyTorch",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: C++",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 15)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
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
        # its models are a package of their own: python/nasa_distill/models/pyproject.toml
        "nasa_distill": ["py.typed"],
    },
    ext_modules=extensions,
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
    # no cap: pip would replace the torch that is there. The kernels check theirs when they load
    install_requires=["torch>=2.7"],
    extras_require={
        "triton": TRITON,
        "cuda-build": CUDA_BUILD,
        "diffusers": DIFFUSERS,
        "distill": DISTILL,
        "demo": [*DISTILL, *DEMO],
        "app": APP,
        "bench": [*DIFFUSERS, *BENCH],
        "test": [*DISTILL, *DEMO, *BENCH, *TEST],
    },
)
