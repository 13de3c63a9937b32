"""The back end for CPU tensors: fused kernels in C++, `_cpu_C.so`, and what runs without them.

The kernels implement the operators that `nasa_kernels/ops.py` defines. Where the library was not
built, or does not load, `attention.py` and `joint.py` implement them: PyTorch's own attention for
each prompt, and an epilogue.

NASA_CPU_ISA names an instruction set (`generic`, `avx2`, `avx512`, `avx512bf16`) that the kernels
are to take instead of the best one, or is `none` and leaves the kernels out; for tests, and read
once.
"""

import ctypes
import functools
import os
from pathlib import Path

from nasa_kernels._library import open_library

LIBRARY = Path(__file__).parents[1] / "_cpu_C.so"
NOT_BUILT = (
    "this install was built without the CPU kernels; install again with --no-build-isolation where "
    "torch and a C++ compiler are, and NASA_KERNELS_CPU=1 to make a failing build an error"
)


@functools.cache
def load() -> str | None:
    """Register the kernels. None when they are there, otherwise one sentence why not."""
    wanted = os.environ.get("NASA_CPU_ISA")
    if wanted == "none":
        return "NASA_CPU_ISA=none leaves the CPU kernels out"
    if not LIBRARY.is_file():
        return NOT_BUILT
    library = open_library(LIBRARY)
    if isinstance(library, str):
        return library
    if not _isa_of(library):
        raise RuntimeError(
            "NASA_CPU_ISA must be none or an instruction set that this CPU has and that was "
            f"compiled, got {wanted!r}; without the variable the best one is taken"
        )
    return None


def isa() -> str | None:
    """The instruction set of the kernels; None where PyTorch's attention runs instead of them."""
    return _isa_of(ctypes.CDLL(str(LIBRARY))) if load() is None else None


def implementation() -> str:
    """What runs on CPU tensors, and why."""
    reason = load()
    if reason is None:
        return f"kernels for {isa()}"
    return f"PyTorch's attention for each prompt: {reason}"


def _isa_of(library: ctypes.CDLL) -> str:
    library.nasa_cpu_isa.restype = ctypes.c_char_p
    return library.nasa_cpu_isa().decode()
