"""The projected rule, backward pass: from dO to dZ+ and dZ-, each prompt's own dO.

With G = dO, and t, r, D as in `projected.py`, s = |D|^2 / |Z+|^2, g_p = <G, Z+>, g_d = <G, D>:

    dr = r^3 (g_p - alpha g_d)       ds = -alpha^2 dr / 2       dalpha = -r g_d - alpha s dr
    dZ- = -alpha r G + (alpha r g_p Z+ + 2 ds D) / |Z+|^2
    dZ+ = r (1 + alpha t) G + ((alpha r g_p - 2 t ds) D - (alpha r g_p t + 2 s ds) Z+) / |Z+|^2

One launch, the forward kernel with another end: Z+ and Z- are rebuilt on chip and reach no memory.
What follows is the backward pass of plain attention, to which `backward.py` gives dZ+ and dZ-.
"""

import torch
import triton
import triton.language as tl

from nasa_kernels._triton.configs import gradients_config, head_cut
from nasa_kernels._triton.forward import attend, blocks_of_z, load_alpha
from nasa_kernels._triton.launch import (
    LOG2E,
    alignment,
    compiler_options,
    group_of,
    on_device,
    strides_or_zeros,
)
from nasa_kernels._triton.projected import SMALLEST, rows_dot
from nasa_kernels._triton.prompt import load_prompt, prompt_of_head
from nasa_kernels._triton.softmax import nonzero
from nasa_kernels._triton.tiles import (
    load_rows,
    of_head,
    scale_rows,
    store_block,
    tile_of_head,
)


@triton.jit(do_not_specialize=["L", "n_pos", "n_neg"])
def row_gradients_kernel(
    DO, Q, K_pos, V_pos, K_neg, V_neg, MASK_pos, MASK_neg, ALPHA, DZ_pos, DZ_neg, DALPHA,
    stride_db, stride_dl, stride_dh, stride_qb, stride_ql, stride_qh,
    stride_kpb, stride_kpn, stride_kph, stride_vpb, stride_vpn, stride_vph,
    stride_knb, stride_knn, stride_knh, stride_vnb, stride_vnn, stride_vnh,
    stride_mpb, stride_mpn, stride_mnb, stride_mnn,
    stride_ab, stride_al, stride_ah,
    H, L, n_pos, n_neg, alpha, qk_scale,
    D: tl.constexpr, D_CUT: tl.constexpr, POS_CUT: tl.constexpr, NEG_CUT: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """dZ+, dZ- [b, l, h, d] and, where it is not None, dalpha [b, l, h] of a tile of queries."""
    tile, bh = tile_of_head(tl.cdiv(L, BLOCK_L))
    b, h = bh // H, bh % H
    pos = prompt_of_head(
        K_pos, V_pos, MASK_pos, stride_kpb, stride_kpn, stride_kph,
        stride_vpb, stride_vpn, stride_vph, stride_mpb, stride_mpn, n_pos, b, h, GROUP, ALIGN,
    )  # fmt: skip
    neg = prompt_of_head(
        K_neg, V_neg, MASK_neg, stride_knb, stride_knn, stride_knh,
        stride_vnb, stride_vnn, stride_vnh, stride_mnb, stride_mnn, n_neg, b, h, GROUP, ALIGN,
    )  # fmt: skip
    row = tile * BLOCK_L + tl.arange(0, BLOCK_L)
    # [BLOCK_L, d]
    Q = of_head(Q, b, h, stride_qb, stride_qh, ALIGN)
    q = load_rows(Q, row, row < L, stride_ql, D, D_CUT, ALIGN)
    k_neg, v_neg = load_prompt(neg, NEG_CUT, D, D_CUT, ALIGN)
    found_neg, l_neg, _ = attend(
        q, k_neg, neg, qk_scale, NEG_CUT, BLOCK_L, BLOCK_N, D, D_CUT, ALIGN
    )
    k_pos, v_pos = load_prompt(pos, POS_CUT, D, D_CUT, ALIGN)
    found_pos, l_pos, _ = attend(
        q, k_pos, pos, qk_scale, POS_CUT, BLOCK_L, BLOCK_N, D, D_CUT, ALIGN
    )
    z_pos = blocks_of_z(found_pos, v_pos, POS_CUT, BLOCK_L, D_CUT)
    z_neg = blocks_of_z(found_neg, v_neg, NEG_CUT, BLOCK_L, D_CUT)
    z_pos = scale_rows(z_pos, 1.0 / nonzero(l_pos))
    z_neg = scale_rows(z_neg, 1.0 / nonzero(l_neg))

    # past the end: 0, under which Z- is not looked at
    a = load_alpha(ALPHA, alpha, stride_ab, stride_al, stride_ah, b, h, row, row < L)
    squared = rows_dot(z_pos, z_pos)
    nothing = squared < SMALLEST
    a = tl.where(nothing, 0.0, a)
    squared = tl.where(nothing, 1.0, squared)
    if ALPHA is not None:
        z_neg = looked_at(z_neg, a)
    t = tl.div_rn(rows_dot(z_neg, z_pos), squared)
    apart = ()
    for i in tl.static_range(len(D_CUT)):
        apart = apart + (z_neg[i] - t[:, None] * z_pos[i],)
    s = rows_dot(apart, apart) / squared
    r = tl.rsqrt(1.0 + a * a * s)

    DO = of_head(DO, b, h, stride_db, stride_dh, ALIGN)
    g = load_rows(DO, row, row < L, stride_dl, D, D_CUT, ALIGN)
    g = scale_rows(g, tl.full([BLOCK_L], 1.0, tl.float32))
    g_p, g_d = rows_dot(g, z_pos), rows_dot(g, apart)
    dr = r * r * r * (g_p - a * g_d)
    ds = -0.5 * a * a * dr
    along = a * r * g_p
    of_g, of_pos, of_apart = -a * r, along / squared, 2.0 * ds / squared
    DZ_pos, DZ_neg = DZ_pos + (b * L * H + h) * D, DZ_neg + (b * L * H + h) * D
    start = 0
    for i in tl.static_range(len(D_CUT)):
        dz = of_g[:, None] * g[i] + (of_pos[:, None] * z_pos[i] + of_apart[:, None] * apart[i])
        store_block(DZ_neg, dz, row, row < L, H * D, start, D, D_CUT[i])
        start += D_CUT[i]
    of_g = r * (1.0 + a * t)
    of_apart, of_pos = (along - 2.0 * t * ds) / squared, -(along * t + 2.0 * s * ds) / squared
    start = 0
    for i in tl.static_range(len(D_CUT)):
        dz = of_g[:, None] * g[i] + (of_pos[:, None] * z_pos[i] + of_apart[:, None] * apart[i])
        store_block(DZ_pos, dz, row, row < L, H * D, start, D, D_CUT[i])
        start += D_CUT[i]
    if DALPHA is not None:
        dalpha = tl.where(nothing, 0.0, -r * g_d - a * s * dr)
        tl.store(DALPHA + (b * L + row) * H + h, dalpha, mask=row < L)


@triton.jit
def looked_at(z_neg, alpha):
    """Z- with 0 for inf and NaN where alpha is 0."""
    kept = ()
    for i in tl.static_range(len(z_neg)):
        hidden = (alpha == 0.0)[:, None] & ~(tl.abs(z_neg[i]) < float("inf"))
        kept = kept + (tl.where(hidden, 0.0, z_neg[i]),)
    return kept


def row_gradients(
    do, q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, alpha, scale,
    pos_cut, neg_cut, has_alpha,
):  # fmt: skip
    """dZ+ and dZ- [b, l, h, d] in the dtype of q, and dalpha [b, l, h] where `has_alpha`."""
    b, l, h, d = q.shape
    dz_pos, dz_neg = (torch.empty((b, l, h, d), dtype=q.dtype, device=q.device) for _ in range(2))
    dalpha = torch.empty((b, l, h), dtype=torch.float32, device=q.device) if has_alpha else None
    if q.numel() == 0:
        return dz_pos, dz_neg, dalpha
    config = gradients_config(d, q.dtype)
    with on_device(q):
        row_gradients_kernel[(triton.cdiv(l, config.BLOCK_L) * b * h,)](
            do, q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map,
            dz_pos, dz_neg, dalpha,
            *do.stride()[:3], *q.stride()[:3],
            *k_pos.stride()[:3], *v_pos.stride()[:3], *k_neg.stride()[:3], *v_neg.stride()[:3],
            *strides_or_zeros(mask_pos, 2), *strides_or_zeros(mask_neg, 2),
            *strides_or_zeros(alpha_map, 3),
            h, l, k_pos.shape[1], k_neg.shape[1], alpha, scale * LOG2E,
            D=d, D_CUT=head_cut(d), POS_CUT=pos_cut, NEG_CUT=neg_cut,
            BLOCK_L=config.BLOCK_L, BLOCK_N=config.BLOCK_N,
            GROUP=group_of(q, k_pos), ALIGN=alignment(do, q, k_pos, v_pos, k_neg, v_neg),
            **compiler_options(config),
        )  # fmt: skip
    return dz_pos, dz_neg, dalpha
