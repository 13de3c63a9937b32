"""ldmatrix, stmatrix and mma.sync: the fragment layouts of PTX ISA 9.7.14.

A warp's fragments are gathered into matrices, multiplied in fp32 and scattered back. g is a lane's
group (lane / 4, a row) and t its place in the group (lane % 4, a column pair).
"""

import re

import numpy as np

from .arithmetic import types_of
from .errors import Unsupported
from .formats import FORMATS
from .isa import instruction
from .special import WARP


def matrix_count(modifiers) -> int:
    return next(int(x[1]) for x in modifiers if x in ("x1", "x2", "x4"))


def _row_index(m, threads, address, matrices: int):
    """Flat 16-byte indices ``[warps, 8 * matrices]``: lane i names row i % 8 of matrix i // 8."""
    used = (np.arange(len(threads)) % WARP) < 8 * matrices
    who, at = threads[used], address[used]
    return m.shared.index(m.cta[who], at, 16, who).reshape(-1, 8 * matrices), who, at


def observe_rows(m, code, who, at, write: bool) -> None:
    if m.watch:
        m.watch.generic(code, who, at, 16, write)
    if m.banks:
        m.banks.count(code, who, at, 16)


@instruction("ldmatrix", together="warp")
def load_matrix(m, code, modifiers):
    if "m8n8" not in modifiers or "b16" not in modifiers:
        raise Unsupported("ldmatrix other than m8n8.b16")
    matrices = matrix_count(modifiers)
    puts = [m.write(r, "b32") for r in m.vector(code.operands[0])]
    address = m.address(code.operands[1])
    transpose = "trans" in modifiers

    def step(active):
        index, who, at = _row_index(m, m.threads(active), address(active), matrices)
        observe_rows(m, code, who, at, write=False)
        # [warps, matrices, row, column]
        rows = m.shared.words(16)[index].view(np.uint16).reshape(-1, matrices, 8, 8)
        if transpose:
            rows = rows.swapaxes(2, 3)
        # lane 4 row + column / 2 receives a pair of columns
        values = np.ascontiguousarray(rows).view(np.uint32).reshape(-1, matrices, WARP)
        for i, put in enumerate(puts):
            put(active, values[:, i].reshape(-1))

    return step


@instruction("stmatrix", together="warp")
def store_matrix(m, code, modifiers):
    if "m8n8" not in modifiers or "b16" not in modifiers:
        raise Unsupported("stmatrix other than m8n8.b16")
    matrices = matrix_count(modifiers)
    gets = [m.read_array(r, "b32") for r in m.vector(code.operands[1])]
    address = m.address(code.operands[0])
    transpose = "trans" in modifiers

    def step(active):
        index, who, at = _row_index(m, m.threads(active), address(active), matrices)
        observe_rows(m, code, who, at, write=True)
        values = np.stack([get(active).reshape(-1, WARP) for get in gets], 1)
        rows = values.view(np.uint16).reshape(-1, matrices, 8, 8)
        if transpose:
            rows = rows.swapaxes(2, 3)
        rows = np.ascontiguousarray(rows).reshape(-1, matrices * 8, 8)
        words, rows = m.shared.words(16), rows.view(np.complex128)[:, :, 0]
        words[index] = rows
        if m.watch:
            m.watch.confirm(words[index].tobytes() == rows.tobytes())

    return step


@instruction("movmatrix.sync.aligned", together="warp")
def transpose_matrix(m, code, modifiers):
    """An 8x8 matrix of 16-bit elements, a row per 4 lanes, transposed in registers."""
    get, put = m.read_array(code.operands[1], "b32"), m.write(code.operands[0], "b32")

    def step(active):
        rows = np.ascontiguousarray(get(active)).view(np.uint16).reshape(-1, 8, 8)
        put(active, np.ascontiguousarray(rows.swapaxes(1, 2)).view(np.uint32).reshape(-1))

    return step


# ---- fragments and matrices ------------------------------------------------------------------


def decoder(kind: str):
    """uint32 registers ``[..., r]`` -> fp32 elements ``[..., r, per]``, per = 2 or 1 (tf32)."""
    fmt = FORMATS[kind]

    def decode(registers: np.ndarray) -> np.ndarray:
        elements = np.ascontiguousarray(registers)[..., None].view(fmt.dtype)
        if kind == "tf32":
            # the unit reads 10 mantissa bits
            return (elements.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
        return fmt.decode(elements) if fmt.decode else elements.astype(np.float32)

    return decode


def gather_registers(gets, active, lanes: int) -> np.ndarray:
    """``[groups of lanes, lanes, registers]``."""
    first = gets[0](active)
    registers = np.empty((len(first), len(gets)), first.dtype)
    registers[:, 0] = first
    for i, get in enumerate(gets[1:], 1):
        registers[:, i] = get(active)
    return registers.reshape(-1, lanes, len(gets))


def a_matrix(elements: np.ndarray) -> np.ndarray:
    """``[w, 32, r, per]`` -> ``[w, 16, k]``: register i is row half i % 2, k block i // 2."""
    w, _, r, per = elements.shape
    rows = 2 if r > 1 else 1
    f = elements.reshape(w, 8, 4, r // rows, rows, per)
    return f.transpose(0, 4, 1, 3, 2, 5).reshape(w, 8 * rows, (r // rows) * 4 * per)


def b_matrix(elements: np.ndarray) -> np.ndarray:
    """``[w, 32, r, per]`` -> ``[w, k, 8]``: register i is k block i."""
    w, _, r, per = elements.shape
    f = elements.reshape(w, 8, 4, r, per)
    return f.transpose(0, 3, 2, 4, 1).reshape(w, r * 4 * per, 8)


def to_c_fragment(matrix: np.ndarray) -> np.ndarray:
    """``[w, 16, n]`` -> ``[w, 32, n / 2]``: per 8 columns a pair of row g, then of row g + 8."""
    w, _, n = matrix.shape
    f = matrix.reshape(w, 2, 8, n // 8, 4, 2)
    return f.transpose(0, 2, 4, 3, 1, 5).reshape(w, WARP, n // 2)


def accumulator_reader(m, operand, kind: str, hooked: bool = True):
    """``active -> fp32 [threads, elements]``: f16 accumulators come in pairs."""
    packed = "f16x2" if kind == "f16" else kind
    reads = [m.read_array(r, packed, hooked) for r in m.vector(operand)]

    def read(active):
        values = np.empty((m.size(active), len(reads), FORMATS[packed].lanes), np.float32)
        for i, get in enumerate(reads):
            values[:, i] = get(active).reshape(-1, values.shape[2])
        return values.reshape(len(values), -1)

    return read


def accumulator_writer(m, operand, kind: str, hooked: bool = True):
    """``(active, fp32 [threads, elements]) -> None``."""
    packed = "f16x2" if kind == "f16" else kind
    puts = [m.write(r, packed, hooked) for r in m.vector(operand)]

    def write(active, values):
        if packed == "f16x2":
            values = values.astype(np.float16).reshape(len(values), -1, 2)
        for i, put in enumerate(puts):
            put(active, values[:, i])

    return write


@instruction("mma.sync.aligned", together="warp")
def multiply_matrices(m, code, modifiers):
    shape = re.fullmatch(r"m16n8k(\d+)", modifiers[0])
    d_kind, a_kind, b_kind, c_kind = types_of(modifiers)
    if not shape or a_kind not in ("f16", "bf16", "tf32") or modifiers[1:3] != ("row", "col"):
        raise Unsupported(f"mma.sync {'.'.join(modifiers)}")
    a_kind = {"f16": "f16x2", "bf16": "bf16x2"}.get(a_kind, a_kind)
    decode = decoder(a_kind)
    destination, a, b, c = code.operands
    per = 4 // FORMATS[a_kind].item_bytes
    k = int(shape[1])
    if len(m.vector(a)) * 2 * per != k or len(m.vector(b)) * 4 * per != k:
        raise Unsupported(f"{len(m.vector(a))} registers for A of k = {k}")
    a_reads = [m.read_array(r, "b32") for r in m.vector(a)]
    b_reads = [m.read_array(r, "b32") for r in m.vector(b)]
    sums = accumulator_reader(m, c, c_kind)
    write = accumulator_writer(m, destination, d_kind)

    def step(active):
        left = a_matrix(decode(gather_registers(a_reads, active, WARP)))
        right = b_matrix(decode(gather_registers(b_reads, active, WARP)))
        product = to_c_fragment(left @ right)
        write(active, sums(active) + product.reshape(-1, product.shape[-1]))

    return step
