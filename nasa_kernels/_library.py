"""Loading a compiled library of the package, or one sentence why it does not load."""

import ctypes
import re
from pathlib import Path

import torch

# the oldest torch whose stable ABI has what the libraries use: CMakeLists.txt
_TORCH = (2, 10)


def open_library(path: Path, symbol: str) -> ctypes.CDLL | str:
    """The library, whose operators are then registered. `symbol`: what this version's must have."""
    major, minor = re.findall(r"\d+", torch.__version__)[:2]
    if (int(major), int(minor)) < _TORCH:
        return f"{path.name} needs torch 2.10 or newer, this is torch {torch.__version__}"
    try:
        library = ctypes.CDLL(str(path))
    except (OSError, RuntimeError) as error:
        first = next(iter(str(error).splitlines()), "").rstrip(".")
        return (
            f"{path.name} does not load under torch {torch.__version__}: {first}; "
            "install nasa-kernels again"
        )
    if not hasattr(library, symbol):
        return (
            f"{path.name} is no library of this version of nasa-kernels: it has no {symbol}; "
            "install nasa-kernels again"
        )
    return library
