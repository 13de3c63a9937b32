"""How many programs of a kernel that walks over tiles fit a GPU, as its compiled code says."""

import functools
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

# programs of a multiprocessor where there is none: Triton's interpreter
INTERPRETED = 3


class Gpu(NamedTuple):
    """One multiprocessor has so many registers, bytes of shared memory, and threads."""

    multiprocessors: int
    registers: int
    shared: int
    threads: int


class Grid(NamedTuple):
    programs: int
    per_multiprocessor: int


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    found = torch.cuda.get_device_properties(device)
    return Gpu(
        found.multi_processor_count,
        found.regs_per_multiprocessor,
        found.shared_memory_per_multiprocessor,
        found.max_threads_per_multi_processor,
    )


def resident_programs(gpu: Gpu, registers: int, shared: int, num_warps: int) -> int:
    """Programs that share a multiprocessor.

    A warp's registers come in units of 256, from one of four parts, and a program reserves 1 KiB of
    shared memory beside its own.
    """
    warps = 4 * (gpu.registers // 4 // (-(-registers * 32 // 256) * 256))
    fit = min(warps, gpu.threads // 32) // num_warps
    return max(1, min(fit, gpu.shared // (shared + 1024)))


def grid_for(tiles: int, multiprocessors: int, resident: int) -> Grid:
    """As many programs as fit at once; one for each tile where there are no more of them.

    Programs start one on each multiprocessor, then a second; `tiles.share_of_tiles` counts on it.
    So a multiprocessor has at most tiles / multiprocessors, rounded up.
    """
    slots = multiprocessors * resident
    return Grid(slots, resident) if tiles > slots else Grid(tiles, 1)


_resident: dict[Hashable, int] = {}


def grid_of(
    kernel: Any, arguments: tuple, options: dict[str, Any], tiles: int, device: torch.device
) -> Grid:
    """The grid for a kernel that is about to be launched; it is compiled where it was not yet."""
    if device.type != "cuda":
        return grid_for(tiles, 1, INTERPRETED)
    # what the registers of the kernel depend on
    kinds = tuple((x.dtype if isinstance(x, Tensor) else x is None) for x in arguments[:10])
    key = (device, kinds, tuple(options.values()))
    resident = _resident.get(key)
    gpu = gpu_of(device)
    if resident is None:
        compiled = kernel.warmup(*arguments, grid=(1,), **options)
        compiled._init_handles()
        metadata = compiled.metadata
        resident = resident_programs(gpu, compiled.n_regs, metadata.shared, metadata.num_warps)
        _resident[key] = resident
    return grid_for(tiles, gpu.multiprocessors, resident)
