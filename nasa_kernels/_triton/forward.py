"""Fused NASA attention, forward pass.

    O = softmax(Q K+^T) V+  -  alpha * softmax(Q K-^T) V-

One launch reads Q once and writes O once; neither Z+ nor Z- reaches memory. With unnormalised
weights p, their row sums l, and z = p V:

    O = (z+ - c z-) / l+        c = alpha * l+ / l-

Equal prompts give equal z and l on both sides, so alpha = 1 gives an exact zero; c = 0 gives
z+ / l+, which is plain attention.

A prompt that fits on chip (77, 120 keys) is `resident`: a program loads it once and walks over
query tiles. A longer one is `streamed`: its keys pass in blocks under an online softmax. Each
prompt is one or the other by its own length, so nothing of Z+ depends on the negative prompt.

Names: b batch, h heads, l queries, n text tokens, d head_dim. A block's shape stands above it;
`tiles.py` says what a tuple of blocks is.
"""

import torch
import triton
import triton.language as tl

from nasa_kernels._checks import expanded
from nasa_kernels._triton.configs import (
    forward_config,
    head_cut,
    programs_per_head,
    resident_cut,
    shared_memory,
)
from nasa_kernels._triton.launch import (
    LOG2E,
    Launch,
    alignment,
    compiler_options,
    launch,
    strides_or_zeros,
)
from nasa_kernels._triton.softmax import finite, mask_scores, nonzero, online_step, row_max
from nasa_kernels._triton.tiles import (
    add_dot,
    dot,
    load_keys,
    load_prompt,
    load_rows,
    of_head,
    scale_rows,
    store_block,
    tile_of_head,
    zeros,
)


@triton.jit
def scores_resident(q, k, MASK, stride_mn, n, qk_scale, N_CUT: tl.constexpr):
    """Scores of a tile of queries over a prompt on chip: a tuple over N_CUT of [BLOCK_L, n_j]."""
    scores = ()
    start = 0
    for j in tl.static_range(len(N_CUT)):
        key = start + tl.arange(0, N_CUT[j])
        # only the last block can reach past the end
        s = mask_scores(dot(q, k[j]), MASK, stride_mn, key, n, qk_scale, RAGGED=j == len(N_CUT) - 1)
        scores = scores + (s,)
        start += N_CUT[j]
    return scores


@triton.jit
def weigh_resident(q, k, MASK, stride_mn, n, qk_scale, BLOCK_L: tl.constexpr, N_CUT: tl.constexpr):
    """Weights p, rounded to the type of q, their sums l before rounding, and the largest score, to
    which both are relative, in base 2.
    """
    scores = scores_resident(q, k, MASK, stride_mn, n, qk_scale, N_CUT)
    shift = row_max(scores) * qk_scale
    l = tl.zeros([BLOCK_L], tl.float32)
    weights = ()
    for j in tl.static_range(len(N_CUT)):
        p = tl.exp2(scores[j] * qk_scale - shift[:, None])
        l += tl.sum(p, 1)
        weights = weights + (p.to(q[0].dtype),)
    return weights, l, shift


@triton.jit
def column(weights, v, i: tl.constexpr):
    """Block i of the head_dim of z = p V, for a prompt on chip: [BLOCK_L, d_i]."""
    z = tl.dot(weights[0], v[0][i], input_precision="ieee")
    for j in tl.static_range(1, len(weights)):
        z = tl.dot(weights[j], v[j][i], z, input_precision="ieee")
    return z


@triton.jit
def attend_streamed(
    q, K, V, MASK, stride_kn, stride_vn, stride_mn, n, qk_scale,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, D_CUT: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """z = p V (not normalised) and l = rowsum(p) over keys that pass in blocks.

    m is the largest score so far; z and l are relative to it. The last one is returned in base 2.
    """
    m = tl.full([BLOCK_L], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_L], tl.float32)
    z = zeros(BLOCK_L, D_CUT)
    for start in range(0, n, BLOCK_N):
        k, v = load_keys(
            K, V, MASK, stride_kn, stride_vn, stride_mn, start, n, BLOCK_N, D, D_CUT, ALIGN
        )
        key = start + tl.arange(0, BLOCK_N)
        # [BLOCK_L, BLOCK_N]
        s = mask_scores(dot(q, k), MASK, stride_mn, key, n, qk_scale, RAGGED=True)
        p, m, decay = online_step(s, m, qk_scale)
        l = l * decay + tl.sum(p, 1)
        z = add_dot(scale_rows(z, decay), p, v)
    return z, l, finite(m) * qk_scale


@triton.jit
def load_alpha(ALPHA, alpha, stride_ab, stride_al, stride_ah, b, h, row, valid):
    """alpha of each row [BLOCK_L], from the map [b, l, h] or from the number."""
    if ALPHA is None:
        value = tl.zeros_like(row).to(tl.float32) + alpha
    else:
        offset = b * stride_ab + h * stride_ah + row.to(tl.int64) * stride_al
        value = tl.load(ALPHA + offset, mask=valid, other=0.0)
    return value


@triton.jit(do_not_specialize=["L", "programs", "n_pos", "n_neg"])
def forward_kernel(
    Q, K_pos, V_pos, K_neg, V_neg, O, MASK_pos, MASK_neg, ALPHA,
    stride_qb, stride_ql, stride_qh,
    stride_kpb, stride_kpn, stride_kph, stride_vpb, stride_vpn, stride_vph,
    stride_knb, stride_knn, stride_knh, stride_vnb, stride_vnn, stride_vnh,
    stride_mpb, stride_mpn, stride_mnb, stride_mnn,
    stride_ab, stride_al, stride_ah,
    H, L, programs, n_pos, n_neg, alpha, qk_scale,
    D: tl.constexpr, D_CUT: tl.constexpr, POS_CUT: tl.constexpr, NEG_CUT: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    first_tile, bh = tile_of_head(programs)
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
    O += (b * L * H + h) * D

    # empty tuples where a prompt is streamed
    k_neg, v_neg = load_prompt(
        K_neg, V_neg, MASK_neg, stride_knn, stride_vnn, stride_mnn, n_neg, NEG_CUT, D, D_CUT, ALIGN
    )
    k_pos, v_pos = load_prompt(
        K_pos, V_pos, MASK_pos, stride_kpn, stride_vpn, stride_mpn, n_pos, POS_CUT, D, D_CUT, ALIGN
    )

    for tile in range(first_tile, tl.cdiv(L, BLOCK_L), programs):
        row = tile * BLOCK_L + tl.arange(0, BLOCK_L)
        # [BLOCK_L, d]
        q = load_rows(Q, row, row < L, stride_ql, D, D_CUT, ALIGN)
        alpha_row = load_alpha(ALPHA, alpha, stride_ab, stride_al, stride_ah, b, h, row, row < L)

        if len(NEG_CUT) > 0:
            p_neg, l_neg, _ = weigh_resident(
                q, k_neg, MASK_neg, stride_mnn, n_neg, qk_scale, BLOCK_L, NEG_CUT
            )
        else:
            z_neg, l_neg, _ = attend_streamed(
                q, K_neg, V_neg, MASK_neg, stride_knn, stride_vnn, stride_mnn, n_neg, qk_scale,
                BLOCK_L, BLOCK_N, D, D_CUT, ALIGN,
            )  # fmt: skip
        if len(POS_CUT) > 0:
            p_pos, l_pos, _ = weigh_resident(
                q, k_pos, MASK_pos, stride_mpn, n_pos, qk_scale, BLOCK_L, POS_CUT
            )
        else:
            z_pos, l_pos, _ = attend_streamed(
                q, K_pos, V_pos, MASK_pos, stride_kpn, stride_vpn, stride_mpn, n_pos, qk_scale,
                BLOCK_L, BLOCK_N, D, D_CUT, ALIGN,
            )  # fmt: skip

        l_pos, l_neg = nonzero(l_pos), nonzero(l_neg)
        # div_rn: exactly 1 where the sums are equal, which `/` does not promise
        c = (alpha_row * tl.div_rn(l_pos, l_neg))[:, None]
        normalise = (1.0 / l_pos)[:, None]
        start = 0
        for i in tl.static_range(len(D_CUT)):
            # [BLOCK_L, d_i]; resident prompts keep no wider accumulator than this
            z_neg_i = column(p_neg, v_neg, i) if len(NEG_CUT) > 0 else z_neg[i]
            z_pos_i = column(p_pos, v_pos, i) if len(POS_CUT) > 0 else z_pos[i]
            o = (z_pos_i - c * z_neg_i) * normalise
            store_block(O, o, row, row < L, H * D, start, D, D_CUT[i])
            start += D_CUT[i]


def forward(q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, alpha, scale):
    """Launch the forward kernel."""
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    launch(
        plan,
        (q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map),
        (alpha_map is None and alpha == 0,),
        (q, k_pos, v_pos, k_neg, v_neg, o, mask_pos, mask_neg, alpha_map),
        (alpha, scale * LOG2E),
    )
    return o


def plan(q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, is_void) -> Launch:
    """The launch of the forward kernel. `is_void`: alpha is 0, and no negative prompt is read."""
    k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map = expanded(
        q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map
    )
    b, l, h, d = q.shape
    # the tiling stays, so O keeps its bits
    n_pos, n_neg = k_pos.shape[1], 0 if is_void else k_neg.shape[1]
    pos_cut, neg_cut = (resident_cut(k.shape[1], d, q) for k in (k_pos, k_neg))
    config = forward_config(d, q.dtype, pos_cut, shared_memory(q.device))
    streamed = not (pos_cut and neg_cut)
    heads = b * h
    programs = programs_per_head(l, max(heads, 1), config, q.device, persistent=not streamed)
    return Launch(
        forward_kernel,
        (programs * heads,),
        (
            *q.stride()[:3],
            *k_pos.stride()[:3], *v_pos.stride()[:3], *k_neg.stride()[:3], *v_neg.stride()[:3],
            *strides_or_zeros(mask_pos, 2), *strides_or_zeros(mask_neg, 2),
            *strides_or_zeros(alpha_map, 3),
            h, l, programs, n_pos, n_neg,
        ),
        {
            "D": d, "D_CUT": head_cut(d), "POS_CUT": pos_cut, "NEG_CUT": neg_cut,
            "BLOCK_L": config.BLOCK_L, "BLOCK_N": config.BLOCK_N,
            "ALIGN": alignment(q, k_pos, v_pos, k_neg, v_neg),
        },
        compiler_options(config),
    )  # fmt: skip
