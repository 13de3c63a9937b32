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
        """Count ``active`` in; where that completes the barrier, let those go who wait.

        Returns bool per CTA: whose barrier is complete now.
        """
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
        if complete.any():
            self.arrived[complete, number] = 0
            key = ("bar", number)
            if m.watch:
                for _, waiting in m.parked.get(key, []):
                    m.watch.acquire(key, waiting[complete[m.cta[waiting]]])
            m.release(key, complete)
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


def _by_barrier(m, code):
    """``active -> [(barrier, expected threads, threads)]``: consumers may each name their own."""
    number = m.read_array(code.operands[0], "u32")
    count = m.read_array(code.operands[1], "u32") if len(code.operands) > 1 else None

    def split(active):
        numbers = number(active)
        counts = count(active) if count else np.full(len(numbers), m.block_size)
        if (numbers == numbers[0]).all() and (counts == counts[0]).all():
            return [(int(numbers[0]), int(counts[0]), m.threads(active))]
        pairs = np.unique(np.stack([numbers, counts], 1), axis=0).tolist()
        threads = m.threads(active)
        return [(n, c, threads[(numbers == n) & (counts == c)]) for n, c in pairs]

    return split


@instruction("bar.sync", "bar.cta.sync", "barrier.sync", "barrier.cta.sync",
             together="warp", schedules=True)  # fmt: skip
def barrier_sync(m, code, modifiers):
    barriers, after, split = m.unit(CtaBarriers), m.pc + 1, _by_barrier(m, code)

    def step(active):
        going = []
        for number, expected, threads in split(active):
            complete = barriers.arrive(number, threads, expected)[m.cta[threads]]
            if m.watch:
                m.watch.acquire(("bar", number), threads[complete])
            if not complete.all():
                m.park(("bar", number), threads[~complete], after)
            going.append(threads[complete])
        go = going[0] if len(going) == 1 else np.sort(np.concatenate(going))
        return after, active if len(go) == m.size(active) else go

    return step


@instruction("bar.arrive", "bar.cta.arrive", "barrier.arrive", "barrier.cta.arrive",
             together="warp", schedules=True)  # fmt: skip
def barrier_arrive(m, code, modifiers):
    barriers, after, split = m.unit(CtaBarriers), m.pc + 1, _by_barrier(m, code)

    def step(active):
        for number, expected, threads in split(active):
            barriers.arrive(number, threads, expected)
        return after, active

    return step


@instruction("bar.red", "bar.cta.red", "barrier.red", "barrier.cta.red",
             together="warp", schedules=True)  # fmt: skip
def barrier_reduce(m, code, modifiers):
    """All threads of the CTA at once: __syncthreads_and, _or, _count."""
    if len(code.operands) == 4:
        raise Unsupported("bar.red with a thread count")
    barriers, after = m.unit(CtaBarriers), m.pc + 1
    number = m.read_array(code.operands[1], "u32")
    value = m.read_array(code.operands[2], "pred")
    put = m.write(code.operands[0], types_of(modifiers)[-1])
    how = next(x for x in modifiers if x in ("popc", "and", "or"))

    def step(active):
        threads = m.threads(active)
        here = np.bincount(m.cta[threads], minlength=m.ctas)
        if ((here > 0) & (here != m.block_size)).any():
            raise Unsupported("bar.red that part of a CTA reaches alone")
        barriers.arrive(int(number(active)[0]), active, m.block_size)
        if m.watch:
            m.watch.acquire(("bar", int(number(active)[0])), threads)
        total = np.bincount(m.cta[threads], value(active), m.ctas).astype(np.int64)
        total = total[m.cta[threads]]
        put(active, {"popc": total, "and": total == m.block_size, "or": total > 0}[how])
        return after, active

    return step


@instruction("griddepcontrol.wait")
def wait_for_grids(m, code, modifiers):
    """The grids before this one have finished, for the threads that wait."""

    def step(active):
        if m.dependent is not None:
            m.dependent[active] = False

    return step


@instruction("bar.warp.sync", "barrier.warp.sync", together="members")
def warp_sync(m, code, modifiers):
    return lambda active: None


@instruction(
    "membar", "fence.acq_rel", "fence.sc", "fence.mbarrier_init", "nanosleep",
    "griddepcontrol.launch_dependents",
    "setmaxnreg", "prefetch", "prefetchu", "discard", "applypriority", "pmevent", "createpolicy",
    "fence.proxy.tensormap", "fence.proxy.alias",
)  # fmt: skip
def no_effect(m, code, modifiers):
    """Order, hints and resources: threads here see each other's writes at once.

    createpolicy makes a cache hint that nobody reads.
    """
    return lambda active: None
