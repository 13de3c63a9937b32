"""Kernels that compute in registers alone, for two of the roofline's rates: exponentials and issue.

Each thread holds ELEMENTS / THREADS numbers, which are independent chains, so that neither unit
waits for a result. The numbers stay between 0 and 1, and are written in the end, so that nothing
can be left out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

ELEMENTS, WARPS = 1024, 4
UNROLLED = 16


@triton.jit
def exponentials(X, turns, ELEMENTS: tl.constexpr, UNROLLED: tl.constexpr):
    """x <- 2^-x, UNROLLED times a turn; goes to 0.64 whatever x was."""
    at = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    x = tl.load(X + at)
    for _ in range(turns):
        for _ in tl.static_range(UNROLLED):
            x = tl.exp2(-x)
    tl.store(X + at, x)


@triton.jit
def multiply_adds(X, turns, a, ELEMENTS: tl.constexpr, UNROLLED: tl.constexpr):
    """x <- a x + a, UNROLLED times a turn; goes to a / (1 - a)."""
    at = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    x = tl.load(X + at)
    for _ in range(turns):
        for _ in tl.static_range(UNROLLED):
            x = x * a + a
    tl.store(X + at, x)


def workload(name: str, device: torch.device, turns: int = 256) -> tuple[Callable, dict[str, int]]:
    """A call, and how much of `exponentials` or `instructions` it does."""
    # every SM full, several times
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    programs = 64 * processors
    x = torch.rand(programs * ELEMENTS, device=device)
    steps = x.numel() * turns * UNROLLED
    if name == "exponential":
        return (
            lambda: exponentials[(programs,)](x, turns, ELEMENTS, UNROLLED, num_warps=WARPS),
            {"exponentials": steps},
        )
    return (
        lambda: multiply_adds[(programs,)](
            x, turns, 0.25, ELEMENTS, UNROLLED, num_warps=WARPS, enable_fp_fusion=True
        ),
        {"instructions": steps},
    )
