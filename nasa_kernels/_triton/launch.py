"""What the launchers share: alignment of the operands, strides of optional ones, the device."""

import contextlib
from typing import Any

import torch
from torch import Tensor

from nasa_kernels._triton.configs import Config

LOG2E = 1.4426950408889634


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


def compiler_options(config: Config) -> dict[str, Any]:
    """How a kernel is compiled. Fusion of a product and a sum is asked for in every launch: the
    default differs between versions of Triton, and with it the bits.
    """
    return {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,
    }


def strides_or_zeros(x: Tensor | None, dimensions: int) -> tuple[int, ...]:
    return (0,) * dimensions if x is None else x.stride()


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be that of the tensors."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)
