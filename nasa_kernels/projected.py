"""The rule "projected" against several negative prompts at once.

    W = sum of alpha_i Z-_i        D = W - <W, Z+> / <Z+, Z+> Z+
    O = (Z+ - D) |Z+| / |Z+ - D|

A projection is linear: to project each Z-_i and to project their weighted sum is the same. The
length is kept once. With one negative prompt it is `rule="projected"` of `nasa_attention` and
`nasa_joint_attention`, one launch where the back end has it; with several, Z+ and each Z-_i are
calls of the attention operators, rounded to the dtype of q, and the rest is plain PyTorch in fp32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nasa_kernels import _projected, attention, joint_attention
from nasa_kernels._checks import Call, check_alpha, outside_autocast, prepare
from nasa_kernels.scalars import whole


class Negative(NamedTuple):
    """One negative prompt of several, and how strongly it acts.

    Attributes:
        k, v: `[b, n, h_kv, d]`, as `k_neg` and `v_neg` of `nasa_attention`.
        alpha: As in `nasa_attention`; in joint attention a tensor broadcasts to
            `[b, image queries, h]`.
        mask: Per key, as `mask_neg` of `nasa_attention`.
    """

    k: Tensor
    v: Tensor
    alpha: float | Tensor
    mask: Tensor | None = None


def projected_attention(
    q: Tensor,
    k_pos: Tensor,
    v_pos: Tensor,
    negatives: Sequence[Negative],
    *,
    mask_pos: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention guided away from several negative prompts, by the rule "projected".

        W = sum of alpha_i Z-_i        D = W - <W, Z+> / <Z+, Z+> Z+
        O = (Z+ - D) |Z+| / |Z+ - D|

    per head and query, where Z+ and Z-_i are the attention over each prompt alone. A projection is
    linear, so W takes what each Z-_i alone would take, and the length of Z+ is kept once. With one
    prompt it is `nasa_attention(..., rule="projected")`. With several, Z+ and each Z-_i are calls,
    rounded to the dtype of `q`; the rest is computed in fp32 and rounded once. Differentiable in
    all tensors.

    Args:
        q, k_pos, v_pos, mask_pos, scale, backend: As `nasa_attention` takes them.
        negatives: A `Negative` (k, v, alpha, mask) of each prompt. One whose alpha is the number 0
            is not looked at.

    Returns:
        `[b, l, h, d]`, contiguous, in the dtype of `q`.

    Raises:
        ValueError: As `nasa_attention`, or `negatives` is empty.
        RuntimeError: As `nasa_attention`.
    """
    function = "projected_attention"
    calls = [
        prepare(
            function,
            q,
            (("_pos", k_pos, v_pos, mask_pos), ("_neg", k, v, mask)),
            alpha,
            scale,
            backend,
        )
        for k, v, alpha, mask in _checked(function, negatives)
    ]
    return outside_autocast(_attend, calls[0], calls)


def _attend(first: Call, calls: Sequence[Call]) -> Tensor:
    if len(calls) == 1:
        return attention.attend(first, "projected")
    z_pos = attention.attend_pos(first)
    parts = (
        _projected.weighted(attention.attend_neg(call), call.alpha_map, call.alpha)
        for call in calls
        if _acts(call.alpha_map, call.alpha)
    )
    return _take_away(z_pos, parts)


def projected_joint_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pos: Tensor,
    v_pos: Tensor,
    negatives: Sequence[Negative],
    *,
    text_queries: Sequence[int] | None = None,
    mask_pos: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Joint attention (FLUX, SD3) guided away from several negative prompts, by rule "projected".

    An image query gets what `projected_attention` says, of Z+ over [image; positive text] and
    Z-_i over [image; negative text i]. Queries of the texts get their plain attention, each over
    the image's keys and its own. With one prompt it is `nasa_joint_attention(...,
    rule="projected")`; with several the image's keys are read once more for each further one.

    Args:
        q: Queries `[b, l, h, d]`: of the image, of the positive text, of each negative text.
        k, v, k_pos, v_pos, mask_pos, scale, backend: As `nasa_joint_attention` takes them.
        negatives: As in `projected_attention`; a tensor alpha broadcasts to
            `[b, image queries, h]`.
        text_queries: How many of the last queries are the positive text's, and each negative
            text's. `None`: all queries are the image's.

    Returns:
        `[b, l, h, d]`, contiguous, in the dtype of `q`, its rows in the order of `q`.

    Raises:
        ValueError, RuntimeError: As `nasa_joint_attention` and `projected_attention` do.
    """
    function = "projected_joint_attention"
    negatives = _checked(function, negatives)
    text_pos, *texts_neg = _checked_texts(function, q, text_queries, len(negatives))
    image = q.shape[1] - text_pos - sum(texts_neg) if q.dim() == 4 else 0
    strengths = [check_alpha(function, q[:, :image], negative.alpha) for negative in negatives]

    def checked(
        own: Tensor, negative: Negative, texts: tuple[int, int], alpha: float | Tensor = 0.0
    ) -> Call:
        prompts = (
            ("", k, v, None),
            ("_pos", k_pos, v_pos, mask_pos),
            ("_neg", negative.k, negative.v, negative.mask),
        )
        return prepare(function, own, prompts, alpha, scale, backend, texts)

    if len(negatives) == 1:
        alpha = negatives[0].alpha
        if isinstance(alpha, Tensor) and alpha.dim() > 1 and alpha.shape[-2] > 1:
            # of no use beside queries of the texts
            alpha = F.pad(alpha, (0, 0, 0, text_pos + texts_neg[0]))
        call = checked(q, negatives[0], (text_pos, texts_neg[0]), alpha)
        return outside_autocast(joint_attention.attend, call, "projected")
    calls: list[Call] = []
    end = image + text_pos
    for negative, text_neg in zip(negatives, texts_neg, strict=True):
        if not calls:
            calls.append(checked(q[:, : end + text_neg], negative, (text_pos, text_neg)))
        else:
            own = torch.cat((q[:, :image], q[:, end : end + text_neg]), dim=1)
            calls.append(checked(own, negative, (0, text_neg)))
        end += text_neg
    return outside_autocast(_attend_jointly, calls[0], calls, strengths)


def _attend_jointly(
    first: Call, calls: Sequence[Call], strengths: Sequence[tuple[Tensor | None, float]]
) -> Tensor:
    parts = []
    if _acts(*strengths[0]):
        apart = joint_attention.attend_apart(first)
        z_pos, texts = apart.z_pos, [apart.text_pos, apart.text_neg]
        parts.append(_projected.weighted(apart.z_neg, *strengths[0]))
    else:
        z_pos, text_pos = joint_attention.attend_pos(first)
        texts = [text_pos, joint_attention.attend_text_neg(first)]
    for call, strength in zip(calls[1:], strengths[1:], strict=True):
        if _acts(*strength):
            z_neg, text_neg = joint_attention.attend_neg(call)
            parts.append(_projected.weighted(z_neg, *strength))
            texts.append(text_neg)
        else:
            texts.append(joint_attention.attend_text_neg(call))
    return torch.cat((_take_away(z_pos, parts), *texts), dim=1)


def _acts(alpha_map: Tensor | None, alpha: float) -> bool:
    return alpha_map is not None or alpha != 0


def _take_away(z_pos: Tensor, parts: Iterable[Tensor]) -> Tensor:
    """The parts are alpha_i Z-_i in fp32; as they come, so that only their sum is held."""
    w: Tensor | None = None
    for part in parts:
        w = part if w is None else w + part
    return z_pos if w is None else _projected.blend(z_pos, w, None, 1.0)


def _checked(function: str, negatives: Sequence[Negative]) -> list[Negative]:
    if not isinstance(negatives, Sequence) or len(negatives) == 0:
        raise ValueError(
            f"{function}: negatives must be a list of at least one Negative(k, v, alpha, mask), "
            f"got {'an empty one' if isinstance(negatives, Sequence) else type(negatives).__name__}"
        )
    for i, negative in enumerate(negatives):
        if not isinstance(negative, tuple) or len(negative) not in (3, 4):
            raise ValueError(
                f"{function}: negatives[{i}] must be a Negative(k, v, alpha, mask), got "
                f"{type(negative).__name__}"
            )
    return [Negative(*negative) for negative in negatives]


def _checked_texts(
    function: str, q: Tensor, text_queries: Sequence[int] | None, negatives: int
) -> list[int]:
    if text_queries is None:
        return [0] * (1 + negatives)
    is_sequence = isinstance(text_queries, (tuple, list))
    texts = [whole(n) for n in text_queries] if is_sequence else []
    if len(texts) != 1 + negatives or None in texts:
        raise ValueError(
            f"{function}: text_queries must be {1 + negatives} integers, the queries of the "
            f"positive and of each negative text, got {text_queries!r}"
        )
    if min(texts) < 0 or (q.dim() == 4 and sum(texts) > q.shape[1]):
        raise ValueError(
            f"{function}: text_queries must be at least 0 and no more than the {q.shape[1]} "
            f"queries of q together, got {text_queries!r}"
        )
    return texts
