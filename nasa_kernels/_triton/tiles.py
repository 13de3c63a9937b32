"""Tiles: how the kernels hold matrices whose sides are no powers of two.

Triton's blocks are powers of two; 77 keys would pad to 128 and head_dim 72 to 128. So a side is
cut into a tuple of widths, 77 -> (64, 16) and 72 -> (64, 16), and a matrix is a tuple of blocks:

    Q, dO        [BLOCK_L, d]    a tuple over the widths of d
    K, V         [n, d]          a tuple over the widths of n, each a tuple over the widths of d
    scores, P    [BLOCK_L, n]    a tuple over the widths of n

Only the last width of a side can be ragged. Loops over tuples are unrolled by the compiler.
"""

import triton
import triton.language as tl


def cut(size: int, widest: int = 256) -> tuple[int, ...]:
    """Widths, powers of two from 16 up and falling, that cover `size`: 77 -> (64, 16).

    At most three widths: the fourth costs more in instructions than the padding it saves.
    """
    rest = -(-size // 16) * 16
    widths: list[int] = [widest] * (rest // widest)
    rest %= widest
    while rest > 0:
        width = 1 << (rest.bit_length() - 1)
        if len(widths) == 2 and width < rest:
            width *= 2
        widths.append(width)
        rest -= width
    # a last width that was doubled may pair up with its neighbour: 240 -> (128, 64, 64) -> (256,)
    while len(widths) > 1 and widths[-1] == widths[-2]:
        widths[-2:] = [2 * widths[-1]]
    return tuple(widths)


@triton.jit
def tile_of_head(tiles):
    """Which of the `tiles` of a head a program has, and which head, in int64.

    The grid is flat, the tiles of a head in a row: beyond its first dimension 65,535 is the limit.
    """
    program = tl.program_id(0)
    return program % tiles, (program // tiles).to(tl.int64)


@triton.jit
def share_of_tiles(total, per_multiprocessor):
    """The half-open range of `total` tiles that a program has, heads after heads, in int64.

    Programs start one on each multiprocessor, then a second: so those `per_multiprocessor` of them
    that share one have neighbouring ranges, and no multiprocessor has two tiles more than another.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    multiprocessors = programs // per_multiprocessor
    place = program % multiprocessors * per_multiprocessor + program // multiprocessors
    place = place.to(tl.int64)
    return place * total // programs, (place + 1) * total // programs


@triton.jit
def of_head(X, b, h, stride_b, stride_h, ALIGN: tl.constexpr):
    """X from sample b and head h on. Both are int64: b * stride_b passes 2^31 for video."""
    return X + tl.multiple_of(b * stride_b + h * stride_h, ALIGN)


@triton.jit
def load_rows(X, rows, valid, stride, D: tl.constexpr, D_CUT: tl.constexpr, ALIGN: tl.constexpr):
    """Rows of a matrix [*, D] as a tuple of blocks; zeros past D and where `valid` is false (None:
    it is true everywhere).
    """
    # int64: a row index times its stride passes 2^31 elements for video
    offsets = tl.multiple_of(rows.to(tl.int64) * stride, ALIGN)
    blocks = ()
    start = 0
    for i in tl.static_range(len(D_CUT)):
        blocks = blocks + (_load_block(X, offsets, valid, start, D, D_CUT[i]),)
        start += D_CUT[i]
    return blocks


@triton.jit
def _load_block(
    X, offsets, valid, start: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    column = start + tl.arange(0, WIDTH)
    places = X + offsets[:, None] + column[None, :]
    if start + WIDTH > D:
        inside = (column < D)[None, :]
        if valid is not None:
            inside = valid[:, None] & inside
        block = tl.load(places, mask=inside, other=0.0)
    elif valid is not None:
        block = tl.load(places, mask=valid[:, None], other=0.0)
    else:
        block = tl.load(places)
    return block


@triton.jit
def store_rows(X, blocks, rows, valid, stride, D: tl.constexpr, D_CUT: tl.constexpr):
    """The inverse of `load_rows`; rounds to the type of X."""
    start = 0
    for i in tl.static_range(len(D_CUT)):
        store_block(X, blocks[i], rows, valid, stride, start, D, D_CUT[i])
        start += D_CUT[i]


@triton.jit
def store_block(X, block, rows, valid, stride, start, D: tl.constexpr, WIDTH: tl.constexpr):
    column = start + tl.arange(0, WIDTH)
    inside = valid[:, None] & (column[None, :] < D)
    offsets = rows.to(tl.int64) * stride
    tl.store(X + offsets[:, None] + column[None, :], block.to(X.dtype.element_ty), mask=inside)


@triton.jit
def zeros(ROWS: tl.constexpr, D_CUT: tl.constexpr):
    """A matrix [ROWS, D] of fp32 zeros."""
    blocks = ()
    for i in tl.static_range(len(D_CUT)):
        blocks = blocks + (tl.full([ROWS, D_CUT[i]], 0.0, tl.float32),)
    return blocks


@triton.jit
def transposed(blocks):
    """A matrix [N, d] as [d, N].

    Where the matrix is loaded, not where it is used: there Triton would copy it to shared memory
    again for each tile of queries.
    """
    out = ()
    for i in tl.static_range(len(blocks)):
        out = out + (tl.trans(blocks[i]),)
    return out


@triton.jit
def dot(a, b):
    """a b, summed over the blocks of d: a [M, d], b [d, N] -> [M, N] in fp32."""
    # ieee: fp32 in means fp32 math, tf32 is never taken behind the caller's back
    out = tl.dot(a[0], b[0], input_precision="ieee")
    for i in tl.static_range(1, len(a)):
        out = tl.dot(a[i], b[i], out, input_precision="ieee")
    return out


@triton.jit
def add_dot(out, a, b):
    """out + a b, block by block of d: a [M, N], b [N, d], out [M, d] in fp32."""
    total = ()
    for i in tl.static_range(len(b)):
        total = total + (tl.dot(a.to(b[i].dtype), b[i], out[i], input_precision="ieee"),)
    return total


@triton.jit
def scale_rows(blocks, factor):
    """Each row of a matrix [M, d] times its factor [M]."""
    scaled = ()
    for i in tl.static_range(len(blocks)):
        scaled = scaled + (blocks[i] * factor[:, None],)
    return scaled
