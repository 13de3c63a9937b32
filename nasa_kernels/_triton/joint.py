"""Fused joint attention, forward pass: the second launch, or of a small image the only one.

The first launch (`nasa_kernels/_joint/shared.py`) left O_s and s, the attention over the image
keys and its log-sum-exp; without it this one makes them, and keeps O_s as the first one would have
rounded it. It attends to both prompts and merges, by a rule, in fp32:

    O = c_s O_s + c_p z+ / l+ + c_n z- / l-        c = function of s, p, n and alpha

or leaves the two joint attentions, over [shared; pos] and over [shared; neg], apart (`pair`).
`nasa_kernels/joint_attention.py` has the table of the rules. z, l and the two ways to hold a prompt
are those of `forward.py`. Log-sum-exps are base 2 here.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from nasa_kernels._checks import check_text_queries, expanded
from nasa_kernels._joint.shared import attend_shared, in_one_launch
from nasa_kernels._triton.configs import forward_config, head_cut, resident_cut
from nasa_kernels._triton.forward import attend, attend_streamed, block_of_z, load_alpha
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
from nasa_kernels._triton.prompt import load_prompt, prompt_of_head
from nasa_kernels._triton.softmax import finite, nonzero
from nasa_kernels._triton.tiles import load_rows, of_head, store_block, store_rows, tile_of_head
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
def attend_image(
    q, image, qk_scale, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
    D_CUT: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """O_s, rounded to the type of q, a tuple over D_CUT of [BLOCK_L, d_i]; and s."""
    z, l, m = attend_streamed(q, image, qk_scale, BLOCK_L, BLOCK_N, D, D_CUT, ALIGN)
    normalise = 1.0 / nonzero(l)
    o_shared = ()
    for i in tl.static_range(len(D_CUT)):
        o_shared = o_shared + ((z[i] * normalise[:, None]).to(q[0].dtype),)
    return o_shared, m + tl.log2(l)


@triton.jit
def visible(n_pos, n_neg, first_row, first_pos, first_neg, BLOCK_L: tl.constexpr):
    """Keys that a tile of queries reads: nothing but one text's own does not read the other's."""
    all_pos = (first_row >= first_pos) & (first_row + BLOCK_L <= first_neg)
    return tl.where(first_row >= first_neg, 0, n_pos), tl.where(all_pos, 0, n_neg)


@triton.jit
def with_shared(o_shared, c_s, found, v, c, N_CUT: tl.constexpr, BLOCK_L, D_CUT: tl.constexpr):
    """c_s O_s + c z, the attention over [shared; prompt]: a tuple over D_CUT of [BLOCK_L, d_i]."""
    blocks = ()
    for i in tl.static_range(len(D_CUT)):
        z = block_of_z(found, v, i, N_CUT, BLOCK_L, D_CUT)
        blocks = blocks + (c_s[:, None] * o_shared[i].to(tl.float32) + c[:, None] * z,)
    return blocks


@triton.jit
def store_projected(
    O, o_shared, s, p, n, l_pos, l_neg, found_pos, v_pos, found_neg, v_neg,
    alpha, row, first_pos, first_neg, H, L, D: tl.constexpr, D_CUT: tl.constexpr,
    POS_CUT: tl.constexpr, NEG_CUT: tl.constexpr, BLOCK_L: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    """Rows of the negative text have zeros for Z+ and -1 for c: 0 + Z-."""
    a_s, a_p = share(s, p)
    b_s, b_n = share(s, n)
    is_neg = row >= first_neg
    a_s, a_p = tl.where(is_neg, 0.0, a_s), tl.where(is_neg, 0.0, a_p / nonzero(l_pos))
    pos = with_shared(o_shared, a_s, found_pos, v_pos, a_p, POS_CUT, BLOCK_L, D_CUT)
    neg = with_shared(
        o_shared, b_s, found_neg, v_neg, b_n / nonzero(l_neg), NEG_CUT, BLOCK_L, D_CUT
    )
    apart, c, r = project(pos, neg, tl.where(row >= first_pos, 0.0, alpha))
    c = tl.where(is_neg, -1.0, c)
    store_rows(O, removed(pos, apart, c, r, HIDES), row, row < L, H * D, D, D_CUT)


@triton.jit
def store_pair(
    O, O_neg, o_shared, s, p, n, l_pos, l_neg, found_pos, v_pos, found_neg, v_neg,
    b, h, row, first_pos, first_neg, H, L, D: tl.constexpr, D_CUT: tl.constexpr,
    POS_CUT: tl.constexpr, NEG_CUT: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Z+ and Z-, each contiguous, without the rows of the other text."""
    a_s, a_p = share(s, p)
    b_s, b_n = share(s, n)
    text_pos = first_neg - first_pos
    O += (b * first_neg * H + h) * D
    O_neg += (b * (L - text_pos) * H + h) * D
    row_neg = tl.where(row < first_neg, row, row - text_pos)
    is_neg = (row < first_pos) | ((row >= first_neg) & (row < L))
    pos = with_shared(
        o_shared, a_s, found_pos, v_pos, a_p / nonzero(l_pos), POS_CUT, BLOCK_L, D_CUT
    )
    neg = with_shared(
        o_shared, b_s, found_neg, v_neg, b_n / nonzero(l_neg), NEG_CUT, BLOCK_L, D_CUT
    )
    store_rows(O, pos, row, row < first_neg, H * D, D, D_CUT)
    store_rows(O_neg, neg, row_neg, is_neg, H * D, D, D_CUT)


@triton.jit(do_not_specialize=["L", "n", "n_pos", "n_neg", "first_pos", "first_neg"])
def joint_kernel(
    Q, K, V, K_pos, V_pos, K_neg, V_neg, O_shared, LSE_shared, O, O_neg, MASK_pos, MASK_neg, ALPHA,
    stride_qb, stride_ql, stride_qh,
    stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_kpb, stride_kpn, stride_kph, stride_vpb, stride_vpn, stride_vph,
    stride_knb, stride_knn, stride_knh, stride_vnb, stride_vnn, stride_vnh,
    stride_mpb, stride_mpn, stride_mnb, stride_mnn,
    stride_ab, stride_al, stride_ah,
    H, L, n, n_pos, n_neg, first_pos, first_neg, alpha, qk_scale,
    RULE: tl.constexpr, D: tl.constexpr, D_CUT: tl.constexpr,
    POS_CUT: tl.constexpr, NEG_CUT: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """With K it attends to the image; O_shared and LSE_shared are then written, or None. Without it
    they are read.
    """
    tile, bh = tile_of_head(tl.cdiv(L, BLOCK_L))
    b, h = bh // H, bh % H
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
    Q = of_head(Q, b, h, stride_qb, stride_qh, ALIGN)
    q = load_rows(Q, row, row < L, stride_ql, D, D_CUT, ALIGN)
    # O_shared and O are [b, l, h, d], contiguous
    first = (b * L * H + h) * D
    if K is not None:
        image = prompt_of_head(
            K, V, None, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
            0, 0, n, b, h, GROUP, ALIGN,
        )  # fmt: skip
        o_shared, s = attend_image(q, image, qk_scale, BLOCK_L, BLOCK_N, D, D_CUT, ALIGN)
        if O_shared is not None:
            store_rows(O_shared + first, o_shared, row, row < L, H * D, D, D_CUT)
            tl.store(LSE_shared + bh * L + row, s / _LOG2E, mask=row < L)
    k_neg, v_neg = load_prompt(neg, NEG_CUT, D, D_CUT, ALIGN)
    found_neg, l_neg, m_neg = attend(
        q, k_neg, neg, qk_scale, NEG_CUT, BLOCK_L, BLOCK_N, D, D_CUT, ALIGN
    )
    k_pos, v_pos = load_prompt(pos, POS_CUT, D, D_CUT, ALIGN)
    found_pos, l_pos, m_pos = attend(
        q, k_pos, pos, qk_scale, POS_CUT, BLOCK_L, BLOCK_N, D, D_CUT, ALIGN
    )

    alpha_row = load_alpha(ALPHA, alpha, stride_ab, stride_al, stride_ah, b, h, row, row < L)
    # log2(0) = -inf: a prompt without keys
    lse_pos, lse_neg = m_pos + tl.log2(l_pos), m_neg + tl.log2(l_neg)
    if K is None:
        s = tl.load(LSE_shared + bh * L + row, mask=row < L, other=0.0) * _LOG2E
        o_shared = load_rows(O_shared + first, row, row < L, H * D, D, D_CUT, 1)
    if O_neg is not None:
        store_pair(
            O, O_neg, o_shared, s, lse_pos, lse_neg, l_pos, l_neg, found_pos, v_pos, found_neg,
            v_neg, b, h, row, first_pos, first_neg, H, L, D, D_CUT, POS_CUT, NEG_CUT, BLOCK_L,
        )  # fmt: skip
    elif RULE == PROJECTED:
        store_projected(
            O + first, o_shared, s, lse_pos, lse_neg, l_pos, l_neg, found_pos, v_pos, found_neg,
            v_neg, alpha_row, row, first_pos, first_neg, H, L, D, D_CUT, POS_CUT, NEG_CUT, BLOCK_L,
            ALPHA is not None,
        )  # fmt: skip
    else:
        c_s, c_p, c_n = coefficients(
            s, lse_pos, lse_neg, alpha_row,
            (row >= first_pos) & (row < first_neg), row >= first_neg, RULE,
        )  # fmt: skip
        c_s = c_s[:, None]
        c_p, c_n = (c_p / nonzero(l_pos))[:, None], (c_n / nonzero(l_neg))[:, None]
        start = 0
        for i in tl.static_range(len(D_CUT)):
            z_neg_i = block_of_z(found_neg, v_neg, i, NEG_CUT, BLOCK_L, D_CUT)
            z_pos_i = block_of_z(found_pos, v_pos, i, POS_CUT, BLOCK_L, D_CUT)
            o = c_s * o_shared[i].to(tl.float32) + c_p * z_pos_i + c_n * z_neg_i
            store_block(O + first, o, row, row < L, H * D, start, D, D_CUT[i])
            start += D_CUT[i]


def forward(
    q, k, v, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, alpha, scale,
    rule, text_pos, text_neg,
):  # fmt: skip
    """O. The public function checked shapes, dtypes and layouts, but for those of a small image,
    which the plan of its launch checks.
    """
    small = in_one_launch(q, k, text_pos + text_neg)
    image = None if small else attend_shared(q, k, v, scale)
    return _attend(
        image, q, k, v, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, alpha, scale,
        rule, text_pos, text_neg,
    )  # fmt: skip


def attention(
    q, k, v, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, alpha, scale,
    rule, text_pos, text_neg,
):  # fmt: skip
    """The same, and O_s and s."""
    if is_made := in_one_launch(q, k, text_pos + text_neg):
        b, l, h, _ = q.shape
        image = rows_like(q), torch.empty((b, h, l), dtype=torch.float32, device=q.device)
    else:
        image = attend_shared(q, k, v, scale)
    o = _attend(
        image, q, k, v, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, alpha, scale,
        rule, text_pos, text_neg, is_made,
    )  # fmt: skip
    return o, *image


def rows_like(q, less=0):
    """A new contiguous tensor of q's rows but for so many."""
    if not less:
        # half of what it costs the host to ask for sizes
        return torch.empty_like(q, memory_format=torch.contiguous_format)
    b, l, h, d = q.shape
    return q.new_empty((b, l - less, h, d))


def pair(
    q, k, v, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, scale, text_pos, text_neg
):  # fmt: skip
    """Z+ and Z-, each without the queries of the other text."""
    small = in_one_launch(q, k, text_pos + text_neg)
    image = None if small else attend_shared(q, k, v, scale)
    z_pos, z_neg = rows_like(q, text_neg), rows_like(q, text_pos)
    _launch(
        image, z_pos, z_neg, q, k, v, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, None, 0.0,
        scale, 0, text_pos, text_neg,
    )  # fmt: skip
    return z_pos, z_neg


def nag(q, k, v, *rest):
    """Normalised attention guidance: the launch of `pair`, and one that makes O of Z+ and Z-."""
    scale, (*_, text_pos, text_neg) = rest[8], rest
    small = in_one_launch(q, k, text_pos + text_neg)
    return _guide(None if small else attend_shared(q, k, v, scale), q, k, v, *rest)


def _guide(
    image, q, k, v, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, alpha, scale,
    nag_scale, nag_tau, nag_norm, text_pos, text_neg,
):  # fmt: skip
    z_pos, z_neg = rows_like(q, text_neg), rows_like(q, text_pos)
    _launch(
        image, z_pos, z_neg, q, k, v, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, None, 0.0,
        scale, 0, text_pos, text_neg,
    )  # fmt: skip
    # Z+ has every row where the negative text has no queries
    o = rows_like(q) if text_neg else z_pos
    return blend(
        z_pos, z_neg, o, alpha_map, alpha, nag_scale, nag_tau, nag_norm, text_pos, text_neg
    )


def _attend(image, q, *rest):
    o = rows_like(q)
    _launch(image, o, None, q, *rest)
    return o


# of a small image: `nasa_kernels/_quick.py` asks whether it is one, and once is enough
ONE_LAUNCH = {
    "forward": functools.partial(_attend, None),
    "nag": functools.partial(_guide, None),
}


def _launch(
    image, o, o_neg, q, k, v, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, alpha,
    scale, rule, text_pos, text_neg, is_made=False,
):  # fmt: skip
    """It writes `o`, and `o_neg` where that is not None.

    image: O_s and s, of another launch or, with `is_made`, of this one. None: this one's, which no
        one is to see.
    """
    prompts = (k_pos, v_pos, k_neg, v_neg)
    o_shared, lse_shared = image or (None, None)
    if image is not None and not is_made:
        k = v = None
    # of a rule under whose alpha 0 the negative text's keys do not count, no query reads them
    is_void = (
        alpha_map is None and alpha == 0 and o_neg is None and text_neg == 0 and rule != _VSF.value
    )
    launch(
        plan,
        (q, k, v, *prompts, mask_pos, mask_neg, alpha_map),
        (rule, text_pos, text_neg, o_neg is not None, is_void, is_made),
        (q, k, v, *prompts, o_shared, lse_shared, o, o_neg, mask_pos, mask_neg, alpha_map),
        (alpha, scale * LOG2E),
    )


def plan(
    q, k, v, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map,
    rule, text_pos, text_neg, is_pair, is_void, is_made,
) -> Launch:  # fmt: skip
    """k and v: None where the image was attended to. `is_pair`: with a pointer for Z-, `is_made`:
    with pointers for O_s and s, which decides what is compiled. `is_void`: no negative prompt is
    read.
    """
    check_text_queries("nasa_kernels", q, (text_pos, text_neg))
    image: list[Any]
    k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, *image = expanded(
        q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, *(() if k is None else (k, v))
    )
    b, l, h, d = q.shape
    n = image[0].shape[1] if image else 0
    # beside an image, whose keys are streamed, all are
    pos_cut, neg_cut = (
        resident_cut(x.shape[1], d, q, widest=0 if image else 160) for x in (k_pos, k_neg)
    )
    if is_void:
        neg_cut = None
    config = forward_config(d, q.dtype, () if image else pos_cut, q.device)
    image_strides = [s for x in image for s in x.stride()[:3]] if image else (0,) * 6
    return Launch(
        joint_kernel,
        (triton.cdiv(l, config.BLOCK_L) * b * h,),
        (
            *q.stride()[:3], *image_strides,
            *k_pos.stride()[:3], *v_pos.stride()[:3], *k_neg.stride()[:3], *v_neg.stride()[:3],
            *strides_or_zeros(mask_pos, 2), *strides_or_zeros(mask_neg, 2),
            *strides_or_zeros(alpha_map, 3),
            h, l, n, k_pos.shape[1], k_neg.shape[1], l - text_pos - text_neg, l - text_neg,
        ),
        {
            "RULE": rule, "D": d, "D_CUT": head_cut(d, bool(image) or pos_cut == ()),
            "POS_CUT": pos_cut, "NEG_CUT": neg_cut, "BLOCK_L": config.BLOCK_L,
            "BLOCK_N": config.BLOCK_N, "GROUP": group_of(q, k_pos),
            "ALIGN": alignment(q, *image, k_pos, v_pos, k_neg, v_neg),
        },
        compiler_options(config),
    )  # fmt: skip
