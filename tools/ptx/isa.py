"""The instruction table: one decorated builder per instruction class.

A builder is called once per instruction and launch. It resolves operands to arrays and returns
``step(active)``, which executes the instruction for the threads ``active``: ``slice(None)`` for
all of them, else sorted indices. The step of a scheduling instruction (a branch, a barrier)
returns ``(pc, threads)``: where who goes on; None for nobody.
"""

from collections.abc import Callable
from dataclasses import dataclass

from .errors import Unsupported


@dataclass(frozen=True)
class Entry:
    build: Callable
    # "warp", "warpgroup": executed by complete ones only; "members": the last operand is the
    # membermask of the lanes that must be here
    together: str | None
    schedules: bool


TABLE: dict[str, Entry] = {}


def instruction(*names: str, together: str | None = None, schedules: bool = False) -> Callable:
    """Register a builder under opcode prefixes; the longest prefix of an opcode wins."""

    def register(build: Callable) -> Callable:
        for name in names:
            if name in TABLE:
                raise ValueError(f"{name} is registered twice")
            TABLE[name] = Entry(build, together, schedules)
        return build

    return register


def lookup(opcode: str) -> tuple[str, Entry, tuple[str, ...]]:
    """``(prefix, entry, modifiers)`` of an opcode such as ``ld.global.v4.b32``."""
    parts = opcode.split(".")
    for n in range(len(parts), 0, -1):
        prefix = ".".join(parts[:n])
        if prefix in TABLE:
            return prefix, TABLE[prefix], tuple(parts[n:])
    raise Unsupported(f"unknown instruction {opcode}")
