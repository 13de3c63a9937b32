"""Run a few lines of PTX on arrays: one thread per element.

d = ptx.evaluate("add.sat.s32 d, a, b;", d="s32", a=("s32", x), b=("s32", y))
"""

import numpy as np
import torch

from .formats import FORMATS
from .launch import LoadedKernel, load
from .memory import Memory

_HEADER = ".version 8.4\n.target sm_90a\n.address_size 64\n"


def module(*entries: str) -> str:
    """A PTX module, as ptxas takes it."""
    return _HEADER + "\n".join(entries)


def entry(code: str, d: str, kinds: dict[str, str], name: str = "snippet") -> str:
    """A kernel that loads ``a``, ``b``, ... of the thread, runs ``code`` and stores ``d``."""
    parameters = ", ".join(f".param .u64 p_{n}" for n in [*kinds, "d"])
    lines = [
        ".reg .b32 %i; .reg .b64 %at, %base;",
        *(f".reg .{_storage(kind)} {n};" for n, kind in {**kinds, "d": d}.items()),
        "mov.u32 %i, %tid.x;",
    ]
    for n, kind in kinds.items():
        lines += [*_address(n, kind), f"ld.global.{_moved(kind)} {n}, [%at];"]
    # what is not assigned shows as zero
    lines += [f"mov.{_storage(d)} d, 0;", "{", code, "}"]
    lines += [*_address("d", d), f"st.global.{_moved(d)} [%at], d;", "ret;"]
    return f".visible .entry {name}({parameters})\n{{\n" + "\n".join(lines) + "\n}\n"


def _address(name: str, kind: str) -> list[str]:
    return [
        f"ld.param.u64 %base, [p_{name}];",
        f"mad.wide.u32 %at, %i, {FORMATS[kind].bytes}, %base;",
    ]


def _storage(kind: str) -> str:
    """The type of a register: the bits of ``kind``, at least 16 of them."""
    return f"b{max(8 * FORMATS[kind].bytes, 16)}"


def _moved(kind: str) -> str:
    return kind if FORMATS[kind].bytes == 1 else _storage(kind)


def evaluate(code: str, d: str, **inputs: tuple[str, np.ndarray]) -> np.ndarray:
    """The values of ``d``; bf16 and packed types as their bits."""
    count = max(len(values) for _, values in inputs.values())
    # whole warps
    threads = -(-count // 32) * 32
    memory, addresses = Memory(), []
    for kind, values in inputs.values():
        padded = np.resize(np.asarray(values), threads)
        raw = np.ascontiguousarray(padded).view(np.uint8)
        if raw.size != threads * FORMATS[kind].bytes:
            raise ValueError(f"{kind} needs {FORMATS[kind].bytes} bytes per thread")
        addresses.append(memory.upload(torch.from_numpy(raw.copy())))
    result = torch.zeros(threads * FORMATS[d].bytes, dtype=torch.uint8)
    addresses.append(memory.upload(result))
    kinds = {name: kind for name, (kind, _) in inputs.items()}
    load(module(entry(code, d, kinds))).launch((1,), threads, addresses, memory)
    raw = memory.download(addresses[-1], result).numpy()
    packed = FORMATS[d].lanes > 1 or FORMATS[d].decode is not None
    return raw.view(f"u{FORMATS[d].bytes}" if packed else FORMATS[d].dtype)[:count]


def program(body: str, *pointers: str, shared_bytes: int = 0) -> LoadedKernel:
    """A kernel of one's own: ``%t`` is the thread, ``%name`` a pointer argument per name.

    Free registers are ``%r`` (b32), ``%d`` (b64), ``%h`` (b16), ``%f`` (f32) and ``%p``; shared
    memory, where asked for, is ``buffer``.
    """
    lines = [
        ".reg .b32 %t, %r<64>; .reg .b64 %d<32>; .reg .b16 %h<16>; .reg .f32 %f<64>;",
        ".reg .pred %p<16>;",
        f".shared .align 1024 .b8 buffer[{shared_bytes}];" if shared_bytes else "",
        *(f".reg .b64 %{name}; ld.param.u64 %{name}, [p_{name}];" for name in pointers),
        "mov.u32 %t, %tid.x;",
        body,
        "ret;",
    ]
    parameters = ", ".join(f".param .u64 p_{name}" for name in pointers)
    return load(module(f".visible .entry program({parameters})\n{{\n" + "\n".join(lines) + "\n}\n"))
