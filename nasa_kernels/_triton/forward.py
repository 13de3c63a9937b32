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
    most_registers,
    resident_cut,
)
from nasa_kernels._triton.grid import Grid, grid_of
from nasa_kernels._triton.launch import (
    LOG2E,
    Launch,
    alignment,
    compiler_options,
    group_of,
    launch,
    strides_or_zeros,
)
from nasa_kernels._triton.nag import blend
from nasa_kernels._triton.projected import PROJECTED, project, removed
from nasa_kernels._triton.prompt import load_keys, load_prompt, prompt_of_head
from nasa_kernels._triton.softmax import finite, mask_scores, nonzero, online_step, row_max
from nasa_kernels._triton.tiles import (
    add_dot,
    dot,
    load_rows,
    of_head,
    scale_rows,
    share_of_tiles,
    store_block,
    store_rows,
    zeros,
)


@triton.jit
def scores_resident(q, k, prompt, qk_scale, N_CUT: tl.constexpr):
    """Scores of a tile of queries over a prompt on chip: a tuple over N_CUT of [BLOCK_L, n_j]."""
    scores = ()
    start = 0
    for j in tl.static_range(len(N_CUT)):
        key = start + tl.arange(0, N_CUT[j])
        # only the last block can reach past the end
        s = mask_scores(dot(q, k[j]), prompt, key, qk_scale, RAGGED=j == len(N_CUT) - 1)
        scores = scores + (s,)
        start += N_CUT[j]
    return scores


@triton.jit
def weigh_resident(q, k, prompt, qk_scale, BLOCK_L: tl.constexpr, N_CUT: tl.constexpr):
    """Weights p, rounded to the type of q, their sums l before rounding, and the largest score, to
    which both are relative, in base 2.
    """
    scores = scores_resident(q, k, prompt, qk_scale, N_CUT)
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
def attend_block(
    q, z, l, m, prompt, start, qk_scale, RAGGED: tl.constexpr,
    BLOCK_N: tl.constexpr, D: tl.constexpr, D_CUT: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    k, v = load_keys(prompt, start, RAGGED, BLOCK_N, D, D_CUT, ALIGN)
    key = start + tl.arange(0, BLOCK_N)
    # [BLOCK_L, BLOCK_N]
    s = mask_scores(dot(q, k), prompt, key, qk_scale, RAGGED)
    p, m, decay = online_step(s, m, qk_scale)
    l = l * decay + tl.sum(p, 1)
    return add_dot(scale_rows(z, decay), p, v), l, m


@triton.jit
def attend_streamed(
    q, prompt, qk_scale, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, D_CUT: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """z = p V (not normalised) and l = rowsum(p) over keys that pass in blocks.

    m is the largest score so far; z and l are relative to it. The last one is returned in base 2.
    """
    m = tl.full([BLOCK_L], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_L], tl.float32)
    z = zeros(BLOCK_L, D_CUT)
    if len(prompt.mask) == 0:
        # whole blocks need no look at where the prompt ends
        whole = prompt.n // BLOCK_N * BLOCK_N
        for start in range(0, whole, BLOCK_N):
            z, l, m = attend_block(
                q, z, l, m, prompt, start, qk_scale, False, BLOCK_N, D, D_CUT, ALIGN
            )
        for start in tl.range(whole, prompt.n, BLOCK_N, num_stages=1):
            z, l, m = attend_block(
                q, z, l, m, prompt, start, qk_scale, True, BLOCK_N, D, D_CUT, ALIGN
            )
    else:
        for start in range(0, prompt.n, BLOCK_N):
            z, l, m = attend_block(
                q, z, l, m, prompt, start, qk_scale, True, BLOCK_N, D, D_CUT, ALIGN
            )
    return z, l, finite(m) * qk_scale


@triton.jit
def attend(
    q, k, prompt, qk_scale, N_CUT: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, D_CUT: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """What is known of one prompt before Z is: the weights of one on chip, z of one that is
    streamed, nothing of a void one; and l and the largest score.
    """
    if N_CUT is None:
        found, l, shift = (), tl.zeros([BLOCK_L], tl.float32), tl.zeros([BLOCK_L], tl.float32)
    elif len(N_CUT) > 0:
        found, l, shift = weigh_resident(q, k, prompt, qk_scale, BLOCK_L, N_CUT)
    else:
        found, l, shift = attend_streamed(q, prompt, qk_scale, BLOCK_L, BLOCK_N, D, D_CUT, ALIGN)
    return found, l, shift


@triton.jit
def block_of_z(
    found, v, i: tl.constexpr, N_CUT: tl.constexpr, BLOCK_L: tl.constexpr, D_CUT: tl.constexpr
):
    """Block i of the head_dim of z, of what `attend` found: [BLOCK_L, d_i]."""
    if N_CUT is None:
        z = tl.zeros([BLOCK_L, D_CUT[i]], tl.float32)
    elif len(N_CUT) > 0:
        z = column(found, v, i)
    else:
        z = found[i]
    return z


@triton.jit
def blocks_of_z(found, v, N_CUT: tl.constexpr, BLOCK_L: tl.constexpr, D_CUT: tl.constexpr):
    """All of z [BLOCK_L, d], a tuple over D_CUT."""
    z = ()
    for i in tl.static_range(len(D_CUT)):
        z = z + (block_of_z(found, v, i, N_CUT, BLOCK_L, D_CUT),)
    return z


@triton.jit
def load_alpha(ALPHA, alpha, stride_ab, stride_al, stride_ah, b, h, row, valid):
    """alpha of each row [BLOCK_L], from the map [b, l, h] or from the number."""
    if ALPHA is None:
        value = tl.zeros_like(row).to(tl.float32) + alpha
    else:
        offset = b * stride_ab + h * stride_ah + row.to(tl.int64) * stride_al
        value = tl.load(ALPHA + offset, mask=valid, other=0.0)
    return value


@triton.jit
def store_apart(
    O, O_neg, found_pos, v_pos, l_pos, found_neg, v_neg, l_neg, row, valid, stride,
    D: tl.constexpr, D_CUT: tl.constexpr, POS_CUT: tl.constexpr, NEG_CUT: tl.constexpr,
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Z+ and Z-."""
    start = 0
    for i in tl.static_range(len(D_CUT)):
        # [BLOCK_L, d_i]
        z_neg = block_of_z(found_neg, v_neg, i, NEG_CUT, BLOCK_L, D_CUT) * (1.0 / l_neg)[:, None]
        store_block(O_neg, z_neg, row, valid, stride, start, D, D_CUT[i])
        z_pos = block_of_z(found_pos, v_pos, i, POS_CUT, BLOCK_L, D_CUT) * (1.0 / l_pos)[:, None]
        store_block(O, z_pos, row, valid, stride, start, D, D_CUT[i])
        start += D_CUT[i]


@triton.jit
def forward_tile(
    Q, O, O_neg, ALPHA, pos, neg, k_pos, v_pos, k_neg, v_neg, tile, b, h,
    stride_ql, stride_ab, stride_al, stride_ah, H, L, alpha, qk_scale,
    RULE: tl.constexpr, D: tl.constexpr, D_CUT: tl.constexpr,
    POS_CUT: tl.constexpr, NEG_CUT: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """O of one tile of queries of a head, whose matrices Q and O are; with O_neg Z+ and Z-."""
    row = tile * BLOCK_L + tl.arange(0, BLOCK_L)
    # [BLOCK_L, d]
    q = load_rows(Q, row, row < L, stride_ql, D, D_CUT, ALIGN)
    found_neg, l_neg, _ = attend(
        q, k_neg, neg, qk_scale, NEG_CUT, BLOCK_L, BLOCK_N, D, D_CUT, ALIGN
    )
    found_pos, l_pos, _ = attend(
        q, k_pos, pos, qk_scale, POS_CUT, BLOCK_L, BLOCK_N, D, D_CUT, ALIGN
    )

    alpha_row = load_alpha(ALPHA, alpha, stride_ab, stride_al, stride_ah, b, h, row, row < L)
    l_pos, l_neg = nonzero(l_pos), nonzero(l_neg)
    # div_rn: exactly 1 where the sums are equal, which `/` does not promise
    c = alpha_row * tl.div_rn(l_pos, l_neg)
    normalise = 1.0 / l_pos
    if O_neg is not None:
        store_apart(
            O, O_neg, found_pos, v_pos, l_pos, found_neg, v_neg, l_neg, row, row < L, H * D,
            D, D_CUT, POS_CUT, NEG_CUT, BLOCK_L,
        )  # fmt: skip
    elif RULE == PROJECTED and NEG_CUT is not None:
        z_pos = blocks_of_z(found_pos, v_pos, POS_CUT, BLOCK_L, D_CUT)
        z_neg = blocks_of_z(found_neg, v_neg, NEG_CUT, BLOCK_L, D_CUT)
        apart, c, r = project(z_pos, z_neg, c)
        store_rows(
            O,
            removed(z_pos, apart, c, r * normalise, ALPHA is not None),
            row,
            row < L,
            H * D,
            D,
            D_CUT,
        )
    else:
        start = 0
        for i in tl.static_range(len(D_CUT)):
            # [BLOCK_L, d_i]; prompts on chip keep no wider accumulator than this
            z_neg_i = block_of_z(found_neg, v_neg, i, NEG_CUT, BLOCK_L, D_CUT)
            z_pos_i = block_of_z(found_pos, v_pos, i, POS_CUT, BLOCK_L, D_CUT)
            o = (z_pos_i - c[:, None] * z_neg_i) * normalise[:, None]
            store_block(O, o, row, row < L, H * D, start, D, D_CUT[i])
            start += D_CUT[i]


@triton.jit(do_not_specialize=["HEADS", "L", "per_multiprocessor", "n_pos", "n_neg"])
def forward_kernel(
    Q, K_pos, V_pos, K_neg, V_neg, O, O_neg, MASK_pos, MASK_neg, ALPHA,
    stride_qb, stride_ql, stride_qh,
    stride_kpb, stride_kpn, stride_kph, stride_vpb, stride_vpn, stride_vph,
    stride_knb, stride_knn, stride_knh, stride_vnb, stride_vnn, stride_vnh,
    stride_mpb, stride_mpn, stride_mnb, stride_mnn,
    stride_ab, stride_al, stride_ah,
    HEADS, H, L, per_multiprocessor, n_pos, n_neg, alpha, qk_scale,
    RULE: tl.constexpr, D: tl.constexpr, D_CUT: tl.constexpr,
    POS_CUT: tl.constexpr, NEG_CUT: tl.constexpr,
    SINGLE: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """A program has some tiles in a row, of one head or of several: HEADS is b H. SINGLE: it has
    one, and no loop holds in registers what a next one would need.
    """
    tiles = tl.cdiv(L, BLOCK_L)
    first, last = share_of_tiles(HEADS.to(tl.int64) * tiles, per_multiprocessor)
    first_head, last_head = first // tiles, tl.cdiv(last, tiles)
    if SINGLE:
        last_head = first_head + 1
    for bh in range(first_head, last_head):
        b, h = bh // H, bh % H
        pos = prompt_of_head(
            K_pos, V_pos, MASK_pos, stride_kpb, stride_kpn, stride_kph,
            stride_vpb, stride_vpn, stride_vph, stride_mpb, stride_mpn, n_pos, b, h, GROUP, ALIGN,
        )  # fmt: skip
        neg = prompt_of_head(
            K_neg, V_neg, MASK_neg, stride_knb, stride_knn, stride_knh,
            stride_vnb, stride_vnn, stride_vnh, stride_mnb, stride_mnn, n_neg, b, h, GROUP, ALIGN,
        )  # fmt: skip
        Q_bh = of_head(Q, b, h, stride_qb, stride_qh, ALIGN)
        O_bh = O + (b * L * H + h) * D
        O_neg_bh = None if O_neg is None else O_neg + (b * L * H + h) * D
        # empty tuples where a prompt is streamed or void
        k_neg, v_neg = load_prompt(neg, NEG_CUT, D, D_CUT, ALIGN)
        k_pos, v_pos = load_prompt(pos, POS_CUT, D, D_CUT, ALIGN)
        first_tile = tl.maximum(first - bh * tiles, 0).to(tl.int32)
        last_tile = tl.minimum(last - bh * tiles, tiles).to(tl.int32)
        if SINGLE:
            last_tile = first_tile + 1
        for tile in range(first_tile, last_tile):
            forward_tile(
                Q_bh, O_bh, O_neg_bh, ALPHA, pos, neg, k_pos, v_pos, k_neg, v_neg, tile, b, h,
                stride_ql, stride_ab, stride_al, stride_ah, H, L, alpha, qk_scale,
                RULE, D, D_CUT, POS_CUT, NEG_CUT, BLOCK_L, BLOCK_N, ALIGN,
            )  # fmt: skip


def forward(
    q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, alpha, scale, rule
):  # fmt: skip
    """Launch the forward kernel."""
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    launch(
        plan,
        (q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map),
        (alpha_map is None and alpha == 0, rule, False),
        (q, k_pos, v_pos, k_neg, v_neg, o, None, mask_pos, mask_neg, alpha_map),
        (alpha, scale * LOG2E),
    )
    return o


def nag(
    q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, alpha, scale,
    nag_scale, nag_tau, nag_norm,
):  # fmt: skip
    """Normalised attention guidance: one launch for Z+ and Z-, and one that makes O of them."""
    prompts = (k_pos, v_pos, k_neg, v_neg)
    if alpha_map is None and alpha == 0:
        return forward(q, *prompts, mask_pos, mask_neg, None, alpha, scale, 0)
    z_pos = torch.empty_like(q, memory_format=torch.contiguous_format)
    z_neg = torch.empty_like(z_pos)
    launch(
        plan,
        (q, *prompts, mask_pos, mask_neg, None),
        (False, 0, True),
        (q, *prompts, z_pos, z_neg, mask_pos, mask_neg, None),
        (1.0, scale * LOG2E),
    )
    return blend(z_pos, z_neg, z_pos, alpha_map, alpha, nag_scale, nag_tau, nag_norm)


def plan(
    q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, is_void, rule, is_pair
) -> Launch:  # fmt: skip
    """The launch of the forward kernel. `is_void`: alpha is 0, and no negative prompt is read.
    `is_pair`: with a pointer for Z-, which decides what is compiled.
    """
    k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map = expanded(
        q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map
    )
    b, l, h, d = q.shape
    pos_cut, neg_cut = (resident_cut(k.shape[1], d, q) for k in (k_pos, k_neg))
    if is_void:
        neg_cut = None
    single = () in (pos_cut, neg_cut)
    config = forward_config(d, q.dtype, pos_cut, q.device)
    tiles = b * h * triton.cdiv(l, config.BLOCK_L)
    strides = (
        *q.stride()[:3],
        *k_pos.stride()[:3], *v_pos.stride()[:3], *k_neg.stride()[:3], *v_neg.stride()[:3],
        *strides_or_zeros(mask_pos, 2), *strides_or_zeros(mask_neg, 2),
        *strides_or_zeros(alpha_map, 3),
    )  # fmt: skip
    lengths = (k_pos.shape[1], k_neg.shape[1])
    constants = {
        "RULE": rule, "D": d, "D_CUT": head_cut(d, pos_cut == ()), "POS_CUT": pos_cut,
        "NEG_CUT": neg_cut, "SINGLE": single, "BLOCK_L": config.BLOCK_L,
        "BLOCK_N": config.BLOCK_N, "GROUP": group_of(q, k_pos),
        "ALIGN": alignment(q, k_pos, v_pos, k_neg, v_neg),
    }  # fmt: skip
    extras = (mask_pos, mask_neg, alpha_map)
    has_more = rule == PROJECTED or is_pair or any(x is not None for x in extras)
    registers = most_registers(d, (pos_cut, neg_cut), has_more, q.device)
    options = compiler_options(config, registers)
    grid = Grid(tiles, 1)
    if not single:
        # O is as Q is, and any numbers do
        arguments = (
            q, k_pos, v_pos, k_neg, v_neg, q, q if is_pair else None, mask_pos, mask_neg,
            alpha_map, *strides,
            b * h, h, l, 1, *lengths, 1.0, 1.0,
        )  # fmt: skip
        grid = grid_of(forward_kernel, arguments, constants | options, tiles, q.device)
    return Launch(
        forward_kernel,
        (grid.programs,),
        (*strides, b * h, h, l, grid.per_multiprocessor, *lengths),
        constants,
        options,
    )
