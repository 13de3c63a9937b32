"""PyTorch's attention in the layout of `nasa_kernels`: what ours is compared with is made of it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """[b, l, h, d] in and out, as views; a mask [b, n]. k and v may have fewer heads."""
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None if mask is None else mask[:, None, None, :]
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    return o.transpose(1, 2)
