"""The floors of a device, from rates measured on it in the same run.

    copy         bytes per second of a large copy, what is read and what is written together
    matrix       FLOP/s of a large matrix product of random numbers, by dtype; on a CPU for which
                 there are kernels, of the products that they are made of, in registers
    exponential  2^x per second, numbers in registers
    issue        fp32 multiply-adds per second on one lane each, registers only (GPU)
    launch       seconds per call of the smallest kernel, in a CUDA graph on a GPU

A floor is the largest of the five times that a piece of work would take at these rates alone: a
bound, which an implementation reaches only by overlapping everything else.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.machine import Machine
from bench.row import Row
from bench.timing import GraphTimer, HostTimer, Timer, measure, synchroniser
from bench.work import Work
from nasa_kernels.testing import CPU_LIBRARY, why_no_cpu_kernels

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


@dataclass(frozen=True)
class Rates:
    """Per second; None or no entry where a device has not been measured."""

    copy: float | None = None
    matrix: dict[str, float] = field(default_factory=dict)
    exponential: float | None = None
    issue: float | None = None
    launch_seconds: float | None = None

    def floor(self, work: Work, dtype: torch.dtype) -> tuple[float, str] | None:
        """Microseconds, and what they are made of; None if nothing was measured."""
        matrix = self.matrix.get(name_of(dtype))
        times = {
            "launch": self.launch_seconds,
            "memory": work.bytes / self.copy if self.copy else None,
            "matrix": work.flops / matrix if matrix else None,
            "exponential": work.exponentials / self.exponential if self.exponential else None,
            "issue": work.instructions / self.issue if self.issue else None,
        }
        known = {name: seconds for name, seconds in times.items() if seconds is not None}
        if not known:
            return None
        of = max(known, key=known.__getitem__)
        return known[of] * 1e6, of

    def columns(self, work: Work, dtype: torch.dtype) -> dict[str, Any]:
        floor = self.floor(work, dtype)
        return {} if floor is None else {"floor_us": floor[0], "floor_of": floor[1]}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def rates_of(rows: list[Row]) -> Rates:
    """What `measure_rates` measured, from its rows."""
    found: dict[str, float] = {}
    matrix: dict[str, float] = {}
    for row in rows:
        if row.bench != "roofline" or not row.p20_us:
            continue
        # the faster samples: a rate that was reached bounds what can be
        seconds = row.p20_us * 1e-6
        if row.provider == "copy" and row.bytes:
            found["copy"] = row.bytes / seconds
        elif row.provider == "matrix" and row.flops:
            matrix[row.dtype] = row.flops / seconds
        elif row.provider == "exponential" and row.exponentials:
            found["exponential"] = row.exponentials / seconds
        elif row.provider == "issue" and row.instructions:
            found["issue"] = row.instructions / seconds
        elif row.provider == "launch":
            found["launch_seconds"] = seconds
    return Rates(matrix=matrix, **found)  # type: ignore[arg-type]


def measure_rates(machine: Machine, device: torch.device, *, quick: bool = False) -> list[Row]:
    """One row per rate; about five seconds."""
    rows = []
    for case, dtype, columns, calls in _cases(device, quick):
        timer = _timer(calls, device)
        measure([timer], samples=15, seconds=0.2 if quick else 0.5)
        (samples,) = timer.results.values()
        rows.append(
            Row(
                **vars(machine),
                bench="roofline",
                case=case,
                dtype=dtype,
                direction="",
                provider=case.split("-")[0],
                timing="warm",
                **samples.columns(),
                **columns,
            )  # fmt: skip
        )
        timer.close()
    return rows


def _timer(calls: list, device: torch.device) -> Timer:
    if device.type == "cuda":
        return GraphTimer(calls, "warm", stream=torch.cuda.Stream(device))
    return HostTimer(calls, "warm", synchronise=synchroniser(device))


def _cases(device: torch.device, quick: bool):
    """Name, dtype, amount of work and calls of each rate."""
    gpu = device.type == "cuda"
    elements = 2**28 if gpu else 2**25
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    amount = {"bytes": 2 * source.numel() * source.element_size()}
    copy = functools.partial(target.copy_, source)
    yield f"copy-{elements * 4 >> 20}MiB", "float32", amount, [copy]
    del source, target, copy

    if not gpu and why_no_cpu_kernels() is None:
        yield from _cpu_cases()
        one = torch.zeros(1)
        yield "launch", "float32", {}, [lambda: one.add_(1)]
        return

    n = (4096 if quick else 8192) if gpu else (1024 if quick else 2048)
    # a CPU's fp16 products can take a thousand times as long as its others
    for dtype in DTYPES if gpu else (torch.bfloat16, torch.float32):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        c = torch.empty_like(a)
        yield (
            f"matrix-{n}", name_of(dtype), {"flops": 2 * n**3},
            [lambda a=a, b=b, c=c: torch.mm(a, b, out=c)],
        )  # fmt: skip
    del a, b, c

    if gpu:
        from bench import registers

        for name in ("exponential", "issue"):
            call, amount = registers.workload(name, device)
            yield name, "float32", amount, [call]
    else:
        # the least that PyTorch gives to a thread each, which its own caches hold
        x = torch.rand(32768 * torch.get_num_threads())
        y = torch.empty_like(x)
        amount = {"exponentials": x.numel()}
        yield "exponential", "float32", amount, [lambda: torch.exp2(x, out=y)]

    one = torch.zeros(1, device=device)
    yield "launch", "float32", {}, [lambda: one.add_(1)]


def _cpu_cases():
    """Products and exponentials of the kernels' vector layer, on every thread: PyTorch's matrix
    products may be far from what the CPU can do, and its exponentials are exact ones."""
    work = ctypes.CDLL(str(CPU_LIBRARY)).nasa_cpu_work
    work.restype = ctypes.c_int64
    rounds = ctypes.c_int64(200_000)
    # in the order of the enumerations in csrc/cpu/nasa_cpu.h
    for i, dtype in enumerate((torch.float32, torch.float16, torch.bfloat16)):
        flops = work(0, i, rounds)
        call = functools.partial(work, 0, i, rounds)
        yield "matrix-registers", name_of(dtype), {"flops": flops}, [call]
    call = functools.partial(work, 1, 0, rounds)
    yield "exponential-registers", "float32", {"exponentials": work(1, 0, rounds)}, [call]
