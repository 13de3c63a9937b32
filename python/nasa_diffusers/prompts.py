"""Negative prompts on their way through the denoiser, and prompts in one layer.

Names: b batch, l image queries, n text tokens, h heads, d head_dim, c channels, r rows of a prompt
(b, or 1 for all).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from nasa_diffusers.alpha import LayerAlpha
from nasa_kernels import nasa_attention, nasa_joint_attention


@dataclass(frozen=True, eq=False)
class Term:
    """One negative prompt, and how strongly it acts."""

    text: Tensor  # [r, n_neg, c]
    mask: Tensor | None  # [r, n_neg] bool, True = attend
    alpha: LayerAlpha


class KeysValues(NamedTuple):
    """One prompt in one layer."""

    k: Tensor  # [r, n, h, d]
    v: Tensor
    mask: Tensor | None = None  # [r, n], bool or an additive bias


class Signed(NamedTuple):
    """A negative prompt in one layer, and how strongly it acts."""

    prompt: KeysValues
    alpha: LayerAlpha


def subtract(
    q: Tensor,  # [b, l, h, d]
    pos: KeysValues,
    neg: KeysValues,
    alpha: float | Tensor,
    backend: str | None,
    image: KeysValues | None = None,
) -> Tensor:
    """`Z+ - alpha Z-`, one launch; plus `Z_image`, two."""
    masks: dict[str, Any] = {"mask_pos": pos.mask, "mask_neg": neg.mask}
    if image is None:
        return nasa_attention(q, pos.k, pos.v, neg.k, neg.v, alpha, **masks, backend=backend)
    return nasa_joint_attention(
        q, image.k, image.v, pos.k, pos.v, neg.k, neg.v, alpha,
        rule="sum", **masks, backend=backend,
    )  # fmt: skip


def nothing(like: KeysValues) -> KeysValues:
    """A prompt without keys."""
    return KeysValues(like.k[:, :0], like.v[:, :0])
