"""Fused NASA attention, backward pass.

    w+ = 1, w- = -alpha          O = w+ P+ V+ + w- P- V-            P = softmax(Q K^T * scale)

    dP = dO V^T    u = rowsum(P * dP)    dS = w P * (dP - u)
    dQ = scale * sum over both prompts of dS K       dK = scale * dS^T Q
    dV = w P^T dO                                    dalpha = -u-

Two kernels, no atomics. `query_kernel` owns a tile of queries: it rebuilds P of both prompts,
writes dQ, and leaves the log-sum-exp and u of each row. `key_kernel` owns a block of keys of one
prompt and walks over the queries. The forward pass saves nothing: rowsum(dO * O), which other
attentions save, mixes the two prompts and cannot give u+ and u-.

Names as in `forward.py`. lse is base 2, of unscaled scores: 2^(s c - lse) = P, c = scale log2(e).
"""

import torch
import triton
import triton.language as tl

from nasa_kernels._triton.configs import (
    architecture,
    backward_keys_config,
    backward_queries_config,
    head_cut,
    multiprocessors,
    resident_cut,
)
from nasa_kernels._triton.forward import load_alpha, scores_resident
from nasa_kernels._triton.launch import LOG2E, alignment, on_device, strides_or_zeros
from nasa_kernels._triton.softmax import finite, mask_scores, nonzero, online_step, row_max
from nasa_kernels._triton.tiles import (
    add_dot,
    cut,
    dot,
    load_keys,
    load_prompt,
    load_rows,
    scale_rows,
    store_rows,
    transposed,
    zeros,
)


@triton.jit
def queries_resident(
    dq, q, do, K, V, MASK, stride_kn, stride_vn, stride_mn, n, w, qk_scale,
    N_CUT: tl.constexpr, D: tl.constexpr, D_CUT: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """dQ / scale plus one prompt's part of it, and lse and u of its rows."""
    k, v = load_prompt(K, V, MASK, stride_kn, stride_vn, stride_mn, n, N_CUT, D, D_CUT, ALIGN)
    scores = scores_resident(q, k, MASK, stride_mn, n, qk_scale, N_CUT)
    shift = row_max(scores) * qk_scale
    l = tl.zeros_like(shift)
    u = tl.zeros_like(shift)
    weights, gradients = (), ()
    for j in tl.static_range(len(N_CUT)):
        # [BLOCK_L, n_j]
        p = tl.exp2(scores[j] * qk_scale - shift[:, None])
        dp = dot(do, transposed(v[j]))
        l += tl.sum(p, 1)
        u += tl.sum(p * dp, 1)
        weights, gradients = weights + (p,), gradients + (dp,)
    l = nonzero(l)
    u = u / l
    factor = (w / l)[:, None]
    for j in tl.static_range(len(N_CUT)):
        ds = weights[j] * (gradients[j] - u[:, None]) * factor
        dq = add_dot(dq, ds, transposed(k[j]))
    return dq, shift + tl.log2(l), u


@triton.jit
def queries_streamed(
    dq, q, do, K, V, MASK, stride_kn, stride_vn, stride_mn, n, w, qk_scale,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, D_CUT: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """The same for a prompt that passes in blocks, twice: for the statistics, then for dQ."""
    m = tl.full([BLOCK_L], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_L], tl.float32)
    u = tl.zeros([BLOCK_L], tl.float32)
    for start in range(0, n, BLOCK_N):
        k, v = load_keys(
            K, V, MASK, stride_kn, stride_vn, stride_mn, start, n, BLOCK_N, D, D_CUT, ALIGN
        )
        key = start + tl.arange(0, BLOCK_N)
        s = mask_scores(dot(q, k), MASK, stride_mn, key, n, qk_scale, RAGGED=True)
        p, m, decay = online_step(s, m, qk_scale)
        l = l * decay + tl.sum(p, 1)
        u = u * decay + tl.sum(p * dot(do, transposed(v)), 1)
    l = nonzero(l)
    lse, u = finite(m) * qk_scale + tl.log2(l), u / l
    for start in range(0, n, BLOCK_N):
        k, v = load_keys(
            K, V, MASK, stride_kn, stride_vn, stride_mn, start, n, BLOCK_N, D, D_CUT, ALIGN
        )
        key = start + tl.arange(0, BLOCK_N)
        s = mask_scores(dot(q, k), MASK, stride_mn, key, n, qk_scale, RAGGED=True)
        p = tl.exp2(s * qk_scale - lse[:, None])
        ds = p * (dot(do, transposed(v)) - u[:, None]) * w[:, None]
        dq = add_dot(dq, ds, transposed(k))
    return dq, lse, u


@triton.jit(do_not_specialize=["L", "n_pos", "n_neg"])
def query_kernel(
    DO, Q, K_pos, V_pos, K_neg, V_neg, MASK_pos, MASK_neg, ALPHA,
    DQ, LSE_pos, LSE_neg, U_pos, U_neg,
    stride_db, stride_dl, stride_dh, stride_qb, stride_ql, stride_qh,
    stride_kpb, stride_kpn, stride_kph, stride_vpb, stride_vpn, stride_vph,
    stride_knb, stride_knn, stride_knh, stride_vnb, stride_vnn, stride_vnh,
    stride_mpb, stride_mpn, stride_mnb, stride_mnn,
    stride_ab, stride_al, stride_ah,
    H, L, n_pos, n_neg, alpha, scale, qk_scale,
    D: tl.constexpr, D_CUT: tl.constexpr, POS_CUT: tl.constexpr, NEG_CUT: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    Q += tl.multiple_of(b * stride_qb + h * stride_qh, ALIGN)
    DO += tl.multiple_of(b * stride_db + h * stride_dh, ALIGN)
    K_pos += tl.multiple_of(b * stride_kpb + h * stride_kph, ALIGN)
    V_pos += tl.multiple_of(b * stride_vpb + h * stride_vph, ALIGN)
    K_neg += tl.multiple_of(b * stride_knb + h * stride_knh, ALIGN)
    V_neg += tl.multiple_of(b * stride_vnb + h * stride_vnh, ALIGN)
    if MASK_pos is not None:
        MASK_pos += b * stride_mpb
    if MASK_neg is not None:
        MASK_neg += b * stride_mnb

    row = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    # [BLOCK_L, d]
    q = load_rows(Q, row, row < L, stride_ql, D, D_CUT, ALIGN)
    do = load_rows(DO, row, row < L, stride_dl, D, D_CUT, ALIGN)
    alpha_row = load_alpha(ALPHA, alpha, stride_ab, stride_al, stride_ah, b, h, row, row < L)
    ones = tl.full([BLOCK_L], 1.0, tl.float32)

    dq = zeros(BLOCK_L, D_CUT)
    if len(NEG_CUT) > 0:
        dq, lse_neg, u_neg = queries_resident(
            dq, q, do, K_neg, V_neg, MASK_neg, stride_knn, stride_vnn, stride_mnn, n_neg,
            -alpha_row, qk_scale, NEG_CUT, D, D_CUT, ALIGN,
        )  # fmt: skip
    else:
        dq, lse_neg, u_neg = queries_streamed(
            dq, q, do, K_neg, V_neg, MASK_neg, stride_knn, stride_vnn, stride_mnn, n_neg,
            -alpha_row, qk_scale, BLOCK_L, BLOCK_N, D, D_CUT, ALIGN,
        )  # fmt: skip
    if len(POS_CUT) > 0:
        dq, lse_pos, u_pos = queries_resident(
            dq, q, do, K_pos, V_pos, MASK_pos, stride_kpn, stride_vpn, stride_mpn, n_pos,
            ones, qk_scale, POS_CUT, D, D_CUT, ALIGN,
        )  # fmt: skip
    else:
        dq, lse_pos, u_pos = queries_streamed(
            dq, q, do, K_pos, V_pos, MASK_pos, stride_kpn, stride_vpn, stride_mpn, n_pos,
            ones, qk_scale, BLOCK_L, BLOCK_N, D, D_CUT, ALIGN,
        )  # fmt: skip

    if DQ is not None:
        DQ += (b * L * H + h) * D
        store_rows(DQ, scale_rows(dq, ones * scale), row, row < L, H * D, D, D_CUT)
    # [b, h, l]
    statistic = bh * L + row
    tl.store(LSE_pos + statistic, lse_pos, mask=row < L)
    tl.store(LSE_neg + statistic, lse_neg, mask=row < L)
    tl.store(U_pos + statistic, u_pos, mask=row < L)
    tl.store(U_neg + statistic, u_neg, mask=row < L)


@triton.jit(do_not_specialize=["L", "n"])
def key_kernel(
    DO, Q, K, V, MASK, ALPHA, LSE, U, DK, DV,
    stride_db, stride_dl, stride_dh, stride_qb, stride_ql, stride_qh,
    stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_mb, stride_mn,
    stride_ab, stride_al, stride_ah,
    B, H, L, n, alpha, scale, qk_scale,
    NEGATIVE: tl.constexpr, D: tl.constexpr, D_CUT: tl.constexpr, N_CUT: tl.constexpr,
    KEYS: tl.constexpr, BLOCK_L: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """dK and dV of KEYS keys; the splits of the queries each write a part `[split, b, n, h, d]`."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    split = tl.program_id(2)
    first = tl.program_id(0) * KEYS
    Q += tl.multiple_of(b * stride_qb + h * stride_qh, ALIGN)
    DO += tl.multiple_of(b * stride_db + h * stride_dh, ALIGN)
    K += tl.multiple_of(b * stride_kb + h * stride_kh, ALIGN)
    V += tl.multiple_of(b * stride_vb + h * stride_vh, ALIGN)
    if MASK is not None:
        MASK += b * stride_mb
    LSE += bh * L
    U += bh * L

    k, v = (), ()
    dk, dv = (), ()
    start = first
    for j in tl.static_range(len(N_CUT)):
        # [d, n_j], [n_j, d]
        k_j, v_j = load_keys(
            K, V, MASK, stride_kn, stride_vn, stride_mn, start, n, N_CUT[j], D, D_CUT, ALIGN
        )
        k, v = k + (transposed(k_j),), v + (v_j,)
        dk, dv = dk + (zeros(N_CUT[j], D_CUT),), dv + (zeros(N_CUT[j], D_CUT),)
        start += N_CUT[j]

    for tile in range(split, tl.cdiv(L, BLOCK_L), tl.num_programs(2)):
        row = tile * BLOCK_L + tl.arange(0, BLOCK_L)
        # [BLOCK_L, d]
        q = load_rows(Q, row, row < L, stride_ql, D, D_CUT, ALIGN)
        do = load_rows(DO, row, row < L, stride_dl, D, D_CUT, ALIGN)
        # rows past the end: q and dO are zeros, so they add nothing whatever lse is
        lse = tl.load(LSE + row, mask=row < L, other=0.0)
        u = tl.load(U + row, mask=row < L, other=0.0)
        w = tl.full([BLOCK_L], 1.0, tl.float32)
        if NEGATIVE:
            w = -load_alpha(ALPHA, alpha, stride_ab, stride_al, stride_ah, b, h, row, row < L)
        dk, dv = add_gradients(
            dk, dv, q, do, k, v, lse, u, w, MASK, stride_mn, first, n, qk_scale, N_CUT
        )

    part = ((split.to(tl.int64) * B + b) * n * H + h) * D
    start = first
    for j in tl.static_range(len(N_CUT)):
        store_gradients(
            DK + part, DV + part, dk[j], dv[j], start, n, H * D, scale, N_CUT[j], D, D_CUT
        )
        start += N_CUT[j]


@triton.jit
def add_gradients(
    dk, dv, q, do, k, v, lse, u, w, MASK, stride_mn, first, n, qk_scale, N_CUT: tl.constexpr
):
    """dK / scale and dV plus what one tile of queries adds. Scores stand keys by queries."""
    dk_sum, dv_sum = (), ()
    start = first
    for j in tl.static_range(len(N_CUT)):
        key = start + tl.arange(0, N_CUT[j])
        # [n_j, BLOCK_L]
        s = dot(k[j], transposed(q))
        s = tl.trans(mask_scores(tl.trans(s), MASK, stride_mn, key, n, qk_scale, RAGGED=True))
        p = tl.exp2(s * qk_scale - lse[None, :])
        ds = p * (dot(v[j], transposed(do)) - u[None, :]) * w[None, :]
        dv_sum = dv_sum + (add_dot(dv[j], p * w[None, :], do),)
        dk_sum = dk_sum + (add_dot(dk[j], ds, q),)
        start += N_CUT[j]
    return dk_sum, dv_sum


@triton.jit
def store_gradients(
    DK, DV, dk, dv, start, n, stride, scale,
    BLOCK_N: tl.constexpr, D: tl.constexpr, D_CUT: tl.constexpr,
):  # fmt: skip
    key = start + tl.arange(0, BLOCK_N)
    factor = tl.full([BLOCK_N], 1.0, tl.float32) * scale
    store_rows(DK, scale_rows(dk, factor), key, key < n, stride, D, D_CUT)
    store_rows(DV, dv, key, key < n, stride, D, D_CUT)


def backward(do, q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, alpha, scale, needs):
    """The gradients that `needs` asks for, of q, k_pos, v_pos, k_neg, v_neg and the alpha map."""
    b, l, h, d = q.shape
    if do.stride(-1) != 1:
        do = do.contiguous()
    # [b, h, l]
    lse_pos, lse_neg, u_pos, u_neg = torch.empty((4, b, h, l), dtype=torch.float32, device=q.device)
    dq = torch.empty((b, l, h, d), dtype=q.dtype, device=q.device) if needs[0] else None
    align = alignment(do, q, k_pos, v_pos, k_neg, v_neg)
    if q.numel() > 0:
        widest = 128 if architecture(q.device) >= 90 else 64
        pos_cut, neg_cut = (resident_cut(k.shape[1], d, q, widest) for k in (k_pos, k_neg))
        config = backward_queries_config(d, q.dtype)
        with on_device(q):
            query_kernel[triton.cdiv(l, config.BLOCK_L), b * h](
                do, q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map,
                dq, lse_pos, lse_neg, u_pos, u_neg,
                *do.stride()[:3], *q.stride()[:3],
                *k_pos.stride()[:3], *v_pos.stride()[:3], *k_neg.stride()[:3], *v_neg.stride()[:3],
                *strides_or_zeros(mask_pos, 2), *strides_or_zeros(mask_neg, 2),
                *strides_or_zeros(alpha_map, 3),
                h, l, k_pos.shape[1], k_neg.shape[1], alpha, scale, scale * LOG2E,
                D=d, D_CUT=head_cut(d), POS_CUT=pos_cut, NEG_CUT=neg_cut,
                BLOCK_L=config.BLOCK_L, BLOCK_N=config.BLOCK_N, ALIGN=align,
                num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip

    def keys(k, v, mask, lse, u, negative):
        needed = needs[3:5] if negative else needs[1:3]
        if not any(needed):
            return q.new_empty(0), q.new_empty(0)
        found = _key_gradients(
            do,
            q,
            k,
            v,
            mask,
            alpha_map if negative else None,
            lse,
            u,
            alpha,
            scale,
            negative,
            align,
        )
        return (x if wanted else q.new_empty(0) for x, wanted in zip(found, needed, strict=True))

    dk_pos, dv_pos = keys(k_pos, v_pos, mask_pos, lse_pos, u_pos, negative=False)
    dk_neg, dv_neg = keys(k_neg, v_neg, mask_neg, lse_neg, u_neg, negative=True)
    # [b, h, l] -> [b, l, h]
    dalpha = -u_neg.transpose(1, 2).contiguous() if needs[5] else u_neg.new_empty(0)
    return q.new_empty(0) if dq is None else dq, dk_pos, dv_pos, dk_neg, dv_neg, dalpha


def _key_gradients(do, q, k, v, mask, alpha_map, lse, u, alpha, scale, negative, align):
    b, l, h, d = q.shape
    n = k.shape[1]
    if q.numel() == 0 or n == 0:
        return q.new_zeros(k.shape), q.new_zeros(v.shape)
    config = backward_keys_config(d, q.dtype)
    keys = min(n, config.BLOCK_N)
    blocks = triton.cdiv(n, keys)
    # queries are split, and the parts summed, only where heads and keys do not fill the GPU
    splits = min(
        triton.cdiv(l, config.BLOCK_L), triton.cdiv(multiprocessors(q.device), b * h * blocks)
    )
    dtype = q.dtype if splits == 1 else torch.float32
    dk, dv = (torch.empty((splits, b, n, h, d), dtype=dtype, device=q.device) for _ in range(2))
    with on_device(q):
        key_kernel[blocks, b * h, splits](
            do, q, k, v, mask, alpha_map, lse, u, dk, dv,
            *do.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            *strides_or_zeros(mask, 2), *strides_or_zeros(alpha_map, 3),
            b, h, l, n, alpha, scale, scale * LOG2E,
            NEGATIVE=negative, D=d, D_CUT=head_cut(d), N_CUT=cut(keys), KEYS=keys,
            BLOCK_L=config.BLOCK_L, ALIGN=align,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return (dk[0], dv[0]) if splits == 1 else (dk.sum(0).to(q.dtype), dv.sum(0).to(q.dtype))
