"""Projected NASA: take only what the negative prompt has and the positive one has not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nasa_diffusers.methods.base import Method, Strength
from nasa_kernels import Negative, backends, projected_attention, projected_joint_attention
from nasa_kernels.nag import pair_backend

# what did well on the small world's U-Net, in one step and in four (docs/distill/results.md), and
# what none of four networks with joint attention was the worse for (docs/diffusers/joint.md)
CROSS_ALPHA = 1.5
JOINT_ALPHA = 1.0


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
        alpha: Strength, in all the forms of NASA's alpha. `None` takes 1.5, in joint attention 2:
            the rule breaks images late, so one strength serves many prompts.
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
        return projected_attention(
            q, pos.k, pos.v,
            [Negative(x.k, x.v, alpha.at(q.shape[1]), x.mask) for x, alpha in negatives],
            mask_pos=pos.mask, backend=backend,
        )  # fmt: skip

    def joint(self, streams):
        q_image, *_ = streams.split(streams.q)
        k_image, k_pos, *k_negatives = streams.split(streams.k)
        v_image, v_pos, *v_negatives = streams.split(streams.v)
        prompts = zip(k_negatives, v_negatives, streams.terms, strict=True)
        return projected_joint_attention(
            streams.q if streams.with_text else q_image, k_image, v_image, k_pos, v_pos,
            [Negative(k, v, x.alpha.at(streams.image_tokens), x.mask) for k, v, x in prompts],
            text_queries=streams.lengths if streams.with_text else None,
            mask_pos=streams.mask_pos, backend=streams.backend,
        )  # fmt: skip

    def attends_image_twice(self, streams):
        tensors = (streams.q, streams.k, streams.v)
        if len(streams.terms) == 1 and fuses_projected(streams.backend, *tensors):
            return False
        return len(streams.terms) > 1 or pair_backend(streams.backend, *tensors) is None


def fuses_projected(backend: str | None, *tensors: Tensor) -> bool:
    """Whether one operator serves a joint attention of these, q the first."""
    q = tensors[0]
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if backend is None:
        backend = backends.choose(q.device, q.dtype, q.shape[3], differentiable)
    return backends.RECORDS[backend].fuses_joint("projected", differentiable)
