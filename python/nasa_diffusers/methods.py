"""What a text cross-attention layer makes of its prompts: NASA, and what users compare it with.

    nasa    O = Z+ - sum of alpha_i Z-_i                   each prompt under its own softmax
    vsf     O = softmax(Q [K+; K-_1; ...]^T) [V+; -alpha_1 V-_1; ...]      one softmax for all
    nag     G = s Z+ - (s - 1) Z-,  O = a G min(1, tau |Z+| / |G|) + (1 - a) Z+

NASA's three rules for joint attention are one rule here, where the prompts share no keys. VSF is
value sign flip (arXiv:2508.10931) without its offset, NAG normalised attention guidance
(arXiv:2505.21179) with the published code's scale.

Names: b batch, l image queries, n text tokens, h heads, d head_dim, r rows of a prompt (b, or 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nasa_diffusers.alpha import LayerAlpha
from nasa_diffusers.scalars import is_real, scalar
from nasa_kernels import nag_attention, nasa_attention, nasa_joint_attention


@dataclass(frozen=True)
class Nag:
    """The parameters of NAG besides its alpha, which is the alpha of the call."""

    scale: float
    tau: float
    norm: int = 1  # |.| is the sum of magnitudes, or 2 for the root of the sum of squares

    def __post_init__(self) -> None:
        for name in ("scale", "tau", "norm"):
            given = getattr(self, name)
            value = scalar(given)
            if not is_real(value) or not math.isfinite(value):
                raise ValueError(f"enable_nasa: nag_{name} must be a finite number, got {given!r}")
            object.__setattr__(self, name, value)
        if self.norm not in (1, 2):
            raise ValueError(
                "enable_nasa: nag_norm must be 1, as in NAG's paper and most of its code, or 2, as "
                f"in its code for FLUX, got {self.norm!r}"
            )
        if self.scale == 1:
            raise ValueError(
                "enable_nasa: nag_scale 1 is no guidance: it counts as the published code does, "
                "where the paper's scale of 0 is 1; give 1 more than the paper's scale"
            )
        if self.tau <= 0:
            raise ValueError(f"enable_nasa: nag_tau must be above 0, got {self.tau!r}")

    def __str__(self) -> str:
        norm = "" if self.norm == 1 else f", norm {self.norm:g}"
        return f"nag, scale {self.scale:g}, tau {self.tau:g}{norm}"


class KeysValues(NamedTuple):
    """One prompt in one layer."""

    k: Tensor  # [r, n, h, d]
    v: Tensor
    mask: Tensor | None = None  # [r, n], bool or an additive bias


class Signed(NamedTuple):
    """A negative prompt in one layer, and how strongly it acts."""

    prompt: KeysValues
    alpha: LayerAlpha


def steer(
    q: Tensor,  # [b, l, h, d]
    pos: KeysValues,
    negatives: Sequence[Signed],
    rule: str,
    nag: Nag | None,
    backend: str | None,
    image: KeysValues | None = None,
) -> Tensor:
    """The steered attention over the text, `[b, l, h, d]`, plus that over `image`."""
    if nag is not None:
        assert image is None, "the norms of NAG are those of the text"
        (neg,) = negatives
        return nag_attention(
            q, pos.k, pos.v, neg.prompt.k, neg.prompt.v,
            nag_scale=nag.scale, nag_tau=nag.tau, nag_norm=nag.norm,
            nag_alpha=neg.alpha.at(q.shape[1]),
            mask_pos=pos.mask, mask_neg=neg.prompt.mask, backend=backend,
        )  # fmt: skip
    if rule == "vsf":
        return _flip_signs(q, pos, negatives, backend, image)
    o: Tensor | None = None
    for prompt, alpha in negatives:
        z = subtract(q, pos, prompt, alpha.at(q.shape[1]), backend, image)
        o = z if o is None else o + z
        # Z+ counts once: a prompt without keys contributes 0 to the terms that follow
        pos, image = nothing(pos), None
    assert o is not None, "enable_nasa refuses an empty list of negative prompts"
    return o


def subtract(
    q: Tensor,
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


def _flip_signs(
    q: Tensor,
    pos: KeysValues,
    negatives: Sequence[Signed],
    backend: str | None,
    image: KeysValues | None,
) -> Tensor:
    """One attention over the keys of all prompts, the values of the negative ones negated."""
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
                # a row that is not guided must not see them: they would take weight at any alpha
                biases[-1] = torch.where(alpha.guided[:, None], biases[-1], float("-inf"))
        bias = _side_by_side(biases)
    every = KeysValues(_side_by_side(keys), _side_by_side(values), bias)
    return subtract(q, every, nothing(every), 0.0, backend, image)


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
