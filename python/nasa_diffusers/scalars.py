"""Numbers as people have them: Python's, NumPy's, and tensors without dimensions."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def scalar(value: Any) -> Any:
    """A NumPy or torch scalar as Python's number; anything else as it is, for a check to refuse.

    A tensor that learns stays one: as a number it would lose its gradient.
    """
    if isinstance(value, Tensor):
        return value if value.dim() or value.requires_grad else value.item()
    # numpy.generic, or an array without dimensions
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    return value


def is_real(value: Any) -> bool:
    """A float or an int; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
