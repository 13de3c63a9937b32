"""Fused joint attention, forward pass: the second launch.

The first launch (`nasa_kernels/_joint/shared.py`) left O_s and s, the attention over the image
keys and its log-sum-exp. This one attends to both prompts and merges, by a rule, in fp32:

    O = c_s O_s + c_p z+ / l+ + c_n z- / l-        c = function of s, p, n and alpha

or leaves the two joint attentions, over [shared; pos] and over [shared; neg], apart (`pair`).
`nasa_kernels/joint_attention.py` has the table of the rules. z, l and the two ways to hold a prompt
are those of `forward.py`. Log-sum-exps are base 2 here.
"""

import torch
import triton
import triton.language as tl

from nasa_kernels._checks import check_text_queries, expanded
from nasa_kernels._joint.shared import attend_shared
from nasa_kernels._triton.configs import forward_config, head_cut, resident_cut, shared_memory
from nasa_kernels._triton.forward import attend_streamed, column, load_alpha, weigh_resident
from nasa_kernels._triton.launch import (
    LOG2E,
    Launch,
    alignment,
    compiler_options,
    launch,
    strides_or_zeros,
)
from nasa_kernels._triton.softmax import finite, nonzero
from nasa_kernels._triton.tiles import load_prompt, load_rows, of_head, store_block, tile_of_head
from nasa_kernels.reference import RULES

_NASA = tl.constexpr(RULES.index("nasa"))
_NASA_CROSS = tl.constexpr(RULES.index("nasa-cross"))
_VSF = tl.constexpr(RULES.index("vsf"))
_SUM = tl.constexpr(RULES.index("sum"))
_LOG2E = tl.constexpr(LOG2E)


@triton.jit
def share(x, y):
    """2^(x - L) and 2^(y - L), L = log2(2^x + 2^y); 0 where both are -inf."""
    highest = finite(tl.maximum(x, y))
    w_x, w_y = tl.exp2(x - highest), tl.exp2(y - highest)
    total = nonzero(w_x + w_y)
    return w_x / total, w_y / total


@triton.jit
def coefficients(s, p, n, alpha, is_pos, is_neg, RULE: tl.constexpr):
    """c_s, c_p, c_n of each row; `is_pos`, `is_neg`: rows of the text's own queries."""
    a_s, a_p = share(s, p)
    b_s, b_n = share(s, n)
    if RULE == _VSF:
        highest = finite(tl.maximum(tl.maximum(s, p), n))
        w_s, w_p, w_n = tl.exp2(s - highest), tl.exp2(p - highest), tl.exp2(n - highest)
        total = nonzero(w_s + w_p + w_n)
        c_s, c_p, c_n = w_s / total, w_p / total, -alpha * (w_n / total)
    elif RULE == _NASA:
        c_s, c_p, c_n = a_s - alpha * b_s, a_p, -alpha * b_n
    elif RULE == _NASA_CROSS:
        c_s, c_p, c_n = a_s, a_p, -alpha
    elif RULE == _SUM:
        c_s, c_p, c_n = 1.0, 1.0, -alpha
    else:
        c_s, c_p, c_n = a_s, a_p, -alpha * b_n
    c_s = tl.where(is_pos, a_s, tl.where(is_neg, b_s, c_s))
    c_p = tl.where(is_pos, a_p, tl.where(is_neg, 0.0, c_p))
    c_n = tl.where(is_pos, 0.0, tl.where(is_neg, b_n, c_n))
    return c_s, c_p, c_n


@triton.jit
def visible(n_pos, n_neg, first_row, first_pos, first_neg, BLOCK_L: tl.constexpr):
    """Keys that a tile of queries reads: nothing but one text's own does not read the other's."""
    all_pos = (first_row >= first_pos) & (first_row + BLOCK_L <= first_neg)
    return tl.where(first_row >= first_neg, 0, n_pos), tl.where(all_pos, 0, n_neg)


@triton.jit(do_not_specialize=["L", "n_pos", "n_neg", "first_pos", "first_neg"])
def joint_kernel(
    Q, K_pos, V_pos, K_neg, V_neg, O_shared, LSE_shared, O, O_neg, MASK_pos, MASK_neg, ALPHA,
    stride_qb, stride_ql, stride_qh,
    stride_kpb, stride_kpn, stride_kph, stride_vpb, stride_vpn, stride_vph,
    stride_knb, stride_knn, stride_knh, stride_vnb, stride_vnn, stride_vnh,
    stride_mpb, stride_mpn, stride_mnb, stride_mnn,
    stride_ab, stride_al, stride_ah,
    H, L, n_pos, n_neg, first_pos, first_neg, alpha, qk_scale,
    RULE: tl.constexpr, D: tl.constexpr, D_CUT: tl.constexpr,
    POS_CUT: tl.constexpr, NEG_CUT: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    tile, bh = tile_of_head(tl.cdiv(L, BLOCK_L))
    b, h = bh // H, bh % H
    Q = of_head(Q, b, h, stride_qb, stride_qh, ALIGN)
    K_pos = of_head(K_pos, b, h, stride_kpb, stride_kph, ALIGN)
    V_pos = of_head(V_pos, b, h, stride_vpb, stride_vph, ALIGN)
    if MASK_pos is not None:
        MASK_pos += b * stride_mpb
    K_neg = of_head(K_neg, b, h, stride_knb, stride_knh, ALIGN)
    V_neg = of_head(V_neg, b, h, stride_vnb, stride_vnh, ALIGN)
    if MASK_neg is not None:
        MASK_neg += b * stride_mnb

    first_row = tile * BLOCK_L
    row = first_row + tl.arange(0, BLOCK_L)
    n_pos, n_neg = visible(n_pos, n_neg, first_row, first_pos, first_neg, BLOCK_L)
    # [BLOCK_L, d]
    q = load_rows(Q, row, row < L, stride_ql, D, D_CUT, ALIGN)
    alpha_row = load_alpha(ALPHA, alpha, stride_ab, stride_al, stride_ah, b, h, row, row < L)
    if len(NEG_CUT) > 0:
        k_neg, v_neg = load_prompt(
            K_neg, V_neg, MASK_neg, stride_knn, stride_vnn, stride_mnn, n_neg, NEG_CUT, D, D_CUT,
            ALIGN,
        )  # fmt: skip
        p_neg, l_neg, m_neg = weigh_resident(
            q, k_neg, MASK_neg, stride_mnn, n_neg, qk_scale, BLOCK_L, NEG_CUT
        )
    else:
        z_neg, l_neg, m_neg = attend_streamed(
            q, K_neg, V_neg, MASK_neg, stride_knn, stride_vnn, stride_mnn, n_neg, qk_scale,
            BLOCK_L, BLOCK_N, D, D_CUT, ALIGN,
        )  # fmt: skip
    if len(POS_CUT) > 0:
        k_pos, v_pos = load_prompt(
            K_pos, V_pos, MASK_pos, stride_kpn, stride_vpn, stride_mpn, n_pos, POS_CUT, D, D_CUT,
            ALIGN,
        )  # fmt: skip
        p_pos, l_pos, m_pos = weigh_resident(
            q, k_pos, MASK_pos, stride_mpn, n_pos, qk_scale, BLOCK_L, POS_CUT
        )
    else:
        z_pos, l_pos, m_pos = attend_streamed(
            q, K_pos, V_pos, MASK_pos, stride_kpn, stride_vpn, stride_mpn, n_pos, qk_scale,
            BLOCK_L, BLOCK_N, D, D_CUT, ALIGN,
        )  # fmt: skip

    # log2(0) = -inf: a prompt without keys
    s = tl.load(LSE_shared + bh * L + row, mask=row < L, other=0.0) * _LOG2E
    p, n = m_pos + tl.log2(l_pos), m_neg + tl.log2(l_neg)
    # O_shared and O are [b, l, h, d], contiguous
    first = (b * L * H + h) * D
    o_shared = load_rows(O_shared + first, row, row < L, H * D, D, D_CUT, 1)
    if O_neg is None:
        c_s, c_p, c_n = coefficients(
            s, p, n, alpha_row, (row >= first_pos) & (row < first_neg), row >= first_neg, RULE
        )
        c_s = c_s[:, None]
        c_p, c_n = (c_p / nonzero(l_pos))[:, None], (c_n / nonzero(l_neg))[:, None]
        start = 0
        for i in tl.static_range(len(D_CUT)):
            z_neg_i = column(p_neg, v_neg, i) if len(NEG_CUT) > 0 else z_neg[i]
            z_pos_i = column(p_pos, v_pos, i) if len(POS_CUT) > 0 else z_pos[i]
            o = c_s * o_shared[i].to(tl.float32) + c_p * z_pos_i + c_n * z_neg_i
            store_block(O + first, o, row, row < L, H * D, start, D, D_CUT[i])
            start += D_CUT[i]
    else:
        a_s, a_p = share(s, p)
        b_s, b_n = share(s, n)
        a_p, b_n = a_p / nonzero(l_pos), b_n / nonzero(l_neg)
        # each contiguous, without the rows of the other text
        text_pos = first_neg - first_pos
        first_p, first_n = (b * first_neg * H + h) * D, (b * (L - text_pos) * H + h) * D
        row_neg = tl.where(row < first_neg, row, row - text_pos)
        is_neg = (row < first_pos) | ((row >= first_neg) & (row < L))
        start = 0
        for i in tl.static_range(len(D_CUT)):
            z_neg_i = column(p_neg, v_neg, i) if len(NEG_CUT) > 0 else z_neg[i]
            z_pos_i = column(p_pos, v_pos, i) if len(POS_CUT) > 0 else z_pos[i]
            o_s = o_shared[i].to(tl.float32)
            o = a_s[:, None] * o_s + a_p[:, None] * z_pos_i
            store_block(O + first_p, o, row, row < first_neg, H * D, start, D, D_CUT[i])
            o = b_s[:, None] * o_s + b_n[:, None] * z_neg_i
            store_block(O_neg + first_n, o, row_neg, is_neg, H * D, start, D, D_CUT[i])
            start += D_CUT[i]


def forward(*args):
    return attention(*args)[0]


def attention(
    q, k, v, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, alpha, scale,
    rule, text_pos, text_neg,
):  # fmt: skip
    """Both launches: O, and O_s and s of the first one. The public function checked shapes, dtypes
    and layouts.
    """
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    o_shared, lse_shared = attend_shared(q, k, v, scale)
    _add_prompts(
        q, k_pos, v_pos, k_neg, v_neg, o_shared, lse_shared, o, None, mask_pos, mask_neg,
        alpha_map, alpha, scale, rule, text_pos, text_neg,
    )  # fmt: skip
    return o, o_shared, lse_shared


def pair(
    q, k, v, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, scale, text_pos, text_neg
):  # fmt: skip
    """Both launches: Z+ and Z-, each without the queries of the other text."""
    b, l, h, d = q.shape
    z_pos, z_neg = (
        torch.empty((b, rows, h, d), dtype=q.dtype, device=q.device)
        for rows in (l - text_neg, l - text_pos)
    )
    o_shared, lse_shared = attend_shared(q, k, v, scale)
    _add_prompts(
        q, k_pos, v_pos, k_neg, v_neg, o_shared, lse_shared, z_pos, z_neg, mask_pos, mask_neg,
        None, 0.0, scale, 0, text_pos, text_neg,
    )  # fmt: skip
    return z_pos, z_neg


def _add_prompts(
    q, k_pos, v_pos, k_neg, v_neg, o_shared, lse_shared, o, o_neg, mask_pos, mask_neg,
    alpha_map, alpha, scale, rule, text_pos, text_neg,
):  # fmt: skip
    """The second launch; it writes `o`, and `o_neg` where that is not None."""
    prompts = (k_pos, v_pos, k_neg, v_neg)
    launch(
        plan,
        (q, *prompts, mask_pos, mask_neg, alpha_map),
        (rule, text_pos, text_neg, o_neg is not None),
        (q, *prompts, o_shared, lse_shared, o, o_neg, mask_pos, mask_neg, alpha_map),
        (alpha, scale * LOG2E),
    )


def plan(
    q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, rule, text_pos, text_neg, is_pair
) -> Launch:  # fmt: skip
    """`is_pair`: with a pointer for Z-, which decides what is compiled."""
    check_text_queries("nasa_kernels", q, (text_pos, text_neg))
    k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map = expanded(
        q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map
    )
    b, l, h, d = q.shape
    pos_cut, neg_cut = (resident_cut(x.shape[1], d, q) for x in (k_pos, k_neg))
    config = forward_config(d, q.dtype, pos_cut, shared_memory(q.device))
    return Launch(
        joint_kernel,
        (triton.cdiv(l, config.BLOCK_L) * b * h,),
        (
            *q.stride()[:3],
            *k_pos.stride()[:3], *v_pos.stride()[:3], *k_neg.stride()[:3], *v_neg.stride()[:3],
            *strides_or_zeros(mask_pos, 2), *strides_or_zeros(mask_neg, 2),
            *strides_or_zeros(alpha_map, 3),
            h, l, k_pos.shape[1], k_neg.shape[1], l - text_pos - text_neg, l - text_neg,
        ),
        {
            "RULE": rule, "D": d, "D_CUT": head_cut(d), "POS_CUT": pos_cut, "NEG_CUT": neg_cut,
            "BLOCK_L": config.BLOCK_L, "BLOCK_N": config.BLOCK_N,
            "ALIGN": alignment(q, k_pos, v_pos, k_neg, v_neg),
        },
        compiler_options(config),
    )  # fmt: skip
