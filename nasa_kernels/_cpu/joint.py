"""Joint attention without the CPU kernels: PyTorch's fused CPU attention for each segment of keys,
and the rule's coefficients from their log-sum-exps, in fp32, rounded once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nasa_kernels._cpu import attention as cross
from nasa_kernels._joint import rules
from nasa_kernels._joint.rules import Segments
from nasa_kernels._joint.shared import attend_shared


def forward(*args) -> Tensor:
    return attention(*args)[0]


def attention(
    q, k, v, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, alpha, scale,
    rule, text_pos, text_neg,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """O, and of the shared keys O_s [b, l, h, d] and lse_s [b, h, l], both in fp32."""
    o_shared, lse_shared = attend_shared(q.float(), k.float(), v.float(), scale)
    # [b, h, l, d]
    queries = q.float().transpose(1, 2)
    o_pos, lse_pos = _attend(queries, k_pos, v_pos, mask_pos, scale)
    o_neg, lse_neg = _attend(queries, k_neg, v_neg, mask_neg, scale)
    c = rules.coefficients(
        rule,
        Segments(lse_shared, lse_pos, lse_neg),
        rules.alpha_per_row(q, alpha_map, alpha),
        text_pos,
        text_neg,
    )
    o = c.shared.unsqueeze(-1) * o_shared.transpose(1, 2)
    o.addcmul_(c.pos.unsqueeze(-1), o_pos).addcmul_(c.neg.unsqueeze(-1), o_neg)
    return o.transpose(1, 2).to(q.dtype).contiguous(), o_shared, lse_shared


def pair(
    q, k, v, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, scale, text_pos, text_neg
) -> tuple[Tensor, Tensor]:
    """Z+ and Z-, each without the queries of the other text."""
    l = q.shape[1]
    first_pos, first_neg = l - text_pos - text_neg, l - text_neg
    o_shared, lse_shared = attend_shared(q.float(), k.float(), v.float(), scale)

    def side(first: int, last: int, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        def rows(x: Tensor) -> Tensor:
            """Those of the image and `first` to `last`, of [b, h, l, ...]."""
            if first == first_pos:
                return x[:, :, :last]
            return torch.cat((x[:, :, :first_pos], x[:, :, first:last]), dim=2)

        o_text, lse_text = _attend(rows(q.float().transpose(1, 2)), k, v, mask, scale)
        c_shared, c_text = rules.shares(rows(lse_shared), lse_text)
        o = c_shared.unsqueeze(-1) * rows(o_shared.transpose(1, 2))
        o.addcmul_(c_text.unsqueeze(-1), o_text)
        return o.transpose(1, 2).to(q.dtype).contiguous()

    return (
        side(first_pos, first_neg, k_pos, v_pos, mask_pos),
        side(first_neg, l, k_neg, v_neg, mask_neg),
    )


def backward(
    grad_o, o_shared, lse_shared,
    q, k, v, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, alpha, scale,
    rule, text_pos, text_neg, needs,
) -> tuple[Tensor, ...]:  # fmt: skip
    do, queries = (x.float().transpose(1, 2) for x in (grad_o, q))
    prompts = (
        cross.prompt(k, v, None),
        cross.prompt(k_pos, v_pos, mask_pos),
        cross.prompt(k_neg, v_neg, mask_neg),
    )
    o = [o_shared.transpose(1, 2)]
    lse = [lse_shared]
    for x, mask in zip(prompts[1:], (mask_pos, mask_neg), strict=True):
        o_i, lse_i = _attend_prompt(queries, x, mask, scale)
        o.append(o_i)
        lse.append(lse_i)
    # c_i, and the gradients of lse_i
    weights = rules.alpha_per_row(q, alpha_map, alpha)
    c = rules.coefficients(rule, Segments(*lse), weights, text_pos, text_neg)
    u = Segments(*(torch.linalg.vecdot(do, o_i) for o_i in o))
    dlse, dalpha = rules.gradients(rule, Segments(*lse), weights, u, text_pos, text_neg)

    dq = torch.zeros_like(queries)
    found: list[Tensor | None] = []
    for x, o_i, lse_i, c_i, dlse_i in zip(prompts, o, lse, c, dlse, strict=True):
        if q.numel() == 0 or x.k.shape[2] == 0:
            found += [None, None]
            continue
        dq_i, dk, dv = _gradients(do * c_i.unsqueeze(-1), dlse_i, queries, x, o_i, lse_i, scale)
        dq += dq_i
        found += [dk, dv]
    tensors = (q, k, v, k_pos, v_pos, k_neg, v_neg)
    return *(
        cross.as_input(gradient, x) if needed else x.new_empty(0)
        for gradient, x, needed in zip((dq, *found), tensors, needs[:7], strict=True)
    ), dalpha.transpose(1, 2).contiguous() if needs[7] else torch.empty(0)


def _gradients(
    do: Tensor, dlse: Tensor, q: Tensor, x: cross.Prompt, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV of one segment from the gradients of its O and of its lse.

    dS = P (dO V^T - rowsum(dO O) + dlse). PyTorch's backward pass takes no dlse, but it takes
    rowsum(dO O) from its arguments: one more column, 1 in dO and -dlse in O, 0 in Q, K and V.
    """
    d = q.shape[3]
    wide = x._replace(k=F.pad(x.k, (0, 1)), v=F.pad(x.v, (0, 1)))
    do = F.pad(do, (0, 1), value=1.0)
    o = torch.cat((o, -dlse.unsqueeze(-1)), dim=-1)
    # a sample without keys: its weights, over rows of zeros, must stay finite
    lse = torch.where(lse == float("-inf"), 0.0, lse)
    dq, dk, dv = cross.gradients(do, F.pad(q, (0, 1)), wide, o, lse, scale)
    return dq[..., :d], dk[..., :d], dv[..., :d]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return _attend_prompt(q, cross.prompt(k, v, mask), mask, scale)


def _attend_prompt(
    q: Tensor, x: cross.Prompt, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Z and lse of one prompt: 0 and -inf where a sample has no key."""
    if q.numel() == 0 or x.k.shape[2] == 0:
        return torch.zeros_like(q), torch.full(q.shape[:3], float("-inf"))
    o, lse = cross.attend(q, x, scale)
    if x.present is not None:
        lse = torch.where(x.present.any(2), lse, float("-inf"))
    return o, lse
