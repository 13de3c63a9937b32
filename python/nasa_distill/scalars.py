"""Numbers as callers have them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from nasa_diffusers.scalars import is_int, is_real, scalar

ONE = {"int": "an integer", "float": "a number"}
SEVERAL = {
    "tuple[int, int]": "two integers",
    "tuple[int, int, int]": "three integers",
    "tuple[float, float]": "two numbers",
}


def plain(value: Any) -> Any:
    """The Python number that a NumPy or torch scalar holds, also inside a tuple or list.

    Checkpoints, logs and results are compared, and written as JSON: they hold Python's numbers.
    """
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(map(plain, value))
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    return value


def read_numbers(settings: Any) -> None:
    """Check the fields of a frozen dataclass that are numbers, or pairs of them."""
    for field in fields(settings):
        kind, given = str(field.type), getattr(settings, field.name)
        if given is None and kind.endswith(" | None"):
            continue
        kind = kind.removesuffix(" | None")
        is_right = is_int if "int" in kind else is_real
        value = given
        if kind in ONE:
            value = scalar(given)
            if not is_right(value):
                raise _refusal(field.name, ONE[kind], given)
        elif kind in SEVERAL:
            value = tuple(map(scalar, given))
            if len(value) != kind.count(",") + 1 or not all(map(is_right, value)):
                raise _refusal(field.name, SEVERAL[kind], given)
        object.__setattr__(settings, field.name, value)


def _refusal(name: str, must: str, given: Any) -> ValueError:
    return ValueError(f"Settings: {name} must be {must}, got {given!r}")
