"""Classes of diffusers that not every supported version has."""

import importlib


class NotThere:
    """Stands for a class that the installed diffusers does not have; nothing is one of it."""


def stock_class(module: str, *names: str) -> type:
    """The first of `names` in a module of diffusers' transformers."""
    try:
        found = importlib.import_module(f"diffusers.models.transformers.{module}")
    except ImportError:
        return NotThere
    return next((getattr(found, name) for name in names if hasattr(found, name)), NotThere)
