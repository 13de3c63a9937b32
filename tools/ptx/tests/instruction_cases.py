"""One case per arithmetic instruction: PTX, inputs, and what numpy says comes out."""

from typing import NamedTuple

import numpy as np
import torch

RNG = np.random.default_rng(0)
N = 64

I32 = RNG.integers(-(2**31), 2**31, N).astype(np.int32)
J32 = np.concatenate([[0, 1, -1, -(2**31), 2**31 - 1], RNG.integers(-99, 99, N - 5)]).astype("i4")
U32, V32 = I32.view(np.uint32), RNG.integers(0, 2**32, N).astype(np.uint32)
SMALL = RNG.integers(0, 40, N).astype(np.uint32)
I64 = RNG.integers(-(2**63), 2**63 - 1, N)
U64 = I64.view(np.uint64)
S16, T16 = RNG.integers(-(2**15), 2**15, (2, N)).astype(np.int16)
F32, G32, H32 = RNG.standard_normal((3, N)).astype(np.float32)
F32[:6] = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40]
G32[:6] = [1.0, np.nan, 1.0, -0.0, 0.0, 1.0]
F64 = RNG.standard_normal(N)
F16, G16, H16 = RNG.standard_normal((3, N)).astype(np.float16)


def bf16(x) -> np.ndarray:
    """fp32 -> bf16 bits, by torch."""
    rounded = torch.from_numpy(np.ascontiguousarray(x, np.float32)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16)


def from_bf16(bits) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


B16, C16, D16 = (bf16(RNG.standard_normal(N)) for _ in range(3))


def pair(low, high) -> np.ndarray:
    """Two 16-bit values per 32-bit register."""
    return np.stack([low.view(np.uint16), high.view(np.uint16)], 1).reshape(-1).view(np.uint32)


def fp64(x) -> np.ndarray:
    return x.astype(np.float64)


class Case(NamedTuple):
    code: str
    d: str
    inputs: dict
    expected: np.ndarray

    def __str__(self) -> str:
        statements = (s.strip() for s in self.code.split(";"))
        return next(s for s in statements if not s.startswith((".reg", "t:"))).split(" ")[0]


def case(code, d, expected, **inputs):
    return Case(code, d, inputs, np.asarray(expected))


def s32(a=I32, b=J32, c=None):
    out = {"a": ("s32", a), "b": ("s32", b)}
    return out | ({"c": ("s32", c)} if c is not None else {})


def b32(a=U32, b=V32, **more):
    return {"a": ("b32", a), "b": ("b32", b)} | {n: ("b32", x) for n, x in more.items()}


def f32(a=F32, b=G32, **more):
    return {"a": ("f32", a), "b": ("f32", b)} | {n: ("f32", x) for n, x in more.items()}


nonzero = np.where(J32 == 0, 7, J32)
with np.errstate(all="ignore"):
    CASES = [
        # integers
        case("add.s32 d, a, b;", "s32", I32 + J32, **s32()),
        case("sub.u32 d, a, b;", "u32", U32 - V32, **b32()),
        case("mul.lo.s32 d, a, b;", "s32", I32 * J32, **s32()),
        case("mul.hi.s32 d, a, b;", "s32", I32.astype("i8") * J32 >> 32, **s32()),
        case("mul.hi.u32 d, a, b;", "u32", U32.astype("u8") * V32 >> np.uint64(32), **b32()),
        case("mul.wide.s32 d, a, b;", "s64", I32.astype("i8") * J32, **s32()),
        case(
            "mul.wide.u16 d, a, b;",
            "u32",
            S16.view("u2").astype("u4") * T16.view("u2"),
            a=("u16", S16),
            b=("u16", T16),
        ),
        case(
            "mul.hi.u64 d, a, b;",
            "u64",
            np.array([int(x) * int(y) >> 64 for x, y in zip(U64, U64[::-1], strict=True)], "u8"),
            a=("u64", U64),
            b=("u64", U64[::-1].copy()),
        ),
        case("mad.lo.s32 d, a, b, c;", "s32", I32 * J32 + I32, **s32(c=I32)),
        case(
            "mad.wide.u32 d, a, b, c;", "u64", U32.astype("u8") * V32 + U64, **b32(), c=("u64", U64)
        ),
        case(
            "div.s32 d, a, b;",
            "s32",
            np.trunc(I32 / nonzero.astype("f8")),
            **s32(b=nonzero.astype("i4")),
        ),
        case("rem.s32 d, a, b;", "s32", np.fmod(I32, nonzero), **s32(b=nonzero.astype("i4"))),
        case("div.u32 d, a, b;", "u32", U32 // (V32 | np.uint32(1)), **b32(b=V32 | np.uint32(1))),
        case("min.s32 d, a, b;", "s32", np.minimum(I32, J32), **s32()),
        case("max.u32 d, a, b;", "u32", np.maximum(U32, V32), **b32()),
        case("abs.s32 d, a;", "s32", np.abs(J32), a=("s32", J32)),
        case("neg.s32 d, a;", "s32", -J32, a=("s32", J32)),
        case(
            "add.s64 d, a, b;", "s64", I64 + I64[::-1], a=("s64", I64), b=("s64", I64[::-1].copy())
        ),
        case("add.s16 d, a, b;", "s16", S16 + T16, a=("s16", S16), b=("s16", T16)),
        # bits
        case("and.b32 d, a, b;", "b32", U32 & V32, **b32()),
        case("or.b32 d, a, b;", "b32", U32 | V32, **b32()),
        case("xor.b32 d, a, b;", "b32", U32 ^ V32, **b32()),
        case("not.b32 d, a;", "b32", ~U32, a=("b32", U32)),
        case("cnot.b32 d, a;", "b32", J32 == 0, a=("b32", J32)),
        case(
            "shl.b32 d, a, b;",
            "b32",
            np.where(SMALL > 31, 0, U32 << np.minimum(SMALL, 31)),
            **b32(b=SMALL),
        ),
        case(
            "shr.u32 d, a, b;",
            "u32",
            np.where(SMALL > 31, 0, U32 >> np.minimum(SMALL, 31)),
            **b32(b=SMALL),
        ),
        case("shr.s32 d, a, b;", "s32", I32 >> np.minimum(SMALL, 31).astype("i4"), **b32(b=SMALL)),
        case(
            "shf.l.wrap.b32 d, a, b, c;",
            "b32",
            (
                (V32.astype("u8") << np.uint64(32) | U32)
                << (SMALL & 31).astype("u8")
                >> np.uint64(32)
            ).astype("u4"),
            **b32(c=SMALL),
        ),
        case(
            "shf.r.clamp.b32 d, a, b, c;",
            "b32",
            (
                (V32.astype("u8") << np.uint64(32) | U32) >> np.minimum(SMALL, 32).astype("u8")
            ).astype("u4"),
            **b32(c=SMALL),
        ),
        case("lop3.b32 d, a, b, c, 0x96;", "b32", U32 ^ V32 ^ SMALL, **b32(c=SMALL)),
        case(
            "lop3.b32 d, a, b, c, 0xe8;",
            "b32",
            U32 & V32 | V32 & SMALL | U32 & SMALL,
            **b32(c=SMALL),
        ),
        case("prmt.b32 d, a, b, 0x5410;", "b32", U32 & 0xFFFF | V32 << np.uint32(16), **b32()),
        case(
            "prmt.b32 d, a, b, 0x7632;",
            "b32",
            U32 >> np.uint32(16) | V32 & np.uint32(0xFFFF0000),
            **b32(),
        ),
        case(
            "prmt.b32 d, a, b, 0x0008;",
            "b32",
            np.where(U32 & 0x80, 0xFF, 0).astype("u4") | (U32 & 0xFF) * np.uint32(0x01010100),
            **b32(),
        ),
        case(
            "bfe.u32 d, a, 4, 15;", "u32", U32 >> np.uint32(4) & np.uint32(0x7FFF), a=("b32", U32)
        ),
        case("bfe.s32 d, a, 3, 5;", "s32", I32 << 24 >> 27, a=("s32", I32)),
        case(
            "bfe.u64 d, a, 7, 33;",
            "u64",
            U64 >> np.uint64(7) & np.uint64(2**33 - 1),
            a=("b64", U64),
        ),
        case(
            "bfi.b32 d, a, b, 8, 12;",
            "b32",
            (U32 & np.uint32(0xFFF)) << np.uint32(8) | V32 & ~np.uint32(0xFFF00),
            **b32(),
        ),
        case("popc.b32 d, a;", "u32", [int(x).bit_count() for x in U32], a=("b32", U32)),
        case("clz.b32 d, a;", "u32", [32 - int(x).bit_length() for x in SMALL], a=("b32", SMALL)),
        case("brev.b32 d, a;", "b32", [int(f"{x:032b}"[::-1], 2) for x in U32], a=("b32", U32)),
        case("bfind.u32 d, a;", "u32", [int(x).bit_length() - 1 for x in V32], a=("u32", V32)),
        # fp32
        case("add.f32 d, a, b;", "f32", F32 + G32, **f32()),
        case("sub.f32 d, a, b;", "f32", F32 - G32, **f32()),
        case("mul.f32 d, a, b;", "f32", F32 * G32, **f32()),
        case("mul.ftz.f32 d, a, b;", "f32", np.where(np.arange(N) == 5, 0, F32 * G32), **f32()),
        case("fma.rn.f32 d, a, b, c;", "f32", (fp64(F32) * G32 + H32).astype("f4"), **f32(c=H32)),
        case("min.f32 d, a, b;", "f32", np.fmin(F32, G32), **f32()),
        case("max.NaN.f32 d, a, b;", "f32", np.maximum(F32, G32), **f32()),
        case("div.rn.f32 d, a, b;", "f32", F32 / G32, **f32()),
        case("div.full.f32 d, a, b;", "f32", F32 / G32, **f32()),
        case("neg.f32 d, a;", "f32", -F32, a=("f32", F32)),
        case("abs.f32 d, a;", "f32", np.abs(F32), a=("f32", F32)),
        case("ex2.approx.ftz.f32 d, a;", "f32", np.exp2(fp64(G32)).astype("f4"), a=("f32", G32)),
        case(
            "lg2.approx.f32 d, a;",
            "f32",
            np.log2(np.abs(fp64(H32))).astype("f4"),
            a=("f32", np.abs(H32)),
        ),
        case("rcp.approx.ftz.f32 d, a;", "f32", (1 / fp64(H32)).astype("f4"), a=("f32", H32)),
        case(
            "rsqrt.approx.f32 d, a;",
            "f32",
            (1 / np.sqrt(np.abs(fp64(H32)))).astype("f4"),
            a=("f32", np.abs(H32)),
        ),
        case("sqrt.rn.f32 d, a;", "f32", np.sqrt(np.abs(H32)), a=("f32", np.abs(H32))),
        case("tanh.approx.f32 d, a;", "f32", np.tanh(fp64(H32)).astype("f4"), a=("f32", H32)),
        case("copysign.f32 d, a, b;", "f32", np.copysign(G32, F32), **f32()),
        case(
            "fma.rn.f64 d, a, b, a;",
            "f64",
            F64 * F64[::-1] + F64,
            a=("f64", F64),
            b=("f64", F64[::-1].copy()),
        ),
        # fp16, bf16, packed
        case("add.f16 d, a, b;", "f16", F16 + G16, a=("f16", F16), b=("f16", G16)),
        case(
            "fma.rn.f16 d, a, b, a;",
            "f16",
            (fp64(F16) * G16 + F16).astype("f2"),
            a=("f16", F16),
            b=("f16", G16),
        ),
        case(
            "fma.rn.bf16 d, a, b, c;",
            "bf16",
            bf16(from_bf16(B16) * from_bf16(C16) + from_bf16(D16)),
            a=("bf16", B16),
            b=("bf16", C16),
            c=("bf16", D16),
        ),
        case(
            "fma.rn.bf16x2 d, a, b, a;",
            "bf16x2",
            pair(
                bf16(from_bf16(B16) * from_bf16(D16) + from_bf16(B16)),
                bf16(from_bf16(C16) * from_bf16(B16) + from_bf16(C16)),
            ),
            a=("bf16x2", pair(B16, C16)),
            b=("bf16x2", pair(D16, B16)),
        ),
        case(
            "mul.f16x2 d, a, b;",
            "f16x2",
            pair(F16 * H16, G16 * F16),
            a=("f16x2", pair(F16, G16)),
            b=("f16x2", pair(H16, F16)),
        ),
        case(
            "max.f16x2 d, a, b;",
            "f16x2",
            pair(np.maximum(F16, H16), np.maximum(G16, F16)),
            a=("f16x2", pair(F16, G16)),
            b=("f16x2", pair(H16, F16)),
        ),
        case(
            "min.bf16x2 d, a, b;",
            "bf16x2",
            pair(
                bf16(np.minimum(from_bf16(B16), from_bf16(D16))),
                bf16(np.minimum(from_bf16(C16), from_bf16(B16))),
            ),
            a=("bf16x2", pair(B16, C16)),
            b=("bf16x2", pair(D16, B16)),
        ),
        # conversions
        case("cvt.rn.bf16.f32 d, a;", "bf16", bf16(G32[2:]), a=("f32", G32[2:])),
        case(
            "cvt.rz.bf16.f32 d, a;",
            "bf16",
            (H32.view("u4") >> np.uint32(16)).astype("u2"),
            a=("f32", H32),
        ),
        case("cvt.rn.f16.f32 d, a;", "f16", H32.astype("f2"), a=("f32", H32)),
        case("cvt.f32.f16 d, a;", "f32", F16.astype("f4"), a=("f16", F16)),
        case("cvt.f32.bf16 d, a;", "f32", from_bf16(B16), a=("bf16", B16)),
        case(
            "cvt.rn.bf16x2.f32 d, a, b;",
            "bf16x2",
            pair(bf16(H32), bf16(H32[::-1])),
            a=("f32", H32[::-1].copy()),
            b=("f32", H32),
        ),
        case(
            "cvt.rn.f16x2.f32 d, a, b;",
            "f16x2",
            pair(H32.astype("f2"), F32[::-1][:N].astype("f2")),
            a=("f32", F32[::-1].copy()),
            b=("f32", H32),
        ),
        case("cvt.rn.f32.s32 d, a;", "f32", I32.astype("f4"), a=("s32", I32)),
        case(
            "cvt.rzi.s32.f32 d, a;",
            "s32",
            [0, 2**31 - 1, -(2**31), 0, 0, 0, *np.trunc(F32[6:] * 0 + G32[6:] * 9).astype("i4")],
            a=("f32", np.concatenate([F32[:6], G32[6:] * 9]).astype("f4")),
        ),
        case(
            "cvt.rni.s32.f32 d, a;",
            "s32",
            np.rint(H32 * 9).astype("i4"),
            a=("f32", H32 * np.float32(9)),
        ),
        case("cvt.s64.s32 d, a;", "s64", I32, a=("s32", I32)),
        case("cvt.u32.u64 d, a;", "u32", U64.astype("u4"), a=("u64", U64)),
        case("cvt.s32.s8 d, a;", "s32", I32.astype("i1"), a=("s32", I32)),
        case("cvt.rn.f32.f64 d, a;", "f32", F64.astype("f4"), a=("f64", F64)),
        case(
            "cvt.rna.tf32.f32 d, a;",
            "b32",
            (H32.view("u4") + np.uint32(0x1000)) & np.uint32(0xFFFFE000),
            a=("f32", H32),
        ),
        # moves
        case(
            ".reg .b16 x, y; mov.b32 {x, y}, a; mov.b32 d, {y, x};",
            "b32",
            U32 << np.uint32(16) | U32 >> np.uint32(16),
            a=("b32", U32),
        ),
        case("mov.b64 d, {a, b};", "b64", V32.astype("u8") << np.uint64(32) | U32, **b32()),
        case(
            ".reg .b32 x, y; mov.b64 {x, y}, a; mov.b32 d, y;",
            "b32",
            U64 >> np.uint64(32),
            a=("b64", U64),
        ),
        # predicates
        case(
            ".reg .pred p; setp.lt.s32 p, a, b; selp.s32 d, a, b, p;",
            "s32",
            np.minimum(I32, J32),
            **s32(),
        ),
        case(
            ".reg .pred p; setp.gtu.f32 p, a, b; selp.b32 d, 1, 0, p;",
            "b32",
            ~(F32 <= G32),
            **f32(),
        ),
        case(
            ".reg .pred p; setp.ne.f32 p, a, b; selp.b32 d, 1, 0, p;",
            "b32",
            (F32 != G32) & ~np.isnan(F32) & ~np.isnan(G32),
            **f32(),
        ),
        case(
            ".reg .pred p, q, r; setp.gt.s32 r, b, 0; setp.lt.and.s32 p|q, a, 5, r; "
            "selp.b32 d, 2, 0, q; @p add.u32 d, d, 1;",
            "b32",
            np.where(J32 > 0, np.where(I32 < 5, 1, 2), 0),
            **s32(),
        ),
        case("set.lt.u32.s32 d, a, b;", "u32", np.where(I32 < J32, 2**32 - 1, 0), **s32()),
        case(
            "slct.b32.s32 d, a, b, c;", "b32", np.where(J32 >= 0, U32, V32), **b32(), c=("s32", J32)
        ),
        case(
            ".reg .pred p; testp.finite.f32 p, a; selp.b32 d, 1, 0, p;",
            "b32",
            np.isfinite(F32),
            a=("f32", F32),
        ),
        # control
        case(
            ".reg .pred p; .reg .b32 i; mov.b32 i, 0; "
            "L: add.s32 d, d, i; add.s32 i, i, 1; setp.lt.u32 p, i, a; @p bra L;",
            "b32",
            [n * (n - 1) // 2 for n in SMALL.tolist()],
            a=("b32", SMALL),
        ),
        case(
            "t: .branchtargets A, B; .reg .b32 i; and.b32 i, a, 1; brx.idx i, t; "
            "A: mov.b32 d, 10; bra.uni E; B: mov.b32 d, 20; E:",
            "b32",
            np.where(U32 & 1, 20, 10),
            a=("b32", U32),
        ),
    ]
