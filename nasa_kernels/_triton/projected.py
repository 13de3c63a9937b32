"""The projected rule: what Z- has that Z+ has not is taken away, and the length of Z+ is kept.

    D = Z- - t Z+        t = <Z-, Z+> / <Z+, Z+>
    O = r (Z+ - alpha D)        r = |Z+| / |Z+ - alpha D| = 1 / sqrt(1 + alpha^2 |D|^2 / |Z+|^2)

per query and head; D is orthogonal to Z+. Both rows stay in registers: three sums, no second pass.

Nothing is normalised before: with z+ = l+ Z+, z- = l- Z- and c = alpha l+ / l- it is

    O = r (z+ - c d) / l+        d = z- - <z-, z+> / <z+, z+> z+

Equal prompts have equal sums, so d is exactly 0 and O exactly Z+.
"""

import triton
import triton.language as tl

from nasa_kernels.reference import RULES

PROJECTED = tl.constexpr(RULES.index("projected"))
# the smallest number with all its digits
SMALLEST = tl.constexpr(2.0**-126)


@triton.jit
def halves(x):
    """The left and the right columns of [M, N]. In registers: a thread of a product's result has
    some of each.
    """
    left, right = x.reshape(x.shape[0], 2, x.shape[1] // 2).trans(0, 2, 1).split()
    return left, right


@triton.jit
def pieces(x):
    """[M, N] as columns of 8 each."""
    parts = (x,)
    for _ in tl.static_range(5):
        if parts[0].shape[1] > 8:
            halved = ()
            for i in tl.static_range(len(parts)):
                left, right = halves(parts[i])
                halved = halved + (left, right)
            parts = halved
    return parts


@triton.jit
def rows_dot(a, b):
    """Sums over the head_dim of a b, each a tuple of blocks [M, d_i]: [M].

    Piece by piece, so that a product and the sum before it are one instruction.
    """
    total = tl.zeros([a[0].shape[0], 8], tl.float32)
    for i in tl.static_range(len(a)):
        x, y = pieces(a[i]), pieces(b[i])
        for j in tl.static_range(len(x)):
            total += x[j] * y[j]
    return tl.sum(total, 1)


@triton.jit
def project(pos, neg, c):
    """(d, c, r) of rows of Z+ and Z-, tuples of blocks [M, d_i]; O is r (pos - c d).

    A row of zeros of Z+, or of numbers whose squares are none, has c 0 and r 1, so O is Z+.
    """
    pos_pos, neg_pos = rows_dot(pos, pos), rows_dot(neg, pos)
    nothing = pos_pos < SMALLEST
    c = tl.where(nothing, 0.0, c)
    pos_pos = tl.where(nothing, 1.0, pos_pos)
    # div_rn: exactly 2 where one sum is twice the other, which `/` does not promise
    t = tl.div_rn(neg_pos, pos_pos)
    apart = ()
    for i in tl.static_range(len(pos)):
        apart = apart + (neg[i] - t[:, None] * pos[i],)
    # NaN of a row that is not looked at must not count
    longer = c * c * (rows_dot(apart, apart) / pos_pos)
    return apart, c, tl.where((longer == 0.0) | (c == 0.0), 1.0, tl.rsqrt(1.0 + longer))


@triton.jit
def removed(pos, apart, c, factor, HIDES: tl.constexpr):
    """factor (pos - c d), rows times a factor each. HIDES: where c is 0, whatever d is."""
    blocks = ()
    for i in tl.static_range(len(pos)):
        kept = pos[i] - c[:, None] * apart[i]
        if HIDES:
            kept = tl.where((c == 0.0)[:, None], pos[i], kept)
        blocks = blocks + (kept * factor[:, None],)
    return blocks
