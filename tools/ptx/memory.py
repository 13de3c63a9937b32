"""The memories of a launch: global memory with guard zones, and per-CTA and per-thread arrays.

Bytes nobody wrote are 0xff, a NaN in every float type, so what is read too early or too far shows
up in the result even where no check raises.
"""

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
import torch

from .errors import Misaligned, OutOfBounds
from .formats import WORD

# where cvta puts the other spaces in the generic address space (PTX ISA 5.1)
SHARED_WINDOW = 1 << 48
LOCAL_WINDOW = 1 << 49
PARAM_WINDOW = 1 << 50

POISON = 0xFF


def check_alignment(address: np.ndarray, size: int, threads: np.ndarray) -> None:
    bad = np.flatnonzero(address & (size - 1))
    if bad.size:
        raise Misaligned(
            f"address {address[bad[0]]:#x} is not a multiple of {size}", int(threads[bad[0]])
        )


@dataclass
class Allocation:
    start: int
    end: int
    label: str
    # bool per byte; False between the rows of a strided tensor: may be read, not written
    owned: np.ndarray | None = None


class Memory:
    """Global memory. Every tensor lies between guard zones, and no access may leave a tensor."""

    BASE = 1 << 40
    GUARD = 1024

    def __init__(self, capacity: int = 1 << 22):
        self.bytes = np.full(capacity, POISON, np.uint8)
        self.top = self.GUARD
        self.allocations: list[Allocation] = []
        self.starts: list[int] = []
        self.tensor_maps: list = []

    def allocate(self, size: int, label: str = "", offset: int = 0) -> int:
        """An address ``offset`` bytes after a 256-byte boundary, with guards on both sides."""
        start = -(-self.top // 256) * 256 + offset
        self.top = start + size + self.GUARD
        if self.top > self.bytes.size:
            grown = np.full(max(self.top, 2 * self.bytes.size), POISON, np.uint8)
            grown[: self.bytes.size] = self.bytes
            self.bytes = grown[: grown.size // 256 * 256]
        address = self.BASE + start
        self.allocations.append(Allocation(address, address + size, label))
        self.starts.append(address)
        return address

    def upload(self, tensor: torch.Tensor, label: str = "") -> int:
        """Copy a tensor with its strides; the address keeps the alignment it has in its storage."""
        span = _span(tensor)
        item = tensor.element_size()
        label = label or f"{tuple(tensor.shape)} {tensor.dtype}"
        address = self.allocate(span * item, label, tensor.storage_offset() * item % 256)
        if tensor.numel() == 0:
            return address
        owned = torch.zeros(span, dtype=torch.bool)
        owned.as_strided(tensor.shape, tensor.stride()).fill_(True)
        raw = tensor.detach().as_strided((span,), (1,)).contiguous().view(torch.uint8).numpy()
        here = self._slice(address, span * item)
        here[:] = raw
        if not owned.all():
            mask = owned.numpy().repeat(item)
            here[~mask] = POISON
            self.allocations[-1].owned = mask
        return address

    def download(self, address: int, like: torch.Tensor) -> torch.Tensor:
        """The tensor at ``address``, with the shape, strides and dtype of ``like``."""
        size = _span(like) * like.element_size()
        raw = torch.from_numpy(self._slice(address, size).copy())
        return raw.view(like.dtype).as_strided(like.shape, like.stride())

    def words(self, size: int) -> np.ndarray:
        return self.bytes.view(WORD[size])

    def check(self, address: np.ndarray, size: int, threads: np.ndarray, write: bool) -> None:
        """Every access of ``size`` bytes must lie in one allocation."""
        if not address.size:
            return
        low, high = int(address.min()), int(address.max())
        i = bisect_right(self.starts, low) - 1
        if i < 0 or high + size > self.allocations[i].end:
            self._check_each(address, size, threads, write)
        elif write and self.allocations[i].owned is not None:
            self._check_owned(self.allocations[i], address, size, threads)

    def _check_each(self, address, size, threads, write) -> None:
        index = np.searchsorted(np.array(self.starts), address, "right") - 1
        ends = np.array([a.end for a in self.allocations] or [0])
        bad = np.flatnonzero((index < 0) | (address + size > ends[index]))
        if bad.size:
            at = int(address[bad[0]])
            raise OutOfBounds(
                f"{'store to' if write else 'load from'} {at:#x} ({size} bytes): "
                f"{self._describe(at)}; {bad.size} of {address.size} threads",
                int(threads[bad[0]]),
            )
        for i in np.unique(index) if write else ():
            if self.allocations[i].owned is not None:
                here = index == i
                self._check_owned(self.allocations[i], address[here], size, threads[here])

    def _check_owned(self, allocation, address, size, threads) -> None:
        offset = address - allocation.start
        bad = np.flatnonzero(~(allocation.owned[offset] & allocation.owned[offset + size - 1]))
        if bad.size:
            raise OutOfBounds(
                f"store between the rows of {allocation.label}, byte {offset[bad[0]]}",
                int(threads[bad[0]]),
            )

    def _describe(self, address: int) -> str:
        if not self.allocations:
            return "nothing is allocated"
        near = min(self.allocations, key=lambda a: max(a.start - address, address + 1 - a.end))
        if address < near.start:
            return f"{near.start - address} bytes before {near.label}"
        return f"{address - near.end} bytes past the end of {near.label}"

    def _slice(self, address: int, size: int) -> np.ndarray:
        return self.bytes[address - self.BASE : address - self.BASE + size]


def _span(tensor: torch.Tensor) -> int:
    """Elements from the first to the last one, gaps included."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


class PrivateMemory:
    """``rows`` equal arrays: shared memory (a row per CTA) or local memory (a row per thread)."""

    def __init__(self, rows: int, size: int, base: int, name: str):
        self.base, self.size, self.name = base, size, name
        self.pitch = max(-(-size // 128) * 128, 128)
        self.bytes = np.full((rows, self.pitch), POISON, np.uint8)

    def words(self, size: int) -> np.ndarray:
        return self.bytes.reshape(-1).view(WORD[size])

    def offsets(self, address: np.ndarray, size: int, threads: np.ndarray) -> np.ndarray:
        """Checked byte offsets of accesses of ``size`` bytes."""
        offset = address - self.base
        if offset.size and (int(offset.min()) < 0 or int(offset.max()) + size > self.size):
            bad = np.flatnonzero((offset < 0) | (offset + size > self.size))
            raise OutOfBounds(
                f"{self.name} address {address[bad[0]]:#x} ({size} bytes) is outside "
                f"[{self.base:#x}, {self.base + self.size:#x}); "
                f"{bad.size} of {offset.size} threads",
                int(threads[bad[0]]),
            )
        return offset

    def index(self, rows: np.ndarray, address: np.ndarray, size: int, threads) -> np.ndarray:
        """Indices into ``words(size)``."""
        offset = self.offsets(address, size, threads)
        check_alignment(address, size, threads)
        return rows * (self.pitch // size) + offset // size
