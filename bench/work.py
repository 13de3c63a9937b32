"""The least that a call has to do, whoever does it: bytes, FLOPs, exponentials, instructions.

Bytes are compulsory ones: every input read once, every result written once. FLOPs count unpadded
products, a multiply-add as 2. Instructions are per lane and per score element, the ones that no
implementation of softmax attention can leave out; they are a bound for GPUs, whose arithmetic
competes with the matrix unit for issue slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nasa_kernels.testing import Shape

# scale and shift, maximum, sum, half a packed conversion of the weight; the exponential besides
FORWARD_INSTRUCTIONS = 4.5
# scale and shift, maximum, sum, exponential; dP P summed; P (dP - u); P and dS packed
BACKWARD_INSTRUCTIONS = 8.0


@dataclass(frozen=True)
class Work:
    """A unit as a row has it."""

    bytes: int
    flops: int
    exponentials: int
    instructions: int


def attention_work(
    shape: Shape, dtype: torch.dtype, direction: str = "forward", guided: bool = True
) -> Work:
    """Forward: reads Q and both K, V, writes O. Backward: reads these but O, and dO; writes dQ and
    both dK, dV. Without guidance there is no negative prompt."""
    keys = shape.n_pos + (shape.n_neg if guided else 0)
    width = shape.b * shape.h * shape.d
    scores = shape.b * shape.h * shape.l * keys
    if direction == "forward":
        elements, products = width * (2 * shape.l + 2 * keys), 2
        instructions = FORWARD_INSTRUCTIONS
    else:
        elements, products = width * (3 * shape.l + 4 * keys), 5
        instructions = BACKWARD_INSTRUCTIONS
    return Work(
        bytes=elements * dtype.itemsize,
        flops=products * 2 * scores * shape.d,
        exponentials=scores,
        instructions=int(instructions * scores),
    )
