"""Projected NASA: take only what the negative prompt has and the positive one has not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nasa_diffusers.alpha import LayerAlpha
from nasa_diffusers.methods.base import Method, Strength
from nasa_diffusers.prompts import nothing, subtract
from nasa_diffusers.streams import Streams, keep_apart
from nasa_kernels import nasa_joint_attention

# what did best on the small world (docs/distill/results.md)
CROSS_ALPHA = 2.0
JOINT_ALPHA = 2.0


@dataclass(frozen=True, eq=False)
class ProjectedNASA(Method):
    """NASA without the part of Z- that Z+ has too, at the length of Z+; per head and query. The
    two steps are those of adaptive projected guidance (arXiv:2410.02416) and of guidance rescaling,
    here inside the attention.

        D = Z- - (<Z-, Z+> / <Z+, Z+>) Z+
        O = (Z+ - alpha D) |Z+| / |Z+ - alpha D|

    Equal prompts change nothing, at any alpha. Of several negative prompts the sum of alpha_i Z-_i
    stands for alpha Z-: the projection is linear, and the length is kept once. In joint attention
    Z+ is over [image; positive] and Z- over [image; negative], for the image queries.

    Args:
        alpha: Strength, in all the forms of NASA's alpha. `None` takes 2: the rule breaks images
            late, so one strength serves many prompts.
    """

    alpha: Strength | None = None
    name: ClassVar[str] = "ProjectedNASA"
    # the length is that of the text's attention
    adds_images: ClassVar[bool] = False

    def default_alpha(self, family, denoiser, has_own_alphas=False):
        if has_own_alphas:
            return 1.0
        return JOINT_ALPHA if family.is_joint else CROSS_ALPHA

    def cross(self, q, pos, negatives, backend, image=None):
        assert image is None, "adds_images is False"
        z_pos = subtract(q, pos, nothing(pos), 0.0, backend)
        return blend(
            z_pos,
            (
                (subtract(q, neg.prompt, nothing(neg.prompt), 0.0, backend), neg.alpha)
                for neg in negatives
            ),
        )

    def joint(self, streams):
        o = keep_apart(streams)
        image, text = o.split([streams.image_tokens, o.shape[1] - streams.image_tokens], dim=1)
        return torch.cat([blend(image, attend_negatives(streams)), text], dim=1)


def attend_negatives(streams: Streams) -> Iterator[tuple[Tensor, LayerAlpha]]:
    """Z- of the image queries over [image; negative], `[b, l, h, d]`, of each negative prompt."""
    q, *_ = streams.split(streams.q)
    k, _, *k_negatives = streams.split(streams.k)
    v, _, *v_negatives = streams.split(streams.v)
    for k_neg, v_neg, term in zip(k_negatives, v_negatives, streams.terms, strict=True):
        z_neg = nasa_joint_attention(
            q, k, v, k_neg, v_neg, k_neg[:, :0], v_neg[:, :0], 0.0,
            mask_pos=term.mask, backend=streams.backend,
        )  # fmt: skip
        yield z_neg, term.alpha


def blend(z_pos: Tensor, negatives: Sequence | Iterator) -> Tensor:
    """Z+ less what the sum of alpha_i Z-_i has beside it, as long as Z+: `[b, l, h, d]`.

    In fp32 (fp64 for fp64), rounded once. Where an alpha is 0 its Z- is not looked at.
    """
    p = z_pos if z_pos.dtype == torch.float64 else z_pos.float()
    away = torch.zeros_like(p)
    for z_neg, alpha in negatives:
        weight = alpha.at(p.shape[1])[..., None].to(p.dtype)
        away = away + torch.where(weight == 0, 0.0, weight * z_neg)
    square = (p * p).sum(-1, keepdim=True)
    # a row of zeros stays one: 1 keeps 0 / 0 and its gradient away
    square = torch.where(square == 0, 1.0, square)
    beside = away - (away * p).sum(-1, keepdim=True) / square * p
    longer = 1 + (beside * beside).sum(-1, keepdim=True) / square
    o = (p - beside) * longer.rsqrt()
    return torch.where((p == 0).all(-1, keepdim=True), p, o).to(z_pos.dtype)
