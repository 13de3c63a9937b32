"""Guided attention of one layer. Everything is `[b, l, h, d]`; the formulas are nasa_kernels'."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nasa_kernels import nag_attention, nag_joint_attention, nasa_attention, nasa_joint_attention
from nasa_kernels.projected import Negative, projected_attention, projected_joint_attention

# of NAG's published code; its scale is the strength of the node
NAG_TAU, NAG_ALPHA = 2.5, 0.25


class Prompt(NamedTuple):
    k: Tensor  # [b, n, h, d]
    v: Tensor
    mask: Tensor | None = None  # [b, n]


class Away(NamedTuple):
    """A negative prompt in one layer."""

    prompt: Prompt
    strength: float


def cross(
    method: str, q: Tensor, pos: Prompt, negatives: list[Away], guided: Tensor | None
) -> Tensor:
    """Attention to the text. `guided` [b]: which rows carry the positive prompt; None is all."""
    if not negatives:
        return nasa_attention(q, pos.k, pos.v, pos.k[:, :0], pos.v[:, :0], 0.0, mask_pos=pos.mask)
    if method == "NAG":
        (away,) = negatives
        return nag_attention(
            q, pos.k, pos.v, away.prompt.k, away.prompt.v,
            nag_scale=away.strength, nag_tau=NAG_TAU, nag_alpha=_rows(NAG_ALPHA, guided),
            mask_pos=pos.mask, mask_neg=away.prompt.mask,
        )  # fmt: skip
    if method == "NASA projected":
        return projected_attention(
            q, pos.k, pos.v, _negatives(negatives, guided), mask_pos=pos.mask
        )
    if method == "VSF":
        neg = _flipped(negatives, guided)
        nothing = pos.k[:, :0]
        return nasa_joint_attention(
            q, nothing, nothing, pos.k, pos.v, neg.k, neg.v, 1.0, rule="vsf",
            mask_pos=pos.mask, mask_neg=neg.mask,
        )  # fmt: skip
    o, k, v, mask = None, pos.k, pos.v, pos.mask
    for (k_neg, v_neg, mask_neg), strength in negatives:
        alpha = _rows(strength, guided)
        part = nasa_attention(q, k, v, k_neg, v_neg, alpha, mask_pos=mask, mask_neg=mask_neg)
        o = part if o is None else o + part
        # the positive prompt counts once
        k, v, mask = k[:, :0], v[:, :0], None
    return o


QKV = tuple[Tensor, Tensor, Tensor]


class Streams(NamedTuple):
    """Queries, keys and values of a joint attention, by whose tokens they are."""

    image: QKV
    pos: QKV
    negatives: list[QKV]


def joint(
    method: str, streams: Streams, strengths: list[float], rule: str, guided: Tensor | None,
    registers: int,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """Of the image, the positive text, and each negative text, whose own queries are plain.

    The first `registers` of the image's tokens are no image: keys for all, guided by nothing.
    """
    (q, k, v), (q_pos, k_pos, v_pos), texts = streams
    keys = (k, v, k_pos, v_pos)
    lengths = [text[0].shape[1] for text in texts]
    alphas = [_by_query(strength, q, guided, registers) for strength in strengths]
    (q_neg, k_neg, v_neg), *others = texts
    sizes = (q_pos.shape[1], lengths[0])
    queries = torch.cat((q, q_pos, q_neg), dim=1)
    if method == "NASA projected":
        queries = torch.cat((queries, *(text[0] for text in others)), dim=1)
        sizes = (q_pos.shape[1], *lengths)
        negatives = [Negative(k, v, a) for (_, k, v), a in zip(texts, alphas, strict=True)]
        o = projected_joint_attention(queries, *keys, negatives, text_queries=sizes)
        image, pos, *negative = o.split((q.shape[1], *sizes), dim=1)
        return image, pos, negative
    if method == "NAG":
        share = _by_query(0.0 if strengths[0] == 1.0 else NAG_ALPHA, q, guided, registers)
        o = nag_joint_attention(
            queries, *keys, k_neg, v_neg, nag_scale=strengths[0], nag_tau=NAG_TAU,
            nag_alpha=share, text_queries=sizes,
        )  # fmt: skip
    elif method == "VSF" and strengths[0]:
        # a row that is not guided must not see the negative's keys: they have weight at any alpha
        seen = None if guided is None else guided[:, None].expand(k_neg.shape[:2])
        o = nasa_joint_attention(
            queries, *keys, k_neg, v_neg, _beside_texts(alphas[0], sizes), rule="vsf",
            text_queries=sizes, mask_neg=seen,
        )  # fmt: skip
        if seen is not None:
            o = torch.cat((o[:, : -sizes[1]], _own(texts[0], k, v)), dim=1)
    else:
        o = nasa_joint_attention(
            queries, *keys, k_neg, v_neg, _beside_texts(alphas[0], sizes),
            rule=rule if method == "NASA" else "nasa-cross", text_queries=sizes,
        )  # fmt: skip
    image, pos, negative = o.split((q.shape[1], *sizes), dim=1)
    results = [negative]
    for text, strength, alpha in zip(others, strengths[1:], alphas[1:], strict=True):
        # rule nasa-cross: the image takes each negative text under a softmax of its own
        if strength:
            _, k_i, v_i = text
            image = image + nasa_attention(q, k_i[:, :0], v_i[:, :0], k_i, v_i, alpha)
        results.append(_own(text, k, v))
    return image, pos, results


def _own(text: QKV, k: Tensor, v: Tensor) -> Tensor:
    """What the queries of a text take from the image and from itself."""
    q, k_text, v_text = text
    nothing = k_text[:, :0]
    return nasa_joint_attention(
        q, k, v, k_text, v_text, nothing, nothing, 0.0, text_queries=(q.shape[1], 0)
    )


def _by_query(strength: float, q: Tensor, guided: Tensor | None, registers: int) -> float | Tensor:
    """The strength as a number, or [b, image queries, 1] with 0 where nothing is guided."""
    alpha = _rows(strength, guided)
    if not registers:
        return alpha
    of_query = torch.ones(1, q.shape[1], 1, device=q.device)
    of_query[:, :registers] = 0.0
    return of_query * alpha


def _beside_texts(alpha: float | Tensor, sizes: tuple[int, ...]) -> float | Tensor:
    """With anything beside the queries of texts, for which it is not used."""
    if isinstance(alpha, Tensor) and alpha.shape[1] > 1:
        return torch.nn.functional.pad(alpha, (0, 0, 0, sum(sizes)))
    return alpha


def _rows(strength: float, guided: Tensor | None) -> float | Tensor:
    """The strength as a number, or [b, 1, 1] with 0 for the rows of CFG's own negative prompt."""
    if guided is None:
        return strength
    return torch.where(guided, strength, 0.0).to(torch.float32)[:, None, None]


def _negatives(negatives: list[Away], guided: Tensor | None) -> list[Negative]:
    return [
        Negative(away.prompt.k, away.prompt.v, _rows(away.strength, guided), away.prompt.mask)
        for away in negatives
    ]


def _flipped(negatives: list[Away], guided: Tensor | None) -> Prompt:
    """All negative prompts of VSF as one, their values by strength."""
    k = torch.cat([away.prompt.k for away in negatives], dim=1)
    v = torch.cat([away.prompt.v * away.strength for away in negatives], dim=1)
    if guided is None and all(away.prompt.mask is None for away in negatives):
        return Prompt(k, v)
    masks = []
    for (k_i, _, mask), _ in negatives:
        bias = torch.zeros(k_i.shape[:2], device=k.device)
        if mask is not None:
            bias = bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask
        masks.append(bias if guided is None else bias.masked_fill(~guided[:, None], -torch.inf))
    return Prompt(k, v, torch.cat(masks, dim=1))
