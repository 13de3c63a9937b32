"""Branches, exits and CTA barriers; PTX ISA 9.7.12 and 9.7.13.

A barrier counts threads per CTA and id. Threads that arrive early are parked; the arrival that
completes the count lets them go. The barrier is named (bar.sync 3, 128) or the CTA's own.
"""

import numpy as np

from .arithmetic import types_of
from .errors import BarrierMisuse, Unsupported
from .isa import instruction


def _target(code, name: str) -> int:
    pc = code.scope.label(name)
    if pc is None:
        raise Unsupported(f"unknown label {name}")
    return pc


@instruction("bra", schedules=True)
def branch(m, code, modifiers):
    target = _target(code, code.operands[0].name)
    return lambda active: (target, active)


@instruction("brx.idx", schedules=True)
def branch_indexed(m, code, modifiers):
    index = m.read_array(code.operands[0], "u32")
    targets = np.array([_target(code, name) for name in code.scope.table(code.operands[1].name)])

    def step(active):
        pcs, threads = targets[index(active)], m.threads(active)
        first, *others = np.unique(pcs)
        for pc in others:
            m.join(int(pc), threads[pcs == pc])
        return int(first), threads[pcs == first]

    return step


@instruction("ret", "exit", schedules=True)
def leave(m, code, modifiers):
    after = m.pc + 1
    return lambda active: (after, None)


@instruction("trap", schedules=True)
def trap(m, code, modifiers):
    def step(active):
        raise BarrierMisuse("the kernel trapped", int(m.threads(active)[0]))

    return step


class CtaBarriers:
    """The 16 barriers of every CTA."""

    COUNT = 16

    def __init__(self, m):
        self.m = m
        # [CTA, barrier]
        self.arrived = np.zeros((m.ctas, self.COUNT), np.int64)
        self.expected = np.zeros((m.ctas, self.COUNT), np.int64)
        m.reporters.append(self.report)

    def arrive(self, number: int, active, expected: int) -> np.ndarray:
        """Count ``active`` in. Returns bool per CTA: whose barrier is complete now."""
        m = self.m
        here = np.bincount(m.cta[active], minlength=m.ctas)
        busy = (self.arrived[:, number] > 0) & (here > 0)
        if (busy & (self.expected[:, number] != expected)).any():
            raise BarrierMisuse(
                f"barrier {number} is used with {expected} threads, earlier arrivals said "
                f"{self.expected[busy, number][0]}"
            )
        self.expected[here > 0, number] = expected
        self.arrived[:, number] += here
        if (self.arrived[here > 0, number] > expected).any():
            raise BarrierMisuse(f"barrier {number}: more than {expected} threads arrived")
        if m.watch:
            m.watch.arrive(("bar", number), active)
        complete = (self.arrived[:, number] == expected) & (here > 0)
        self.arrived[complete, number] = 0
        return complete

    def report(self) -> list[str]:
        m, lines = self.m, []
        for number in range(self.COUNT):
            for cta in np.flatnonzero(self.arrived[:, number])[:4]:
                lines.append(
                    f"barrier {number}: {self.arrived[cta, number]} of "
                    f"{self.expected[cta, number]} threads arrived in "
                    f"{m.name_of(cta * m.block_size).partition(' thread')[0]}; waiting: "
                    f"{m.waiting(('bar', number))}"
                )
        return lines


def _number_and_count(m, code, first: int):
    """The barrier's id and thread count; both must be the same for all threads that come."""
    number = m.read_array(code.operands[first], "u32")
    count = None
    if len(code.operands) > first + 1:
        count = m.read_array(code.operands[first + 1], "u32")

    def resolve(active) -> tuple[int, int]:
        values = [number(active)] + ([count(active)] if count else [])
        if any((v != v[0]).any() for v in values):
            raise Unsupported("a barrier id or count that differs between threads")
        return int(values[0][0]), int(values[1][0]) if count else m.block_size

    return resolve


def _wait(m, barriers, resolve, active, after):
    number, expected = resolve(active)
    key = ("bar", number)
    complete = barriers.arrive(number, active, expected)
    threads = m.threads(active)
    go = complete[m.cta[threads]]
    if m.watch:
        waiting = [t for _, t in m.parked.get(key, [])]
        everybody = np.concatenate([threads, *waiting])
        m.watch.acquire(key, everybody[complete[m.cta[everybody]]])
    if complete.any():
        m.release(key, complete)
    if not go.all():
        m.park(key, threads[~go], after)
    return after, active if go.all() else threads[go]


@instruction("bar.sync", "bar.cta.sync", "barrier.sync", "barrier.cta.sync",
             together="warp", schedules=True)  # fmt: skip
def barrier_sync(m, code, modifiers):
    barriers, after = m.unit(CtaBarriers), m.pc + 1
    resolve = _number_and_count(m, code, 0)
    return lambda active: _wait(m, barriers, resolve, active, after)


@instruction("bar.arrive", "bar.cta.arrive", "barrier.arrive", "barrier.cta.arrive",
             together="warp", schedules=True)  # fmt: skip
def barrier_arrive(m, code, modifiers):
    barriers, after = m.unit(CtaBarriers), m.pc + 1
    resolve = _number_and_count(m, code, 0)

    def step(active):
        number, expected = resolve(active)
        complete = barriers.arrive(number, active, expected)
        if complete.any():
            key = ("bar", number)
            if m.watch:
                waiting = [t for _, t in m.parked.get(key, [])] or [m.all_threads[:0]]
                everybody = np.concatenate(waiting)
                m.watch.acquire(key, everybody[complete[m.cta[everybody]]])
            m.release(key, complete)
        return after, active

    return step


@instruction("bar.red", "bar.cta.red", "barrier.red", "barrier.cta.red",
             together="warp", schedules=True)  # fmt: skip
def barrier_reduce(m, code, modifiers):
    """All threads of the CTA at once: __syncthreads_and, _or, _count."""
    barriers, after = m.unit(CtaBarriers), m.pc + 1
    resolve = _number_and_count(m, code, 1) if len(code.operands) == 4 else None
    first = m.read_array(code.operands[1], "u32")
    value = m.read_array(code.operands[-1], "pred")
    put = m.write(code.operands[0], types_of(modifiers)[-1])
    how = next(x for x in modifiers if x in ("popc", "and", "or"))

    def step(active):
        threads = m.threads(active)
        here = np.bincount(m.cta[threads], minlength=m.ctas)
        if ((here > 0) & (here != m.block_size)).any() or resolve:
            raise Unsupported("bar.red that part of a CTA reaches alone")
        complete = barriers.arrive(int(first(active)[0]), active, m.block_size)
        if m.watch:
            m.watch.acquire(("bar", int(first(active)[0])), threads)
        total = np.bincount(m.cta[threads], value(active), m.ctas).astype(np.int64)
        total = total[m.cta[threads]]
        put(active, {"popc": total, "and": total == m.block_size, "or": total > 0}[how])
        return after, active if complete.any() else None

    return step


@instruction("bar.warp.sync", "barrier.warp.sync", together="members")
def warp_sync(m, code, modifiers):
    return lambda active: None


@instruction(
    "membar", "fence.acq_rel", "fence.sc", "fence.mbarrier_init", "griddepcontrol", "nanosleep",
    "setmaxnreg", "prefetch", "prefetchu", "discard", "applypriority", "pmevent", "createpolicy",
    "fence.proxy.tensormap", "fence.proxy.alias",
)  # fmt: skip
def no_effect(m, code, modifiers):
    """Order, hints and resources: threads here see each other's writes at once.

    createpolicy makes a cache hint that nobody reads.
    """
    return lambda active: None
