"""Shared memory hazards, by happens-before: vector clocks per warp, as FastTrack keeps them.

Two accesses to the same bytes, one of them a write, must be ordered by a barrier. The agents are
the warps of a CTA and its mbarriers: a TMA load's bytes are written by the mbarrier that counts
them, in the phase that completes. Barriers join clocks. A second set of clocks says what a warp
knows to be visible to the async proxy, and grows at fence.proxy.async (PTX ISA 8, "Proxies").

Inside a warp the lanes are taken to be in step: a missing bar.warp.sync is not found.
"""

from dataclasses import dataclass

import numpy as np

from .errors import Hazard
from .formats import FORMATS
from .special import WARP

_NOBODY = -1
# state of shared bytes
_UNWRITTEN, _VALID, _IN_FLIGHT = 0, 1, 2
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


@dataclass
class AsyncRead:
    """Shared reads of a wgmma in flight: warpgroups ``leader``, in commit groups ``group``."""

    code: object
    leader: np.ndarray
    group: np.ndarray
    # [warpgroups, granules]
    granules: np.ndarray


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
        # the last write met another warp's write of the same instruction: _complain's arguments
        self.clash: tuple | None = None

    @staticmethod
    def bytes_per_cta(kernel, shared_bytes: int, warps: int) -> int:
        return (shared_bytes + 128) // granule_of(kernel) * (18 + 4 * warps)

    # ---- ordinary accesses -------------------------------------------------------------------

    def _cells(self, address: np.ndarray, size: int) -> np.ndarray:
        """``[accesses, granules]`` of ``size`` bytes at ``address``."""
        first = (address - self.m.shared.base) // self.granule
        return first[:, None] + np.arange(max(size // self.granule, 1))

    def _warp(self, threads: np.ndarray) -> np.ndarray:
        return threads % self.m.block_size // WARP

    def generic(self, code, threads, address, size: int, write: bool, atomic: bool = False) -> None:
        cells = self._cells(address, size)
        cta, warp = self.m.cta[threads][:, None], self._warp(threads)[:, None]
        self._check_seen(code, threads, cta, warp, cells, write, atomic)
        if write:
            self._check_readers(code, threads, cta, warp, cells)
            self._record_write(code, cta, warp, cells, generic=True)
            clash = self.writer[cta, cells] != warp
            self.clash = (code, threads, cells, clash, cta) if clash.any() and not atomic else None
            self.state[cta, cells] = _VALID
            self.write_atomic[cta, cells] = atomic
        else:
            self.read_clock[cta, cells, warp] = self.clock[cta, warp, warp]
            self.read_line[cta, cells] = code.line

    def confirm(self, same_value: bool) -> None:
        """After a write: warps that wrote the same bytes at once must have written one value.

        Triton's replicated layouts store a value once per warp that holds it.
        """
        clash, self.clash = self.clash, None
        if clash and not same_value:
            self._complain(*clash, "writes {place}, and so does another warp at the same time")

    def initialised(self, code, threads, address) -> None:
        """mbarrier operations order themselves, but init must have happened before."""
        cells = self._cells(address, 8)
        cta, warp = self.m.cta[threads][:, None], self._warp(threads)[:, None]
        self._check_seen(code, threads, cta, warp, cells, write=False)

    def _check_seen(self, code, threads, cta, warp, cells, write, atomic=False) -> None:
        """The last write must have happened before, and have arrived."""
        state = self.state[cta, cells]
        if (state == _IN_FLIGHT).any():
            self._complain(
                code,
                threads,
                cells,
                state == _IN_FLIGHT,
                cta,
                "{verb} {place} while the copy of line {writer} is in flight",
                write,
            )
        if not write and not self.allow_uninitialized and (state == _UNWRITTEN).any():
            self._complain(
                code, threads, cells, state == _UNWRITTEN, cta, "reads {place}, which nobody wrote"
            )
        writer = self.writer[cta, cells]
        unseen = (writer != _NOBODY) & (
            self.write_clock[cta, cells] > self.clock[cta, warp, writer]
        )
        if atomic:
            unseen &= ~self.write_atomic[cta, cells]
        if unseen.any():
            self._complain(
                code,
                threads,
                cells,
                unseen,
                cta,
                "{verb} {place}, written at line {writer} by another warp, without a "
                "barrier in between",
                write,
            )

    def _check_readers(self, code, threads, cta, warp, cells) -> None:
        """All earlier reads must have happened before this write."""
        read = self.read_clock[cta, cells]
        unseen = (read > self.clock[cta, warp, : self.warps]).any(-1)
        if unseen.any():
            self._complain(
                code,
                threads,
                cells,
                unseen,
                cta,
                "overwrites {place}, read at line {reader} by another warp, without a "
                "barrier in between",
            )
        flying = self.reads_in_flight[cta, cells] > 0
        if flying.any():
            self._complain(
                code,
                threads,
                cells,
                flying,
                cta,
                "overwrites {place}, which the wgmma or bulk store of line {flight} may still read",
            )

    def _record_write(self, code, cta, warp, cells, generic: bool) -> None:
        self.writer[cta, cells] = warp
        self.write_clock[cta, cells] = self.clock[cta, warp, warp]
        self.write_line[cta, cells] = code.line
        self.write_generic[cta, cells] = generic

    def _complain(self, code, threads, cells, bad, cta, message, write=False) -> None:
        row, column = np.argwhere(bad)[0]
        cell = int(np.broadcast_to(cells, bad.shape)[row, column])
        where = int(np.broadcast_to(cta, bad.shape)[row, column]), cell
        start = self.m.shared.base + cell * self.granule
        text = message.format(
            place=f"shared {start:#x}..{start + self.granule - 1:#x}",
            verb="overwrites" if write else "reads",
            writer=self.write_line[where],
            reader=self.read_line[where],
            flight=self.flight_line[where],
        )
        raise Hazard(f"line {code.line}: {text}", int(threads[row]))

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
        cells = self._cells(address, size)
        cta, warp = self.m.cta[threads][:, None], self._warp(threads)[:, None]
        self._check_seen(code, threads, cta, warp, cells, write=True)
        self._check_readers(code, threads, cta, warp, cells)
        self._record_write(code, cta, warp, cells, generic=True)
        self.state[cta, cells] = _IN_FLIGHT

    def landed(self, code, threads, address, size: int) -> None:
        """The issuing thread has waited: the bytes count as written now."""
        cells = self._cells(address, size)
        cta, warp = self.m.cta[threads][:, None], self._warp(threads)[:, None]
        self._record_write(code, cta, warp, cells, generic=True)
        self.state[cta, cells] = _VALID

    # ---- the async proxy: wgmma and TMA ------------------------------------------------------

    def _hidden(self, cta, warp, cells) -> np.ndarray:
        """Ordinary writes that no proxy fence has shown to the async proxy."""
        writer = self.writer[cta, cells]
        unseen = self.write_clock[cta, cells] > self.fenced[cta, warp, writer]
        return self.write_generic[cta, cells] & unseen & self.proxy_fences

    def _check_async_read(self, code, threads, cta, warp, cells) -> None:
        self._check_seen(code, threads, cta, warp, cells, write=False)
        hidden = self._hidden(cta, warp, cells)
        if hidden.any():
            self._complain(
                code,
                threads,
                cells,
                hidden,
                cta,
                "reads {place}, written at line {writer}, through the async proxy "
                "without fence.proxy.async",
            )

    def async_read(self, code, leader, address: np.ndarray, size: int, group) -> None:
        """wgmma: ``address [warpgroups, n]``; every warp must have seen the data."""
        cells = self._cells(address.reshape(-1), size).reshape(len(address), -1)
        cta, first = self.m.cta[leader][:, None], self._warp(leader)[:, None]
        for i in range(4):
            self._check_async_read(code, leader, cta, first + i, cells)
        np.add.at(self.reads_in_flight, (cta, cells), 1)
        self.flight_line[cta, cells] = code.line
        self.async_reads.append(AsyncRead(code, leader, group, cells))

    def async_reads_done(self, active, limit: np.ndarray) -> None:
        """The warps waited for their commit groups below ``limit [active]``."""
        limits = np.full(self.m.count, -1)
        limits[active] = limit
        left = []
        for read in self.async_reads:
            done = read.group < limits[read.leader]
            if done.any():
                leader, cells = read.leader[done], read.granules[done]
                cta, first = self.m.cta[leader][:, None], self._warp(leader)[:, None]
                np.subtract.at(self.reads_in_flight, (cta, cells), 1)
                self.read_line[cta, cells] = read.code.line
                for warp in (first + i for i in range(4)):
                    self.read_clock[cta, cells, warp] = self.clock[cta, warp, warp]
            if not done.all():
                rest = ~done
                left.append(
                    AsyncRead(read.code, read.leader[rest], read.group[rest], read.granules[rest])
                )
        self.async_reads = left

    def _bulk(self, thread: int, target: np.ndarray):
        """``(threads, cta, warp, cells)`` of byte addresses, once per granule."""
        cells = np.unique((target - self.m.shared.base) // self.granule)[None]
        threads = np.array([thread])
        return threads, self.m.cta[threads][:, None], self._warp(threads)[:, None], cells

    def bulk_issue(self, code, thread: int, target: np.ndarray) -> None:
        """A TMA load may write from now on."""
        threads, cta, warp, cells = self._bulk(thread, target)
        self._check_seen(code, threads, cta, warp, cells, write=True)
        self._check_readers(code, threads, cta, warp, cells)
        hidden = self._hidden(cta, warp, cells)
        if hidden.any():
            self._complain(
                code,
                threads,
                cells,
                hidden,
                cta,
                "overwrites {place}, written at line {writer}, through the async proxy "
                "without fence.proxy.async",
            )
        self._record_write(code, cta, warp, cells, generic=False)
        self.state[cta, cells] = _IN_FLIGHT

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
        threads, cta, warp, cells = self._bulk(thread, source)
        self._check_async_read(code, threads, cta, warp, cells)
        self.reads_in_flight[cta, cells] += 1
        self.flight_line[cta, cells] = code.line

    def bulk_read_done(self, code, thread: int, source: np.ndarray) -> None:
        _, cta, warp, cells = self._bulk(thread, source)
        self.reads_in_flight[cta, cells] -= 1
        self.read_clock[cta, cells, warp] = self.clock[cta, warp, warp]
        self.read_line[cta, cells] = code.line
