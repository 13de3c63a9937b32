"""The row-wise end of normalised attention guidance: `nasa_kernels/nag.py` says what it computes.

    G = s Z+ - (s - 1) Z-        O = a G min(1, tau |Z+| / |G|) + (1 - a) Z+

One program per query: its row over all heads, [h * d] of each of Z+ and Z-, is read once, stays
in registers for the two norms, and is written once. Widths are those of `tiles.cut`, so 1280
channels are 1024 and 256 and none are padded to 2048.
"""

import torch
import triton
import triton.language as tl

from nasa_kernels._triton.launch import Launch, launch, strides_or_zeros
from nasa_kernels._triton.tiles import cut


@triton.jit
def load_row(X, C: tl.constexpr, C_CUT: tl.constexpr):
    """One row [C] as a tuple of fp32 blocks over C_CUT, zeros past the end."""
    blocks = ()
    start = 0
    for i in tl.static_range(len(C_CUT)):
        column = start + tl.arange(0, C_CUT[i])
        blocks = blocks + (tl.load(X + column, mask=column < C, other=0.0).to(tl.float32),)
        start += C_CUT[i]
    return blocks


@triton.jit
def norm_of(blocks, P: tl.constexpr):
    """The sum of magnitudes of a row, or for P 2 the root of the sum of squares."""
    total = 0.0
    for i in tl.static_range(len(blocks)):
        total += tl.sum(tl.abs(blocks[i]) if P == 1 else blocks[i] * blocks[i], 0)
    return total if P == 1 else tl.sqrt_rn(total)


@triton.jit(do_not_specialize=["L"])
def blend_kernel(
    Z_pos, Z_neg, O, ALPHA, stride_ab, stride_al, L, alpha, nag_scale, nag_tau,
    C: tl.constexpr, C_CUT: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if ALPHA is not None:
        alpha = tl.load(ALPHA + (row // L) * stride_ab + (row % L) * stride_al)
    # [C], fp32
    pos = load_row(Z_pos + row * C, C, C_CUT)
    neg = load_row(Z_neg + row * C, C, C_CUT)
    guided = ()
    for i in tl.static_range(len(C_CUT)):
        guided = guided + (nag_scale * pos[i] - (nag_scale - 1) * neg[i],)
    norm, limit = norm_of(guided, P), nag_tau * norm_of(pos, P)
    # `norm` is 0 only where it is not over the limit
    shrink = tl.where(norm > limit, limit / tl.where(norm > limit, norm, 1.0), 1.0)

    start = 0
    for i in tl.static_range(len(C_CUT)):
        column = start + tl.arange(0, C_CUT[i])
        o = alpha * (guided[i] * shrink) + (1 - alpha) * pos[i]
        o = tl.where(alpha == 0, pos[i], o)
        tl.store(O + row * C + column, o.to(O.dtype.element_ty), mask=column < C)
        start += C_CUT[i]


def blend(z_pos, z_neg, alpha_map, alpha, nag_scale, nag_tau, nag_norm=1):
    """Launch the kernel on Z+ and Z- [b, l, h, d]; alpha_map [b, l, 1], or None for `alpha`."""
    z_pos, z_neg = z_pos.contiguous(), z_neg.contiguous()
    o = torch.empty_like(z_pos)
    launch(
        plan,
        (z_pos, z_neg, alpha_map),
        (nag_norm,),
        (z_pos, z_neg, o, alpha_map),
        (alpha, nag_scale, nag_tau),
    )
    return o


def plan(z_pos, z_neg, alpha_map, nag_norm) -> Launch:
    b, l, h, d = z_pos.shape
    return Launch(
        blend_kernel,
        # without heads there is no row either
        (b * l if h else 0,),
        (*strides_or_zeros(alpha_map, 3)[:2], l),
        {"C": h * d, "C_CUT": cut(h * d, widest=1024), "P": nag_norm},
        {"num_warps": 4 if h * d <= 2048 else 8, "enable_fp_fusion": True},
    )
