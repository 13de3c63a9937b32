"""wgmma: warpgroup matrix multiplies on shared memory; PTX ISA 9.7.15.

The product is computed at issue, but its registers belong to the tensor core until wait_group:
reading or writing one of them before is an error, and so is a register that was written after the
last wgmma.fence. A plain mov may copy an accumulator in flight (compilers rename registers); the
copy is then in flight, too.
"""

import re

import numpy as np

from .arithmetic import types_of
from .errors import Hazard, Unsupported
from .formats import FORMATS
from .isa import instruction
from .mma import (
    a_matrix,
    accumulator_reader,
    accumulator_writer,
    decoder,
    gather_registers,
    to_c_fragment,
)
from .parser import Register, Vector
from .special import WARP

GROUP = 4 * WARP
IDLE = -1

# layout type (bits 62-63 of a descriptor) -> bytes per row of the swizzle atom, address bits that
# are xored into bits 4-6
_ROW = {0: 16, 1: 128, 2: 64, 3: 32}
SWIZZLE_BITS = {0: 0x00, 16: 0x00, 32: 0x10, 64: 0x30, 128: 0x70}


def swizzle(address: np.ndarray, row: int) -> np.ndarray:
    """The swizzle of a ``row``-byte atom: 16-byte chunk number xor row number, by address bits."""
    return address ^ ((address >> 3) & SWIZZLE_BITS[row])


class TensorCores:
    """Which registers belong to multiplies in flight."""

    def __init__(self, m):
        self.m = m
        self.committed = np.zeros(m.count, np.int64)
        # register -> the commit group that will write, or reads it; IDLE for none
        self.writing: dict[str, np.ndarray] = {}
        self.reading: dict[str, np.ndarray] = {}
        # register -> written since the last wgmma.fence
        self.unfenced: dict[str, np.ndarray] = {}
        accumulators, sources = _registers(m.kernel)
        for name in accumulators:
            self.writing[name] = np.full(m.count, IDLE)
            m.read_hooks[name] = self._reads(name)
        for name in sources:
            self.reading[name] = np.full(m.count, IDLE)
        for name in accumulators | sources:
            self.unfenced[name] = np.zeros(m.count, bool)
            m.write_hooks[name] = self._writes(name)

    def _reads(self, name: str):
        writing = self.writing[name]

        def check(active):
            if (writing[active] != IDLE).any():
                raise Hazard(
                    f"reads {name} before wgmma.wait_group",
                    int(self.m.threads(active)[writing[active] != IDLE][0]),
                )

        return check

    def _writes(self, name: str):
        users = [u[name] for u in (self.writing, self.reading) if name in u]
        unfenced = self.unfenced[name]

        def check(active):
            for group in users:
                if (group[active] != IDLE).any():
                    raise Hazard(
                        f"writes {name}, which a wgmma in flight uses",
                        int(self.m.threads(active)[group[active] != IDLE][0]),
                    )
            unfenced[active] = True

        return check

    def in_flight(self, name: str, active) -> bool:
        return bool((self.writing[name][active] != IDLE).any())

    def copy(self, source: str, destination: str, active) -> None:
        """mov: what holds for the source holds for the copy."""
        self.writing[destination][active] = self.writing[source][active]
        self.unfenced[destination][active] = self.unfenced[source][active]

    def issue(self, accumulators, sources, active) -> None:
        for register in (*accumulators, *sources):
            if self.unfenced[register.name][active].any():
                raise Hazard(
                    f"{register.name} was written after the last wgmma.fence",
                    int(self.m.threads(active)[self.unfenced[register.name][active]][0]),
                )
        for register in sources:
            if register.name in self.writing:
                self._reads(register.name)(active)
        group = self.committed[active]
        for register in accumulators:
            self.writing[register.name][active] = group
        for register in sources:
            self.reading[register.name][active] = group

    def fence(self, active) -> None:
        for unfenced in self.unfenced.values():
            unfenced[active] = False

    def wait(self, active, keep: int) -> None:
        limit = self.committed[active] - keep
        for users in (self.writing, self.reading):
            for group in users.values():
                mine = group[active]
                group[active] = np.where(mine < limit, IDLE, mine)


def _registers(kernel) -> tuple[set[str], set[str]]:
    """``(accumulators and their copies by mov, registers of A)`` over the whole kernel."""
    accumulators, sources, copies = set(), set(), []
    for code in kernel.instructions:
        if code.opcode.startswith("wgmma.mma_async"):
            accumulators |= {r.name for r in code.operands[0].items}
            if isinstance(code.operands[1], Vector):
                sources |= {r.name for r in code.operands[1].items}
        elif code.opcode.startswith("mov.") and all(isinstance(o, Register) for o in code.operands):
            copies.append((code.operands[0].name, code.operands[1].name))
    grown = True
    while grown:
        new = {d for d, s in copies if s in accumulators} - accumulators
        grown = bool(new)
        accumulators |= new
    return accumulators, sources


# ---- shared memory operands ------------------------------------------------------------------


def chunk_offsets(size: int, layout: int, leading: int, stride: int, mn_major: bool) -> np.ndarray:
    """Byte offsets of an operand's 16-byte chunks; the canonical layouts of PTX ISA 9.7.15.5.1.

    K-major ``[size, 2]``: two chunks along k per row. MN-major ``[size / 8, 16]``: per k (of 16-bit
    elements), chunks of 8 rows.
    """
    row = _ROW[layout]
    if not mn_major:
        i, j = np.arange(size)[:, None], np.arange(2)
        return i // 8 * stride + i % 8 * row + j * (16 if layout else leading)
    i, k = np.arange(size // 8)[:, None], np.arange(16)
    if not layout:
        return i * stride + k % 8 * 16 + k // 8 * leading
    chunks = row // 16
    return i % chunks * 16 + i // chunks * leading + k % 8 * row + k // 8 * stride


def read_operand(m, code, active, descriptor, size: int, mn_major: bool) -> np.ndarray:
    """A matrix in shared memory as bytes ``[w, size, 32]``: 32 bytes along k per row."""
    threads = m.threads(active)
    leaders = threads.reshape(-1, GROUP)[:, 0]
    descriptor = descriptor.reshape(-1, GROUP)
    if (descriptor != descriptor[:, :1]).any():
        raise Hazard("the descriptor differs between threads of a warpgroup", int(leaders[0]))
    offsets = []
    for value in np.unique(descriptor[:, 0]).tolist() if len(leaders) else ():
        if value >> 49 & 7:
            raise Unsupported("a descriptor with a base offset")
        start, leading, stride = (((value >> bit) & 0x3FFF) << 4 for bit in (0, 16, 32))
        layout = value >> 62
        chunks = swizzle(
            start + chunk_offsets(size, layout, leading, stride, mn_major), _ROW[layout]
        )
        offsets.append((value, chunks))
    address = np.empty((len(leaders), *offsets[0][1].shape), np.int64)
    for value, chunks in offsets:
        address[descriptor[:, 0] == value] = chunks
    flat = address.reshape(len(leaders), -1)
    who = np.broadcast_to(leaders[:, None], flat.shape).reshape(-1)
    index = m.shared.index(m.cta[who], flat.reshape(-1), 16, who)
    if m.watch:
        group = m.unit(TensorCores).committed[leaders]
        m.watch.async_read(code, leaders, flat, 16, group)
    data = m.shared.words(16)[index].view(np.uint16).reshape(*address.shape, 8)
    if mn_major:
        # [w, chunk, k, 8] -> [w, chunk, 8, k]
        data = data.swapaxes(2, 3)
    return np.ascontiguousarray(data).reshape(len(leaders), size, 16).view(np.uint8)


_SHAPE = re.compile(r"m64n(\d+)k(\d+)")


@instruction("wgmma.mma_async.sync.aligned", together="warpgroup")
def multiply(m, code, modifiers):
    shape = _SHAPE.fullmatch(modifiers[0])
    d_kind, a_kind, b_kind = types_of(modifiers)
    n, k = int(shape[1]), int(shape[2])
    if a_kind not in ("f16", "bf16", "tf32") or d_kind not in ("f32", "f16"):
        raise Unsupported(f"wgmma of {a_kind}")
    a_kind = {"f16": "f16x2", "bf16": "bf16x2"}.get(a_kind, a_kind)
    if k * FORMATS[a_kind].item_bytes != 32 or n % 8 or not 8 <= n <= 256:
        raise Unsupported(f"wgmma shape {modifiers[0]}")
    decode, unit = decoder(a_kind), m.unit(TensorCores)
    destination, a, b, scale_d, *scales = code.operands
    elements = n // 2 if d_kind == "f32" else n // 4
    if len(destination.items) != elements:
        raise Unsupported(f"{len(destination.items)} accumulators for n = {n}")
    in_registers = isinstance(a, Vector)
    # the immediates after scale_d: scale_a, scale_b, then trans_a (A in shared memory), trans_b
    scale_a, scale_b, *transposed = (s.value for s in scales)
    trans_a, trans_b = (0, 0, *transposed)[-2:] if not in_registers else (0, *transposed, 0)[:2]
    if in_registers:
        a_reads = [m.read(r, "b32", hooked=False) for r in a.items]
        sources = a.items
    else:
        a_read, sources = m.read_array(a, "b64"), ()
    b_read = m.read_array(b, "b64")
    keep = m.read_array(scale_d, "pred")
    sums = accumulator_reader(m, destination, d_kind, hooked=False)
    write = accumulator_writer(m, destination, d_kind, hooked=False)

    def shared_matrix(active, descriptor, size, mn_major):
        raw = read_operand(m, code, active, descriptor, size, mn_major)
        # [w, size, 8 words, per] -> [w, size, k]
        return decode(raw.view(np.uint32)).reshape(-1, size, k)

    def step(active):
        unit.issue(destination.items, sources, active)
        if in_registers:
            fragments = gather_registers(a_reads, active, WARP)
            left = a_matrix(decode(fragments)).reshape(-1, 64, k)
        else:
            left = shared_matrix(active, a_read(active), 64, bool(trans_a))
        right = shared_matrix(active, b_read(active), n, bool(trans_b))
        product = left @ right.swapaxes(1, 2)
        fragment = to_c_fragment(product.reshape(-1, 16, n)).reshape(-1, n // 2)
        if scale_a * scale_b < 0:
            fragment = -fragment
        old = sums(active)
        write(active, fragment + np.where(keep(active)[:, None], old, np.float32(0)))

    return step


@instruction("wgmma.fence", together="warpgroup")
def fence(m, code, modifiers):
    return m.unit(TensorCores).fence


@instruction("wgmma.commit_group", together="warpgroup")
def commit(m, code, modifiers):
    unit = m.unit(TensorCores)

    def step(active):
        unit.committed[active] += 1

    return step


@instruction("wgmma.wait_group", together="warpgroup")
def wait(m, code, modifiers):
    unit, keep = m.unit(TensorCores), code.operands[0].value

    def step(active):
        unit.wait(active, keep)
        if m.watch:
            m.watch.async_reads_done(active, unit.committed[active] - keep)

    return step
