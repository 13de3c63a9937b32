"""What a call takes besides time: launches, and memory above what was there before."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode

from bench.timing import Call


class Operators(TorchDispatchMode):
    """The operators that compute or copy something; views do neither."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split(".")[0]
        is_view = any(result.alias_info for result in func._schema.returns)
        if not is_view and name not in ("aten::_unsafe_view", "aten::detach"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def count_launches(call: Call, device: torch.device) -> int | None:
    """Kernels and copies on a GPU, None where CUPTI cannot be used; operators on a CPU."""
    if device.type != "cuda":
        with Operators() as seen:
            call()
        return len(seen.names)
    call()
    torch.cuda.synchronize(device)
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize(device)
    return sum(_is_on_gpu(event) for event in _events(profile)) or None


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """The most that was allocated at once during a call, above what was before it."""
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        del result
        return peak
    with (
        warnings.catch_warnings(),
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile,
    ):
        warnings.simplefilter("ignore")
        result = call()
    # what the call returns is freed after the profile, or the last events would be negative
    del result
    return peak_of([(e.start_ns(), e.nbytes()) for e in _events(profile) if e.name() == "[memory]"])


def peak_of(changes: list[tuple[int, int]]) -> int:
    """The highest sum of changes, each at its time."""
    now = highest = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        now += change
        highest = max(highest, now)
    return highest


def _events(profile: Any) -> list[Any]:
    return profile.profiler.kineto_results.events()


def _is_on_gpu(event: Any) -> bool:
    return event.device_type() == DeviceType.CUDA and not event.is_user_annotation()
