"""Without the CPU kernels: PyTorch's fused CPU attention for each prompt, one epilogue.

fp16 is computed in fp32 and rounded once. bf16 is left to PyTorch's bf16 attention, which is faster
than that and rounds Z of each prompt as well; so are the gradients of few queries. For a gradient,
Z and the log-sum-exp of each prompt are kept; without one fp16's never exist as a whole in fp32.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nasa_kernels._joint.shared import of_groups
from nasa_kernels.reference import additive_bias

_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
# PyTorch adds up dK and dV of bf16 in bf16, block by block of queries: of more than these it loses
# more than eager does, and fp32 is as fast
_BF16_QUERIES = 1024
# fp32 copies of queries at a time: small enough to stay in cache and to come from the heap
_CHUNK_BYTES = 2 << 20


class Prompt(NamedTuple):
    k: Tensor  # [b, h_kv, n, d], in the precision of the computation
    v: Tensor
    bias: Tensor | None  # [b, 1, 1, n], fp32
    present: Tensor | None  # [b, 1, n, 1], keys that are not masked


def computed_in(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.bfloat16 else torch.float32


def prompt(k: Tensor, v: Tensor, mask: Tensor | None, dtype: torch.dtype = torch.float32) -> Prompt:
    """Rows of masked keys become zeros, since 0 * NaN is NaN. A sample without any key attends to
    those zeros under a bias of 0, which gives its Z = 0.
    """
    k, v = (x.to(dtype).transpose(1, 2) for x in (k, v))
    if mask is None:
        return Prompt(k, v, None, None)
    bias = additive_bias(mask, torch.float32)
    present = bias > float("-inf")
    bias = torch.where(present.any(1, keepdim=True), bias, 0.0)[:, None, None, :]
    present = present[:, None, :, None]
    return Prompt(torch.where(present, k, 0.0), torch.where(present, v, 0.0), bias, present)


def attend(q: Tensor, x: Prompt, scale: float) -> tuple[Tensor, Tensor]:
    """Z [b, h, l, d] in the dtype of q, and its log-sum-exp [b, h, l] in fp32, of one prompt."""
    group = group_of(q, x)
    if group > 1:
        z, lse = of_groups(group, lambda own: attend(own(q), x, scale))
        return z, lse
    return _attention(q, x.k, x.v, attn_mask=x.bias, scale=scale)


def group_of(q: Tensor, x: Prompt) -> int:
    """How many heads of q [b, h, l, d] look at each of a prompt."""
    return q.shape[1] // max(1, x.k.shape[1])


def forward(q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, alpha, scale) -> Tensor:
    has_pos, has_neg = _sides(q, k_pos, k_neg, alpha_map, alpha)
    if not (has_pos or has_neg):
        return torch.zeros(q.shape, dtype=q.dtype)
    dtype = computed_in(q.dtype)
    pos, neg = prompt(k_pos, v_pos, mask_pos, dtype), prompt(k_neg, v_neg, mask_neg, dtype)
    b, l, h, d = q.shape
    heads = h if q.dtype == dtype else max(1, min(h, _CHUNK_BYTES // (4 * b * l * d)))
    group = h // max(1, k_pos.shape[2])
    heads = max(group, heads // group * group)
    if heads == h:
        return _forward(q, pos, neg, has_pos, has_neg, alpha_map, alpha, scale)[0]
    o = torch.empty(q.shape, dtype=q.dtype)
    for first in range(0, h, heads):
        some = slice(first, first + heads)
        keys = slice(first // group, (first + heads) // group)
        o[:, :, some] = _forward(
            q[:, :, some],
            pos._replace(k=pos.k[:, keys], v=pos.v[:, keys]),
            neg._replace(k=neg.k[:, keys], v=neg.v[:, keys]),
            has_pos,
            has_neg,
            None if alpha_map is None else alpha_map[:, :, some],
            alpha,
            scale,
        )[0]
    return o


def attention(
    q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, alpha, scale
) -> tuple[Tensor, ...]:
    """O, and what `backward` needs: Z and its log-sum-exp of each prompt."""
    has_pos, has_neg = _sides(q, k_pos, k_neg, alpha_map, alpha)
    dtype = computed_in(q.dtype)
    pos, neg = prompt(k_pos, v_pos, mask_pos, dtype), prompt(k_neg, v_neg, mask_neg, dtype)
    return _forward(q, pos, neg, has_pos, has_neg, alpha_map, alpha, scale, keep=True)


def kept(q, k_pos, k_neg, alpha_map, alpha) -> tuple[Tensor, ...]:
    """Shapes and strides of what `attention` returns beside O."""
    b, l, h, d = q.shape
    found: tuple[Tensor, ...] = ()
    for exists in _sides(q, k_pos, k_neg, alpha_map, alpha):
        z_size, lse_size = ((b, l, h, d), (b, l, h)) if exists else ((0, 0, 0), (0, 0))
        z = torch.empty(z_size, dtype=computed_in(q.dtype), device=q.device)
        lse = torch.empty(lse_size, dtype=torch.float32, device=q.device)
        found += tuple(x.transpose(1, 2) if exists else x for x in (z, lse))
    return found


def _sides(q, k_pos, k_neg, alpha_map, alpha) -> tuple[bool, bool]:
    """Which prompts there is anything to compute of."""
    if q.numel() == 0:
        return False, False
    return k_pos.shape[1] > 0, k_neg.shape[1] > 0 and (alpha_map is not None or alpha != 0)


def _forward(
    q: Tensor, pos: Prompt, neg: Prompt, has_pos: bool, has_neg: bool,
    alpha_map: Tensor | None, alpha: float, scale: float, keep: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    # [b, h, l, d], a view where q is what is computed in
    dtype = computed_in(q.dtype)
    queries = q.to(dtype).transpose(1, 2)
    nothing = (torch.empty(0, 0, 0, dtype=dtype), torch.empty(0, 0))
    z_pos, lse_pos = attend(queries, pos, scale) if has_pos else nothing
    z_neg, lse_neg = attend(queries, neg, scale) if has_neg else nothing
    minuend = z_pos if has_pos else torch.zeros(q.shape, dtype=dtype).transpose(1, 2)
    if not has_neg:
        o = minuend.to(q.dtype, copy=keep)
    else:
        # one pass subtracts in fp32 and rounds, where it can in the memory of Z+
        in_place = q.dtype == dtype and not (keep and has_pos)
        o = minuend if in_place else torch.empty(q.shape, dtype=q.dtype).transpose(1, 2)
        if alpha_map is None:
            torch.sub(minuend, z_neg, alpha=alpha, out=o)
        else:
            torch.addcmul(minuend, z_neg, _per_row(alpha_map), value=-1, out=o)
    o = o.transpose(1, 2).contiguous()
    return (o, z_pos, lse_pos, z_neg, lse_neg) if keep else (o,)


def backward(
    grad_o, z_pos, lse_pos, z_neg, lse_neg,
    q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, alpha, scale, needs,
) -> tuple[Tensor, ...]:  # fmt: skip
    has_pos, has_neg = _sides(q, k_pos, k_neg, alpha_map, alpha)
    # [b, h, l, d]
    dtype = torch.float32 if q.shape[1] > _BF16_QUERIES else computed_in(q.dtype)
    do, queries = (x.to(dtype).transpose(1, 2) for x in (grad_o, q))
    z_pos, z_neg = z_pos.to(dtype), z_neg.to(dtype)
    dq = dk_pos = dv_pos = dk_neg = dv_neg = None
    if has_pos:
        x = prompt(k_pos, v_pos, mask_pos, dtype)
        dq, dk_pos, dv_pos = gradients(do, queries, x, z_pos, lse_pos, scale)
    if has_neg:
        x = prompt(k_neg, v_neg, mask_neg, dtype)
        dz = do * -alpha if alpha_map is None else (do * -_per_row(alpha_map)).to(dtype)
        dq_neg, dk_neg, dv_neg = gradients(dz, queries, x, z_neg, lse_neg, scale)
        dq = dq_neg if dq is None else dq.add_(dq_neg)
    tensors = (q, k_pos, v_pos, k_neg, v_neg)
    found = (dq, dk_pos, dv_pos, dk_neg, dv_neg)
    dalpha = torch.empty(0)
    if needs[5]:
        b, l, h, _ = q.shape
        dalpha = torch.zeros(b, l, h)
        if has_neg:
            dalpha = -torch.linalg.vecdot(do.float(), z_neg.float()).transpose(1, 2).contiguous()
    return *(
        as_input(gradient, x) if needed else x.new_empty(0)
        for gradient, x, needed in zip(found, tensors, needs[:5], strict=True)
    ), dalpha


def as_input(gradient: Tensor | None, x: Tensor) -> Tensor:
    """[b, h, n, d], or None for zeros, as the gradient of x."""
    if gradient is None:
        return torch.zeros(x.shape, dtype=x.dtype)
    return gradient.transpose(1, 2).to(x.dtype).contiguous()


def gradients(
    dz: Tensor, q: Tensor, x: Prompt, z: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV of one prompt from dz, the gradient of its Z."""
    group = group_of(q, x)
    if group > 1:
        dq, dk, dv = of_groups(
            group, lambda own: gradients(own(dz), own(q), x, own(z), own(lse), scale)
        )
        # [b, h, n, d] -> [b, h_kv, n, d]
        dk, dv = (y.unflatten(1, (-1, group)).float().sum(2) for y in (dk, dv))
        return dq, dk, dv
    dq, dk, dv = _attention_backward(
        dz, q, x.k, x.v, z, lse, 0.0, False, attn_mask=x.bias, scale=scale
    )
    if x.present is not None:
        # a sample without keys gave weight to its rows of zeros: that is no gradient of theirs
        dk, dv = torch.where(x.present, dk, 0.0), torch.where(x.present, dv, 0.0)
    return dq, dk, dv


def _per_row(alpha_map: Tensor) -> Tensor:
    """[b, l, h] -> [b, h, l, 1]"""
    return alpha_map.transpose(1, 2).unsqueeze(-1)
