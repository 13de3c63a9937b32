"""The methods: one file, one class each. A new one is a subclass of `Method`, listed here."""

from typing import Any

from nasa_diffusers.methods.base import Method, with_alpha
from nasa_diffusers.methods.nag import NAG
from nasa_diffusers.methods.nasa import NASA
from nasa_diffusers.methods.projected import ProjectedNASA
from nasa_diffusers.methods.vsf import VSF

METHODS: tuple[type[Method], ...] = (NASA, ProjectedNASA, NAG, VSF)

__all__ = ["METHODS", "NAG", "NASA", "VSF", "Method", "ProjectedNASA", "read_method", "with_alpha"]


def read_method(method: Any, alpha: Any = None) -> Method:
    """The `method` of `enable_nasa`, of which `alpha` alone is short for `NASA(alpha)`."""
    if method is None:
        return NASA(alpha)
    if not isinstance(method, Method):
        names = ", ".join(cls.name for cls in METHODS)
        hint = ""
        if isinstance(method, type) and issubclass(method, Method):
            hint = f"; write {method.__name__}()"
        raise ValueError(
            f"enable_nasa: method must be an object of one of the classes {names} of "
            f"nasa_diffusers, got {method!r}{hint}"
        )
    if alpha is not None:
        raise ValueError(
            f"enable_nasa: alpha is short for NASA(alpha); with a method write "
            f"{method.name}(alpha=...)"
        )
    return method
