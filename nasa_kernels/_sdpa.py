"""The back end `sdpa`: PyTorch's `scaled_dot_product_attention` for each prompt, and one epilogue.

For devices without kernels of ours: Apple's GPUs, AMD's, Intel's. No scores of size l x n are kept
where PyTorch has a fused attention for the device. Z of each prompt is rounded to the dtype of q;
the difference is taken in fp32 and rounded once. Gradients are PyTorch's own. Joint attention is
made of whole attentions, each of which reads the image's keys. Keys that serve a group of heads are
read in place where PyTorch's kernel for the device does so.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nasa_kernels import reference


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Z [b, l, h, d] of one prompt, in the dtype of q; 0 where no key is left to attend to."""
    if q.numel() == 0 or k.shape[1] == 0:
        return reference.attend(q, k, v, mask, scale)
    bias = None
    dtype = q.dtype
    if mask is not None:
        # [b, n]
        is_bool = mask.dtype == torch.bool
        present = mask if is_bool else mask > float("-inf")
        # a masked key is an absent key: what its row holds, NaN included, must not count
        k, v = (torch.where(present[:, :, None, None], x, 0.0) for x in (k, v))
        # a prompt with no key at all: softmax over zeros is finite, and every v is 0
        has_keys = present.any(1, keepdim=True)
        if is_bool:
            bias = mask | ~has_keys
        else:
            # half precision would round a bias of log(m)
            q, k, v = q.float(), k.float(), v.float()
            bias = torch.where(has_keys, mask.float(), 0.0)
        bias = bias[:, None, None, :]
    # [b, h, l, d]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    # said where it is so alone: a graph with sizes of its own compares them to a symbol, no bool
    of_groups = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    z = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, **of_groups)
    return z.transpose(1, 2).to(dtype)


def cross(
    q: Tensor, k_pos: Tensor, v_pos: Tensor, k_neg: Tensor, v_neg: Tensor, alpha: float | Tensor,
    *, mask_pos: Tensor | None, mask_neg: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    o = attend(q, k_pos, v_pos, mask_pos, scale)
    if isinstance(alpha, Tensor) or alpha != 0:
        weight = alpha.unsqueeze(-1) if isinstance(alpha, Tensor) else alpha
        o = o.float() - weight * attend(q, k_neg, v_neg, mask_neg, scale).float()
    return o.to(q.dtype).contiguous()


def joint(
    q: Tensor, k: Tensor, v: Tensor, k_pos: Tensor, v_pos: Tensor, k_neg: Tensor, v_neg: Tensor,
    alpha: float | Tensor, *, rule: str, text_queries: tuple[int, int],
    mask_pos: Tensor | None, mask_neg: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    def attend_fp32(*args) -> Tensor:
        return attend(*args).float()

    dtype = q.dtype
    if mask_pos is not None or mask_neg is not None:
        # the masks of two segments are joined in the dtype of their keys
        q, k, v, k_pos, v_pos, k_neg, v_neg = (
            x.float() for x in (q, k, v, k_pos, v_pos, k_neg, v_neg)
        )
    o = reference.joint(
        attend_fp32, q, k, v, k_pos, v_pos, k_neg, v_neg, alpha,
        rule, text_queries, mask_pos, mask_neg, scale,
    )  # fmt: skip
    return o.to(dtype).contiguous()
