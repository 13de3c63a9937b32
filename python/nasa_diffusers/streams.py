"""A block's attention over `[image; positive text; negative texts]`, each prompt kept apart.

Names: b batch, l image tokens, n text tokens, h heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nasa_diffusers.prompts import Term
from nasa_kernels import nasa_joint_attention


class Streams(NamedTuple):
    """Q, K and V of all tokens of a block, and whose they are."""

    q: Tensor  # [b, l + n, h, d], or [b, l, h, d] where text is keys only
    k: Tensor  # [b, l + n, h, d], or of fewer heads, of which each serves a group
    v: Tensor
    lengths: list[int]  # n_pos, then n_neg of each negative prompt
    terms: tuple[Term, ...]
    with_text: bool  # False: text tokens are keys only, and leave no rows
    backend: str | None
    mask_pos: Tensor | None = None  # [b, n_pos], of the positive text

    @property
    def image_tokens(self) -> int:
        return self.k.shape[1] - sum(self.lengths)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """`[b, l + n, h, d]` as image, positive text and each negative text."""
        has_text = x.shape[1] > self.image_tokens
        lengths = self.lengths if has_text else [0] * len(self.lengths)
        return x.split([self.image_tokens, *lengths], dim=1)

    def text_queries(self, i: int) -> tuple[int, int]:
        """How many positive tokens and tokens of negative prompt `i` are queries."""
        return (self.lengths[0], self.lengths[1 + i]) if self.with_text else (0, 0)

    def first_queries(self) -> Tensor:
        """Those of the image, the positive prompt and the first negative one."""
        return self.q[:, : self.image_tokens + sum(self.text_queries(0))]


def keep_apart(streams: Streams) -> Tensor:
    """Nothing is subtracted: image and positive text see each other, each negative text sees
    itself and the image. `[b, l + n, h, d]`."""
    return _attend(streams, None, [term.mask for term in streams.terms])


def subtract_from_image(
    streams: Streams, rule: str, masks: Sequence[Tensor | None] | None = None
) -> Tensor:
    """The same, and each negative prompt takes from the image what it would take alone, by a rule
    of `nasa_kernels.nasa_joint_attention`. `masks` are those of the negative prompts, `[r, n]`."""
    return _attend(streams, rule, [t.mask for t in streams.terms] if masks is None else masks)


def _attend(streams: Streams, rule: str | None, masks: Sequence[Tensor | None]) -> Tensor:
    queries, terms = streams.image_tokens, streams.terms
    q_image, _, *q_negatives = streams.split(streams.q)
    k_image, k_pos, *k_negatives = streams.split(streams.k)
    v_image, v_pos, *v_negatives = streams.split(streams.v)

    def with_prompt(i: int, q: Tensor, text: tuple[int, int], rule: str | None = rule) -> Tensor:
        return nasa_joint_attention(
            q, k_image, v_image, k_pos, v_pos, k_negatives[i], v_negatives[i],
            0.0 if rule is None else _image_alpha(terms[i], queries, sum(text)),
            rule=rule or "nasa-cross", text_queries=text, mask_pos=streams.mask_pos,
            mask_neg=terms[i].mask if rule is None else masks[i], backend=streams.backend,
        )  # fmt: skip

    o = with_prompt(0, streams.first_queries(), streams.text_queries(0))
    if len(terms) == 1:
        return o
    image, text = o[:, :queries], [o[:, queries:]]
    z_pos = image if rule is None else with_prompt(0, q_image, (0, 0), None)
    for i, q_neg in list(enumerate(q_negatives))[1:]:
        n_neg = streams.text_queries(i)[1]
        o = with_prompt(i, torch.cat([q_image, q_neg[:, :n_neg]], dim=1), (0, n_neg))
        image = image + (o[:, :queries] - z_pos)
        text.append(o[:, queries:])
    return torch.cat([image, *text], dim=1)


def _image_alpha(term: Term, queries: int, text_queries: int) -> Tensor:
    """Alpha of the image queries, broadcastable to all rows; text is never guided."""
    alpha = term.alpha.at(queries)
    if alpha.shape[1] == 1:
        return alpha
    return F.pad(alpha, (0, 0, 0, text_queries))
