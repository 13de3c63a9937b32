"""Moves and conversions: mov with its pack and unpack forms, cvt, cvta; PTX ISA 9.7.9."""

import numpy as np

from .arithmetic import check_modifiers, flush, types_of
from .errors import Unsupported
from .formats import FORMATS, f32_to_bf16
from .isa import instruction
from .memory import LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW
from .parser import Register, Vector
from .wgmma import TensorCores


@instruction("mov")
def move(m, code, modifiers):
    check_modifiers(modifiers)
    (kind,) = types_of(modifiers)
    destination, source = code.operands
    if isinstance(destination, Vector):
        return _unpack(m, destination.items, source, kind)
    if isinstance(source, Vector):
        return _pack(m, destination, source.items, kind)
    get, put = m.read(source, kind), m.write(destination, kind)
    if isinstance(source, Register) and source.name in m.read_hooks:
        return _move_accumulator(m, destination, source, kind)
    return lambda active: put(active, get(active))


def _move_accumulator(m, destination, source, kind):
    """A compiler may rename a wgmma accumulator that is still in flight."""
    get, put = m.read(source, kind, hooked=False), m.write(destination, kind, hooked=False)
    cores, check = m.unit(TensorCores), m.write_hooks[destination.name]

    def step(active):
        # a copy over a copy in flight only renames again
        if not cores.in_flight(source.name, active):
            check(active)
        cores.copy(source.name, destination.name, active)
        put(active, get(active))

    return step


def _part(kind: str, count: int) -> str:
    return f"b{8 * FORMATS[kind].bytes // count}"


def _unpack(m, destinations, source, kind):
    part = _part(kind, len(destinations))
    puts = [m.write(d, part) for d in destinations]
    get = m.read_array(source, kind)

    def step(active):
        values = np.ascontiguousarray(get(active)).view(FORMATS[part].dtype)
        for i, put in enumerate(puts):
            put(active, values.reshape(-1, len(puts))[:, i])

    return step


def _pack(m, destination, sources, kind):
    part = _part(kind, len(sources))
    gets, put = [m.read(s, part) for s in sources], m.write(destination, kind)
    dtype, whole = FORMATS[part].dtype, FORMATS[kind].dtype

    def step(active):
        parts = np.empty((m.size(active), len(gets)), dtype)
        for i, get in enumerate(gets):
            parts[:, i] = get(active)
        put(active, parts.view(whole)[:, 0])

    return step


_WINDOW = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}


@instruction("cvta")
def convert_address(m, code, modifiers):
    """Generic addresses are the space's addresses, moved to the window of the space."""
    to_space = modifiers[0] == "to"
    space = modifiers[1 if to_space else 0].partition("::")[0]
    kind = modifiers[-1]
    window = np.uint64(_WINDOW.get(space, 0))
    get, put = m.read(code.operands[1], kind), m.write(code.operands[0], kind)
    if to_space:
        return lambda active: put(active, get(active) - window)
    return lambda active: put(active, get(active) + window)


@instruction("isspacep")
def is_space(m, code, modifiers):
    space = modifiers[0].partition("::")[0]
    get, put = m.read_array(code.operands[1], "u64"), m.write(code.operands[0], "pred")
    if space == "global":
        return lambda active: put(active, get(active) < np.uint64(SHARED_WINDOW))
    low = np.uint64(_WINDOW[space])
    return lambda active: put(active, (get(active) >= low) & (get(active) < low + np.uint64(2**47)))


@instruction("mapa")
def map_cluster_address(m, code, modifiers):
    """A cluster is one CTA here, so its only rank maps an address to itself."""
    kind = types_of(modifiers)[0]
    get, put = m.read(code.operands[1], kind), m.write(code.operands[0], kind)
    rank = m.read_array(code.operands[2], "u32")

    def step(active):
        if rank(active).any():
            raise Unsupported("mapa to another CTA: clusters are not modelled")
        put(active, get(active))

    return step


# ---- cvt -------------------------------------------------------------------------------------

_ROUND_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _float_to_int(kind: str, rounding):
    """Saturates, and turns NaN into 0 (into 2^63 for 64-bit targets, as the hardware does)."""
    fmt = FORMATS[kind]
    info = np.iinfo(fmt.dtype)
    nan = fmt.dtype(0) if fmt.bytes < 8 else fmt.dtype(1 << 63 if not fmt.is_signed else -(1 << 63))

    def convert(x):
        x = rounding(np.asarray(x, np.float64))
        # 2^63 and 2^64 are floats, the integers below them are not
        inside = np.clip(x, float(info.min), np.nextafter(float(info.max) + 1, 0))
        result = np.nan_to_num(inside).astype(fmt.dtype)
        result = np.where(x >= float(info.max), fmt.dtype(info.max), result)
        return np.where(np.isnan(x), nan, result)

    return convert


def _toward_zero(kind: str):
    """f32 -> kind with rounding .rz."""
    if kind == "bf16":
        # the decoded value is exact in bf16, so encode() keeps it
        return lambda x: (np.asarray(x, np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(
            np.float32
        )
    if kind == "f16":

        def truncate(x):
            half = np.asarray(x).astype(np.float16)
            away = np.abs(half.astype(np.float64)) > np.abs(x)
            return np.where(away, np.nextafter(half, np.float16(0)), half)

        return truncate
    raise Unsupported(f"cvt.rz to {kind}")


def _to_tf32(x):
    """Round to 10 mantissa bits, nearest with ties away (rna)."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(x), rounded.view(np.float32), x)


@instruction("cvt")
def convert(m, code, modifiers):
    kinds = types_of(modifiers)
    check_modifiers(
        modifiers, "rn", "rz", "rna", "ftz", "sat", "satfinite", "relu", *_ROUND_TO_INTEGER
    )
    if len(code.operands) == 3:
        return _convert_pair(m, code, kinds, modifiers)
    target, source = kinds
    to, origin = FORMATS[target], FORMATS[source]
    get, put = m.read(code.operands[1], source), m.write(code.operands[0], target)
    rounding = next((r for r in modifiers if r in _ROUND_TO_INTEGER), None)
    if to.is_float and rounding:
        compute = _ROUND_TO_INTEGER[rounding]
    elif target == "tf32":
        compute = _to_tf32
    elif to.is_float and "rz" in modifiers and to.item_bytes < origin.item_bytes:
        compute = _toward_zero(target)
    elif to.is_float:
        # bf16 is rounded when written; fp32 on the way there must not round fp64 first
        wide = np.float32 if to.decode else to.dtype
        compute = lambda x: np.asarray(x).astype(wide)  # noqa: E731
    elif origin.is_float:
        compute = _float_to_int(target, _ROUND_TO_INTEGER[rounding or "rzi"])
    elif "sat" in modifiers:
        out, into = np.iinfo(origin.dtype), np.iinfo(to.dtype)
        low, high = max(out.min, into.min), min(out.max, into.max)
        compute = lambda x: np.clip(x, low, high).astype(to.dtype)  # noqa: E731
    else:
        compute = lambda x: np.asarray(x).astype(to.dtype)  # noqa: E731
    clamp = "sat" in modifiers and to.is_float
    ftz = "ftz" in modifiers

    def step(active):
        x = get(active)
        if ftz and source == "f32":
            x = flush(x)
        x = compute(x)
        if clamp:
            # NaN becomes 0
            x = np.fmin(np.fmax(x, 0), 1)
        if "relu" in modifiers:
            x = np.maximum(x, 0)
        put(active, x)

    return step


def _convert_pair(m, code, kinds, modifiers):
    """cvt.rn.bf16x2.f32 d, a, b: a goes into the upper half."""
    target, source = kinds
    if target not in ("f16x2", "bf16x2") or source != "f32" or "rn" not in modifiers:
        raise Unsupported("this two-operand cvt")
    upper, lower = (m.read(op, "f32") for op in code.operands[1:3])
    put = m.write(code.operands[0], "b32")
    encode = f32_to_bf16 if target == "bf16x2" else lambda x: x.astype(np.float16).view(np.uint16)
    relu = "relu" in modifiers

    def step(active):
        halves = np.empty((m.size(active), 2), np.uint16)
        for i, x in enumerate((lower(active), upper(active))):
            halves[:, i] = encode(np.maximum(x, 0) if relu else x)
        put(active, halves.view(np.uint32)[:, 0])

    return step
