"""One prompt inside a kernel: where its keys and values lie, and how they are loaded.

A prompt that fits on chip is loaded whole, as a tuple over the widths of its length, `N_CUT`
(`tiles.py`); of a longer one, whose N_CUT is (), blocks pass. Where no key of a prompt is looked at
(it has none, or alpha is 0) it is void, and N_CUT is None: nothing is computed for it.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from nasa_kernels._triton.softmax import present
from nasa_kernels._triton.tiles import load_rows, of_head, transposed


class Prompt(NamedTuple):
    """Of one sample and head.

    It is made in the kernel, whose arguments stay flat: tuples of arguments cost host time in
    every launch.
    """

    K: Any  # [n, d]
    V: Any
    mask: Any  # (the mask [n],), or () where there is none: Triton 3.6 has no None in a tuple
    stride_kn: Any
    stride_vn: Any
    stride_mn: Any
    n: Any


@triton.jit
def prompt_of_head(
    K, V, MASK, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_mb, stride_mn, n, b, h, GROUP: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    # GROUP heads of Q look at each head of K and V
    h = h // GROUP
    # 0, but no compiler knows: else it would work out once where each row lies, and hold all of
    # that in registers while a program walks over heads
    zero = b >> 40
    return Prompt(
        of_head(K, b, h, stride_kb, stride_kh, ALIGN),
        of_head(V, b, h, stride_vb, stride_vh, ALIGN),
        () if MASK is None else (MASK + b * stride_mb,),
        stride_kn + zero,
        stride_vn + zero,
        stride_mn,
        n,
    )


@triton.jit
def load_keys(
    prompt, start, RAGGED: tl.constexpr,
    BLOCK_N: tl.constexpr, D: tl.constexpr, D_CUT: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Keys, transposed [d, BLOCK_N], and values [BLOCK_N, d] from token `start` on.

    The rows of keys that are masked, or past the end, are zeros: a NaN in them must not count.
    Without RAGGED none is past the end.
    """
    key = start + tl.arange(0, BLOCK_N)
    exists = present(prompt, key) if RAGGED or len(prompt.mask) > 0 else None
    k = load_rows(prompt.K, key, exists, prompt.stride_kn, D, D_CUT, ALIGN)
    v = load_rows(prompt.V, key, exists, prompt.stride_vn, D, D_CUT, ALIGN)
    return transposed(k), v


@triton.jit
def load_prompt(
    prompt, N_CUT: tl.constexpr, D: tl.constexpr, D_CUT: tl.constexpr, ALIGN: tl.constexpr
):
    """A whole prompt: keys and values, each a tuple over N_CUT of [n_j, d]."""
    k, v = (), ()
    if N_CUT is not None:
        start = 0
        for j in tl.static_range(len(N_CUT)):
            # only the last block can reach past the end
            k_j, v_j = load_keys(prompt, start, j == len(N_CUT) - 1, N_CUT[j], D, D_CUT, ALIGN)
            k, v = k + (k_j,), v + (v_j,)
            start += N_CUT[j]
    return k, v
