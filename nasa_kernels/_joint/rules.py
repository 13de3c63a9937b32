"""The rules of joint attention, as coefficients of the segments and as gradients of them.

    O = c_s O_shared + c_p O_pos + c_n O_neg        c = function of s, p, n and alpha

s, p, n are the log-sum-exps of the three segments, -inf where a segment has no key.
`joint_attention.py` has the table of the rules. The kernels compute the coefficients on chip; this
is for the back ends made of PyTorch's parts, and for every backward pass, where it is a few numbers
per query.

Everything here is [b, h, l] in fp32, alpha as well; the last `text_pos + text_neg` of l are
queries of the text.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nasa_kernels.reference import RULES

# rules of the queries of the text, beside those of RULES
_POSITIVE = "positive text"
_NEGATIVE = "negative text"


class Segments(NamedTuple):
    """One tensor for each segment of keys."""

    shared: Tensor
    pos: Tensor
    neg: Tensor


def alpha_per_row(q: Tensor, alpha_map: Tensor | None, alpha: float) -> Tensor:
    """alpha of a call in fp32, from its map [b, l, h] or from the number."""
    b, l, h, _ = q.shape
    if alpha_map is None:
        return torch.full((b, h, l), alpha, dtype=torch.float32, device=q.device)
    return alpha_map.transpose(1, 2)


def coefficients(rule: int, lse: Segments, alpha: Tensor, text_pos: int, text_neg: int) -> Segments:
    parts = [
        _coefficients(kind, Segments(*(x[..., rows] for x in lse)), alpha[..., rows])
        for kind, rows in _rows(rule, lse.shared.shape[2], text_pos, text_neg)
    ]
    return Segments(*(torch.cat(x, dim=2) for x in zip(*parts, strict=True)))


def gradients(
    rule: int, lse: Segments, alpha: Tensor, u: Segments, text_pos: int, text_neg: int
) -> tuple[Segments, Tensor]:
    """The gradients of lse and of alpha, from u_i = rowsum(dO * O_i), the gradients of c_i."""
    parts = [
        _gradients(
            kind,
            Segments(*(x[..., rows] for x in lse)),
            alpha[..., rows],
            Segments(*(x[..., rows] for x in u)),
        )
        for kind, rows in _rows(rule, lse.shared.shape[2], text_pos, text_neg)
    ]
    *dlse, dalpha = (torch.cat(x, dim=2) for x in zip(*parts, strict=True))
    return Segments(*dlse), dalpha


def _rows(rule: int, l: int, text_pos: int, text_neg: int) -> tuple[tuple[str, slice], ...]:
    image = l - text_pos - text_neg
    return (
        (RULES[rule], slice(0, image)),
        (_POSITIVE, slice(image, image + text_pos)),
        (_NEGATIVE, slice(image + text_pos, l)),
    )


def shares(*lse: Tensor) -> tuple[Tensor, ...]:
    """e^(x - L) of each x, L the log-sum-exp of all; 0 where all are -inf."""
    highest = torch.stack(lse).amax(0)
    highest = torch.where(highest == float("-inf"), 0.0, highest)
    weights = [torch.exp(x - highest) for x in lse]
    total = sum(weights[1:], weights[0])
    total = torch.where(total == 0, 1.0, total)
    return tuple(x / total for x in weights)


def _coefficients(kind: str, lse: Segments, alpha: Tensor) -> Segments:
    if kind == "vsf":
        c_s, c_p, w_n = shares(*lse)
        return Segments(c_s, c_p, -alpha * w_n)
    a_s, a_p = shares(lse.shared, lse.pos)
    b_s, b_n = shares(lse.shared, lse.neg)
    zero, one = torch.zeros_like(a_s), torch.ones_like(a_s)
    return {
        "nasa": Segments(a_s - alpha * b_s, a_p, -alpha * b_n),
        "nasa-text": Segments(a_s, a_p, -alpha * b_n),
        "nasa-cross": Segments(a_s, a_p, -alpha),
        "sum": Segments(one, one, -alpha),
        _POSITIVE: Segments(a_s, a_p, zero),
        _NEGATIVE: Segments(b_s, zero, b_n),
    }[kind]


def _gradients(
    kind: str, lse: Segments, alpha: Tensor, u: Segments
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d lse_s, d lse_p, d lse_n, d alpha.

    A softmax of two, a_s + a_p = 1, has d a_s / d s = a_s a_p = -d a_s / d p.
    """
    if kind == "vsf":
        w_s, w_p, w_n = shares(*lse)
        mean = w_s * u.shared + w_p * u.pos - alpha * w_n * u.neg
        return (
            w_s * (u.shared - mean),
            w_p * (u.pos - mean),
            w_n * (-alpha * u.neg - mean),
            -w_n * u.neg,
        )
    a_s, a_p = shares(lse.shared, lse.pos)
    b_s, b_n = shares(lse.shared, lse.neg)
    zero = torch.zeros_like(a_s)
    # the derivative of O by a_s
    by_a = zero if kind in ("sum", _NEGATIVE) else u.shared - u.pos
    positive = a_s * a_p * by_a
    # the derivative of O by b_s, and that by alpha
    by_b, by_alpha = {
        "nasa": (-alpha * (u.shared - u.neg), -(b_s * u.shared + b_n * u.neg)),
        "nasa-text": (alpha * u.neg, -b_n * u.neg),
        "nasa-cross": (zero, -u.neg),
        "sum": (zero, -u.neg),
        _POSITIVE: (zero, zero),
        _NEGATIVE: (u.shared - u.neg, zero),
    }[kind]
    negative = b_s * b_n * by_b
    return positive + negative, -positive, -negative, by_alpha
