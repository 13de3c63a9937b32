"""The row-wise end of normalised attention guidance: `nasa_kernels/nag.py` says what it computes.

    G = s Z+ - (s - 1) Z-        O = a G min(1, tau |Z+| / |G|) + (1 - a) Z+

One program per query: its row over all heads, [h * d] of each of Z+ and Z-, is read once, stays
in registers for the two norms, and is written once. Widths are those of `tiles.cut`, so 1280
channels are 1024 and 256 and none are padded to 2048.
"""

import triton
import triton.language as tl

from nasa_kernels._triton.launch import Launch, launch, strides_or_zeros
from nasa_kernels._triton.tiles import cut


@triton.jit
def load_row(X, count, C_CUT: tl.constexpr):
    """`count` channels of a row as a tuple of fp32 blocks over C_CUT, zeros past them."""
    blocks = ()
    start = 0
    for i in tl.static_range(len(C_CUT)):
        column = start + tl.arange(0, C_CUT[i])
        blocks = blocks + (tl.load(X + column, mask=column < count, other=0.0).to(tl.float32),)
        start += C_CUT[i]
    return blocks


@triton.jit
def norm_of(blocks, P: tl.constexpr):
    """The sum of magnitudes of a row, or for P 2 the root of the sum of squares."""
    total = 0.0
    for i in tl.static_range(len(blocks)):
        total += tl.sum(tl.abs(blocks[i]) if P == 1 else blocks[i] * blocks[i], 0)
    return total if P == 1 else tl.sqrt_rn(total)


@triton.jit(do_not_specialize=["L", "first_pos", "first_neg"])
def blend_kernel(
    Z_pos, Z_neg, O, ALPHA, stride_ab, stride_al, L, first_pos, first_neg,
    alpha, nag_scale, nag_tau, C: tl.constexpr, C_CUT: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Rows [first_pos, first_neg) of O are those of Z+, rows [first_neg, L) those of Z-. Neither
    has the rows of the other's text. O may be Z+.
    """
    row = tl.program_id(0).to(tl.int64)
    b, l = row // L, row % L
    is_pos, is_neg = (l >= first_pos) & (l < first_neg), l >= first_neg
    text_pos = first_neg - first_pos
    if ALPHA is not None:
        alpha = tl.load(ALPHA + b * stride_ab + l * stride_al, mask=l < first_pos, other=0.0)
    # [C], fp32
    pos = load_row(Z_pos + (b * first_neg + l) * C, tl.where(is_neg, 0, C), C_CUT)
    l_neg = tl.where(is_neg, l - text_pos, l)
    neg = load_row(Z_neg + (b * (L - text_pos) + l_neg) * C, tl.where(is_pos, 0, C), C_CUT)
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
        o = tl.where(is_neg, neg[i], tl.where(is_pos | (alpha == 0), pos[i], o))
        tl.store(O + row * C + column, o.to(O.dtype.element_ty), mask=column < C)
        start += C_CUT[i]


def blend(
    z_pos, z_neg, o, alpha_map, alpha, nag_scale, nag_tau, nag_norm, text_pos=0, text_neg=0
):  # fmt: skip
    """Launch the kernel on Z+ [b, l - text_neg, h, d] and Z- [b, l - text_pos, h, d], to O
    [b, l, h, d], all contiguous; alpha_map broadcasts to [b, image queries, 1], or is None for
    `alpha`.
    """
    launch(
        plan,
        (o, alpha_map),
        (nag_norm, text_pos, text_neg),
        (z_pos, z_neg, o, alpha_map),
        (alpha, nag_scale, nag_tau),
    )
    return o


def plan(o, alpha_map, nag_norm, text_pos, text_neg) -> Launch:
    b, l, h, d = o.shape
    first_pos, first_neg = l - text_pos - text_neg, l - text_neg
    if alpha_map is not None:
        alpha_map = alpha_map.expand(b, first_pos, 1)
    return Launch(
        blend_kernel,
        # without heads there is no row either
        (b * l if h else 0,),
        (*strides_or_zeros(alpha_map, 3)[:2], l, first_pos, first_neg),
        {"C": h * d, "C_CUT": cut(h * d, widest=1024), "P": nag_norm},
        {"num_warps": 4 if h * d <= 2048 else 8, "enable_fp_fusion": True},
    )
