"""Whether what a pipeline runs is still what NASA was put on.

`from_pipe` may make a new denoiser of a guided one (AnimateDiff copies the weights into a UNet of
its own), and a pipeline's `unet` may be replaced by another. Hooks stay where they were put, so the
new one would run without NASA and without a word. The other parts of the pipeline are shared, the
text encoders and the VAE: a hook on them looks at the pipeline that runs.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import nn

from nasa_diffusers.caller import find_caller

DENOISERS = ("unet", "transformer", "transformer_2")
SHARED = ("text_encoder", "text_encoder_2", "text_encoder_3", "vae.decoder", "image_encoder")


class Guided(Protocol):
    """The hook on a denoiser, as far as it is asked here."""

    denoiser: nn.Module
    lost: str | None

    @property
    def pipe(self) -> Any: ...

    @property
    def is_off(self) -> bool: ...


class PipelineWatch:
    """A forward-pre-hook on the parts of a pipeline that are not its denoiser."""

    only_watches = True

    def __init__(self, guidance: Guided | None = None):
        self.guidance = (lambda: None) if guidance is None else weakref.ref(guidance)

    def __reduce__(self):
        # a part may be copied or saved; the copy watches nothing
        return PipelineWatch, ()

    def __deepcopy__(self, memo: dict) -> PipelineWatch:
        return PipelineWatch()

    def attach(self, pipe: Any) -> list[Any]:
        """On every part there is; what to call to take it off."""
        return [part.register_forward_pre_hook(self) for part in _shared(pipe)]

    def __call__(self, part: nn.Module, args: tuple) -> None:
        guidance = self.guidance()
        if torch.compiler.is_compiling() or guidance is None or guidance.is_off:
            return
        caller = find_caller()
        if caller is None:
            return
        guidance.lost = what_runs_instead(guidance, caller.pipe)
        if guidance.lost is not None:
            raise RuntimeError(
                f"nasa_diffusers: {guidance.lost}. Call disable_nasa on the pipeline that NASA was "
                "put on, then enable_nasa on this one, or run it without"
            )


def what_runs_instead(guidance: Guided, pipe: Any) -> str | None:
    """A sentence about a denoiser that runs in place of the guided one; None where none does."""
    denoisers = denoisers_of(pipe)
    own, name = guidance.denoiser, type(pipe).__name__
    if not denoisers or any(denoiser is own for denoiser in denoisers):
        return None
    for denoiser in denoisers:
        is_guided = any(
            type(hook) is type(guidance)
            for hook in getattr(denoiser, "_forward_pre_hooks", {}).values()
        )
        if is_guided:
            continue
        if pipe is guidance.pipe:
            return (
                f"NASA was put on the {type(own).__name__} that this {name} had then; it runs "
                f"another {type(denoiser).__name__} now, which is not guided"
            )
        if isinstance(denoiser, nn.Module) and _has_weights_of(denoiser, own):
            return (
                f"{name} runs a {type(denoiser).__name__} that was made from the guided "
                f"{type(own).__name__}; the copy is not guided"
            )
    return None


def denoisers_of(pipe: Any) -> list[Any]:
    """The networks that a pipeline calls once per step, without the wrapper of torch.compile."""
    modules = [getattr(pipe, name, None) for name in DENOISERS]
    return [getattr(m, "_orig_mod", m) for m in modules if m is not None]


def _shared(pipe: Any) -> Iterator[nn.Module]:
    for path in SHARED:
        part = pipe
        for name in path.split("."):
            part = getattr(part, name, None)
        if isinstance(part, nn.Module):
            yield part


def _has_weights_of(copy: nn.Module, own: nn.Module) -> bool:
    """Whether the first weight of the same name and shape is the same in both."""
    weights = dict(own.named_parameters())
    for name, weight in copy.named_parameters():
        other = weights.get(name)
        if other is not None and other.shape == weight.shape and other.numel() > 1:
            if weight.is_meta or other.is_meta:
                return False
            return torch.equal(weight.float().cpu(), other.float().cpu())
    return False
