"""The oracle: NASA attention in plain PyTorch, for any device and any floating dtype.

    O = softmax(Q K+^T * scale + bias+) V+  -  alpha * softmax(Q K-^T * scale + bias-) V-

or, by rule "projected", what `project` makes of the two attentions; and, where image keys are
shared by both prompts, joint attention (`joint`).

Read this file to know what every back end must compute. It is differentiable as often as you
like, in forward and in reverse mode, and it is what `backend="reference"` runs. fp16 and bf16 are
computed in fp32 and rounded once, at the end; fp32 and fp64 are computed as they are.

Names: b batch, h heads, l queries, n text tokens, d head_dim. K and V may have fewer heads, k: then
head i of Q looks at head i // g of them, g = h / k.
"""

from collections.abc import Callable

import torch
from torch import Tensor

RULES = ("nasa", "nasa-text", "nasa-cross", "vsf", "sum", "projected")
# of cross-attention
CROSS_RULES = ("nasa", "projected")


def additive_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask (True = attend) or an additive one, as an additive bias: 0, -inf or finite."""
    if mask.dtype == torch.bool:
        zero = torch.zeros((), dtype=dtype, device=mask.device)
        return torch.where(mask, zero, float("-inf"))
    return mask.to(dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Z = softmax(q k^T * scale + bias) v for one prompt; 0 where no key is left to attend to."""
    # [b, l, k, g, d]
    q = q.unflatten(2, (k.shape[2], -1)) if k.shape[2] else q.unsqueeze(3)
    if mask is None:
        # [b, k, g, l, n]
        scores = torch.einsum("blkgd,bnkd->bkgln", q, k) * scale
    else:
        # [b, n]
        bias = additive_bias(mask, q.dtype)
        present = bias > float("-inf")
        # a masked key is an absent key: what its row holds, NaN included, must not count
        k = torch.where(present[:, :, None, None], k, 0.0)
        v = torch.where(present[:, :, None, None], v, 0.0)
        # a prompt with no key at all: softmax over zeros is finite, and every v is 0
        bias = torch.where(present.any(1, keepdim=True), bias, 0.0)
        scores = torch.einsum("blkgd,bnkd->bkgln", q, k) * scale + bias[:, None, None, None, :]
    return torch.einsum("bkgln,bnkd->blkgd", scores.softmax(-1), v).flatten(2, 3)


def combine(z_pos: Tensor, z_neg: Tensor, alpha: float | Tensor, rule: str) -> Tensor:
    """What a rule makes of Z+ and Z- [b, l, h, d]; alpha is a number or [b, l, h, 1]."""
    return project(z_pos, z_neg, alpha) if rule == "projected" else z_pos - alpha * z_neg


def project(z_pos: Tensor, z_neg: Tensor, alpha: float | Tensor) -> Tensor:
    """Take from Z+ what Z- has and Z+ has not, and keep the length of Z+; per head and query.

        D = Z- - t Z+       t = <Z-, Z+> / <Z+, Z+>
        O = (Z+ - alpha D) / sqrt(1 + alpha^2 <D, D> / <Z+, Z+>)

    The root is |Z+ - alpha D| / |Z+|, for D stands at a right angle to Z+. A row of zeros in Z+
    stays one. Equal Z+ and Z- have a D of exact zeros, and alpha 0 takes no D.
    """
    if isinstance(alpha, Tensor):
        z_neg = looked_at(z_neg, alpha)
    squared = (z_pos * z_pos).sum(-1, keepdim=True)
    exists = squared > 0
    # no division by zero: its gradient would spread
    squared = torch.where(exists, squared, 1.0)
    d = z_neg - (z_neg * z_pos).sum(-1, keepdim=True) / squared * z_pos
    longer = (1 + alpha * alpha * ((d * d).sum(-1, keepdim=True) / squared)).sqrt()
    return torch.where(exists, (z_pos - alpha * d) / longer, z_pos)


def looked_at(z_neg: Tensor, alpha: Tensor) -> Tensor:
    """Z- [b, l, h, d] with 0 for inf and NaN where alpha [b, l, h, 1] is 0."""
    return torch.where((alpha == 0) & ~z_neg.isfinite(), 0.0, z_neg)


def nasa_attention_reference(
    q: Tensor,
    k_pos: Tensor,
    v_pos: Tensor,
    k_neg: Tensor,
    v_neg: Tensor,
    alpha: float | Tensor,
    *,
    rule: str = "nasa",
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
        alpha = alpha.to(q.dtype).expand(q.shape[:-1]).unsqueeze(-1)
    if isinstance(alpha, Tensor) or alpha != 0:
        o = combine(o, attend(q, k_neg, v_neg, mask_neg, scale), alpha, rule)
    return o.to(dtype).contiguous()


def joint(
    attend: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pos: Tensor,
    v_pos: Tensor,
    k_neg: Tensor,
    v_neg: Tensor,
    alpha: float | Tensor,
    rule: str,
    text_queries: tuple[int, int],
    mask_pos: Tensor | None,
    mask_neg: Tensor | None,
    scale: float,
) -> Tensor:
    """Joint attention by its definitions, out of whole attentions `attend(q, k, v, mask, scale)`.

    Z+ and Z- of the image queries:

        nasa        Z+ over [shared; pos]        Z- over [shared; neg]
        nasa-text   Z+ over [shared; pos]        Z- the same, with 0 for the shared values
        nasa-cross  Z+ over [shared; pos]        Z- over neg
        vsf         both over [shared; pos; neg]: Z+ with 0 for the negative's values, Z- with 0
                    for all the others
        sum         Z+ over shared plus that over pos       Z- over neg
        projected   as nasa, and then `project`
    """
    b, l, h, d = q.shape
    image = l - sum(text_queries)
    q, q_pos, q_neg = q.split((image, *text_queries), dim=1)
    with_pos = _join((k, k_pos), (v, v_pos), (None, mask_pos))
    with_neg = _join((k, k_neg), (v, v_neg), (None, mask_neg))
    if rule == "vsf":
        keys, masks = (k, k_pos, k_neg), (None, mask_pos, mask_neg)
        kept = _join(keys, (v, v_pos, torch.zeros_like(v_neg)), masks)
        taken = _join(keys, (torch.zeros_like(v), torch.zeros_like(v_pos), v_neg), masks)
    else:
        kept = with_pos
        taken = {
            "nasa": with_neg,
            "projected": with_neg,
            "nasa-text": _join((k, k_neg), (torch.zeros_like(v), v_neg), (None, mask_neg)),
            "nasa-cross": (k_neg, v_neg, mask_neg),
            "sum": (k_neg, v_neg, mask_neg),
        }[rule]
    if rule == "sum":
        o = attend(q, k, v, None, scale) + attend(q, k_pos, v_pos, mask_pos, scale)
    else:
        o = attend(q, *kept, scale)
    if isinstance(alpha, Tensor):
        # [b, l, h] -> [b, image, h, 1]
        alpha = alpha.expand(b, l, h)[:, :image].unsqueeze(-1)
    if isinstance(alpha, Tensor) or alpha != 0:
        o = combine(o, attend(q, *taken, scale), alpha, rule)
    return torch.cat((o, attend(q_pos, *with_pos, scale), attend(q_neg, *with_neg, scale)), dim=1)


def _join(
    keys: tuple[Tensor, ...], values: tuple[Tensor, ...], masks: tuple[Tensor | None, ...]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Several segments as one: their keys, their values, and an additive mask if any has one."""
    mask = None
    if any(part is not None for part in masks):
        mask = torch.cat(
            [
                k.new_zeros(k.shape[:2]) if part is None else additive_bias(part, k.dtype)
                for k, part in zip(keys, masks, strict=True)
            ],
            dim=1,
        )
    return torch.cat(keys, dim=1), torch.cat(values, dim=1), mask


def nasa_joint_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pos: Tensor,
    v_pos: Tensor,
    k_neg: Tensor,
    v_neg: Tensor,
    alpha: float | Tensor,
    *,
    rule: str = "nasa-cross",
    text_queries: tuple[int, int] = (0, 0),
    mask_pos: Tensor | None = None,
    mask_neg: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`nasa_joint_attention` without its checks and its kernels; the arguments mean the same."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = q.dtype
    if dtype in (torch.float16, torch.bfloat16):
        q, k, v, k_pos, v_pos, k_neg, v_neg = (
            x.float() for x in (q, k, v, k_pos, v_pos, k_neg, v_neg)
        )
    o = joint(
        attend, q, k, v, k_pos, v_pos, k_neg, v_neg, alpha,
        rule, text_queries, mask_pos, mask_neg, scale,
    )  # fmt: skip
    return o.to(dtype).contiguous()
