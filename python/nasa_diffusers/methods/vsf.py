"""Value sign flip (arXiv:2508.10931)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nasa_diffusers.methods.base import Method, Strength
from nasa_diffusers.prompts import KeysValues, Term, nothing, subtract
from nasa_diffusers.streams import subtract_from_image


@dataclass(frozen=True, eq=False)
class VSF(Method):
    """Value sign flip (arXiv:2508.10931), without its offset: one softmax over the keys of all
    prompts, the values of the negative ones times -alpha.

        O = softmax(Q [K+; K-]^T) [V+; -alpha V-]

    In joint attention the image's keys and values stand beside them. Its authors use an alpha
    above 1; the default is the family's alpha of NASA.

    Args:
        alpha: Strength: a number, or one per image; in joint attention also a map over the image,
            as NASA's.
    """

    alpha: Strength | None = None
    name: ClassVar[str] = "VSF"
    drops_padding: ClassVar[bool] = True

    def check(self, family, alpha, has_own_alphas):
        if alpha.region is not None and not family.is_joint:
            raise ValueError(
                "VSF: in cross-attention it weighs the values of keys, which all of the image "
                "shares, so alpha cannot be a map over the image; give a number, or one per image"
            )

    def check_references(self):
        raise ValueError(
            "VSF: the negative prompt is in the one softmax of all image tokens, so reference "
            "images beside the image that is made cannot be left out; use NASA or NAG"
        )

    def cross(self, q, pos, negatives, backend, image=None):
        keys, values = [pos.k], [pos.v]
        for prompt, alpha in negatives:
            keys.append(prompt.k)
            # [b or 1, 1, 1, 1]: values that all images share stay shared
            factor = -(alpha.rows[:1] if alpha.guided is None else alpha.rows)[..., None]
            values.append((prompt.v * factor).to(prompt.v.dtype))
        bias = None
        if pos.mask is not None or any(
            prompt.mask is not None or alpha.guided is not None for prompt, alpha in negatives
        ):
            biases = [_bias(pos)]
            for prompt, alpha in negatives:
                biases.append(_bias(prompt))
                if alpha.guided is not None:
                    # a row that is not guided must not see them: they have weight at any alpha
                    biases[-1] = torch.where(alpha.guided[:, None], biases[-1], float("-inf"))
            bias = _side_by_side(biases)
        every = KeysValues(_side_by_side(keys), _side_by_side(values), bias)
        return subtract(q, every, nothing(every), 0.0, backend, image)

    def joint(self, streams):
        return subtract_from_image(streams, "vsf", [_guided_keys(t) for t in streams.terms])


def _guided_keys(term: Term) -> Tensor | None:
    """The mask of a negative prompt, nothing of it for images that are not guided: `[b, n]`."""
    if term.alpha.guided is None:
        return term.mask
    # [b, 1], and the text as [r, n]
    guided = term.alpha.guided[:, None]
    present = torch.ones_like(term.text[..., 0], dtype=torch.bool)
    return guided & (present if term.mask is None else term.mask)


def _bias(prompt: KeysValues) -> Tensor:
    """The mask of a prompt as an additive bias in fp32, `[r, n]`."""
    if prompt.mask is None:
        return prompt.k.new_zeros(1, prompt.k.shape[1], dtype=torch.float32)
    if prompt.mask.dtype == torch.bool:
        return torch.where(prompt.mask, 0.0, float("-inf"))
    return prompt.mask.float()


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Tokens of several prompts, `[r, n, ...]` each, as one prompt."""
    rows = max(part.shape[0] for part in parts)
    return torch.cat([part.expand(rows, *part.shape[1:]) for part in parts], dim=1)
