"""PyTorch's attention in the layout of `nasa_kernels`: what ours is compared with is made of it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """[b, l, h, d] in and out, as views; a mask [b, n]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = None if mask is None else mask[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
