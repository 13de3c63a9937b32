"""Shifts, bit fields, byte permutes and bit counts; PTX ISA 9.7.1 and 9.7.8."""

import numpy as np

from .arithmetic import check_modifiers, elementwise, types_of
from .errors import Unsupported
from .formats import FORMATS
from .isa import instruction


@instruction("shl", "shr")
def shift(m, code, modifiers):
    """Amounts of the width and more shift everything out; shr.s keeps the sign."""
    check_modifiers(modifiers)
    (kind,) = types_of(modifiers)
    fmt = FORMATS[kind]
    bits = 8 * fmt.bytes
    left = code.opcode.startswith("shl")
    function = np.left_shift if left else np.right_shift

    def compute(a, n):
        moved = function(a, np.minimum(n, bits - 1).astype(fmt.dtype))
        if not left and fmt.is_signed:
            return moved
        return np.where(n >= bits, fmt.dtype(0), moved)

    return elementwise(m, code, (kind, kind, "u32"), compute)


@instruction("shf")
def funnel_shift(m, code, modifiers):
    """shf.l takes the high, shf.r the low word of (b:a) shifted by c."""
    check_modifiers(modifiers, "l", "r", "wrap", "clamp")
    left, wrap = "l" in modifiers, "wrap" in modifiers

    def compute(a, b, c):
        n = (c & np.uint32(31) if wrap else np.minimum(c, 32)).astype(np.uint64)
        both = b.astype(np.uint64) << np.uint64(32) | a
        return ((both << n) >> np.uint64(32) if left else both >> n).astype(np.uint32)

    return elementwise(m, code, ("b32", "b32", "b32", "u32"), compute)


@instruction("lop3")
def lop3(m, code, modifiers):
    """Any function of three bits: the last operand is its truth table."""
    check_modifiers(modifiers)
    table = code.operands[4].value

    def compute(a, b, c):
        result = np.zeros_like(a | b | c)
        for row in range(8):
            if table >> row & 1:
                result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        return result

    put = m.write(code.operands[0], "b32")
    a, b, c = (m.read(op, "b32") for op in code.operands[1:4])
    return lambda active: put(active, compute(a(active), b(active), c(active)))


@instruction("prmt")
def permute_bytes(m, code, modifiers):
    """Default mode: selector nibbles pick bytes of (b:a); bit 3 spreads the byte's sign."""
    check_modifiers(modifiers)

    def compute(a, b, selector):
        both = b.astype(np.uint64) << np.uint64(32) | a
        result = np.zeros(np.broadcast_shapes(np.shape(both), np.shape(selector)), np.uint32)
        for i in range(4):
            nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
            byte = both >> ((nibble & np.uint32(7)) * np.uint32(8)).astype(np.uint64)
            byte = (byte & np.uint64(0xFF)).astype(np.uint32)
            sign = np.where(byte & np.uint32(0x80), np.uint32(0xFF), np.uint32(0))
            result |= np.where(nibble & np.uint32(8), sign, byte) << np.uint32(8 * i)
        return result

    return elementwise(m, code, ("b32", "b32", "b32", "b32"), compute)


@instruction("bfe")
def extract_field(m, code, modifiers):
    (kind,) = types_of(modifiers)
    fmt = FORMATS[kind]
    width = 8 * fmt.bytes

    def compute(a, start, length):
        start = np.minimum(start & np.uint32(255), width).astype(np.int64)
        length = np.minimum(length & np.uint32(255), width).astype(np.int64)
        # the field's top bit, or the value's where the field reaches past it, is the sign
        length = np.minimum(length, np.maximum(width - start, int(fmt.is_signed)))
        start = np.minimum(start, width - 1) if fmt.is_signed else start
        a = a.astype(np.int64 if fmt.is_signed else np.uint64)
        if fmt.is_signed:
            up = 64 - start - length
            value = np.right_shift(np.left_shift(a, up), 64 - length)
            return np.where(length == 0, 0, value).astype(fmt.dtype)
        start, length = start.astype(np.uint64), length.astype(np.uint64)
        full = length >= 64
        mask = (np.uint64(1) << np.where(full, np.uint64(0), length)) - np.uint64(1)
        value = np.where(start >= 64, np.uint64(0), a >> np.minimum(start, np.uint64(63)))
        return np.where(full, value, value & mask).astype(fmt.dtype)

    return elementwise(m, code, (kind, kind, "u32", "u32"), compute)


@instruction("bfi")
def insert_field(m, code, modifiers):
    (kind,) = types_of(modifiers)
    fmt = FORMATS[kind]
    width = 8 * fmt.bytes

    def compute(field, base, start, length):
        start = (start & np.uint32(255)).astype(np.uint64)
        length = np.minimum((length & np.uint32(255)).astype(np.uint64), np.uint64(width))
        ones = np.where(length >= 64, ~np.uint64(0), (np.uint64(1) << length) - np.uint64(1))
        gone = start >= width
        start = np.where(gone, np.uint64(0), start)
        mask = np.where(gone, np.uint64(0), ones << start)
        inserted = (field.astype(np.uint64) << start) & mask
        return (inserted | (base.astype(np.uint64) & ~mask)).astype(fmt.dtype)

    return elementwise(m, code, (kind, kind, kind, "u32", "u32"), compute)


@instruction("popc", "clz", "brev", "bfind")
def count_bits(m, code, modifiers):
    check_modifiers(modifiers, "shiftamt")
    (kind,) = types_of(modifiers)
    fmt = FORMATS[kind]
    width = 8 * fmt.bytes
    name = code.opcode.partition(".")[0]

    def bits_of(a):
        a = np.atleast_1d(a).astype(f"u{fmt.bytes}")
        return a[:, None] >> np.arange(width, dtype=a.dtype) & a.dtype.type(1)

    def compute(a):
        bits = bits_of(~a if name == "bfind" and fmt.is_signed and (a < 0).any() else a)
        # position of the highest set bit, -1 for none
        highest = np.where(bits.any(1), width - 1 - bits[:, ::-1].argmax(1), -1)
        if name == "popc":
            return bits.sum(1)
        if name == "clz":
            return width - 1 - highest
        if name == "brev":
            weights = np.uint64(1) << np.arange(width, dtype=np.uint64)[::-1]
            return (bits.astype(np.uint64) * weights).sum(1, dtype=np.uint64)
        if "shiftamt" in modifiers:
            return np.where(highest < 0, -1, width - 1 - highest)
        return highest

    if name == "bfind" and fmt.is_signed:
        raise Unsupported("bfind of a signed value")
    result = kind if name == "brev" else "u32"
    dtype = FORMATS[result].dtype
    return elementwise(
        m, code, (result, kind), lambda a: compute(a).astype(np.int64).astype(dtype)
        if name != "brev" else compute(a).astype(dtype)
    )  # fmt: skip
