"""The back end for CPU tensors: PyTorch's fused CPU attention for each prompt, one epilogue.

fp16 and bf16 are computed in fp32 and rounded once. The backward pass rebuilds Z and its
log-sum-exp of each prompt from the inputs; nothing else is saved.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nasa_kernels.reference import additive_bias

_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class _Prompt(NamedTuple):
    k: Tensor  # [b, h, n, d], fp32
    v: Tensor
    bias: Tensor | None  # [b, 1, 1, n]
    present: Tensor | None  # [b, 1, n, 1], keys that are not masked


def _prompt(k: Tensor, v: Tensor, mask: Tensor | None) -> _Prompt:
    """Rows of masked keys become zeros, since 0 * NaN is NaN. A sample without any key attends to
    those zeros under a bias of 0, which gives its Z = 0.
    """
    k, v = (x.float().transpose(1, 2) for x in (k, v))
    if mask is None:
        return _Prompt(k, v, None, None)
    bias = additive_bias(mask, torch.float32)
    present = bias > float("-inf")
    bias = torch.where(present.any(1, keepdim=True), bias, 0.0)[:, None, None, :]
    present = present[:, None, :, None]
    return _Prompt(torch.where(present, k, 0.0), torch.where(present, v, 0.0), bias, present)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Z [b, h, l, d] of one prompt, in fp32."""
    x = _prompt(k, v, mask)
    return F.scaled_dot_product_attention(q, x.k, x.v, attn_mask=x.bias, scale=scale)


def forward(
    q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, alpha, scale
) -> Tensor:
    # [b, h, l, d], a view where q is fp32
    queries = q.float().transpose(1, 2)
    if q.numel() == 0 or k_pos.shape[1] == 0:
        o = torch.zeros(q.shape).transpose(1, 2)
    else:
        o = _attend(queries, k_pos, v_pos, mask_pos, scale)
    if q.numel() > 0 and k_neg.shape[1] > 0 and (alpha_map is not None or alpha != 0):
        z_neg = _attend(queries, k_neg, v_neg, mask_neg, scale)
        if alpha_map is None:
            o.sub_(z_neg, alpha=alpha)
        else:
            o.addcmul_(z_neg, _per_row(alpha_map), value=-1)
    return o.transpose(1, 2).to(q.dtype).contiguous()


def backward(
    grad_o, q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, alpha, scale, needs
) -> tuple[Tensor, ...]:
    # [b, h, l, d]
    do, queries = (x.float().transpose(1, 2) for x in (grad_o, q))
    weight = alpha if alpha_map is None else _per_row(alpha_map)
    dq_pos, dk_pos, dv_pos, _ = _gradients(do, queries, k_pos, v_pos, mask_pos, scale)
    dq_neg, dk_neg, dv_neg, z_neg = _gradients(
        do * -weight, queries, k_neg, v_neg, mask_neg, scale
    )
    dalpha = -(do * z_neg).sum(-1).transpose(1, 2).contiguous() if needs[5] else torch.empty(0)
    gradients = (dq_pos + dq_neg, dk_pos, dv_pos, dk_neg, dv_neg)
    return *(
        x.transpose(1, 2).to(q.dtype).contiguous() if needed else q.new_empty(0)
        for x, needed in zip(gradients, needs[:5], strict=True)
    ), dalpha


def _gradients(
    dz: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dQ, dK, dV of one prompt from dz, the gradient of its Z; and that Z."""
    x = _prompt(k, v, mask)
    if q.numel() == 0 or k.shape[1] == 0:
        return (*(torch.zeros_like(y) for y in (q, x.k, x.v)), torch.zeros_like(q))
    z, lse = _attention(q, x.k, x.v, attn_mask=x.bias, scale=scale)
    dq, dk, dv = _attention_backward(
        dz, q, x.k, x.v, z, lse, 0.0, False, attn_mask=x.bias, scale=scale
    )
    if x.present is not None:
        # a sample without keys gave weight to its rows of zeros: that is no gradient of theirs
        dk, dv = torch.where(x.present, dk, 0.0), torch.where(x.present, dv, 0.0)
    return dq, dk, dv, z


def _per_row(alpha_map: Tensor) -> Tensor:
    """[b, l, h] -> [b, h, l, 1]"""
    return alpha_map.transpose(1, 2).unsqueeze(-1)
