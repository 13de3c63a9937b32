"""Fused joint attention, backward pass: the launches of `_joint/gradients.py`.

The formulas are there. `statistics_kernel` rebuilds the log-sum-exps and u of the prompts,
`query_kernel` writes dQ, and `key_kernel` of `backward.py` the gradients of each segment's keys.

Names as in `joint.py` and `backward.py`. What is known of each query and segment is [3, b, h, l].
"""

import torch
import triton
import triton.language as tl

from nasa_kernels._joint.gradients import Launches, joint_gradients
from nasa_kernels._triton.backward import Rows, add_streamed, key_gradients, statistics_streamed
from nasa_kernels._triton.configs import backward_queries_config, head_cut
from nasa_kernels._triton.joint import visible
from nasa_kernels._triton.launch import (
    LOG2E,
    alignment,
    compiler_options,
    group_of,
    on_device,
    strides_or_zeros,
)
from nasa_kernels._triton.prompt import prompt_of_head
from nasa_kernels._triton.tiles import (
    load_rows,
    of_head,
    scale_rows,
    store_rows,
    tile_of_head,
    zeros,
)


@triton.jit(do_not_specialize=["L", "n_pos", "n_neg", "first_pos", "first_neg"])
def statistics_kernel(
    DO, Q, O_shared, K_pos, V_pos, K_neg, V_neg, MASK_pos, MASK_neg, LSE, U,
    stride_db, stride_dl, stride_dh, stride_qb, stride_ql, stride_qh,
    stride_kpb, stride_kpn, stride_kph, stride_vpb, stride_vpn, stride_vph,
    stride_knb, stride_knn, stride_knh, stride_vnb, stride_vnn, stride_vnh,
    stride_mpb, stride_mpn, stride_mnb, stride_mnn,
    H, L, n_pos, n_neg, first_pos, first_neg, qk_scale,
    D: tl.constexpr, D_CUT: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """u of the three segments, and lse of the prompts."""
    tiles = tl.cdiv(L, BLOCK_L)
    tile, bh = tile_of_head(tiles)
    b, h = bh // H, bh % H
    Q = of_head(Q, b, h, stride_qb, stride_qh, ALIGN)
    DO = of_head(DO, b, h, stride_db, stride_dh, ALIGN)
    first_row = tile * BLOCK_L
    row = first_row + tl.arange(0, BLOCK_L)
    n_pos, n_neg = visible(n_pos, n_neg, first_row, first_pos, first_neg, BLOCK_L)
    pos = prompt_of_head(
        K_pos, V_pos, MASK_pos, stride_kpb, stride_kpn, stride_kph,
        stride_vpb, stride_vpn, stride_vph, stride_mpb, stride_mpn, n_pos, b, h, GROUP, ALIGN,
    )  # fmt: skip
    neg = prompt_of_head(
        K_neg, V_neg, MASK_neg, stride_knb, stride_knn, stride_knh,
        stride_vnb, stride_vnn, stride_vnh, stride_mnb, stride_mnn, n_neg, b, h, GROUP, ALIGN,
    )  # fmt: skip
    # [BLOCK_L, d]
    q = load_rows(Q, row, row < L, stride_ql, D, D_CUT, ALIGN)
    do = load_rows(DO, row, row < L, stride_dl, D, D_CUT, ALIGN)
    # contiguous
    o_shared = load_rows(O_shared + (b * L * H + h) * D, row, row < L, H * D, D, D_CUT, 1)
    u_shared = tl.zeros([BLOCK_L], tl.float32)
    for i in tl.static_range(len(D_CUT)):
        u_shared += tl.sum(do[i].to(tl.float32) * o_shared[i].to(tl.float32), 1)
    lse_pos, u_pos = statistics_streamed(q, do, pos, qk_scale, BLOCK_L, BLOCK_N, D, D_CUT, ALIGN)
    lse_neg, u_neg = statistics_streamed(q, do, neg, qk_scale, BLOCK_L, BLOCK_N, D, D_CUT, ALIGN)

    shared, segment = bh * L + row, (tl.num_programs(0) // tiles).to(tl.int64) * L
    tl.store(U + shared, u_shared, mask=row < L)
    tl.store(U + segment + shared, u_pos, mask=row < L)
    tl.store(U + 2 * segment + shared, u_neg, mask=row < L)
    tl.store(LSE + segment + shared, lse_pos, mask=row < L)
    tl.store(LSE + 2 * segment + shared, lse_neg, mask=row < L)


@triton.jit
def add_segment(
    dq, q, do, prompt, LSE, U, C, DLSE, statistic, valid, qk_scale,
    BLOCK_N: tl.constexpr, D: tl.constexpr, D_CUT: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """dQ / scale plus the part of one segment."""
    lse = tl.load(LSE + statistic, mask=valid, other=0.0)
    u = tl.load(U + statistic, mask=valid, other=0.0)
    c = tl.load(C + statistic, mask=valid, other=0.0)
    dlse = tl.load(DLSE + statistic, mask=valid, other=0.0)
    return add_streamed(
        dq, q, do, prompt, lse, u, c, dlse[:, None], qk_scale, BLOCK_N, D, D_CUT, ALIGN
    )


@triton.jit(do_not_specialize=["L", "n", "n_pos", "n_neg", "first_pos", "first_neg"])
def query_kernel(
    DO, Q, K, V, K_pos, V_pos, K_neg, V_neg, MASK_pos, MASK_neg, LSE, U, C, DLSE, DQ,
    stride_db, stride_dl, stride_dh, stride_qb, stride_ql, stride_qh,
    stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_kpb, stride_kpn, stride_kph, stride_vpb, stride_vpn, stride_vph,
    stride_knb, stride_knn, stride_knh, stride_vnb, stride_vnn, stride_vnh,
    stride_mpb, stride_mpn, stride_mnb, stride_mnn,
    H, L, n, n_pos, n_neg, first_pos, first_neg, scale, qk_scale,
    D: tl.constexpr, D_CUT: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """dQ: the segments one after the other, so its bits are always the same."""
    tiles = tl.cdiv(L, BLOCK_L)
    tile, bh = tile_of_head(tiles)
    b, h = bh // H, bh % H
    Q = of_head(Q, b, h, stride_qb, stride_qh, ALIGN)
    DO = of_head(DO, b, h, stride_db, stride_dh, ALIGN)
    first_row = tile * BLOCK_L
    row = first_row + tl.arange(0, BLOCK_L)
    n_pos, n_neg = visible(n_pos, n_neg, first_row, first_pos, first_neg, BLOCK_L)
    shared = prompt_of_head(
        K, V, None, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
        0, 0, n, b, h, GROUP, ALIGN,
    )  # fmt: skip
    pos = prompt_of_head(
        K_pos, V_pos, MASK_pos, stride_kpb, stride_kpn, stride_kph,
        stride_vpb, stride_vpn, stride_vph, stride_mpb, stride_mpn, n_pos, b, h, GROUP, ALIGN,
    )  # fmt: skip
    neg = prompt_of_head(
        K_neg, V_neg, MASK_neg, stride_knb, stride_knn, stride_knh,
        stride_vnb, stride_vnn, stride_vnh, stride_mnb, stride_mnn, n_neg, b, h, GROUP, ALIGN,
    )  # fmt: skip
    # [BLOCK_L, d]
    q = load_rows(Q, row, row < L, stride_ql, D, D_CUT, ALIGN)
    do = load_rows(DO, row, row < L, stride_dl, D, D_CUT, ALIGN)
    statistic, segment = bh * L + row, (tl.num_programs(0) // tiles).to(tl.int64) * L
    dq = zeros(BLOCK_L, D_CUT)
    dq = add_segment(
        dq, q, do, shared, LSE, U, C, DLSE, statistic, row < L, qk_scale, BLOCK_N, D, D_CUT, ALIGN
    )
    statistic += segment
    dq = add_segment(
        dq, q, do, pos, LSE, U, C, DLSE, statistic, row < L, qk_scale, BLOCK_N, D, D_CUT, ALIGN
    )
    statistic += segment
    dq = add_segment(
        dq, q, do, neg, LSE, U, C, DLSE, statistic, row < L, qk_scale, BLOCK_N, D, D_CUT, ALIGN
    )
    factor = tl.full([BLOCK_L], 1.0, tl.float32) * scale
    store_rows(DQ + (b * L * H + h) * D, scale_rows(dq, factor), row, row < L, H * D, D, D_CUT)


def backward(
    do, o_shared, lse_shared,
    q, k, v, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, alpha, scale,
    rule, text_pos, text_neg, needs,
):  # fmt: skip
    """The gradients that `needs` asks for: of q, of keys and values in order, of the alpha map."""
    b, l, h, d = q.shape
    if do.stride(-1) != 1:
        do = do.contiguous()
    config = backward_queries_config(d, q.dtype)
    grid = (triton.cdiv(l, config.BLOCK_L) * b * h,)
    first_pos, first_neg = l - text_pos - text_neg, l - text_neg
    n_pos, n_neg = k_pos.shape[1], k_neg.shape[1]
    strides_of_prompts = (
        *k_pos.stride()[:3], *v_pos.stride()[:3], *k_neg.stride()[:3], *v_neg.stride()[:3],
        *strides_or_zeros(mask_pos, 2), *strides_or_zeros(mask_neg, 2),
    )  # fmt: skip
    align = alignment(do, q, k, v, k_pos, v_pos, k_neg, v_neg)
    options = {
        "D": d, "D_CUT": head_cut(d), "BLOCK_L": config.BLOCK_L, "BLOCK_N": config.BLOCK_N,
        "GROUP": group_of(q, k), "ALIGN": align, **compiler_options(config),
    }  # fmt: skip

    def statistics():
        lse, u = torch.empty((2, 3, b, h, l), dtype=torch.float32, device=q.device)
        if q.numel() > 0:
            with on_device(q):
                statistics_kernel[grid](
                    do, q, o_shared, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, lse, u,
                    *do.stride()[:3], *q.stride()[:3], *strides_of_prompts,
                    h, l, n_pos, n_neg, first_pos, first_neg, scale * LOG2E, **options,
                )  # fmt: skip
        return lse, u

    def queries(rows):
        dq = torch.empty((b, l, h, d), dtype=q.dtype, device=q.device)
        if q.numel() > 0:
            with on_device(q):
                query_kernel[grid](
                    do, q, k, v, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, *rows, dq,
                    *do.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
                    *strides_of_prompts,
                    h, l, k.shape[1], n_pos, n_neg, first_pos, first_neg, scale, scale * LOG2E,
                    **options,
                )  # fmt: skip
        return dq

    def keys(segment, needed):
        lse, u, c, dlse = segment.rows
        rows = Rows(lse, u, c.transpose(1, 2), dlse=dlse, hidden=segment.hidden)
        return key_gradients(do, q, segment.k, segment.v, segment.mask, rows, scale, align, needed)

    return joint_gradients(
        Launches(statistics, queries, keys), lse_shared,
        q, k, v, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, alpha,
        rule, text_pos, text_neg, needs,
    )  # fmt: skip
