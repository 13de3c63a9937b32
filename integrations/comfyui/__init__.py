"""ComfyUI nodes of nasa-kernels: a negative prompt that acts inside attention."""

from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
