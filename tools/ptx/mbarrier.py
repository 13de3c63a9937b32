"""mbarrier objects; PTX ISA 9.7.13.15.

A phase completes when all expected arrivals and all expected bytes have come. try_wait parks the
thread until the phase completes; when nobody can run and no copy is left, it gives up and returns
false once (its time limit), and a second round without progress is a deadlock.
"""

from collections.abc import Callable

import numpy as np

from .arithmetic import check_modifiers
from .copies import CopyQueue
from .errors import BarrierMisuse, Unsupported
from .isa import instruction
from .memory import SHARED_WINDOW
from .parser import SINK, Address

_SCOPES = (
    "shared", "shared::cta", "shared::cluster", "release", "acquire", "relaxed", "cta", "cluster",
    "b64", "noComplete",
)  # fmt: skip


class Barrier:
    """The mbarriers at one shared address, one per CTA."""

    def __init__(self, ctas: int):
        self.live = np.zeros(ctas, bool)
        # arrivals per phase, arrivals still missing, bytes still missing, phases completed
        self.count, self.missing, self.bytes, self.phase = np.zeros((4, ctas), np.int64)


class Mbarriers:
    def __init__(self, m):
        self.m = m
        self.barriers: dict[int, Barrier] = {}
        # threads whose try_wait must return false: its time limit has passed
        self.expired = np.zeros(m.count, bool)
        self.timeouts = 0
        m.time_limits.append(self.time_out)
        m.reporters.append(self.report)

    def at(self, address: int, ctas: np.ndarray) -> Barrier:
        barrier = self.barriers.get(address)
        if barrier is None or not barrier.live[ctas].all():
            raise BarrierMisuse(f"the mbarrier at {self.place(address)} was not initialised")
        return barrier

    def arrive(
        self, address: int, ctas: np.ndarray, arrivals: np.ndarray, size: np.ndarray
    ) -> None:
        """Per entry of ``ctas``: expect ``size`` more bytes (negative: they came), then arrive."""
        barrier = self.at(address, ctas)
        np.add.at(barrier.bytes, ctas, size)
        np.subtract.at(barrier.missing, ctas, arrivals)
        if (barrier.missing[ctas] < 0).any():
            raise BarrierMisuse(
                f"more than {barrier.count[ctas[0]]} arrivals in one phase of the mbarrier at "
                f"{self.place(address)}"
            )
        done = barrier.live & (barrier.missing == 0) & (barrier.bytes == 0)
        if done.any():
            barrier.phase[done] += 1
            barrier.missing[done] = barrier.count[done]
            self.timeouts = 0
            if self.m.watch:
                self.m.watch.complete_phase(address, done, barrier.phase)
            self.m.release(("mbarrier", address), done)

    def time_out(self) -> bool:
        """Let every parked try_wait return false, unless that has just been tried in vain."""
        keys = [key for key in self.m.parked if key[0] == "mbarrier"]
        self.timeouts += 1
        if not keys or self.timeouts > 2:
            return False
        everyone = np.ones(self.m.ctas, bool)
        for key in keys:
            for _, threads in self.m.parked[key]:
                self.expired[threads] = True
            self.m.release(key, everyone)
        return True

    def place(self, address: int) -> str:
        symbols = [s for s in self.m.kernel.shared if self.m.symbols[s.name] <= address]
        if not symbols:
            return f"{address:#x}"
        near = max(symbols, key=lambda s: self.m.symbols[s.name])
        return f"{address:#x} ({near.name} + {address - self.m.symbols[near.name]})"

    def report(self) -> list[str]:
        lines = []
        for address, b in self.barriers.items():
            waiting = self.m.waiting(("mbarrier", address))
            if not waiting:
                continue
            for cta in np.flatnonzero(b.live)[:2]:
                who = self.m.name_of(cta * self.m.block_size).partition(" thread")[0]
                lines.append(
                    f"mbarrier {self.place(address)} of {who}: phase {b.phase[cta]} lacks "
                    f"{b.missing[cta]} of {b.count[cta]} arrivals and {b.bytes[cta]} bytes; "
                    f"waiting: {waiting}"
                )
        return lines


def barrier_address(m, operand: Address) -> Callable:
    """Shared addresses, also when they come as generic ones."""
    address = m.address(operand)

    def read(active):
        value = address(active)
        return np.where(value >= SHARED_WINDOW, value - SHARED_WINDOW, value)

    return read


def _by_address(addresses: np.ndarray):
    """``(address, mask)`` for each distinct address."""
    first = addresses[0]
    if (addresses == first).all():
        yield int(first), slice(None)
        return
    for address in np.unique(addresses):
        yield int(address), addresses == address


@instruction("mbarrier.init", "mbarrier.inval")
def initialise(m, code, modifiers):
    check_modifiers(modifiers, *_SCOPES)
    unit, address = m.unit(Mbarriers), barrier_address(m, code.operands[0])
    count = m.read_array(code.operands[1], "u32") if len(code.operands) > 1 else None

    def step(active):
        threads, at = m.threads(active), address(active)
        m.shared.index(m.cta[threads], at, 8, threads)
        if m.watch:
            m.watch.generic(code, threads, at, 8, write=True)
            m.watch.confirm(same_value=False)
        for place, mask in _by_address(at):
            barrier = unit.barriers.setdefault(place, Barrier(m.ctas))
            ctas = m.cta[threads[mask]]
            barrier.live[ctas] = count is not None
            if count is not None:
                barrier.count[ctas] = barrier.missing[ctas] = count(active)[mask]
                barrier.bytes[ctas] = barrier.phase[ctas] = 0

    return step


def _arrival(m, code, arrivals: Callable, size: Callable, result=SINK):
    """A step that expects ``size`` bytes and then counts ``arrivals`` in."""
    unit, after = m.unit(Mbarriers), m.pc + 1
    operand = next(op for op in code.operands if isinstance(op, Address))
    address = barrier_address(m, operand)
    put_token = m.write(result, "b64")

    def step(active):
        threads, at = m.threads(active), address(active)
        count, expected = arrivals(active), size(active)
        if m.watch:
            m.watch.initialised(code, threads, at)
        token = np.empty(len(threads), np.uint64)
        for place, mask in _by_address(at):
            ctas = m.cta[threads[mask]]
            token[mask] = unit.at(place, ctas).phase[ctas]
            if m.watch and count[mask].any():
                m.watch.arrive(("mbarrier", place), threads[mask])
            unit.arrive(place, ctas, count[mask], expected[mask])
        put_token(active, token)
        return after, active

    return step


def _constant(m, value: int) -> Callable:
    return lambda active: np.full(m.size(active), value, np.int64)


def _signed(read: Callable, sign: int = 1) -> Callable:
    return lambda active: sign * read(active).astype(np.int64)


@instruction("mbarrier.arrive", schedules=True)
def arrive(m, code, modifiers):
    check_modifiers(modifiers, *_SCOPES)
    result = SINK if isinstance(code.operands[0], Address) else code.operands[0]
    last = code.operands[-1]
    one = isinstance(last, Address)
    arrivals = _constant(m, 1) if one else _signed(m.read_array(last, "u32"))
    return _arrival(m, code, arrivals, _constant(m, 0), result)


@instruction("mbarrier.arrive.expect_tx", schedules=True)
def arrive_expect(m, code, modifiers):
    check_modifiers(modifiers, *_SCOPES)
    result = SINK if isinstance(code.operands[0], Address) else code.operands[0]
    size = _signed(m.read_array(code.operands[-1], "u32"))
    return _arrival(m, code, _constant(m, 1), size, result)


@instruction("mbarrier.expect_tx", "mbarrier.complete_tx", schedules=True)
def change_bytes(m, code, modifiers):
    check_modifiers(modifiers, *_SCOPES)
    sign = -1 if "complete_tx" in code.opcode else 1
    size = _signed(m.read_array(code.operands[-1], "u32"), sign)
    return _arrival(m, code, _constant(m, 0), size)


@instruction("cp.async.mbarrier.arrive", schedules=True)
def arrive_after_copies(m, code, modifiers):
    """The arrival that this thread's cp.async copies make when they land.

    They land here: the copies may be this early, and the barrier's waiters are checked for the
    arrival. Without .noinc the barrier expects one arrival more, so the count stays.
    """
    queue = m.unit(CopyQueue)
    plain = _arrival(m, code, _constant(m, 1 if "noinc" in modifiers else 0), _constant(m, 0))

    def step(active):
        queue.complete(active, None)
        return plain(active)

    return step


@instruction("mbarrier.try_wait", "mbarrier.test_wait", schedules=True)
def wait(m, code, modifiers):
    """With .parity the operand is the phase's parity, else the token of an arrival."""
    check_modifiers(modifiers, *_SCOPES, "parity")
    unit, here = m.unit(Mbarriers), m.pc
    put = m.write(code.operands[0], "pred")
    address = barrier_address(m, code.operands[1])
    wanted = m.read_array(code.operands[2], "u32" if "parity" in modifiers else "u64")

    def step(active):
        threads, at = m.threads(active), address(active)
        value = wanted(active).astype(np.int64)
        done = np.empty(len(threads), bool)
        if m.watch:
            m.watch.initialised(code, threads, at)
        for place, mask in _by_address(at):
            ctas = m.cta[threads[mask]]
            phase = unit.at(place, ctas).phase[ctas]
            if "parity" in modifiers:
                done[mask] = (phase & 1) != (value[mask] & 1)
            else:
                done[mask] = phase > value[mask]
            if m.watch and done[mask].any():
                m.watch.acquire(("mbarrier", place), threads[mask][done[mask]])
        go = done | unit.expired[threads]
        unit.expired[threads] = False
        if go.all():
            put(active, done)
            return here + 1, active
        for place, mask in _by_address(at):
            m.park(("mbarrier", place), threads[mask][~go[mask]], here)
        put(threads[go], done[go])
        return here + 1, threads[go]

    return step


@instruction("mbarrier.arrive_drop", "mbarrier.pending_count")
def unsupported(m, code, modifiers):
    raise Unsupported(code.opcode)
