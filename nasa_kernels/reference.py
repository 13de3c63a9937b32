"""The oracle: NASA attention in plain PyTorch, for any device and any floating dtype.

    O = softmax(Q K+^T * scale + bias+) V+  -  alpha * softmax(Q K-^T * scale + bias-) V-

Read this file to know what every back end must compute. It is differentiable as often as you
like, in forward and in reverse mode, and it is what `backend="reference"` runs. fp16 and bf16 are
computed in fp32 and rounded once, at the end; fp32 and fp64 are computed as they are.

Names: b batch, h heads, l queries, n text tokens, d head_dim.
"""

import torch
from torch import Tensor


def additive_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask (True = attend) or an additive one, as an additive bias: 0, -inf or finite."""
    if mask.dtype == torch.bool:
        zero = torch.zeros((), dtype=dtype, device=mask.device)
        return torch.where(mask, zero, float("-inf"))
    return mask.to(dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Z = softmax(q k^T * scale + bias) v for one prompt; 0 where no key is left to attend to."""
    if mask is None:
        # [b, h, l, n]
        scores = torch.einsum("blhd,bnhd->bhln", q, k) * scale
    else:
        # [b, n]
        bias = additive_bias(mask, q.dtype)
        present = bias > float("-inf")
        # a masked key is an absent key: what its row holds, NaN included, must not count
        k = torch.where(present[:, :, None, None], k, 0.0)
        v = torch.where(present[:, :, None, None], v, 0.0)
        # a prompt with no key at all: softmax over zeros is finite, and every v is 0
        bias = torch.where(present.any(1, keepdim=True), bias, 0.0)
        scores = torch.einsum("blhd,bnhd->bhln", q, k) * scale + bias[:, None, None, :]
    return torch.einsum("bhln,bnhd->blhd", scores.softmax(-1), v)


def nasa_attention_reference(
    q: Tensor,
    k_pos: Tensor,
    v_pos: Tensor,
    k_neg: Tensor,
    v_neg: Tensor,
    alpha: float | Tensor,
    *,
    mask_pos: Tensor | None = None,
    mask_neg: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`nasa_attention` without its checks and its kernels; the arguments mean the same."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = q.dtype
    if dtype in (torch.float16, torch.bfloat16):
        q, k_pos, v_pos, k_neg, v_neg = (x.float() for x in (q, k_pos, v_pos, k_neg, v_neg))
    # [b, l, h, d]
    o = attend(q, k_pos, v_pos, mask_pos, scale)
    if isinstance(alpha, Tensor):
        # [b, l, h] -> [b, l, h, 1]
        weight = alpha.to(q.dtype).expand(q.shape[:-1]).unsqueeze(-1)
        o = o - weight * attend(q, k_neg, v_neg, mask_neg, scale)
    elif alpha != 0:
        o = o - alpha * attend(q, k_neg, v_neg, mask_neg, scale)
    return o.to(dtype).contiguous()
