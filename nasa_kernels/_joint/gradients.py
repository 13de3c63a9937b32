"""The backward pass of joint attention around its launches, for the back ends that have kernels.

    O = c_s O_s + c_p O_p + c_n O_n         c = function of alpha and of the log-sum-exps s, p, n

    dP_i = dO V_i^T    u_i = rowsum(P_i * dP_i) = rowsum(dO * O_i), the gradient of c_i
    dS_i = P_i * (c_i (dP_i - u_i) + dlse_i)
    dQ = scale * sum of dS_i K_i        dK_i = scale * dS_i^T Q        dV_i = c_i P_i^T dO

Of the shared keys the forward pass keeps O_s and s, so their u is a sum over the head_dim. Three
steps, none with atomics: the first launch rebuilds the log-sum-exps and u of the prompts,
`rules.py` makes c and dlse of them, a few numbers per query, and the last launches write dQ, and
dK and dV of each segment. The shared keys go through the same kernels: PyTorch's attention, which
attends to them in the forward pass, takes no gradient of its log-sum-exp.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nasa_kernels._joint import rules
from nasa_kernels._joint.rules import Segments

LOG2E = math.log2(math.e)


class Rows(NamedTuple):
    """Per-query statistics: of one segment [b, h, l], or of all three [3, b, h, l].

    lse is base 2, +inf where a query finds no key in the segment.
    """

    lse: Tensor
    u: Tensor
    c: Tensor
    dlse: Tensor


class Segment(NamedTuple):
    """Keys, and the per-query statistics that their gradients need."""

    k: Tensor
    v: Tensor
    mask: Tensor | None
    rows: Rows
    # the half-open range of queries that do not see the keys
    hidden: tuple[int, int]


class Launches(NamedTuple):
    """The steps of a back end, for one call."""

    # lse in base 2 and u, [3, b, h, l] in the order of Segments; lse of the shared keys is not used
    statistics: Callable[[], tuple[Tensor, Tensor]]
    # dQ
    queries: Callable[[Rows], Tensor]
    # dK and dV, empty where they are not needed
    keys: Callable[[Segment, Sequence[bool]], Sequence[Tensor]]


def joint_gradients(
    launches: Launches, lse_shared, q, k, v, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg,
    alpha_map, alpha, rule, text_pos, text_neg, needs,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients that `needs` asks for: of q, of keys and values in order, of the alpha map."""
    l = q.shape[1]
    first_pos, first_neg = l - text_pos - text_neg, l - text_neg
    lse, u = launches.statistics()
    torch.mul(lse_shared, LOG2E, out=lse[0])

    weights = rules.alpha_per_row(q, alpha_map, alpha)
    natural = Segments(lse_shared, lse[1] / LOG2E, lse[2] / LOG2E)
    c = rules.coefficients(rule, natural, weights, text_pos, text_neg)
    dlse, dalpha = rules.gradients(rule, natural, weights, Segments(*u), text_pos, text_neg)
    # where no key was found P is 0: 2^(-inf - inf), not the NaN of 2^(-inf + inf)
    lse.masked_fill_(lse == float("-inf"), float("inf"))
    rows = Rows(lse, u, torch.stack(c), torch.stack(dlse))

    dq = launches.queries(rows) if needs[0] else q.new_empty(0)
    segments = (
        (k, v, None, (0, 0)),
        (k_pos, v_pos, mask_pos, (first_neg, l)),
        (k_neg, v_neg, mask_neg, (first_pos, first_neg)),
    )
    found: list[Tensor] = []
    for i, (keys, values, mask, hidden) in enumerate(segments):
        segment = Segment(keys, values, mask, Rows(*(x[i] for x in rows)), hidden)
        found += launches.keys(segment, needs[1 + 2 * i : 3 + 2 * i])
    dalpha = dalpha.transpose(1, 2).contiguous() if needs[7] else dalpha.new_empty(0)
    return dq, *found, dalpha
