"""cp.async: 4, 8 or 16 bytes from global to shared memory; PTX ISA 9.7.9.25.

The destination is poison from the copy's issue until the issuing thread has waited for it, the
latest moment at which the hardware may deliver.
"""

from dataclasses import dataclass

import numpy as np

from .errors import Unsupported
from .formats import WORD
from .isa import instruction
from .memory import POISON, check_alignment


@dataclass
class Copy:
    threads: np.ndarray
    # the commit group the copy belongs to, per thread
    group: np.ndarray
    index: np.ndarray
    # [threads, 1], in words of the copy's size
    data: np.ndarray
    address: np.ndarray
    code: object

    def select(self, mask: np.ndarray) -> "Copy":
        return Copy(
            self.threads[mask], self.group[mask], self.index[mask], self.data[mask],
            self.address[mask], self.code,
        )  # fmt: skip


class CopyQueue:
    """Copies in flight, and per thread how many groups it has committed."""

    def __init__(self, m):
        self.m = m
        self.committed = np.zeros(m.count, np.int64)
        self.copies: list[Copy] = []

    def complete(self, active, keep: int | None) -> None:
        """Deliver what the ``active`` threads wait for: all but their ``keep`` newest groups.

        ``keep`` None delivers what is not committed, too.
        """
        m = self.m
        limit = np.full(m.count, -1)
        if keep is None:
            limit[active] = np.iinfo(np.int64).max
        else:
            limit[active] = self.committed[active] - keep
        left = []
        for copy in self.copies:
            done = copy.group < limit[copy.threads]
            if done.all():
                self._deliver(copy)
            elif not done.any():
                left.append(copy)
            else:
                self._deliver(copy.select(done))
                left.append(copy.select(~done))
        self.copies = left

    def _deliver(self, copy: Copy) -> None:
        size = copy.data.dtype.itemsize
        self.m.shared.words(size)[copy.index] = copy.data
        if self.m.watch:
            self.m.watch.landed(copy.code, copy.threads, copy.address, size)


@instruction("cp.async.ca", "cp.async.cg")
def copy_async(m, code, modifiers):
    queue = m.unit(CopyQueue)
    destination, source = (m.address(op) for op in code.operands[:2])
    size = code.operands[2].value
    rest = code.operands[3:]
    if "L2::cache_hint" in modifiers:
        rest = rest[:-1]
    # [threads] bytes to read, the others become zero
    source_size = None
    if rest and getattr(rest[0], "type", "") == "pred":
        ignore = m.read_array(rest[0], "pred")
        source_size = lambda active: np.where(ignore(active), 0, size)  # noqa: E731
    elif rest:
        source_size = m.read_array(rest[0], "u32")
    if size not in (4, 8, 16) or ("cg" in code.opcode.split(".") and size != 16):
        raise Unsupported(f"cp.async of {size} bytes")

    def step(active):
        threads = m.threads(active)
        to, origin = destination(active), source(active)
        index = m.shared.index(m.cta[threads], to, size, threads)
        amount = source_size(active).astype(np.int64) if source_size else None
        reading = slice(None) if amount is None else amount > 0
        check_alignment(origin[reading], size, threads[reading])
        # a short copy may end where the tensor ends
        short = np.unique(amount[reading]) if amount is not None else [size]
        for n in short:
            which = reading if amount is None else amount == n
            m.check_global(origin[which], int(n), threads[which], write=False)
        data = np.zeros(len(threads), WORD[size])
        data[reading] = m.memory.words(size)[(origin[reading] - m.memory.BASE) // size]
        if amount is not None and (amount[reading] < size).any():
            raw = data.view(np.uint8).reshape(-1, size)
            raw[np.arange(size) >= amount[:, None]] = 0
        m.shared.words(1).reshape(-1, size)[index] = POISON
        if m.watch:
            m.watch.in_flight(code, threads, to, size)
        queue.copies.append(Copy(threads, queue.committed[threads], index, data, to, code))

    return step


@instruction("cp.async.commit_group")
def commit(m, code, modifiers):
    queue = m.unit(CopyQueue)

    def step(active):
        queue.committed[active] += 1

    return step


@instruction("cp.async.wait_group")
def wait_group(m, code, modifiers):
    queue, keep = m.unit(CopyQueue), code.operands[0].value
    return lambda active: queue.complete(active, keep)


@instruction("cp.async.wait_all")
def wait_all(m, code, modifiers):
    queue = m.unit(CopyQueue)
    return lambda active: queue.complete(active, None)
