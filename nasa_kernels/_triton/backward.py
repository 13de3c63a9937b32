"""Fused NASA attention, backward pass.

    w+ = 1, w- = -alpha          O = w+ P+ V+ + w- P- V-            P = softmax(Q K^T * scale)

    dP = dO V^T    u = rowsum(P * dP)    dS = P * w (dP - u)
    dQ = scale * sum over both prompts of dS K       dK = scale * dS^T Q
    dV = w P^T dO                                    dalpha = -u-

Two kernels, no atomics. `query_kernel` owns a tile of queries: it rebuilds P of both prompts,
writes dQ, and leaves the log-sum-exp and u of each row. `key_kernel` owns a block of keys of one
prompt and walks over the queries. The forward pass saves nothing: rowsum(dO * O), which other
attentions save, mixes the two prompts and cannot give u+ and u-.

In joint attention (`joint_backward.py`) w is a function of the log-sum-exps, which then have a
gradient of their own: dS = P * (w (dP - u) + dlse).

Under the projected rule `projected_backward.py` turns dO into dZ+ and dZ-, and each prompt's part
is that of plain attention under its own dO.

Names as in `forward.py`. lse is base 2, of unscaled scores: 2^(s c - lse) = P, c = scale log2(e);
never -inf, which would make NaN of the scores of keys that are not there.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nasa_kernels._triton.configs import (
    architecture,
    backward_keys_config,
    backward_queries_config,
    head_cut,
    multiprocessors,
    resident_cut,
)
from nasa_kernels._triton.forward import load_alpha, scores_resident
from nasa_kernels._triton.launch import (
    LOG2E,
    alignment,
    compiler_options,
    group_of,
    on_device,
    strides_or_zeros,
)
from nasa_kernels._triton.projected_backward import row_gradients
from nasa_kernels._triton.prompt import load_keys, load_prompt, prompt_of_head
from nasa_kernels._triton.softmax import finite, mask_scores, nonzero, online_step, row_max
from nasa_kernels._triton.tiles import (
    add_dot,
    cut,
    dot,
    load_rows,
    of_head,
    scale_rows,
    store_rows,
    tile_of_head,
    transposed,
    zeros,
)
from nasa_kernels.reference import RULES


@triton.jit
def queries_resident(
    dq, q, do, prompt, w, qk_scale,
    N_CUT: tl.constexpr, D: tl.constexpr, D_CUT: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """dQ / scale plus one prompt's part of it, and lse and u of its rows."""
    k, v = load_prompt(prompt, N_CUT, D, D_CUT, ALIGN)
    scores = scores_resident(q, k, prompt, qk_scale, N_CUT)
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
def statistics_streamed(
    q, do, prompt, qk_scale, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, D_CUT: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """lse and u of each row over keys that pass in blocks; -inf and 0 where it has none."""
    m = tl.full([BLOCK_L], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_L], tl.float32)
    u = tl.zeros([BLOCK_L], tl.float32)
    for start in range(0, prompt.n, BLOCK_N):
        k, v = load_keys(prompt, start, True, BLOCK_N, D, D_CUT, ALIGN)
        key = start + tl.arange(0, BLOCK_N)
        s = mask_scores(dot(q, k), prompt, key, qk_scale, RAGGED=True)
        p, m, decay = online_step(s, m, qk_scale)
        l = l * decay + tl.sum(p, 1)
        u = u * decay + tl.sum(p * dot(do, transposed(v)), 1)
    return finite(m) * qk_scale + tl.log2(l), u / nonzero(l)


@triton.jit
def add_streamed(
    dq, q, do, prompt, lse, u, w, dlse, qk_scale,
    BLOCK_N: tl.constexpr, D: tl.constexpr, D_CUT: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """dQ / scale plus the part of keys that pass in blocks."""
    for start in range(0, prompt.n, BLOCK_N):
        k, v = load_keys(prompt, start, True, BLOCK_N, D, D_CUT, ALIGN)
        key = start + tl.arange(0, BLOCK_N)
        s = mask_scores(dot(q, k), prompt, key, qk_scale, RAGGED=True)
        p = tl.exp2(s * qk_scale - lse[:, None])
        dp = dot(do, transposed(v))
        ds = gradient_of_scores(p, p * w[:, None], dp, u[:, None], dlse)
        dq = add_dot(dq, ds, transposed(k))
    return dq


@triton.jit
def queries_of_prompt(
    dq, q, do, prompt, w, qk_scale, N_CUT: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr, D: tl.constexpr, D_CUT: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """dQ / scale plus one prompt's part of it, and lse and u of its rows: 0 of a void prompt."""
    if N_CUT is None:
        lse, u = tl.zeros([BLOCK_L], tl.float32), tl.zeros([BLOCK_L], tl.float32)
    elif len(N_CUT) > 0:
        dq, lse, u = queries_resident(dq, q, do, prompt, w, qk_scale, N_CUT, D, D_CUT, ALIGN)
    else:
        lse, u = statistics_streamed(q, do, prompt, qk_scale, BLOCK_L, BLOCK_N, D, D_CUT, ALIGN)
        lse = finite(lse)
        dq = add_streamed(dq, q, do, prompt, lse, u, w, None, qk_scale, BLOCK_N, D, D_CUT, ALIGN)
    return dq, lse, u


@triton.jit
def gradient_of_scores(p, weighted, dp, u, dlse):
    """dS from p and w p; u and dlse stand beside their rows, dlse is None where it is 0."""
    ds = weighted * (dp - u)
    if dlse is not None:
        ds += p * dlse
    return ds


@triton.jit(do_not_specialize=["L", "n_pos", "n_neg"])
def query_kernel(
    DO, DO_neg, Q, K_pos, V_pos, K_neg, V_neg, MASK_pos, MASK_neg, ALPHA,
    DQ, LSE_pos, LSE_neg, U_pos, U_neg,
    stride_db, stride_dl, stride_dh, stride_qb, stride_ql, stride_qh,
    stride_kpb, stride_kpn, stride_kph, stride_vpb, stride_vpn, stride_vph,
    stride_knb, stride_knn, stride_knh, stride_vnb, stride_vnn, stride_vnh,
    stride_mpb, stride_mpn, stride_mnb, stride_mnn,
    stride_ab, stride_al, stride_ah,
    H, L, n_pos, n_neg, alpha, scale, qk_scale,
    D: tl.constexpr, D_CUT: tl.constexpr, POS_CUT: tl.constexpr, NEG_CUT: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    tile, bh = tile_of_head(tl.cdiv(L, BLOCK_L))
    b, h = bh // H, bh % H
    Q = of_head(Q, b, h, stride_qb, stride_qh, ALIGN)
    DO = of_head(DO, b, h, stride_db, stride_dh, ALIGN)
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
    q = load_rows(Q, row, row < L, stride_ql, D, D_CUT, ALIGN)
    do = load_rows(DO, row, row < L, stride_dl, D, D_CUT, ALIGN)
    ones = tl.full([BLOCK_L], 1.0, tl.float32)
    if DO_neg is None:
        do_neg = do
        w_neg = -load_alpha(ALPHA, alpha, stride_ab, stride_al, stride_ah, b, h, row, row < L)
    else:
        DO_neg = of_head(DO_neg, b, h, stride_db, stride_dh, ALIGN)
        do_neg = load_rows(DO_neg, row, row < L, stride_dl, D, D_CUT, ALIGN)
        w_neg = ones

    dq = zeros(BLOCK_L, D_CUT)
    dq, lse_neg, u_neg = queries_of_prompt(
        dq, q, do_neg, neg, w_neg, qk_scale, NEG_CUT, BLOCK_L, BLOCK_N, D, D_CUT, ALIGN
    )
    dq, lse_pos, u_pos = queries_of_prompt(
        dq, q, do, pos, ones, qk_scale, POS_CUT, BLOCK_L, BLOCK_N, D, D_CUT, ALIGN
    )

    if DQ is not None:
        DQ += (b * L * H + h) * D
        store_rows(DQ, scale_rows(dq, ones * scale), row, row < L, H * D, D, D_CUT)
    # [b, h, l]
    statistic = bh * L + row
    tl.store(LSE_pos + statistic, lse_pos, mask=row < L)
    tl.store(LSE_neg + statistic, lse_neg, mask=row < L)
    tl.store(U_pos + statistic, u_pos, mask=row < L)
    tl.store(U_neg + statistic, u_neg, mask=row < L)


@triton.jit(do_not_specialize=["L", "n", "first_hidden", "hidden"])
def key_kernel(
    DO, Q, K, V, MASK, W, LSE, U, DLSE, DK, DV,
    stride_db, stride_dl, stride_dh, stride_qb, stride_ql, stride_qh,
    stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_mb, stride_mn,
    stride_wb, stride_wl, stride_wh,
    B, H, L, n, first_hidden, hidden, w, scale, qk_scale,
    SIGN: tl.constexpr, D: tl.constexpr, D_CUT: tl.constexpr, N_CUT: tl.constexpr,
    KEYS: tl.constexpr, BLOCK_L: tl.constexpr, GROUP: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """dK and dV of KEYS keys; the splits of the queries each write a part `[split, b, n, h, d]`.

    SIGN times W, or where it is None times the number w, are the weights of the rows; where both
    are None it is 1. `hidden` tiles of queries, from `first_hidden` on, do not see the keys; None
    where all do.
    """
    block, bh = tile_of_head(tl.cdiv(n, KEYS))
    b, h = bh // H, bh % H
    split = tl.program_id(1)
    first = block * KEYS
    Q = of_head(Q, b, h, stride_qb, stride_qh, ALIGN)
    DO = of_head(DO, b, h, stride_db, stride_dh, ALIGN)
    prompt = prompt_of_head(
        K, V, MASK, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
        stride_mb, stride_mn, n, b, h, GROUP, ALIGN,
    )  # fmt: skip
    statistics = bh * L

    k, v = (), ()
    dk, dv = (), ()
    start = first
    for j in tl.static_range(len(N_CUT)):
        # [d, n_j], [n_j, d]
        k_j, v_j = load_keys(prompt, start, True, N_CUT[j], D, D_CUT, ALIGN)
        k, v = k + (transposed(k_j),), v + (v_j,)
        dk, dv = dk + (zeros(N_CUT[j], D_CUT),), dv + (zeros(N_CUT[j], D_CUT),)
        start += N_CUT[j]

    tiles = tl.cdiv(L, BLOCK_L)
    if hidden is not None:
        tiles -= hidden
    for tile in range(split, tiles, tl.num_programs(1)):
        first_row = tile * BLOCK_L
        if hidden is not None:
            first_row += tl.where(tile < first_hidden, 0, hidden * BLOCK_L)
        row = first_row + tl.arange(0, BLOCK_L)
        # [BLOCK_L, d]
        q = load_rows(Q, row, row < L, stride_ql, D, D_CUT, ALIGN)
        do = load_rows(DO, row, row < L, stride_dl, D, D_CUT, ALIGN)
        # rows past the end: q and dO are zeros, so they add nothing whatever lse is
        lse = tl.load(LSE + statistics + row, mask=row < L, other=0.0)
        u = tl.load(U + statistics + row, mask=row < L, other=0.0)
        w_row = tl.full([BLOCK_L], 1.0, tl.float32)
        if W is not None or w is not None:
            w_row = SIGN * load_alpha(W, w, stride_wb, stride_wl, stride_wh, b, h, row, row < L)
        dlse = None
        if DLSE is not None:
            dlse = tl.load(DLSE + statistics + row, mask=row < L, other=0.0)[None, :]
        dk, dv = add_gradients(
            dk, dv, q, do, k, v, lse, u, w_row, dlse, prompt, first, qk_scale, N_CUT
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
    dk, dv, q, do, k, v, lse, u, w, dlse, prompt, first, qk_scale, N_CUT: tl.constexpr
):  # fmt: skip
    """dK / scale and dV plus what one tile of queries adds. Scores stand keys by queries."""
    dk_sum, dv_sum = (), ()
    start = first
    for j in tl.static_range(len(N_CUT)):
        key = start + tl.arange(0, N_CUT[j])
        # [n_j, BLOCK_L]
        s = dot(k[j], transposed(q))
        s = tl.trans(mask_scores(tl.trans(s), prompt, key, qk_scale, RAGGED=True))
        p = tl.exp2(s * qk_scale - lse[None, :])
        weighted = p * w[None, :]
        dp = dot(v[j], transposed(do))
        ds = gradient_of_scores(p, weighted, dp, u[None, :], dlse)
        dv_sum = dv_sum + (add_dot(dv[j], weighted, do),)
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


def backward(
    do, q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, alpha, scale, rule, needs
):  # fmt: skip
    """The gradients that `needs` asks for, of q, k_pos, v_pos, k_neg, v_neg and the alpha map."""
    b, l, h, d = q.shape
    if do.stride(-1) != 1:
        do = do.contiguous()
    widest = 128 if architecture(q.device) >= 90 else 64
    pos_cut, neg_cut = (resident_cut(k.shape[1], d, q, widest) for k in (k_pos, k_neg))
    if alpha_map is None and alpha == 0:
        # no query looks at the negative prompt
        neg_cut, rule = None, 0
    # each prompt's own dO under the projected rule
    do_pos, do_neg = do, None
    dalpha = None
    if rule == RULES.index("projected"):
        do_pos, do_neg, dalpha = row_gradients(
            do, q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, alpha, scale,
            pos_cut, neg_cut, needs[5],
        )  # fmt: skip
    # [b, h, l]
    lse_pos, lse_neg, u_pos, u_neg = torch.empty((4, b, h, l), dtype=torch.float32, device=q.device)
    dq = torch.empty((b, l, h, d), dtype=q.dtype, device=q.device) if needs[0] else None
    align = alignment(do_pos, q, k_pos, v_pos, k_neg, v_neg)
    if q.numel() > 0:
        config = backward_queries_config(d, q.dtype)
        with on_device(q):
            query_kernel[(triton.cdiv(l, config.BLOCK_L) * b * h,)](
                do_pos, do_neg, q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map,
                dq, lse_pos, lse_neg, u_pos, u_neg,
                *do_pos.stride()[:3], *q.stride()[:3],
                *k_pos.stride()[:3], *v_pos.stride()[:3], *k_neg.stride()[:3], *v_neg.stride()[:3],
                *strides_or_zeros(mask_pos, 2), *strides_or_zeros(mask_neg, 2),
                *strides_or_zeros(alpha_map, 3),
                h, l, k_pos.shape[1], k_neg.shape[1], alpha, scale, scale * LOG2E,
                D=d, D_CUT=head_cut(d), POS_CUT=pos_cut, NEG_CUT=neg_cut,
                BLOCK_L=config.BLOCK_L, BLOCK_N=config.BLOCK_N, GROUP=group_of(q, k_pos),
                ALIGN=align, **compiler_options(config),
            )  # fmt: skip

    dk_pos, dv_pos = key_gradients(
        do_pos, q, k_pos, v_pos, mask_pos, Rows(lse_pos, u_pos), scale, align, needs[1:3]
    )
    if do_neg is None:
        do_neg, negative = do, Rows(lse_neg, u_neg, alpha_map, alpha, sign=-1)
    else:
        negative = Rows(lse_neg, u_neg)
    if neg_cut is None:
        dk_neg, dv_neg = (
            x.new_zeros(x.shape if needed else (0,))
            for x, needed in zip((k_neg, v_neg), needs[3:5], strict=True)
        )
    else:
        dk_neg, dv_neg = key_gradients(
            do_neg, q, k_neg, v_neg, mask_neg, negative, scale, align, needs[3:5]
        )
    if dalpha is None:
        # [b, h, l] -> [b, l, h]
        dalpha = -u_neg.transpose(1, 2).contiguous() if needs[5] else u_neg.new_empty(0)
    return q.new_empty(0) if dq is None else dq, dk_pos, dv_pos, dk_neg, dv_neg, dalpha


class Rows(NamedTuple):
    """Per-query statistics that the gradients of keys need."""

    lse: Tensor  # [b, h, l]
    u: Tensor
    # the weights: sign * w_map [b, l, h], or sign * w, or 1
    w_map: Tensor | None = None
    w: float | None = None
    sign: int = 1
    dlse: Tensor | None = None  # [b, h, l]
    # the half-open range of queries that do not see the keys
    hidden: tuple[int, int] = (0, 0)


def key_gradients(do, q, k, v, mask, rows: Rows, scale, align, needed):
    """dK and dV of one prompt; empty where they are not `needed`. Where a group of heads looks at
    one of K and V, each makes a gradient of its own, and their sum is rounded once.
    """
    b, l, h, d = q.shape
    n, group = k.shape[1], group_of(q, k)
    if not any(needed):
        return q.new_empty(0), q.new_empty(0)
    config = backward_keys_config(d, q.dtype)
    tiles, first_hidden, hidden = visible_tiles(l, config.BLOCK_L, rows.hidden)
    if b * h * n * d * tiles == 0:
        dk, dv = q.new_zeros(k.shape), q.new_zeros(v.shape)
    else:
        keys = min(n, config.BLOCK_N)
        blocks = triton.cdiv(n, keys)
        # queries are split, and the parts summed, only where heads and keys do not fill the GPU
        splits = min(tiles, triton.cdiv(multiprocessors(q.device), b * h * blocks))
        is_whole = splits == group == 1
        dtype = q.dtype if is_whole else torch.float32
        dk, dv = (torch.empty((splits, b, n, h, d), dtype=dtype, device=q.device) for _ in range(2))
        with on_device(q):
            key_kernel[blocks * b * h, splits](
                do, q, k, v, mask, rows.w_map, rows.lse, rows.u, rows.dlse, dk, dv,
                *do.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
                *strides_or_zeros(mask, 2), *strides_or_zeros(rows.w_map, 3),
                b, h, l, n, first_hidden, hidden or None, rows.w, scale, scale * LOG2E,
                SIGN=rows.sign, D=d, D_CUT=head_cut(d), N_CUT=cut(keys), KEYS=keys,
                BLOCK_L=config.BLOCK_L, GROUP=group, ALIGN=align,
                **compiler_options(config),
            )  # fmt: skip
        if group > 1:
            # [splits, b, n, h_kv, group, d]
            dk, dv = (x.unflatten(3, (-1, group)).sum((0, 4)).to(q.dtype) for x in (dk, dv))
        else:
            dk, dv = (x[0] if is_whole else x.sum(0).to(q.dtype) for x in (dk, dv))
    return (x if wanted else q.new_empty(0) for x, wanted in zip((dk, dv), needed, strict=True))


def visible_tiles(l: int, block: int, hidden: tuple[int, int]) -> tuple[int, int, int]:
    """Of the tiles of queries: how many see the keys, and the first and number of the others."""
    tiles = triton.cdiv(l, block)
    first = triton.cdiv(hidden[0], block)
    last = tiles if hidden[1] == l else hidden[1] // block
    count = max(0, last - first)
    return tiles - count, first, count
