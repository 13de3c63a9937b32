"""Operands: registers, constants, names and addresses as functions of the active threads.

A builder asks once, ``read = m.read(operand, "f32")``, and a step calls ``read(active)``. For
registers that is a view of the array, indexed.
"""

from collections.abc import Callable

import numpy as np

from .errors import Unsupported
from .formats import FORMATS, WORD, Format, low_part
from .memory import POISON
from .parser import SINK, Address, Immediate, Register, Special, Symbol, Vector
from .special import special_registers

EVERYONE = slice(None)


class Operands:
    """What a Machine knows about names. Uses its ``count`` and ``threads``."""

    count: int
    all_threads: np.ndarray

    def __init__(self):
        self.registers: dict[str, np.ndarray] = {}
        self.specials: dict[str, np.ndarray] = {}
        self.symbols: dict[str, int] = {}
        # register -> check(active), called before a read or a write by an ordinary instruction
        self.read_hooks: dict[str, Callable] = {}
        self.write_hooks: dict[str, Callable] = {}

    def threads(self, active) -> np.ndarray:
        return self.all_threads if active is EVERYONE else active

    def size(self, active) -> int:
        return self.count if active is EVERYONE else len(active)

    def register(self, operand: Register) -> np.ndarray:
        array = self.registers.get(operand.name)
        if array is None:
            if operand.type == "pred":
                array = np.zeros(self.count, np.bool_)
            else:
                # a NaN until something is written
                size = FORMATS[operand.type].bytes
                array = np.full(self.count * size, POISON, np.uint8).view(WORD[size])
            self.registers[operand.name] = array
        return array

    def read(self, operand, kind: str, hooked: bool = True) -> Callable:
        """``active -> values``; an array ``[active]`` (packed: ``[active, 2]``) or a scalar."""
        fmt = FORMATS[kind]
        check = self.read_hooks.get(operand.name) if isinstance(operand, Register) else None
        if check and hooked:
            plain = self.read(operand, kind, hooked=False)

            def checked(active):
                check(active)
                return plain(active)

            return checked
        if isinstance(operand, Special):
            view = self.special(operand.name).astype(fmt.dtype)
        elif isinstance(operand, Register):
            view = low_part(self.register(operand), fmt)
        else:
            value = self.constant(operand, fmt)
            return lambda active: value
        if fmt.decode:
            return lambda active: fmt.decode(view[active])
        if isinstance(operand, Register) and operand.negated:
            return lambda active: ~view[active]
        return view.__getitem__

    def read_array(self, operand, kind: str, hooked: bool = True) -> Callable:
        """As ``read``, with constants spread over the threads."""
        read = self.read(operand, kind, hooked)
        if isinstance(operand, Register | Special):
            return read
        return lambda active: np.broadcast_to(read(active), self.size(active))

    def write(self, operand, kind: str, hooked: bool = True) -> Callable:
        """``(active, values) -> None``; a wider register is sign- or zero-extended."""
        if operand == SINK:
            return lambda active, values: None
        if not isinstance(operand, Register):
            raise Unsupported(f"{operand} is not a register")
        check = self.write_hooks.get(operand.name)
        if check and hooked:
            plain = self.write(operand, kind, hooked=False)

            def checked(active, values):
                check(active)
                plain(active, values)

            return checked
        fmt, array = FORMATS[kind], self.register(operand)
        if array.dtype == np.bool_ or array.dtype.itemsize == fmt.bytes:
            view = low_part(array, fmt)
        elif array.dtype.itemsize > fmt.bytes and not fmt.is_float:
            view = array.view(f"{'i' if fmt.is_signed else 'u'}{array.dtype.itemsize}")
        else:
            raise Unsupported(f"cannot write {kind} to a .{operand.type} register")
        if fmt.encode:
            return lambda active, values: view.__setitem__(active, fmt.encode(values))
        return view.__setitem__

    def constant(self, operand, fmt: Format):
        if isinstance(operand, Symbol):
            return fmt.dtype(self.symbol(operand.name))
        if not isinstance(operand, Immediate):
            raise Unsupported(f"{operand} is not a value")
        if fmt.dtype is np.bool_:
            return np.bool_(operand.value)
        bits = operand.bits if operand.bits is not None else operand.value
        if isinstance(bits, float) or (fmt.dtype is np.float64 and operand.bits is not None):
            return fmt.dtype(operand.value)
        raw = np.array(int(bits) & (1 << 8 * fmt.bytes) - 1, f"u{fmt.bytes}")
        value = raw.reshape(1).view(fmt.dtype)
        value = value if fmt.lanes > 1 else value[0]
        return fmt.decode(value) if fmt.decode else value

    def symbol(self, name: str) -> int:
        if name not in self.symbols:
            raise Unsupported(f"unknown name {name}")
        return self.symbols[name]

    def address(self, operand: Address) -> Callable:
        """``active -> int64 [active]``."""
        base, offset = operand.base, np.int64(operand.offset)
        if isinstance(base, Register):
            view = self.register(base)
            return lambda active: view[active].astype(np.int64) + offset
        start = 0 if base is None else self.symbol(base.name)
        return lambda active: np.full(self.size(active), start + operand.offset, np.int64)

    def vector(self, operand) -> tuple:
        return operand.items if isinstance(operand, Vector) else (operand,)

    def special(self, name: str) -> np.ndarray:
        if not self.specials:
            self.specials = special_registers(self)
        if name not in self.specials:
            raise Unsupported(f"unknown special register {name}")
        return self.specials[name]
