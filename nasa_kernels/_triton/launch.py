"""What the launchers share: alignment of the operands, strides of optional ones, the device; and
launches that are remembered, because Triton's own way from a call to the GPU costs the host more
than most of these kernels take.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

from nasa_kernels._triton.configs import Config

LOG2E = 1.4426950408889634
# of the remembered launches; a program that comes by so many has shapes that never come again
_MOST = 4096


class Launch(NamedTuple):
    """A launch, without its pointers and its numbers. The parameters of a kernel are pointers,
    integers, numbers and constants, in this order."""

    kernel: Any
    grid: tuple[int, ...]
    integers: tuple[int, ...]
    constants: dict[str, Any]
    # how it is compiled
    options: dict[str, Any]


class _Ready(NamedTuple):
    run: Callable
    integers: tuple[int, ...]
    constants: tuple


_ready: dict[tuple, _Ready] = {}


def launch(
    plan: Callable[..., Launch],
    operands: Sequence[Tensor | None],
    settings: tuple,
    pointers: Sequence[Tensor | None],
    numbers: tuple[float, ...],
) -> None:
    """Launch what `plan(*operands, *settings)` says, on pointers and numbers.

    A plan may look at shapes, strides, dtypes, devices and alignment of its operands, and at the
    settings: where these come again, so do the compiled kernel, its grid and its integers, and
    nothing is planned or bound. Pointers are operands, and tensors that were made for this launch.
    """
    key = (
        plan,
        settings,
        *[
            None if x is None else (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() & 15)
            for x in operands
        ],
    )
    ready = _ready.get(key)
    first = operands[0]
    assert first is not None
    if ready is not None:
        if first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                ready.run(*pointers, *ready.integers, *numbers, *ready.constants)
        else:
            ready.run(*pointers, *ready.integers, *numbers, *ready.constants)
        return
    for x in operands:
        if x is not None and x.device != first.device:
            raise ValueError(
                f"nasa_kernels: a tensor is on {x.device}, the first on {first.device}"
            )
    with on_device(first):
        made = plan(*operands, *settings)
        if 0 in made.grid:
            return
        compiled = made.kernel[made.grid](
            *pointers, *made.integers, *numbers, **made.constants, **made.options
        )
        # not in the interpreter, which compiles nothing
        if isinstance(compiled, CompiledKernel):
            if len(_ready) >= _MOST:
                _ready.clear()
            # as bound: every parameter by its place
            constants = [x for x in made.kernel.arg_names if x in made.constants]
            _ready[key] = _Ready(
                _runner(compiled, (*made.grid, 1, 1)[:3]),
                made.integers,
                tuple(made.constants[name] for name in constants),
            )


def _runner(compiled: CompiledKernel, grid: tuple[int, ...]) -> Callable:
    """`compiled[grid]`, but for what that makes to tell the hooks of a launch: it costs the host
    more than the launch itself, and no one reads it where there are no hooks.
    """
    with_hooks = compiled[grid]
    x, y, z = grid
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata

    def launch_without_hooks(*arguments) -> None:
        runtime = knobs.runtime
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        # a profiler adds itself to the chain of hooks, or is the hook
        if (enter is not None and getattr(enter, "calls", True)) or (
            leave is not None and getattr(leave, "calls", True)
        ):
            with_hooks(*arguments)
            return
        active = driver.active
        stream = active.get_current_stream(active.get_current_device())
        run(x, y, z, stream, function, metadata, None, None, None, *arguments)

    return launch_without_hooks


def alignment(*tensors: Tensor) -> int:
    """Elements that every row of every operand is a multiple of: 8 when rows are 16-byte aligned.

    Triton derives this from strides divisible by 16; d = 40 and 72 have none and would be loaded
    two bytes at a time.
    """
    width = 16 // tensors[0].element_size()
    for x in tensors:
        if x.data_ptr() % 16 or any(s % width for s in x.stride()[:3]):
            return 1
    return width


def group_of(q: Tensor, k: Tensor) -> int:
    """How many heads of q look at each of k, which is expanded where one is for all."""
    return q.shape[2] // max(1, k.shape[2])


def compiler_options(config: Config, registers: int | None = None) -> dict[str, Any]:
    """How a kernel is compiled. Fusion of a product and a sum is asked for in every launch: the
    default differs between versions of Triton, and with it the bits.

    registers: The most that a thread may have; None is the compiler's choice.
    """
    options = {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,
    }
    return options if registers is None else options | {"maxnreg": registers}


def strides_or_zeros(x: Tensor | None, dimensions: int) -> tuple[int, ...]:
    return (0,) * dimensions if x is None else x.stride()


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be that of the tensors."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)
