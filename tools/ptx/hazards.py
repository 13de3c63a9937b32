"""Shared memory hazards, by happens-before: vector clocks per warp, as FastTrack keeps them.

Two accesses to the same bytes, one of them a write, must be ordered by a barrier. The agents are
the warps of a CTA and its mbarriers: a TMA load's bytes are written by the mbarrier that counts
them, in the phase that completes. Barriers join clocks. A second set of clocks says what a warp
knows to be visible to the async proxy, and grows at fence.proxy.async (PTX ISA 8, "Proxies").

Inside a warp the lanes are taken to be in step: a missing bar.warp.sync is not found.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .errors import Hazard
from .formats import FORMATS
from .special import WARP

_NOBODY = -1
# state of shared bytes
_UNWRITTEN, _VALID, _IN_FLIGHT = 0, 1, 2
_NO_BARRIER = " by another warp, without a barrier in between"
# mbarriers of a CTA that get a clock
_MBARRIERS = 64


def granule_of(kernel) -> int:
    """Bytes that are tracked together: the narrowest shared access of the kernel."""
    smallest = 16
    for code in kernel.instructions:
        parts = code.opcode.split(".")
        if parts[0] in ("ld", "st", "atom", "red") and not {"global", "param"} & set(parts):
            count = next((int(p[1]) for p in parts if p in ("v2", "v4")), 1)
            kind = FORMATS[[p for p in parts if p in FORMATS][-1]]
            smallest = min(smallest, kind.item_bytes * (1 if "x2" in kind.name else count))
        elif code.opcode.startswith(("cp.async.ca", "mbarrier")):
            smallest = min(smallest, 4 if code.opcode.startswith("cp") else 8)
    return smallest


class Access(NamedTuple):
    """What some threads touch. Arrays broadcast to ``[threads, granules]``."""

    code: object
    threads: np.ndarray
    cta: np.ndarray
    warp: np.ndarray
    cells: np.ndarray

    def of_warp(self, warp: np.ndarray) -> "Access":
        return self._replace(warp=warp)


@dataclass
class AsyncRead:
    """Shared reads of a wgmma in flight: warpgroups ``leader``, in commit groups ``group``."""

    access: Access
    leader: np.ndarray
    group: np.ndarray

    def select(self, mask: np.ndarray) -> "AsyncRead":
        a = self.access
        rows = Access(a.code, a.threads[mask], a.cta[mask], a.warp[mask], a.cells[mask])
        return AsyncRead(rows, self.leader[mask], self.group[mask])


class HazardMonitor:
    def __init__(self, m, allow_uninitialized: bool, proxy_fences: bool):
        self.m = m
        self.allow_uninitialized, self.proxy_fences = allow_uninitialized, proxy_fences
        self.granule = granule_of(m.kernel)
        self.warps = m.block_size // WARP
        ctas, cells = m.ctas, m.shared.pitch // self.granule
        agents = self.warps + _MBARRIERS
        # what warp w of a CTA knows of agent a: [CTA, warp, agent]
        self.clock = np.zeros((ctas, self.warps, agents), np.int32)
        self.clock[:, np.arange(self.warps), np.arange(self.warps)] = 1
        self.fenced = np.zeros_like(self.clock)
        # barrier key -> [2, CTA, agent]: joined clock and fenced of those that arrived
        self.arrived: dict[tuple, np.ndarray] = {}
        self.completed: dict[tuple, np.ndarray] = {}
        self.mbarrier_agent: dict[int, int] = {}
        # per granule: who wrote last, when, where, through which proxy; [CTA, cell]
        self.writer = np.full((ctas, cells), _NOBODY, np.int16)
        self.write_clock = np.zeros((ctas, cells), np.int32)
        self.write_line = np.zeros((ctas, cells), np.int32)
        self.write_generic = np.zeros((ctas, cells), bool)
        self.write_atomic = np.zeros((ctas, cells), bool)
        self.state = np.full((ctas, cells), _UNWRITTEN, np.uint8)
        # last read of every warp, [CTA, cell, warp]
        self.read_clock = np.zeros((ctas, cells, self.warps), np.int32)
        self.read_line = np.zeros((ctas, cells), np.int32)
        # reads by wgmma and bulk stores that nobody has waited for
        self.reads_in_flight = np.zeros((ctas, cells), np.int16)
        self.flight_line = np.zeros((ctas, cells), np.int32)
        self.async_reads: list[AsyncRead] = []
        # where the last write met another warp's write of the same instruction
        self.clash: tuple | None = None

    @staticmethod
    def bytes_per_cta(kernel, shared_bytes: int, warps: int) -> int:
        return (shared_bytes + 128) // granule_of(kernel) * (18 + 4 * warps)

    # ---- ordinary accesses -------------------------------------------------------------------

    def _access(self, code, threads, address: np.ndarray, size: int) -> Access:
        """``size`` bytes per thread at ``address``."""
        first = (address - self.m.shared.base) // self.granule
        cells = first[:, None] + np.arange(max(size // self.granule, 1))
        return Access(code, threads, self.m.cta[threads][:, None], self._warp(threads), cells)

    def _warp(self, threads: np.ndarray) -> np.ndarray:
        return (threads % self.m.block_size // WARP)[:, None]

    def generic(self, code, threads, address, size: int, write: bool, atomic: bool = False) -> None:
        a = self._access(code, threads, address, size)
        self._check_seen(a, write, atomic)
        if write:
            self._check_readers(a)
            self._record_write(a, generic=True)
            clash = self.writer[a.cta, a.cells] != a.warp
            self.clash = (a, clash) if clash.any() and not atomic else None
            self.state[a.cta, a.cells] = _VALID
            self.write_atomic[a.cta, a.cells] = atomic
        else:
            self._record_read(a)

    def confirm(self, same_value: bool) -> None:
        """After a write: warps that wrote the same bytes at once must have written one value.

        Triton's replicated layouts store a value once per warp that holds it.
        """
        clash, self.clash = self.clash, None
        if clash and not same_value:
            self._complain(*clash, "writes {place}, and so does another warp at the same time")

    def initialised(self, code, threads, address) -> None:
        """mbarrier operations order themselves, but init must have happened before."""
        self._check_seen(self._access(code, threads, address, 8), write=False)

    def _check_seen(self, a: Access, write: bool, atomic: bool = False) -> None:
        """The last write must have happened before, and have arrived."""
        verb = "overwrites" if write else "reads"
        state = self.state[a.cta, a.cells]
        flying = state == _IN_FLIGHT
        if flying.any():
            self._complain(
                a, flying, verb + " {place} while the copy of line {writer} is in flight"
            )
        unwritten = state == _UNWRITTEN
        if not write and not self.allow_uninitialized and unwritten.any():
            self._complain(a, unwritten, "reads {place}, which nobody wrote")
        writer = self.writer[a.cta, a.cells]
        known = self.clock[a.cta, a.warp, writer]
        unseen = (writer != _NOBODY) & (self.write_clock[a.cta, a.cells] > known)
        if atomic:
            unseen &= ~self.write_atomic[a.cta, a.cells]
        if unseen.any():
            self._complain(a, unseen, verb + " {place}, written at line {writer}" + _NO_BARRIER)

    def _check_readers(self, a: Access) -> None:
        """All earlier reads must have happened before this write."""
        read = self.read_clock[a.cta, a.cells]
        unseen = (read > self.clock[a.cta, a.warp, : self.warps]).any(-1)
        if unseen.any():
            self._complain(a, unseen, "overwrites {place}, read at line {reader}" + _NO_BARRIER)
        flying = self.reads_in_flight[a.cta, a.cells] > 0
        if flying.any():
            what = "which the wgmma or bulk store of line {flight} may still read"
            self._complain(a, flying, "overwrites {place}, " + what)

    def _record_write(self, a: Access, generic: bool) -> None:
        self.writer[a.cta, a.cells] = a.warp
        self.write_clock[a.cta, a.cells] = self.clock[a.cta, a.warp, a.warp]
        self.write_line[a.cta, a.cells] = a.code.line
        self.write_generic[a.cta, a.cells] = generic

    def _record_read(self, a: Access) -> None:
        self.read_clock[a.cta, a.cells, a.warp] = self.clock[a.cta, a.warp, a.warp]
        self.read_line[a.cta, a.cells] = a.code.line

    def _complain(self, a: Access, bad: np.ndarray, message: str) -> None:
        row, column = np.argwhere(bad)[0]
        where = int(a.cta[row, 0]), int(a.cells[row, column])
        start = self.m.shared.base + where[1] * self.granule
        text = message.format(
            place=f"shared {start:#x}..{start + self.granule - 1:#x}",
            writer=self.write_line[where],
            reader=self.read_line[where],
            flight=self.flight_line[where],
        )
        raise Hazard(f"line {a.code.line}: {text}", int(a.threads[row]))

    # ---- barriers ----------------------------------------------------------------------------

    def _join_of(self, key: tuple) -> np.ndarray:
        if key not in self.arrived:
            self.arrived[key] = np.zeros((2, self.m.ctas, self.clock.shape[2]), np.int32)
        return self.arrived[key]

    def arrive(self, key: tuple, active) -> None:
        """Whoever waits for ``key`` will know what the ``active`` warps know now."""
        joined = self._join_of(key)
        for cta, warp in self._warps(active):
            np.maximum.at(joined[0], cta, self.clock[cta, warp])
            np.maximum.at(joined[1], cta, self.fenced[cta, warp])
            # what a warp does from here on is not covered by this arrival
            self.clock[cta, warp, warp] += 1

    def acquire(self, key: tuple, threads: np.ndarray) -> None:
        joined = self.completed.get(key) if key[0] == "mbarrier" else self.arrived.get(key)
        if joined is None:
            return
        for cta, warp in self._warps(threads):
            self.clock[cta, warp] = np.maximum(self.clock[cta, warp], joined[0, cta])
            self.fenced[cta, warp] = np.maximum(self.fenced[cta, warp], joined[1, cta])

    def complete_phase(self, address: int, done: np.ndarray, phase: np.ndarray) -> None:
        """The mbarrier's phase is over in the CTAs ``done``; ``phase`` is the next one's number."""
        key, joined = ("mbarrier", address), self._join_of(("mbarrier", address))
        joined[:, done, self._agent(address)] = phase[done]
        completed = self.completed.setdefault(key, np.zeros_like(joined))
        completed[:, done] = joined[:, done]

    def _warps(self, active):
        """``(CTA, warp)`` of the active warps; once, for all of them."""
        warps = np.unique(self.m.warp[active])
        yield warps // self.warps, warps % self.warps

    def _agent(self, address: int) -> int:
        number = self.mbarrier_agent.setdefault(address, len(self.mbarrier_agent))
        if number >= _MBARRIERS:
            raise Hazard(f"more than {_MBARRIERS} mbarriers: raise _MBARRIERS")
        return self.warps + number

    def fence_proxy(self, active) -> None:
        for cta, warp in self._warps(active):
            self.fenced[cta, warp] = np.maximum(self.fenced[cta, warp], self.clock[cta, warp])
            self.clock[cta, warp, warp] += 1

    # ---- cp.async ----------------------------------------------------------------------------

    def in_flight(self, code, threads, address, size: int) -> None:
        a = self._access(code, threads, address, size)
        self._check_seen(a, write=True)
        self._check_readers(a)
        self._record_write(a, generic=True)
        self.state[a.cta, a.cells] = _IN_FLIGHT

    def landed(self, code, threads, address, size: int) -> None:
        """The issuing thread has waited: the bytes count as written now."""
        a = self._access(code, threads, address, size)
        self._record_write(a, generic=True)
        self.state[a.cta, a.cells] = _VALID

    # ---- the async proxy: wgmma and TMA ------------------------------------------------------

    def _check_proxy(self, a: Access, verb: str) -> None:
        """Ordinary writes must have been shown to the async proxy."""
        writer = self.writer[a.cta, a.cells]
        hidden = self.write_clock[a.cta, a.cells] > self.fenced[a.cta, a.warp, writer]
        hidden &= self.write_generic[a.cta, a.cells]
        if self.proxy_fences and hidden.any():
            what = "written at line {writer}, through the async proxy without fence.proxy.async"
            self._complain(a, hidden, verb + " {place}, " + what)

    def async_read(self, code, leader, address: np.ndarray, size: int, group) -> None:
        """wgmma: ``address [warpgroups, n]``; every warp must have seen the data."""
        a = self._access(code, leader, address.reshape(-1), size)
        a = a._replace(cells=a.cells.reshape(len(leader), -1), cta=self.m.cta[leader][:, None])
        for i in range(4):
            self._check_seen(a.of_warp(a.warp + i), write=False)
            self._check_proxy(a.of_warp(a.warp + i), "reads")
        np.add.at(self.reads_in_flight, (a.cta, a.cells), 1)
        self.flight_line[a.cta, a.cells] = code.line
        self.async_reads.append(AsyncRead(a, leader, group))

    def async_reads_done(self, active, limit: np.ndarray) -> None:
        """The warps waited for their commit groups below ``limit [active]``."""
        limits = np.full(self.m.count, -1)
        limits[active] = limit
        left = []
        for read in self.async_reads:
            done = read.group < limits[read.leader]
            if done.any():
                a = read.select(done).access
                np.subtract.at(self.reads_in_flight, (a.cta, a.cells), 1)
                for i in range(4):
                    self._record_read(a.of_warp(a.warp + i))
            if not done.all():
                left.append(read.select(~done))
        self.async_reads = left

    def _bulk(self, code, thread: int, place: np.ndarray) -> Access:
        """One thread's bulk copy of the bytes at ``place``, once per granule."""
        cells = np.unique((place - self.m.shared.base) // self.granule)[None]
        threads = np.array([thread])
        return Access(code, threads, self.m.cta[threads][:, None], self._warp(threads), cells)

    def bulk_issue(self, code, thread: int, target: np.ndarray) -> None:
        """A TMA load may write from now on."""
        a = self._bulk(code, thread, target)
        self._check_seen(a, write=True)
        self._check_readers(a)
        self._check_proxy(a, "overwrites")
        self._record_write(a, generic=False)
        self.state[a.cta, a.cells] = _IN_FLIGHT

    def bulk_landed(self, code, cta: int, target: np.ndarray, barrier: int, phase: int) -> None:
        """The mbarrier's phase ``phase`` counts these bytes: its waiters will have seen them."""
        cells = np.unique((target - self.m.shared.base) // self.granule)
        self.writer[cta, cells] = self._agent(barrier)
        self.write_clock[cta, cells] = phase + 1
        self.write_line[cta, cells] = code.line
        self.write_generic[cta, cells] = False
        self.state[cta, cells] = _VALID

    def bulk_read(self, code, thread: int, source: np.ndarray) -> None:
        """A bulk store reads from now on, until its thread waits."""
        a = self._bulk(code, thread, source)
        self._check_seen(a, write=False)
        self._check_proxy(a, "reads")
        self.reads_in_flight[a.cta, a.cells] += 1
        self.flight_line[a.cta, a.cells] = code.line

    def bulk_read_done(self, code, thread: int, source: np.ndarray) -> None:
        a = self._bulk(code, thread, source)
        self.reads_in_flight[a.cta, a.cells] -= 1
        self._record_read(a)
