"""Softmax over the keys of one prompt, in base 2, with ragged ends, masks and rows without keys.

    s = q k^T + bias / scale        p = 2^(s c - m c)        c = scale * log2(e) > 0,  m = max s

Scores stay unscaled, so that scaling and shifting are one fused multiply-add per weight. A key
past the end of the prompt or masked has s = -inf and p = 0. Where a row has no key left, m is 0
and every p is 0: the sums stay finite, and `nonzero` makes Z of such a row 0 instead of 0/0.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_bias(prompt, key):
    """Natural-log bias of keys `key`; -inf past the end. The mask is bool or floating point."""
    inside = key < prompt.n
    value = tl.load(prompt.mask[0] + key.to(tl.int64) * prompt.stride_mn, mask=inside, other=0)
    if value.dtype == tl.int1:
        bias = tl.where(value, 0.0, float("-inf"))
    else:
        bias = tl.where(inside, value.to(tl.float32), float("-inf"))
    return bias


@triton.jit
def present(prompt, key):
    """Which of the keys `key` exist: not past the end, and not masked by -inf or False."""
    if len(prompt.mask) == 0:
        exists = key < prompt.n
    else:
        exists = load_bias(prompt, key) > float("-inf")
    return exists


@triton.jit
def mask_scores(scores, prompt, key, qk_scale, RAGGED: tl.constexpr):
    """Add the bias of each key to scores [M, n_j], and remove the keys that do not exist.

    Without RAGGED no key is past the end. A prompt is that of `prompt.py`.
    """
    if len(prompt.mask) > 0:
        scores += (load_bias(prompt, key) * (LOG2E / qk_scale))[None, :]
    elif RAGGED:
        scores = tl.where((key < prompt.n)[None, :], scores, float("-inf"))
    return scores


@triton.jit
def row_max(scores):
    """Maximum over all keys of a tuple of scores [M, n_j]; 0 where a row has no key."""
    highest = tl.max(scores[0], 1)
    for j in tl.static_range(1, len(scores)):
        highest = tl.maximum(highest, tl.max(scores[j], 1))
    return finite(highest)


@triton.jit
def online_step(scores, m, qk_scale):
    """Weights p of a block of scores [M, n], the largest score so far, and the factor by which
    sums relative to the largest score before, `m`, shrink.
    """
    m_new = tl.maximum(m, tl.max(scores, 1))
    shift = finite(m_new) * qk_scale
    return tl.exp2(scores * qk_scale - shift[:, None]), m_new, tl.exp2(m * qk_scale - shift)


@triton.jit
def finite(highest):
    return tl.where(highest == float("-inf"), 0.0, highest)


@triton.jit
def nonzero(row_sum):
    return tl.where(row_sum == 0.0, 1.0, row_sum)
