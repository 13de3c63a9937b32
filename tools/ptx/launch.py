"""Launching a kernel: arguments, waves of CTAs, and the report of what ran."""

import struct
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from . import (  # noqa: F401  # importing a file registers its instructions
    arithmetic,
    bits,
    control,
    copies,
    loadstore,
    mbarrier,
    mma,
    moves,
    parser,
    tma,
    warp,
    wgmma,
)
from .banks import BankCounter
from .formats import FORMATS
from .hazards import HazardMonitor
from .machine import Machine
from .memory import Memory
from .special import WARP

# enough threads to fill numpy's vectors, few enough for the registers to stay in the cache
THREADS_PER_WAVE = 16384
# for the clocks of the hazard checks
HAZARD_BYTES = 1 << 27

_PACK = {"f32": "<f", "f64": "<d", "f16": "<e"}


@dataclass
class Report:
    """What a launch did. ``counts`` is how often each opcode was issued, per group of threads."""

    seconds: float = 0.0
    steps: int = 0
    counts: Counter = field(default_factory=Counter)
    # line -> shared memory wavefronts beyond the necessary; None if they were not counted
    bank_conflicts: Counter | None = None


@dataclass(frozen=True)
class LoadedKernel:
    """A parsed kernel that can be launched any number of times."""

    kernel: parser.Kernel

    @property
    def name(self) -> str:
        return self.kernel.name

    def launch(
        self,
        grid: tuple[int, ...],
        block: int | tuple[int, ...],
        args: list,
        memory: Memory,
        shared_bytes: int = 0,
        check_races: bool = False,
        allow_uninitialized: bool = False,
        proxy_fences: bool = True,
        count_bank_conflicts: bool = False,
        dependent: bool = False,
        max_steps: int = 20_000_000,
    ) -> Report:
        """Run the grid. Out-of-bounds and misaligned accesses, deadlocks, and registers touched
        while a wgmma owns them are always errors.

        Args:
            args: One value per kernel parameter: an int, a float, or ``bytes`` for a struct.
            shared_bytes: Dynamic shared memory; static shared memory is added to it.
            check_races: Raise Hazard for accesses to shared memory that no barrier orders, for
                reads of bytes in flight or never written, and for missing proxy fences.
            allow_uninitialized: Let shared bytes be read that nobody wrote; they are NaN.
            proxy_fences: False leaves fence.proxy.async out of the checks: Triton 3.6 has none
                between cp.async and wgmma, 3.9 has.
            count_bank_conflicts: Fill ``report.bank_conflicts``.
            dependent: The grid may start while those before it run: global memory that a thread
                touches before its griddepcontrol.wait is an error.
            max_steps: Instructions a wave of CTAs may issue before the launch is given up.
        """
        grid, block = _three(grid), _three(block)
        threads = block[0] * block[1] * block[2]
        kernel = self.kernel
        if threads % WARP:
            raise ValueError(f"{self.name}: a block of {threads} threads has a broken warp")
        if kernel.required_block and threads != np.prod(kernel.required_block):
            raise ValueError(f"{self.name}: needs a block of {kernel.required_block}, got {block}")
        parameters = pack_arguments(kernel, args)
        total = grid[0] * grid[1] * grid[2]
        per_wave = max(1, THREADS_PER_WAVE // threads)
        if check_races:
            static = sum(v.bytes for v in kernel.shared)
            each = HazardMonitor.bytes_per_cta(kernel, static + shared_bytes, threads // WARP)
            per_wave = max(1, min(per_wave, HAZARD_BYTES // each))
        banks = BankCounter() if count_bank_conflicts else None
        report, start = Report(), time.perf_counter()
        constants = {v.name: _upload_variable(memory, v) for v in kernel.constants}
        for first in range(0, total, per_wave):
            ctas = np.arange(first, min(first + per_wave, total))
            machine = Machine(
                kernel, grid, block, ctas, parameters, memory, shared_bytes, max_steps
            )
            machine.symbols |= constants
            machine.banks = banks
            machine.dependent = np.ones(machine.count, bool) if dependent else None
            if check_races:
                machine.watch = HazardMonitor(machine, allow_uninitialized, proxy_fences)
            if any(code.opcode.startswith("wgmma") for code in kernel.instructions):
                # its checks must be in place before the first instruction is bound
                machine.unit(wgmma.TensorCores)
            machine.run()
            for code, n in zip(kernel.instructions, machine.executed, strict=True):
                if n:
                    report.counts[code.opcode] += n
        report.bank_conflicts = banks and banks.extra
        report.steps = report.counts.total()
        report.seconds = time.perf_counter() - start
        return report


@lru_cache(maxsize=64)
def load(text: str, name: str | None = None) -> LoadedKernel:
    """One kernel of a PTX text: the only one, or the only one whose name contains ``name``."""
    return LoadedKernel(parser.load(text, name))


def _three(size: int | tuple[int, ...]) -> tuple[int, int, int]:
    size = (size,) if isinstance(size, int) else tuple(size)
    return (*size, *(1,) * (3 - len(size)))


def _upload_variable(memory: Memory, variable: parser.Variable) -> int:
    address = memory.allocate(variable.bytes, variable.name)
    memory.bytes[address - memory.BASE :][: variable.bytes] = np.frombuffer(variable.data, np.uint8)
    return address


def pack_arguments(kernel: parser.Kernel, args: list) -> bytes:
    """The parameter block: every argument at its parameter's offset."""
    if len(args) != len(kernel.parameters):
        names = ", ".join(f"{p.name}: {p.type}" for p in kernel.parameters)
        raise ValueError(
            f"{kernel.name} has {len(kernel.parameters)} parameters ({names}), got {len(args)}"
        )
    block = bytearray(kernel.parameter_bytes)
    for parameter, value in zip(kernel.parameters, args, strict=True):
        if isinstance(value, bytes | bytearray):
            raw = bytes(value)
        elif parameter.type in _PACK:
            raw = struct.pack(_PACK[parameter.type], value)
        else:
            size = FORMATS[parameter.type].bytes
            raw = (int(value) & (1 << 8 * size) - 1).to_bytes(size, "little")
        if len(raw) != parameter.bytes:
            raise ValueError(
                f"{kernel.name}: {parameter.name} has {parameter.bytes} bytes, got {len(raw)}"
            )
        block[parameter.offset : parameter.offset + parameter.bytes] = raw
    return bytes(block)
