"""The CUDA C++ extension `_C.so`: loads it, says why it is not here, and what it does not take.

The kernels are implementations only; `nasa_kernels/ops.py` defines the schemas and must do so
before `load` is called.
"""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nasa_kernels._library import open_library

LIBRARY = Path(__file__).parents[1] / "_C.so"
NOT_BUILT = (
    "this install was built without the CUDA C++ kernels; install again with --no-build-isolation "
    "where torch and nvcc are, and NASA_KERNELS_CUDA=1 to make what is missing an error"
)


@functools.cache
def load() -> str | None:
    """Register the kernels. None when they are there, otherwise one sentence why not."""
    if not LIBRARY.is_file():
        return NOT_BUILT
    library = open_library(LIBRARY)
    return library if isinstance(library, str) else None


@functools.cache
def why_not(device: torch.device) -> str | None:
    """None when the kernels run on tensors of `device`, otherwise one sentence why not."""
    if (reason := load()) is not None:
        return reason
    if device.type != "cuda":
        return f"it runs on NVIDIA GPUs, not on {device.type} tensors"
    if torch.version.cuda is None:
        return "this torch is not built for CUDA"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"its kernels need compute capability 8.0, this GPU has {major}.{minor}"
    architectures = _architectures()
    if not has_code(architectures, major, minor):
        return (
            f"it has no code for this GPU's compute capability {major}.{minor}, only for "
            f"{', '.join(architectures)}; install it again from source with "
            f"NASA_CUDA_ARCHS={major}.{minor}"
        )
    runtime, driver = _cuda_versions()
    if driver // 1000 < runtime // 1000:
        return (
            f"it was built with CUDA {_version(runtime)}, and the driver serves CUDA "
            f"{_version(driver)}; update the driver, or build it with CUDA {driver // 1000}"
        )
    return None


def has_code(architectures: Sequence[str], major: int, minor: int) -> bool:
    """Whether a GPU runs code for one of `architectures`, which are like 8.0, 9.0a or 12.0+PTX."""
    for architecture in architectures:
        number, _, ptx = architecture.partition("+")
        own_major, own_minor = (int(part) for part in number.rstrip("af").split("."))
        if number.endswith("a"):
            runs = (major, minor) == (own_major, own_minor)
        else:
            # machine code runs on later GPUs of its generation, PTX on all later ones
            runs = (major == own_major and minor >= own_minor) or (
                bool(ptx) and (major, minor) >= (own_major, own_minor)
            )
        if runs:
            return True
    return False


@functools.cache
def _architectures() -> tuple[str, ...]:
    ask = ctypes.CDLL(str(LIBRARY)).nasa_kernels_architectures
    ask.restype = ctypes.c_char_p
    return tuple(ask().decode().split(","))


@functools.cache
def _cuda_versions() -> tuple[int, int]:
    """Of the runtime in the extension, and of the driver: 13000 for 13.0."""
    library = ctypes.CDLL(str(LIBRARY))
    return library.nasa_kernels_cuda_version(), library.nasa_kernels_driver_version()


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


@functools.cache
def why_not_head_dim(device: torch.device, head_dim: int, backward: bool = False) -> str | None:
    """None when the kernels take this head_dim on `device`, otherwise one sentence why not."""
    need = _shared_bytes(head_dim, backward)
    properties: Any = torch.cuda.get_device_properties(device)
    limit = properties.shared_memory_per_block_optin
    if need > limit:
        return (
            f"its {'backward' if backward else 'forward'} needs {need} bytes of shared memory for "
            f"head_dim {head_dim}, a block on this GPU has {limit}"
        )
    return None


@functools.cache
def _shared_bytes(head_dim: int, backward: bool) -> int:
    library = ctypes.CDLL(str(LIBRARY))
    return library.nasa_kernels_shared_bytes(ctypes.c_int(head_dim), ctypes.c_bool(backward))


def overlap_launches(on: bool) -> None:
    """Whether a forward on Hopper may start while the kernel before it in the stream ends.

    Programmatic dependent launch, in this whole process. Off by default: it is not measured yet.
    """
    library = ctypes.CDLL(str(LIBRARY))
    library.nasa_kernels_overlap_launches(ctypes.c_bool(on))
