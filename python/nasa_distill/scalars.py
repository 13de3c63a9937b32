"""Numbers as callers have them."""

from __future__ import annotations

from typing import Any


def plain(value: Any) -> Any:
    """The Python number that a NumPy or torch scalar holds, also inside a tuple or list.

    Checkpoints, logs and results are compared, and written as JSON: they hold Python's numbers.
    """
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(map(plain, value))
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    return value


def plain_fields(settings: Any) -> None:
    """The same for every field of a frozen dataclass, in place."""
    for name in settings.__dataclass_fields__:
        object.__setattr__(settings, name, plain(getattr(settings, name)))
