"""Fused joint attention, backward pass.

    O = c_s O_s + c_p O_p + c_n O_n         c = function of alpha and of the log-sum-exps s, p, n

    dP_i = dO V_i^T    u_i = rowsum(P_i * dP_i) = rowsum(dO * O_i), the gradient of c_i
    dS_i = P_i * (c_i (dP_i - u_i) + dlse_i)
    dQ = scale * sum of dS_i K_i        dK_i = scale * dS_i^T Q        dV_i = c_i P_i^T dO

Of the shared keys the forward pass keeps O_s and s, so their u is a sum over the head_dim. Three
steps, none with atomics: `statistics_kernel` rebuilds the log-sum-exps and u of the prompts,
`rules.py` makes c and dlse of them, a few numbers per query, and `query_kernel` and, for each
segment, `key_kernel` of `backward.py` write the gradients. The shared keys go through the same
kernels: PyTorch's attention, which attends to them in the forward pass, takes no gradient of its
log-sum-exp.

Names as in `joint.py` and `backward.py`. What is known of each query and segment is [3, b, h, l].
"""

import torch
import triton
import triton.language as tl

from nasa_kernels import rules
from nasa_kernels._triton.backward import Rows, add_streamed, key_gradients, statistics_streamed
from nasa_kernels._triton.configs import backward_queries_config, head_cut
from nasa_kernels._triton.joint import visible
from nasa_kernels._triton.launch import LOG2E, alignment, on_device, strides_or_zeros
from nasa_kernels._triton.tiles import (
    load_rows,
    of_head,
    scale_rows,
    store_rows,
    zeros,
)
from nasa_kernels.rules import Segments


@triton.jit(do_not_specialize=["L", "n_pos", "n_neg", "first_pos", "first_neg"])
def statistics_kernel(
    DO, Q, O_shared, K_pos, V_pos, K_neg, V_neg, MASK_pos, MASK_neg, LSE, U,
    stride_db, stride_dl, stride_dh, stride_qb, stride_ql, stride_qh,
    stride_kpb, stride_kpn, stride_kph, stride_vpb, stride_vpn, stride_vph,
    stride_knb, stride_knn, stride_knh, stride_vnb, stride_vnn, stride_vnh,
    stride_mpb, stride_mpn, stride_mnb, stride_mnn,
    H, L, n_pos, n_neg, first_pos, first_neg, qk_scale,
    D: tl.constexpr, D_CUT: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """u of the three segments, and lse of the prompts."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    Q = of_head(Q, b, h, stride_qb, stride_qh, ALIGN)
    DO = of_head(DO, b, h, stride_db, stride_dh, ALIGN)
    K_pos = of_head(K_pos, b, h, stride_kpb, stride_kph, ALIGN)
    V_pos = of_head(V_pos, b, h, stride_vpb, stride_vph, ALIGN)
    if MASK_pos is not None:
        MASK_pos += b * stride_mpb
    K_neg = of_head(K_neg, b, h, stride_knb, stride_knh, ALIGN)
    V_neg = of_head(V_neg, b, h, stride_vnb, stride_vnh, ALIGN)
    if MASK_neg is not None:
        MASK_neg += b * stride_mnb

    first_row = tl.program_id(0) * BLOCK_L
    row = first_row + tl.arange(0, BLOCK_L)
    n_pos, n_neg = visible(n_pos, n_neg, first_row, first_pos, first_neg, BLOCK_L)
    # [BLOCK_L, d]
    q = load_rows(Q, row, row < L, stride_ql, D, D_CUT, ALIGN)
    do = load_rows(DO, row, row < L, stride_dl, D, D_CUT, ALIGN)
    # contiguous
    o_shared = load_rows(O_shared + (b * L * H + h) * D, row, row < L, H * D, D, D_CUT, 1)
    u_shared = tl.zeros([BLOCK_L], tl.float32)
    for i in tl.static_range(len(D_CUT)):
        u_shared += tl.sum(do[i].to(tl.float32) * o_shared[i].to(tl.float32), 1)
    lse_pos, u_pos = statistics_streamed(
        q, do, K_pos, V_pos, MASK_pos, stride_kpn, stride_vpn, stride_mpn, n_pos, qk_scale,
        BLOCK_L, BLOCK_N, D, D_CUT, ALIGN,
    )  # fmt: skip
    lse_neg, u_neg = statistics_streamed(
        q, do, K_neg, V_neg, MASK_neg, stride_knn, stride_vnn, stride_mnn, n_neg, qk_scale,
        BLOCK_L, BLOCK_N, D, D_CUT, ALIGN,
    )  # fmt: skip

    shared, segment = bh * L + row, tl.num_programs(1).to(tl.int64) * L
    tl.store(U + shared, u_shared, mask=row < L)
    tl.store(U + segment + shared, u_pos, mask=row < L)
    tl.store(U + 2 * segment + shared, u_neg, mask=row < L)
    tl.store(LSE + segment + shared, lse_pos, mask=row < L)
    tl.store(LSE + 2 * segment + shared, lse_neg, mask=row < L)


@triton.jit
def add_segment(
    dq, q, do, K, V, MASK, stride_kn, stride_vn, stride_mn, n, LSE, U, C, DLSE, statistic, valid,
    qk_scale, BLOCK_N: tl.constexpr, D: tl.constexpr, D_CUT: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """dQ / scale plus the part of one segment."""
    lse = tl.load(LSE + statistic, mask=valid, other=0.0)
    u = tl.load(U + statistic, mask=valid, other=0.0)
    c = tl.load(C + statistic, mask=valid, other=0.0)
    dlse = tl.load(DLSE + statistic, mask=valid, other=0.0)
    return add_streamed(
        dq, q, do, K, V, MASK, stride_kn, stride_vn, stride_mn, n, lse, u, c, dlse[:, None],
        qk_scale, BLOCK_N, D, D_CUT, ALIGN,
    )  # fmt: skip


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
    ALIGN: tl.constexpr,
):  # fmt: skip
    """dQ: the segments one after the other, so its bits are always the same."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    Q = of_head(Q, b, h, stride_qb, stride_qh, ALIGN)
    DO = of_head(DO, b, h, stride_db, stride_dh, ALIGN)
    K = of_head(K, b, h, stride_kb, stride_kh, ALIGN)
    V = of_head(V, b, h, stride_vb, stride_vh, ALIGN)
    K_pos = of_head(K_pos, b, h, stride_kpb, stride_kph, ALIGN)
    V_pos = of_head(V_pos, b, h, stride_vpb, stride_vph, ALIGN)
    if MASK_pos is not None:
        MASK_pos += b * stride_mpb
    K_neg = of_head(K_neg, b, h, stride_knb, stride_knh, ALIGN)
    V_neg = of_head(V_neg, b, h, stride_vnb, stride_vnh, ALIGN)
    if MASK_neg is not None:
        MASK_neg += b * stride_mnb

    first_row = tl.program_id(0) * BLOCK_L
    row = first_row + tl.arange(0, BLOCK_L)
    n_pos, n_neg = visible(n_pos, n_neg, first_row, first_pos, first_neg, BLOCK_L)
    # [BLOCK_L, d]
    q = load_rows(Q, row, row < L, stride_ql, D, D_CUT, ALIGN)
    do = load_rows(DO, row, row < L, stride_dl, D, D_CUT, ALIGN)
    shared, segment = bh * L + row, tl.num_programs(1).to(tl.int64) * L
    dq = zeros(BLOCK_L, D_CUT)
    dq = add_segment(
        dq, q, do, K, V, None, stride_kn, stride_vn, 0, n, LSE, U, C, DLSE,
        shared, row < L, qk_scale, BLOCK_N, D, D_CUT, ALIGN,
    )  # fmt: skip
    dq = add_segment(
        dq, q, do, K_pos, V_pos, MASK_pos, stride_kpn, stride_vpn, stride_mpn, n_pos,
        LSE, U, C, DLSE, segment + shared, row < L, qk_scale, BLOCK_N, D, D_CUT, ALIGN,
    )  # fmt: skip
    dq = add_segment(
        dq, q, do, K_neg, V_neg, MASK_neg, stride_knn, stride_vnn, stride_mnn, n_neg,
        LSE, U, C, DLSE, 2 * segment + shared, row < L, qk_scale, BLOCK_N, D, D_CUT, ALIGN,
    )  # fmt: skip
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
    first_pos, first_neg = l - text_pos - text_neg, l - text_neg
    lse, u = torch.empty((2, 3, b, h, l), dtype=torch.float32, device=q.device)
    torch.mul(lse_shared, LOG2E, out=lse[0])
    dq = torch.empty((b, l, h, d), dtype=q.dtype, device=q.device) if needs[0] else q.new_empty(0)
    config = backward_queries_config(d, q.dtype)
    grid = (triton.cdiv(l, config.BLOCK_L), b * h)
    strides_of_prompts = (
        *k_pos.stride()[:3], *v_pos.stride()[:3], *k_neg.stride()[:3], *v_neg.stride()[:3],
        *strides_or_zeros(mask_pos, 2), *strides_or_zeros(mask_neg, 2),
    )  # fmt: skip
    n_pos, n_neg = k_pos.shape[1], k_neg.shape[1]
    align = alignment(do, q, k, v, k_pos, v_pos, k_neg, v_neg)
    options = {
        "D": d, "D_CUT": head_cut(d), "BLOCK_L": config.BLOCK_L, "BLOCK_N": config.BLOCK_N,
        "ALIGN": align, "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
    if q.numel() > 0:
        with on_device(q):
            statistics_kernel[grid](
                do, q, o_shared, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, lse, u,
                *do.stride()[:3], *q.stride()[:3], *strides_of_prompts,
                h, l, n_pos, n_neg, first_pos, first_neg, scale * LOG2E, **options,
            )  # fmt: skip

    weights = rules.alpha_per_row(q, alpha_map, alpha)
    natural = Segments(lse_shared, lse[1] / LOG2E, lse[2] / LOG2E)
    c = rules.coefficients(rule, natural, weights, text_pos, text_neg)
    dlse, dalpha = rules.gradients(rule, natural, weights, Segments(*u), text_pos, text_neg)
    c, dlse = torch.stack(c), torch.stack(dlse)
    # where no key was found P is 0: 2^(-inf - inf), not the NaN of 2^(-inf + inf)
    lse.masked_fill_(lse == float("-inf"), float("inf"))

    if needs[0] and q.numel() > 0:
        with on_device(q):
            query_kernel[grid](
                do, q, k, v, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, lse, u, c, dlse, dq,
                *do.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
                *strides_of_prompts,
                h, l, k.shape[1], n_pos, n_neg, first_pos, first_neg, scale, scale * LOG2E,
                **options,
            )  # fmt: skip
    segments = (
        (k, v, None, (0, 0)),
        (k_pos, v_pos, mask_pos, (first_neg, l)),
        (k_neg, v_neg, mask_neg, (first_pos, first_neg)),
    )
    found = []
    for i, (keys, values, mask, hidden) in enumerate(segments):
        rows = Rows(lse[i], u[i], c[i].transpose(1, 2), dlse=dlse[i], hidden=hidden)
        wanted = needs[1 + 2 * i : 3 + 2 * i]
        found += key_gradients(do, q, keys, values, mask, rows, scale, align, wanted)
    dalpha = dalpha.transpose(1, 2).contiguous() if needs[7] else dalpha.new_empty(0)
    return dq, *found, dalpha
