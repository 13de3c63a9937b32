"""Host time of a call: Python, PyTorch's dispatcher and the launchers, and nothing after them.

CPU tensors and a runtime that launches nothing (`host_runtime.cpp`, `host_driver.py`) leave all
that a call on a GPU costs the host, but for the driver's own launch, which every call pays. The
unit is the host time of one `F.scaled_dot_product_attention` call on the same CPU: rounds of both
take turns, so what else the machine does falls on both, and only the thread's own time counts.

Joint attention has one launch for all beside a small image, in the rows `joint-small` and
`joint-nag-small`. Of other images the first launch is PyTorch's own attention, which does compute
here: the row `image` is that call alone, and what `joint` and `joint-nag` take beside it is ours
(`host_shares.py`). The image is the same; those two may not know that it is small.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

from bench.row import Row
from bench.session import Session
from bench.timing import Samples
from nasa_kernels import (
    backends,
    nag_attention,
    nag_joint_attention,
    nasa_attention,
    nasa_joint_attention,
)
from nasa_kernels.testing import (
    attend_shared,
    joint_forward_cuda,
    joint_nag_cuda,
    take_in_one_launch,
)

LIBRARY = Path(__file__).parents[1] / "build" / "cuda" / "host.so"
BACKENDS = ("cuda", "triton")
BASELINE = "sdpa"
# of one SDPA call, and what masks, a tensor alpha and a broadcast prompt may add, each
CEILINGS = {"cuda": 1.5, "triton": 4.0}
MORE = 0.5
CALLS, ROUNDS = 100, 60
# of these the image is as a large one
TWO_LAUNCHES = ("joint", "joint-nag")

# whether the Python around the launches of joint attention takes CPU tensors
_has_joint: list[bool] = []

Calls = dict[str, Callable[[], object]]


def calls_of(backend: str) -> Calls:
    """By case. Two samples, or broadcasting would be none."""
    generator = torch.Generator().manual_seed(0)

    def normal(n: int) -> torch.Tensor:
        return torch.randn(2, n, 2, 64, generator=generator).bfloat16()

    q, k_pos, v_pos, k_neg, v_neg = normal(16), normal(77), normal(77), normal(77), normal(77)
    k, v, k_one, v_one = normal(8), normal(8), k_neg[:1], v_neg[:1]
    mask = torch.ones(2, 77, dtype=torch.bool)
    alpha = torch.full((2, 1, 1), 0.5)
    # written out as a caller writes them: to unpack and to merge arguments would be counted too

    def joint() -> torch.Tensor:
        return nasa_joint_attention(
            q, k, v, k_pos, v_pos, k_neg, v_neg, 0.5, rule="nasa-cross", backend=backend
        )

    def nag() -> torch.Tensor:
        return nag_attention(
            q, k_pos, v_pos, k_neg, v_neg,
            nag_scale=3.0, nag_tau=2.5, nag_alpha=0.5, backend=backend,
        )  # fmt: skip

    def joint_nag() -> torch.Tensor:
        return nag_joint_attention(
            q, k, v, k_pos, v_pos, k_neg, v_neg,
            nag_scale=3.0, nag_tau=2.5, nag_alpha=0.5, backend=backend,
        )  # fmt: skip

    return {
        "plain": lambda: nasa_attention(q, k_pos, v_pos, k_neg, v_neg, 0.5, backend=backend),
        "masks": lambda: nasa_attention(
            q, k_pos, v_pos, k_neg, v_neg, 0.5, mask_pos=mask, mask_neg=mask, backend=backend
        ),
        "alpha": lambda: nasa_attention(q, k_pos, v_pos, k_neg, v_neg, alpha, backend=backend),
        "broadcast": lambda: nasa_attention(q, k_pos, v_pos, k_one, v_one, 0.5, backend=backend),
        "projected": lambda: nasa_attention(
            q, k_pos, v_pos, k_neg, v_neg, 0.5, rule="projected", backend=backend
        ),
        "nag": nag,
        # the first launch of joint attention: PyTorch's operator alone, and with what is around it
        "image": attention_of_pytorch(q, k, v),
        "shared": lambda: attend_shared(q, k, v, 0.125),
        "joint": joint,
        "joint-nag": joint_nag,
        "joint-small": joint,
        "joint-nag-small": joint_nag,
    }


def attention_of_pytorch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], object]:
    """The operator for CPU tensors that joint attention calls, on [b, l, h, d]."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    return lambda: attend(q, k, v, scale=0.125)


def sdpa() -> Callable[[], object]:
    q, k = torch.randn(1, 2, 1, 64), torch.randn(1, 2, 1, 64)
    return lambda: F.scaled_dot_product_attention(q, k, k)


def run(session: Session, library: Path | None = None, quick: bool = False) -> list[Row]:
    rows: list[Row] = []
    for backend in BACKENDS:
        if (reason := _why_not(backend, library or LIBRARY)) is not None:
            session.leave_out(f"host {backend}", reason)
            continue
        with _on_the_cpu(backend, library or LIBRARY), torch.no_grad():
            calls = calls_of(backend)
            times, baseline = compare(calls, sdpa(), ROUNDS // (4 if quick else 1))
        for case, samples in times.items():
            rows.append(
                session.row(
                    bench="host", case=case, dtype="bf16", direction="forward", provider=backend,
                    timing="host", baseline=BASELINE, baseline_us=baseline, **samples.columns(),
                )
            )  # fmt: skip
    session.write(rows)
    return rows


def compare(
    calls: Calls, unit: Callable[[], object], rounds: int
) -> tuple[dict[str, Samples], float]:
    """Microseconds of each call, and those of the unit. A sample is a round's ratio to the unit's
    own round, times the unit's median: so the spread is that of the ratio.
    """
    for case, call in (*calls.items(), ("", unit)):
        with _launches_of(case):
            _round(call)
    ratios: dict[str, list[float]] = {case: [] for case in calls}
    units = Samples()
    for _ in range(rounds):
        for case, call in calls.items():
            own = _round(unit)
            units.us.append(own)
            with _launches_of(case):
                ratios[case].append(_round(call) / own)
    median = units.quantile(0.5)
    return {case: Samples([x * median for x in found]) for case, found in ratios.items()}, median


@contextlib.contextmanager
def _launches_of(case: str) -> Iterator[None]:
    if case not in TWO_LAUNCHES:
        yield
        return
    before = take_in_one_launch(0)
    try:
        yield
    finally:
        take_in_one_launch(before)


def _round(call: Callable[[], object]) -> float:
    started = time.thread_time_ns()
    for _ in range(CALLS):
        call()
    return max(time.thread_time_ns() - started, 1) / CALLS / 1000


def _why_not(backend: str, library: Path) -> str | None:
    if backend == "cuda" and not library.is_file():
        return (
            f"{library} is not there; where nvcc is, cmake -S . -B build/cuda -G Ninja "
            "-DNASA_CUDA=ON && cmake --build build/cuda --target host"
        )
    if backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 compiles nothing; unset it"
    return None


@contextlib.contextmanager
def _on_the_cpu(backend: str, library: Path) -> Iterator[None]:
    """`backend` takes CPU tensors, and launches nothing."""
    if backend == "cuda":
        torch.ops.load_library(library)
        if not _has_joint:
            torch.library.impl("nasa_kernels::joint_forward_cuda", "CPU", joint_forward_cuda)
            torch.library.impl("nasa_kernels::joint_nag_cuda", "CPU", joint_nag_cuda)
            _has_joint.append(True)
    else:
        from bench import host_driver

        host_driver.use()
    threads, why_not = torch.get_num_threads(), backends.why_not

    def takes_cpu_tensors(name: str, device: torch.device) -> str | None:
        return None if name == backend else why_not(name, device)

    torch.set_num_threads(1)
    try:
        with mock.patch.object(backends, "why_not", takes_cpu_tensors):
            yield
    finally:
        torch.set_num_threads(threads)
