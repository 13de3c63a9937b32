"""Loading a compiled library of the package, or one sentence why it does not load."""

import ctypes
import mmap
import re
from pathlib import Path

import torch

# the oldest torch whose stable ABI has what the libraries use: CMakeLists.txt
_TORCH = (2, 10)
# the number of the operators in `ops.py`, as csrc/abi.h has it: one more whenever one of them, its
# arguments or their meaning change
ABI = 2
_REBUILD = (
    "build it again from these sources, with pip install --no-build-isolation, or install "
    "nasa-kernels again"
)


def open_library(path: Path) -> ctypes.CDLL | str:
    """The library, whose operators are then registered.

    One that was built from other sources is not loaded: it would register its operators, and the
    first call would hand them arguments that they do not expect.
    """
    major, minor = re.findall(r"\d+", torch.__version__)[:2]
    if (int(major), int(minor)) < _TORCH:
        return f"{path.name} needs torch 2.10 or newer, this is torch {torch.__version__}"
    is_ours, abi = _look_into(path)
    if is_ours and abi != ABI:
        built = "older ones" if abi is None else f"number {abi}"
        return (
            f"{path.name} was built from another version of the sources: its operators are "
            f"{built}, those of this nasa-kernels are number {ABI}; {_REBUILD}"
        )
    try:
        library = ctypes.CDLL(str(path))
    except (OSError, RuntimeError) as error:
        first = next(iter(str(error).splitlines()), "").rstrip(".")
        return (
            f"{path.name} does not load under torch {torch.__version__}: {first}; "
            "install nasa-kernels again"
        )
    if not is_ours:
        return (
            f"{path.name} is no library of this version of nasa-kernels: it has no "
            "nasa_kernels_abi; install nasa-kernels again"
        )
    return library


def _look_into(path: Path) -> tuple[bool, int | None]:
    """Whether the file has operators of nasa_kernels, and the number of csrc/abi.h."""
    with path.open("rb") as file:
        try:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            # an empty file
            return False, None
        with content:
            if (found := re.search(rb"nasa_kernels ABI (\d+)\0", content)) is not None:
                return True, int(found[1])
            # the name of the operators' namespace
            return content.find(b"nasa_kernels") >= 0, None
