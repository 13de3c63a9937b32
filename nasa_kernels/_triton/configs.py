"""Block sizes, by head_dim and dtype, and which prompts stay on chip.

No number here was timed on a GPU yet. They are the largest tiles that compile without a spill
for sm_80, sm_90 and sm_100 under the oldest and the newest Triton, and fit the shared memory of
every GPU: `tests/op/test_triton_compile.py` holds registers and bytes to ceilings.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton

from nasa_kernels._triton.tiles import cut

# query rows of a program whose positive prompt stays on chip
RESIDENT_BLOCK_L = 64
# bytes in which the compiler passes weights and sums between threads
SCRATCH = 4096
# held to 168 registers, Triton 3.6 puts 40 bytes on the stack; 3.9 none; between them not looked at
SPILLS_AT_168 = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)


class Config(NamedTuple):
    BLOCK_L: int  # query rows of a program
    BLOCK_N: int  # keys of a block, where a prompt is streamed
    num_warps: int
    num_stages: int


def forward_config(
    d: int, dtype: torch.dtype, pos_cut: tuple[int, ...] | None, device: torch.device
) -> Config:
    """By head_dim, and by whether the positive prompt stays on chip: it alone decides, so that
    the bits of Z+ do not depend on the negative prompt.
    """
    if dtype == torch.float32:
        return Config(BLOCK_L=32, BLOCK_N=16, num_warps=4, num_stages=1)
    if pos_cut != ():
        # a second tile of queries is on its way where there is room for it
        fits = resident_bytes(d, pos_cut or (), dtype, stages=2) <= shared_memory(device)
        stages = 2 if d <= 80 and fits else 1
        return Config(RESIDENT_BLOCK_L, BLOCK_N=32, num_warps=4, num_stages=stages)
    # Hopper's products have 64 rows for 4 warps: with 64 rows, 8 warps do all scores twice
    wide = 90 <= architecture(device) <= 103
    if d <= 64:
        return Config(BLOCK_L=64, BLOCK_N=64, num_warps=4, num_stages=2)
    if d <= 128 and wide:
        return Config(BLOCK_L=128, BLOCK_N=64, num_warps=8, num_stages=2)
    if d <= 80:
        return Config(BLOCK_L=64, BLOCK_N=32, num_warps=4, num_stages=2)
    if d <= 128:
        return Config(BLOCK_L=128, BLOCK_N=32, num_warps=8, num_stages=2)
    rows = 128 if d <= 160 and architecture(device) == 90 else 64
    return Config(BLOCK_L=rows, BLOCK_N=32, num_warps=8, num_stages=1)


def most_registers(
    d: int, cuts: Sequence[tuple[int, ...] | None], has_more: bool, device: torch.device
) -> int | None:
    """What the forward kernel is held to where the compiler would take a few registers more than
    three programs of a multiprocessor have, and needs none of them: 77 keys of d 40 on Hopper.

    has_more: It has masks, a map of alpha, a projection or a second result, and may spill.
    """
    if SPILLS_AT_168 or has_more or architecture(device) != 90:
        return None
    of_clip = all(cut is None or 0 < sum(cut) <= 80 for cut in cuts)
    return 168 if 32 < d <= 48 and of_clip else None


def backward_queries_config(d: int, dtype: torch.dtype) -> Config:
    if dtype == torch.float32:
        return Config(BLOCK_L=16, BLOCK_N=16, num_warps=4, num_stages=1)
    return Config(BLOCK_L=64, BLOCK_N=32, num_warps=4 if d <= 128 else 8, num_stages=1)


def gradients_config(d: int, dtype: torch.dtype) -> Config:
    """Of the kernel that rebuilds Z+ and Z- of the projected rule, and has dO beside them."""
    if dtype == torch.float32:
        return Config(BLOCK_L=16, BLOCK_N=16, num_warps=4, num_stages=1)
    return Config(BLOCK_L=64, BLOCK_N=32, num_warps=4 if d <= 80 else 8, num_stages=1)


def backward_keys_config(d: int, dtype: torch.dtype) -> Config:
    """BLOCK_N is the most keys that one program owns."""
    if dtype == torch.float32:
        return Config(BLOCK_L=16, BLOCK_N=16, num_warps=4, num_stages=1)
    # on Hopper 8 warps would make every product of these blocks twice
    if d <= 128:
        return Config(BLOCK_L=32, BLOCK_N=128 if d <= 64 else 64, num_warps=4, num_stages=1)
    return Config(BLOCK_L=32, BLOCK_N=16, num_warps=4, num_stages=1)


def head_cut(d: int, streamed: bool = False) -> tuple[int, ...]:
    """Widths of the head_dim: one accumulator of 160 or 256 columns would not fit registers.

    Where keys are streamed one block of 128 takes fewer instructions than three for 112.
    """
    if streamed and 96 < d <= 128:
        return (128,)
    return cut(d, widest=64 if d > 128 else 128)


def resident_cut(n: int, d: int, q: torch.Tensor, widest: int = 160) -> tuple[int, ...] | None:
    """Widths of a prompt of n keys that stays on chip; () where it is streamed, None where it has
    no key.
    """
    if n == 0:
        return None
    # fp32 multiplies in registers, which a whole prompt does not fit
    if q.dtype == torch.float32 or n > 128 or d > widest:
        return ()
    # Triton 3.6 compiles wider ones to nothing on Blackwell: they overrun its tensor memory
    if d > 128 and architecture(q.device) >= 100:
        return ()
    widths = cut(n)
    fits = resident_bytes(d, widths, q.dtype, stages=1) <= shared_memory(q.device)
    return widths if fits else ()


def resident_bytes(d: int, widths: tuple[int, ...], dtype: torch.dtype, stages: int) -> int:
    """Shared memory of a program that holds two prompts as long as this one, and its queries.

    As long: the other prompt passed the same test, so their sum fits whatever it is.
    """
    row = sum(head_cut(d)) * dtype.itemsize
    keys_and_values = 2 * 2 * sum(widths) * row
    return keys_and_values + stages * RESIDENT_BLOCK_L * row + SCRATCH


# On a CPU the kernels run in Triton's interpreter, as on a Hopper GPU with one multiprocessor.


@functools.cache
def architecture(device: torch.device) -> int:
    """Compute capability, 90 for 9.0."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may use."""
    if device.type != "cuda":
        return 227 * 1024
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
