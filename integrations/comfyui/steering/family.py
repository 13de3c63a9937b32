"""A network as guidance sees it: how many attentions to text there are, which calls they are, and
what else must know that the text is several prompts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .call import Guide

NET = "diffusion_model"


class Family:
    """A network whose text attentions pass through the attention override."""

    is_joint = False
    # where the text stands in a joint attention
    is_text_first: bool | None = True

    def __init__(self, net: Any):
        self.net = net
        # whether a call before this one went through the network
        self.has_run = False

    def __deepcopy__(self, memo: dict) -> Family:
        return self

    def layers(self) -> int:
        """Attentions to text in one call of the network."""
        return len(self.net.blocks)

    def layers_in(self, conds: dict[str, Any]) -> int:
        """In a call with these conditions."""
        return self.layers()

    def image_tokens(self, x: Tensor) -> int | None:
        """Of a latent; None where no call could be taken for another."""
        return None

    def other_keys(self, x: Tensor, conds: dict[str, Any]) -> set[int]:
        """How many keys the attentions have that are none to the text; cross-attention only."""
        tokens = self.image_tokens(x)
        return set() if tokens is None else {tokens}

    def refuse(self, conds: dict[str, Any]) -> None:
        """Raise where a call has what is not known here."""

    def registers(self) -> int:
        """Tokens before the text of a joint attention that are no text."""
        return 0

    def lengths(self, lengths: list[int]) -> list[int]:
        """Of each prompt inside the network."""
        return lengths

    def patch(self, model: Any) -> None:
        """Patches beside those of the attention itself."""

    def owns(self, guide: Guide, lq: int, lk: int, mask: Tensor | None) -> bool:
        """Whether this attention is one to text."""
        text = sum(guide.lengths)
        if guide.is_aside:
            return False
        if not self.is_joint:
            return lk == text
        if mask is not None or lq != lk or lq <= text:
            return False
        return guide.image_tokens is None or lq == self.registers() + text + guide.image_tokens


def patches_of(x: Tensor, *sizes: int) -> int:
    """Tokens of a latent [b, c, ...] in patches of these sizes, the last ones for width."""
    return math.prod(-(-n // size) for n, size in zip(x.shape[-len(sizes) :], sizes, strict=True))


def refuse_beside(model: str, conds: dict[str, Any], **known: str) -> None:
    """Raise where one of these conditions brings tokens that are neither text nor image."""
    for key, name in known.items():
        if conds.get(key) is not None:
            raise ValueError(
                f"NASA negative prompt: this call has {name} ({key}) beside the text of {model}, "
                "which is not known to this node; leave it out, or guide with cfg"
            )


def replace(model: Any, name: str, patch: Callable[[Callable], Callable]) -> None:
    """An object patch around what the model has by this name, once."""
    name = f"{NET}.{name}"
    original = model.get_model_object(name)
    if getattr(original, "is_of_nasa", False):
        return
    patched = patch(original)
    patched.is_of_nasa = True
    model.add_object_patch(name, patched)
