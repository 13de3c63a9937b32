"""Integer and floating point arithmetic, comparison and selection; PTX ISA 9.7.1 to 9.7.7.

Floating point is rounded to nearest even. The approximate units (ex2, lg2, rcp, ...) are computed
in fp64 and rounded once, so a result here is the best the hardware could give.
"""

from collections.abc import Callable

import numpy as np

from .errors import Unsupported
from .formats import FORMATS, Format
from .isa import instruction

# roundings that change nothing: the default, and what approximate units may do
_NEAREST = {"rn", "approx", "full", "ftz"}


def types_of(modifiers: tuple[str, ...]) -> list[str]:
    return [m for m in modifiers if m in FORMATS]


def check_modifiers(modifiers: tuple[str, ...], *allowed: str) -> None:
    """What a builder does not know it must not ignore."""
    for m in modifiers:
        if m not in FORMATS and m not in allowed:
            raise Unsupported(f"unknown modifier .{m}")


def flush(x):
    """ftz: subnormal fp32 becomes a zero of the same sign."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def _flushed(compute: Callable) -> Callable:
    return lambda *values: flush(compute(*(flush(v) for v in values)))


def elementwise(m, code, kinds: tuple[str, ...], compute: Callable, ftz: bool = False) -> Callable:
    """``dst = compute(*sources)``; ``kinds`` are the types of dst and of every source."""
    put = m.write(code.operands[0], kinds[0])
    sources = [m.read(op, k) for op, k in zip(code.operands[1:], kinds[1:], strict=True)]
    if ftz:
        compute = _flushed(compute)
    # unrolled: this is the interpreter's inner loop
    if len(sources) == 1:
        (a,) = sources
        return lambda active: put(active, compute(a(active)))
    if len(sources) == 2:
        a, b = sources
        return lambda active: put(active, compute(a(active), b(active)))
    if len(sources) == 3:
        a, b, c = sources
        return lambda active: put(active, compute(a(active), b(active), c(active)))
    return lambda active: put(active, compute(*(s(active) for s in sources)))


# ---- add, sub, mul, min, max, and, or, ... ---------------------------------------------------


def _divide(a, b):
    """Truncates; x / 0 is all ones, as the hardware has it."""
    zero = b == 0
    safe = np.where(zero, b.dtype.type(1), b)
    quotient = a // safe
    if a.dtype.kind == "i":
        quotient = quotient + ((a % safe != 0) & ((a < 0) != (safe < 0)))
    return np.where(zero, a.dtype.type(0) - a.dtype.type(1), quotient)


def _remainder(a, b):
    zero = b == 0
    return np.where(zero, a, np.fmod(a, np.where(zero, b.dtype.type(1), b)))


_INTEGER = {
    "add": np.add, "sub": np.subtract, "div": _divide, "rem": _remainder,
    "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip
# min and max drop a NaN (fmin), unless .NaN says otherwise
_FLOAT = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.true_divide,
    "min": np.fmin, "max": np.fmax,
}  # fmt: skip


def _half_safe(fmt: Format, compute: Callable) -> Callable:
    """fp16 arithmetic through fp32: one rounding, and numpy is faster there."""
    if fmt.dtype is not np.float16:
        return compute
    return lambda *xs: compute(*(x.astype(np.float32) for x in xs)).astype(np.float16)


@instruction("add", "sub", "div", "rem", "min", "max", "and", "or", "xor")
def binary(m, code, modifiers):
    name = code.opcode.partition(".")[0]
    (kind,) = types_of(modifiers)
    fmt = FORMATS[kind]
    if not fmt.is_float:
        check_modifiers(modifiers)
        return elementwise(m, code, (kind,) * 3, _INTEGER[name])
    check_modifiers(modifiers, *_NEAREST, "NaN")
    compute = {"min": np.minimum, "max": np.maximum}[name] if "NaN" in modifiers else _FLOAT[name]
    return elementwise(m, code, (kind,) * 3, _half_safe(fmt, compute), "ftz" in modifiers)


_WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


def _high_half(kind: str) -> Callable:
    fmt = FORMATS[kind]
    if fmt.bytes == 8:
        # Python integers: numpy has no 128-bit type
        return lambda a, b: ((a.astype(object) * b.astype(object)) >> 64).astype(fmt.dtype)
    wide = FORMATS[_WIDER[kind]].dtype
    shift = wide(8 * fmt.bytes)
    return lambda a, b: (a.astype(wide) * b.astype(wide) >> shift).astype(fmt.dtype)


@instruction("mul", "mul24")
def multiply(m, code, modifiers):
    (kind,) = types_of(modifiers)
    fmt = FORMATS[kind]
    if fmt.is_float:
        check_modifiers(modifiers, *_NEAREST)
        return elementwise(m, code, (kind,) * 3, _half_safe(fmt, np.multiply), "ftz" in modifiers)
    check_modifiers(modifiers, "lo", "hi", "wide")
    if "wide" in modifiers:
        wide = FORMATS[_WIDER[kind]].dtype
        compute = lambda a, b: a.astype(wide) * b.astype(wide)  # noqa: E731
        return elementwise(m, code, (_WIDER[kind], kind, kind), compute)
    return elementwise(m, code, (kind,) * 3, _high_half(kind) if "hi" in modifiers else np.multiply)


def _fused(fmt: Format) -> Callable:
    """fma with one rounding: fp32 through fp64, where the product of two fp32 is exact."""
    if fmt.dtype is np.float64:
        return lambda a, b, c: a * b + c
    narrow = np.float16 if fmt.dtype is np.float16 else np.float32
    return lambda a, b, c: (a.astype(np.float64) * b + c).astype(narrow)


@instruction("fma", "mad")
def multiply_add(m, code, modifiers):
    (kind,) = types_of(modifiers)
    fmt = FORMATS[kind]
    if fmt.is_float:
        check_modifiers(modifiers, *_NEAREST, "relu")
        fused = _fused(fmt)
        relu = (lambda a, b, c: np.maximum(fused(a, b, c), 0)) if "relu" in modifiers else fused
        return elementwise(m, code, (kind,) * 4, relu, "ftz" in modifiers)
    check_modifiers(modifiers, "lo", "hi", "wide")
    if "wide" in modifiers:
        wide = FORMATS[_WIDER[kind]].dtype
        return elementwise(
            m, code, (_WIDER[kind], kind, kind, _WIDER[kind]),
            lambda a, b, c: a.astype(wide) * b.astype(wide) + c,
        )  # fmt: skip
    product = _high_half(kind) if "hi" in modifiers else np.multiply
    return elementwise(m, code, (kind,) * 4, lambda a, b, c: product(a, b) + c)


# ---- one operand -----------------------------------------------------------------------------


def _once_rounded(function: Callable) -> Callable:
    """fp64 inside, one rounding out."""
    return lambda x: function(x.astype(np.float64)).astype(x.dtype)


_UNARY_FLOAT = {
    "ex2": np.exp2, "lg2": np.log2, "rcp": np.reciprocal, "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x), "sin": np.sin, "cos": np.cos, "tanh": np.tanh,
}  # fmt: skip


@instruction("ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "tanh")
def approximate(m, code, modifiers):
    check_modifiers(modifiers, *_NEAREST)
    (kind,) = types_of(modifiers)
    compute = _once_rounded(_UNARY_FLOAT[code.opcode.partition(".")[0]])
    return elementwise(m, code, (kind, kind), compute, "ftz" in modifiers and kind == "f32")


@instruction("neg", "abs", "not", "cnot")
def unary(m, code, modifiers):
    check_modifiers(modifiers, "ftz")
    (kind,) = types_of(modifiers)
    compute = {
        "neg": np.negative,
        "abs": np.abs,
        "not": np.logical_not if kind == "pred" else np.bitwise_not,
        "cnot": lambda a: (a == 0).astype(a.dtype),
    }[code.opcode.partition(".")[0]]
    return elementwise(m, code, (kind, kind), compute, "ftz" in modifiers and kind == "f32")


@instruction("copysign")
def copysign(m, code, modifiers):
    (kind,) = types_of(modifiers)
    return elementwise(m, code, (kind,) * 3, lambda sign, x: np.copysign(x, sign))


# ---- comparison and selection ----------------------------------------------------------------

# ordered: false for NaN. The -u forms are true for NaN, lo..hs are unsigned lt..ge.
_ORDERED = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
    "eq": np.equal,
}  # fmt: skip
_OPPOSITE = {"ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt"}


def _unordered(a, b):
    return np.isnan(a) | np.isnan(b)


def comparison(name: str, is_float: bool) -> Callable:
    if name in _ORDERED:
        return _ORDERED[name]
    if name in _OPPOSITE:
        opposite = _ORDERED[_OPPOSITE[name]]
        return lambda a, b: ~opposite(a, b)
    if name == "ne":
        return (lambda a, b: (a != b) & ~_unordered(a, b)) if is_float else np.not_equal
    table = {
        "equ": lambda a, b: (a == b) | _unordered(a, b),
        "neu": np.not_equal,
        "num": lambda a, b: ~_unordered(a, b),
        "nan": _unordered,
    }
    if name not in table:
        raise Unsupported(f"unknown comparison .{name}")
    return table[name]


_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@instruction("setp", "set")
def compare(m, code, modifiers):
    name, *rest = modifiers
    kinds = types_of(rest)
    combine = next((_COMBINE[r] for r in rest if r in _COMBINE), None)
    check_modifiers(rest, "ftz", *_COMBINE)
    source = kinds[-1]
    if FORMATS[source].lanes != 1:
        raise Unsupported("a packed comparison")
    test = comparison(name, FORMATS[source].is_float)
    a, b = m.read_array(code.operands[1], source), m.read(code.operands[2], source)
    extra = m.read(code.operands[3], "pred") if combine else None
    first, second = code.operands[0], None
    if code.opcode.startswith("setp"):
        if hasattr(first, "second"):
            first, second = first
        put = m.write(first, "pred")
        put_not = m.write(second, "pred") if second is not None else None
    else:
        fmt = FORMATS[kinds[0]]
        # set writes 1.0, or all ones for integer destinations
        true = fmt.dtype(1) if fmt.is_float else np.array(-1).astype(fmt.dtype)
        write = m.write(first, kinds[0])
        put = lambda active, v: write(active, np.where(v, true, fmt.dtype(0)))  # noqa: E731
        put_not = None

    def step(active):
        value = test(a(active), b(active))
        both = combine(value, extra(active)) if combine else value
        if put_not:
            opposite = combine(~value, extra(active)) if combine else ~value
            put(active, both)
            put_not(active, opposite)
        else:
            put(active, both)

    return step


@instruction("selp")
def select(m, code, modifiers):
    (kind,) = types_of(modifiers)
    return elementwise(m, code, (kind, kind, kind, "pred"), lambda a, b, p: _where(p, a, b))


def _where(p, a, b):
    # packed values have a trailing axis
    return np.where(p[:, None] if np.ndim(a) == 2 and np.ndim(p) == 1 else p, a, b)


@instruction("slct")
def select_by_sign(m, code, modifiers):
    kind, sign = types_of(modifiers)
    return elementwise(m, code, (kind, kind, kind, sign), lambda a, b, c: np.where(c >= 0, a, b))


@instruction("testp")
def test_property(m, code, modifiers):
    (kind,) = types_of(modifiers)
    test = {
        "finite": np.isfinite, "infinite": np.isinf, "notanumber": np.isnan,
        "number": lambda a: ~np.isnan(a),
    }.get(modifiers[0])  # fmt: skip
    if test is None:
        raise Unsupported(f"testp.{modifiers[0]}")
    return elementwise(m, code, ("pred", kind), test)
