"""One call of a network under guidance: which tokens are whose, and what each attention does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from . import attention
from .attention import Away, Prompt, Streams
from .terms import Term

# for what passes no options on: the call of this thread
CURRENT: ContextVar[Guide | None] = ContextVar("nasa_guide", default=None)


class Guide:
    """The text of a call is [positive; negative 1; negative 2; ...], of `lengths` tokens."""

    def __init__(
        self, family: Any, terms: list[Term], given: list[int], guided: Tensor | None, x: Tensor,
        conds: dict[str, Any],
    ):  # fmt: skip
        self.family = family
        self.terms = terms
        self.method = terms[0].method
        # as they go into the network, and inside of it
        self.given = given
        self.lengths = family.lengths(given)
        # [b], or None where every row carries the positive prompt
        self.guided = guided
        self.image_tokens = family.image_tokens(x) if family.is_joint else None
        # attentions to text, and those so far
        self.layers = family.layers_in(conds)
        self.count = 0
        self.is_aside = False
        # who changes the text of a UNet before the projections
        self.text_patch = "another node"

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """The attentions inside are none of an image to a text."""
        self.is_aside = True
        try:
            yield
        finally:
            self.is_aside = False

    def _strengths(self) -> list[float]:
        """Of each term in the attention that runs now, which is counted."""
        layer = self.count
        self.count += 1
        off = 1.0 if self.method == "NAG" else 0.0
        return [term.strength if term.acts_on(layer) else off for term in self.terms]

    def cross(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Of queries and text keys `[b, l, h, d]`, a mask per key `[b, n]`."""
        (pos, *prompts), strengths = self._prompts(k, v, mask), self._strengths()
        return attention.cross(self.method, q, pos, self._acting(prompts, strengths), self.guided)

    def cross_beside(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What the negative prompts add to another node's attention to the positive one."""
        (pos, *prompts), strengths = self._prompts(k, v, None), self._strengths()
        nothing = Prompt(pos.k[:, :0], pos.v[:, :0])
        acting = self._acting(prompts, strengths)
        if not acting:
            return torch.zeros_like(q)
        return attention.cross("NASA", q, nothing, acting, self.guided)

    def positive(self, x: Tensor) -> Tensor:
        """The positive prompt's of `[b, n, c]`."""
        return x[:, : self.lengths[0]]

    def _prompts(self, k: Tensor, v: Tensor, mask: Tensor | None) -> list[Prompt]:
        parts = [x.split(self.lengths, 1) for x in (k, v)]
        masks = [None] * len(self.lengths) if mask is None else mask.split(self.lengths, 1)
        return [Prompt(*part) for part in zip(*parts, masks, strict=True)]

    def _acting(self, prompts: list[Prompt], strengths: list[float]) -> list[Away]:
        off = 1.0 if self.method == "NAG" else 0.0
        return [
            Away(prompt, strength)
            for prompt, strength in zip(prompts, strengths, strict=True)
            if strength != off
        ]

    def joint(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Of a joint attention `[b, l, h, d]` over registers, text and image, in any order."""
        registers = self.family.registers()
        sizes = [registers, *self.lengths, q.shape[1] - registers - sum(self.lengths)]
        parts = []
        for x in (q, k, v):
            if self.family.is_text_first:
                first, *texts, image = x.split(sizes, 1)
            else:
                image, first, *texts = x.split([sizes[-1], *sizes[:-1]], 1)
            parts.append((torch.cat((first, image), 1) if registers else image, texts))
        image, pos, *negatives = (
            tuple(x) for x in zip(*((image, *texts) for image, texts in parts), strict=True)
        )
        o, o_pos, o_negatives = attention.joint(
            self.method, Streams(image, pos, negatives), self._strengths(), self.terms[0].rule,
            self.guided, registers,
        )  # fmt: skip
        first, o = o.split((registers, o.shape[1] - registers), 1)
        text = torch.cat((first, o_pos, *o_negatives), 1)
        return torch.cat((text, o) if self.family.is_text_first else (o, text), 1)
