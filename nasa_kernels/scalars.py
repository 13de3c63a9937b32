"""Numbers as people have them: Python's, NumPy's, and tensors without dimensions."""

from typing import Any

import torch
from torch import Tensor

_REAL = (int, float, torch.SymFloat, torch.SymInt)
_INTEGER = (int, torch.SymInt)


def real(value: Any) -> Any:
    """A number as Python's, None for what is none. True and False are none, and neither is a
    tensor that learns: as a number it would lose its gradient."""
    return _of(value, _REAL)


def whole(value: Any) -> Any:
    """An integer as Python's, None for what is none."""
    return _of(value, _INTEGER)


def _of(value: Any, kinds: tuple[type, ...]) -> Any:
    if not isinstance(value, _REAL):
        is_tensor = isinstance(value, Tensor)
        # numpy.generic, an array or a tensor without dimensions
        if is_tensor and value.requires_grad or getattr(value, "shape", None) != ():
            return None
        value = value.item()
    return value if isinstance(value, kinds) and not isinstance(value, bool) else None
