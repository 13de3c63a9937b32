"""What ComfyUI imports and these tests do not use, as modules that have any name there is."""

import importlib.util
import sys
import types

PACKAGES = (
    ("torchvision", "transforms", "transforms.functional", "ops", "models"),
    ("torchaudio", "transforms", "functional"),
    ("kornia", "filters", "morphology", "color", "geometry", "geometry.transform"),
    ("spandrel",),
)


class _StandIn(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__module__": self.__name__})


def put() -> None:
    """Those whose package is not installed."""
    for package, *parts in PACKAGES:
        if importlib.util.find_spec(package) is not None:
            continue
        for name in (package, *(f"{package}.{part}" for part in parts)):
            module = _StandIn(name)
            module.__spec__ = importlib.util.spec_from_loader(name, None)
            module.__path__ = []
            sys.modules[name] = module
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)
