"""Tensor maps: what the TMA unit knows about a tensor; cuTensorMapEncodeTiled in the CUDA driver.

A map is 128 opaque bytes for the kernel. Here they hold a mark and the number of a TensorMap in
the memory's list.
"""

from dataclasses import dataclass

import numpy as np
import torch

from .memory import Memory

_MARK = b"tensormp"
_BYTES = 128


@dataclass(frozen=True)
class TensorMap:
    """Innermost dimension first, as CUDA has it; strides in bytes; swizzle 0, 32, 64 or 128."""

    address: int
    item: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int
    fill_nan: bool = False

    def __post_init__(self):
        row = self.box[0] * self.item.itemsize
        if not 1 <= len(self.shape) <= 5 or len(self.box) != len(self.shape):
            raise ValueError(f"a tensor map has 1 to 5 dimensions, got {self.shape}, {self.box}")
        if self.address % 16 or any(s % 16 for s in self.strides[1:]):
            raise ValueError(f"address and strides must be multiples of 16 bytes: {self.strides}")
        if self.strides[0] != self.item.itemsize:
            raise ValueError("the innermost dimension must be contiguous")
        if row % 16 or any(not 1 <= n <= 256 for n in self.box):
            raise ValueError(f"box {self.box} of {self.item}: rows of 16 bytes, at most 256 wide")
        if self.swizzle not in (0, 32, 64, 128) or (self.swizzle and row > self.swizzle):
            raise ValueError(f"a box row of {row} bytes does not fit swizzle {self.swizzle}")

    @property
    def box_bytes(self) -> int:
        return int(np.prod(self.box)) * self.item.itemsize

    def elements(self, start: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """``(byte addresses, inside)`` of a box at ``start``, in box order (innermost fastest)."""
        # one axis per dimension, outermost first
        address = np.int64(self.address)
        inside = np.True_
        for d, n in enumerate(self.box):
            position = start[d] + np.arange(n)
            axis = [1] * len(self.box)
            axis[len(self.box) - 1 - d] = n
            position = position.reshape(axis)
            inside = inside & (position >= 0) & (position < self.shape[d])
            address = address + position * self.strides[d]
        return address.reshape(-1), inside.reshape(-1)


def tensor_map(
    memory: Memory,
    address: int,
    tensor: torch.Tensor,
    box: tuple[int, ...],
    swizzle: int = 0,
    fill_nan: bool = False,
) -> bytes:
    """A map of ``tensor`` at ``address``, as the 128 bytes of a kernel argument.

    ``box`` is in the order of the tensor's dimensions, outermost first. A dimension of size 1 may
    have any stride.
    """
    item = np.dtype(f"u{tensor.element_size()}")
    strides = [s * tensor.element_size() for s in tensor.stride()]
    strides = [
        -(-s // 16) * 16 if n == 1 and i < len(strides) - 1 else s
        for i, (s, n) in enumerate(zip(strides, tensor.shape, strict=True))
    ]
    entry = TensorMap(
        address, item, tuple(reversed(tensor.shape)), tuple(reversed(strides)),
        tuple(reversed(box)), swizzle, fill_nan,
    )  # fmt: skip
    memory.tensor_maps.append(entry)
    number = len(memory.tensor_maps) - 1
    return (_MARK + number.to_bytes(8, "little")).ljust(_BYTES, b"\0")


def find(memory: Memory, raw: bytes) -> TensorMap | None:
    """The map behind the bytes a kernel points at."""
    if raw[:8] != _MARK:
        return None
    return memory.tensor_maps[int.from_bytes(raw[8:16], "little")]
