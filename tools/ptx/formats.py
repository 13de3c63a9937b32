"""PTX types as numpy arrays: how the bits of a register or of memory are viewed and computed with.

A register is stored as unsigned bits. A Format views these bits; bf16, which numpy lacks, is
decoded to fp32 before arithmetic and rounded to nearest even after it. Packed types have a
trailing axis of 2.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# how many bytes -> the dtype that moves them; complex128 is numpy's plain 16-byte item, it is
# copied and never computed with
WORD = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x: np.ndarray) -> np.ndarray:
    """Round to nearest even; every NaN becomes the canonical 0x7fff (PTX ISA, cvt)."""
    x = np.asarray(x, np.float32)
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(np.uint16))


def f32_to_f16(x: np.ndarray) -> np.ndarray:
    return np.asarray(x).astype(np.float16)


@dataclass(frozen=True)
class Format:
    """``dtype`` views the bits of one element; ``lanes`` elements share a register."""

    name: str
    dtype: type
    lanes: int = 1
    decode: Callable | None = None
    encode: Callable | None = None

    @property
    def item_bytes(self) -> int:
        return np.dtype(self.dtype).itemsize

    @property
    def bytes(self) -> int:
        return self.item_bytes * self.lanes

    @property
    def is_float(self) -> bool:
        return self.decode is not None or np.dtype(self.dtype).kind == "f"

    @property
    def is_signed(self) -> bool:
        return np.dtype(self.dtype).kind == "i"


_PLAIN = {
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64,
    "b128": np.complex128,
    "f16": np.float16, "f32": np.float32, "f64": np.float64,
    # tf32 keeps the fp32 layout
    "tf32": np.float32,
    "pred": np.bool_,
}  # fmt: skip

FORMATS = {name: Format(name, dtype) for name, dtype in _PLAIN.items()} | {
    "f16x2": Format("f16x2", np.float16, 2),
    "bf16": Format("bf16", np.uint16, 1, bf16_to_f32, f32_to_bf16),
    "bf16x2": Format("bf16x2", np.uint16, 2, bf16_to_f32, f32_to_bf16),
}


def low_part(array: np.ndarray, fmt: Format) -> np.ndarray:
    """View ``[T]`` register bits as ``fmt``: the low bytes where the register is wider."""
    if fmt.dtype is np.bool_ or array.dtype == np.bool_:
        return array
    ratio = array.dtype.itemsize // fmt.item_bytes
    if ratio == 0:
        raise ValueError(f"a {array.dtype.itemsize}-byte register cannot hold {fmt.name}")
    view = array.view(fmt.dtype)
    if ratio == 1:
        return view
    view = view.reshape(-1, ratio)
    return view[:, : fmt.lanes] if fmt.lanes > 1 else view[:, 0]
