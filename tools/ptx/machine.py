"""The machine: threads, registers and the scheduler.

All threads of a wave of CTAs run at once: a register is an array with one entry per thread, and an
instruction is a few numpy operations on the threads that are at the same pc. The group with the
lowest pc goes first, which makes structured code reconverge. Threads that must wait (barriers,
mbarriers, a warp that is not complete) are parked; when nobody can run, asynchronous copies
complete, and when there are none either, it is a deadlock.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from .errors import Deadlock, Fault, Hazard
from .isa import lookup
from .memory import Memory, PrivateMemory
from .operands import EVERYONE, Operands
from .parser import Instruction, Kernel
from .special import WARP

# CUDA keeps the first KiB of shared memory for itself, so a null shared address is never valid
SHARED_BASE = 1024


@dataclass(slots=True)
class Step:
    """One bound instruction."""

    run: Callable
    # active -> bool per active thread
    guard: Callable | None
    # active -> (threads whose warp is complete, threads that wait for theirs)
    split: Callable | None
    # a branch or a barrier: run() returns (pc, threads), where who goes on
    schedules: bool


class Machine(Operands):
    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        ctas: np.ndarray,
        parameters: bytes,
        memory: Memory,
        shared_bytes: int,
        max_steps: int = 20_000_000,
    ):
        super().__init__()
        self.kernel, self.grid, self.block, self.memory = kernel, grid, block, memory
        self.cta_ids, self.ctas = ctas, len(ctas)
        self.block_size = block[0] * block[1] * block[2]
        self.count = self.ctas * self.block_size
        self.all_threads = np.arange(self.count)
        # index of the thread's CTA in this wave
        self.cta = self.all_threads // self.block_size
        self.warp = self.all_threads // WARP
        self.lane = self.all_threads % WARP
        self.parameters = np.frombuffer(parameters.ljust(-(-len(parameters) // 16) * 16), np.uint8)
        static = self._place(kernel.shared, SHARED_BASE)
        self.dynamic_shared = shared_bytes
        self.shared_size = static - SHARED_BASE + shared_bytes
        self.shared = PrivateMemory(self.ctas, self.shared_size, SHARED_BASE, "shared")
        local = self._place(kernel.local, 0)
        self.local = PrivateMemory(self.count if local else 1, local, 0, "local")
        self.symbols |= {p.name: p.offset for p in kernel.parameters}

        self.steps: list[Step | None] = [None] * len(kernel.instructions)
        self.executed = [0] * len(kernel.instructions)
        self.pc = 0
        self.max_steps = max_steps
        # pc -> sorted threads that can run there
        self.groups: dict[int, np.ndarray] = {}
        # threads that polled memory: they run again once the others had their turn
        self.deferred: dict[int, np.ndarray] = {}
        # threads at a collective whose warp is not complete yet
        self.gathering: dict[int, np.ndarray] = {}
        # what threads wait for -> [(pc to resume at, threads)]
        self.parked: dict[tuple, list[tuple[int, np.ndarray]]] = {}
        # when nobody can run: asynchronous work that completes, then waits that give up
        self.engines: list[Callable[[], None]] = []
        self.time_limits: list[Callable[[], bool]] = []
        # one line per unfinished barrier, for the deadlock report
        self.reporters: list[Callable[[], list[str]]] = []
        self.units: dict[type, object] = {}
        # called when all threads have exited
        self.finishers: list[Callable[[], None]] = []
        # threads that may not touch global memory before griddepcontrol.wait; None: all may
        self.dependent: np.ndarray | None = None
        # observers: a HazardMonitor and a BankCounter, where asked for
        self.watch = None
        self.banks = None

    def _place(self, variables, base: int) -> int:
        """Give every variable its address; dynamic shared memory (no size) comes last."""
        end = base
        for v in sorted(variables, key=lambda v: v.bytes == 0):
            end = -(-end // v.align) * v.align
            self.symbols[v.name] = end
            end += v.bytes
        return end

    def unit(self, kind: type):
        """The machine's one instance of a functional unit (barriers, copy queues, ...)."""
        if kind not in self.units:
            self.units[kind] = kind(self)
        return self.units[kind]

    def check_global(
        self, address: np.ndarray, size: int, threads: np.ndarray, write: bool
    ) -> None:
        self.check_dependent(threads)
        self.memory.check(address, size, threads, write)

    def check_dependent(self, threads: np.ndarray) -> None:
        if self.dependent is not None and self.dependent[threads].any():
            first = int(threads[self.dependent[threads]][0])
            raise Hazard("touches global memory before griddepcontrol.wait", first)

    # ---- threads -----------------------------------------------------------------------------

    def name_of(self, thread: int) -> str:
        cta = int(self.cta_ids[self.cta[thread]])
        x, y = cta % self.grid[0], cta // self.grid[0] % self.grid[1]
        z = cta // (self.grid[0] * self.grid[1])
        return f"CTA ({x}, {y}, {z}) thread {thread % self.block_size}"

    def whole(self, active, size: int):
        """Split into threads whose warp or warpgroup (``size``) is complete, and the rest."""
        if active is EVERYONE:
            return active, None
        if len(active) % size == 0:
            rows = active.reshape(-1, size)
            if (rows[:, 0] % size == 0).all() and (rows[:, -1] - rows[:, 0] == size - 1).all():
                return active, None
        group = active // size
        complete = np.bincount(group, minlength=self.count // size)[group] == size
        return active[complete], active[~complete]

    def members(self, active, mask: Callable):
        """Split by whether all lanes of the thread's membermask are here."""
        ready, rest = self.whole(active, WARP)
        if rest is None:
            return active, None
        present = np.zeros(self.count // WARP, np.uint32)
        np.bitwise_or.at(present, self.warp[active], np.uint32(1) << self.lane[active].astype("u4"))
        ok = (mask(active) & ~present[self.warp[active]]) == 0
        return active[ok], (None if ok.all() else active[~ok])

    # ---- scheduling --------------------------------------------------------------------------

    def run(self) -> None:
        self.join(0, self.all_threads)
        left = self.max_steps
        try:
            with np.errstate(all="ignore"):
                while self.groups or self._wake():
                    pc = min(self.groups)
                    left -= self._run_group(pc, self.groups.pop(pc), left)
            for finish in self.finishers:
                finish()
        except Fault as fault:
            # what happens between instructions has no line of its own
            fault.where = fault.where or f"{self.kernel.name}: "
            raise

    def join(self, pc: int, threads: np.ndarray) -> None:
        """Let ``threads`` run at ``pc``."""
        if len(threads):
            here = self.groups.get(pc)
            self.groups[pc] = threads if here is None else _merge(here, threads)

    def let_others_go(self, active, pc: int):
        """For a thread that may be polling: resume at ``pc`` after all others had their turn."""
        if not self.groups:
            return active
        threads, early = self.threads(active), self.deferred.get(pc)
        self.deferred[pc] = threads if early is None else _merge(early, threads)
        return None

    def park(self, key: tuple, threads: np.ndarray, pc: int) -> None:
        self.parked.setdefault(key, []).append((pc, threads))

    def release(self, key: tuple, ctas: np.ndarray) -> None:
        """Let the threads parked on ``key`` go on in the CTAs where ``ctas`` (bool) is set."""
        waiting = self.parked.pop(key, [])
        for pc, threads in waiting:
            go = ctas[self.cta[threads]]
            self.join(pc, threads[go])
            if not go.all():
                self.park(key, threads[~go], pc)

    def _wake(self) -> bool:
        """Nobody can run: find someone who can. False when all threads have exited."""
        if not self.parked and not self.gathering and not self.deferred:
            return False
        for engine in self.engines:
            engine()
        for pc, threads in self.deferred.items():
            self.join(pc, threads)
        self.deferred = {}
        if self.groups or any(give_up() for give_up in self.time_limits):
            return True
        lines = [line for report in self.reporters for line in report()]
        for pc, threads in self.gathering.items():
            lines.append(
                f"line {self.kernel.instructions[pc].line}: {self._crowd(threads)} waits for the "
                f"rest of its warp"
            )
        raise Deadlock("deadlock\n  " + "\n  ".join(lines))

    def waiting(self, key: tuple) -> str:
        """Who waits for ``key`` and where, for reports."""
        return "; ".join(
            f"{self._crowd(threads)} at line {self.kernel.instructions[pc].line}"
            for pc, threads in self.parked.get(key, [])
        )

    def _crowd(self, threads: np.ndarray) -> str:
        first = self.name_of(int(threads[0]))
        return first if len(threads) == 1 else f"{first} and {len(threads) - 1} more"

    def _run_group(self, pc: int, threads: np.ndarray, limit: int) -> int:
        """Run ``threads`` from ``pc`` until they exit, block or must let others go first."""
        active = EVERYONE if len(threads) == self.count else threads
        steps, executed, end = self.steps, self.executed, len(self.steps)
        horizon = min(self.groups, default=end)
        taken = 0
        try:
            while pc < end:
                if pc >= horizon:
                    if pc > horizon:
                        self.join(pc, self.threads(active))
                        return taken
                    threads = _merge(self.threads(active), self.groups.pop(pc))
                    active = EVERYONE if len(threads) == self.count else threads
                    horizon = min(self.groups, default=end)
                step = steps[pc]
                if step is None:
                    step = self._bind(pc)
                taken += 1
                executed[pc] += 1
                if step.split is not None:
                    active = self._gather(pc, step, active)
                    if active is None:
                        return taken
                chosen, others = active, None
                if step.guard is not None:
                    take = step.guard(active)
                    if not take.any():
                        pc += 1
                        continue
                    if not take.all():
                        threads = self.threads(active)
                        chosen, others = threads[take], threads[~take]
                if not step.schedules:
                    step.run(chosen)
                    pc += 1
                    continue
                self.pc = pc
                target, go = step.run(chosen)
                if others is not None and target != pc + 1:
                    # a branch: both sides become groups, the lower pc goes on
                    self.join(target, self.threads(go))
                    active, target = others, pc + 1
                elif others is not None:
                    active = others if go is None else _merge(others, self.threads(go))
                elif go is None or (go is not EVERYONE and not len(go)):
                    return taken
                else:
                    active = go
                if active is not EVERYONE and len(active) == self.count:
                    active = EVERYONE
                pc = target
                horizon = min(self.groups, default=end)
                if taken > limit:
                    raise Fault(f"more than {self.max_steps} steps: a loop that never ends?")
        except Fault as fault:
            self._locate(fault, pc)
            raise
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            fault = Fault(f"{type(error).__name__}: {error}")
            self._locate(fault, pc)
            raise fault from error
        return taken

    def _gather(self, pc: int, step: Step, active):
        """The threads that can execute a collective now; the others wait for their warp."""
        early = self.gathering.pop(pc, None)
        if early is not None:
            active = _merge(self.threads(active), early)
            active = EVERYONE if len(active) == self.count else active
        ready, rest = step.split(active)
        if rest is not None and len(rest):
            self.gathering[pc] = rest
        return ready if ready is EVERYONE or len(ready) else None

    def _bind(self, pc: int) -> Step:
        code = self.kernel.instructions[pc]
        _, entry, modifiers = lookup(code.opcode)
        self.pc = pc
        run = entry.build(self, code, modifiers)
        guard = self.read_array(code.guard, "pred") if code.guard else None
        split = None
        if entry.together == "warp":
            split = partial(self.whole, size=WARP)
        elif entry.together == "warpgroup":
            split = partial(self.whole, size=4 * WARP)
        elif entry.together == "members":
            split = partial(self.members, mask=self.read_array(code.operands[-1], "u32"))
        self.steps[pc] = step = Step(run, guard, split, entry.schedules)
        return step

    def _locate(self, fault: Fault, pc: int) -> None:
        if fault.where:
            return
        code: Instruction = self.kernel.instructions[pc]
        who = "" if fault.thread is None else f", {self.name_of(fault.thread)}"
        fault.where = f"{self.kernel.name}, line {code.line}: `{code.text}`{who}: "


def _merge(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.sort(np.concatenate([a, b]))
