"""Warps and tensor cores of the interpreter: shuffles, votes, ldmatrix, mma.sync fragments.

Fragment layouts are written out per lane here, as PTX ISA 9.7.14 states them.
"""

import numpy as np
import ptx
import pytest
import torch

LANES = np.arange(32)
RNG = np.random.default_rng(0)


def run(body, out, *inputs, threads=32, shared_bytes=0, **options):
    """Run with pointers ``%out, %a, %b, ...``; returns ``out`` as the kernel left it."""
    names = "abcd"[: len(inputs)]
    kernel = ptx.program(body, "out", *names, shared_bytes=shared_bytes)
    memory = ptx.Memory()
    addresses = [memory.upload(x) for x in (out, *inputs)]
    kernel.launch((1,), threads, addresses, memory, **options)
    return memory.download(addresses[0], out)


STORE = "mad.wide.u32 %d31, %t, 4, %out; st.global.b32 [%d31], "


def lanes(body, register="%r1", **options) -> np.ndarray:
    """What ``register`` holds after ``body``, per lane."""
    return run(f"{body} {STORE}{register};", torch.zeros(32, dtype=torch.int32), **options).numpy()


@pytest.mark.parametrize(
    ("mode", "amount", "clamp", "source"),
    [
        ("bfly", 3, 0x1F, LANES ^ 3),
        ("up", 5, 0x00, np.where(LANES >= 5, LANES - 5, LANES)),
        ("down", 5, 0x1F, np.where(LANES + 5 < 32, LANES + 5, LANES)),
        ("idx", 7, 0x1F, np.full(32, 7)),
        # segments of 8 lanes
        ("idx", 3, 0x181F, LANES // 8 * 8 + 3),
        ("down", 3, 0x181F, np.where(LANES % 8 + 3 < 8, LANES + 3, LANES)),
    ],
)
def test_shuffle(mode, amount, clamp, source):
    body = f"shfl.sync.{mode}.b32 %r1|%p1, %t, {amount}, {clamp}, 0xffffffff;"
    np.testing.assert_array_equal(lanes(body), source)
    valid = lanes(body + "selp.b32 %r2, 1, 0, %p1;", "%r2")
    if mode in ("up", "down"):
        np.testing.assert_array_equal(valid, source != LANES)


def test_votes():
    odd = "and.b32 %r2, %t, 1; setp.eq.b32 %p1, %r2, 1;"
    everyone = "0xffffffff"
    ballot = lanes(f"{odd} vote.sync.ballot.b32 %r1, %p1, {everyone};")
    np.testing.assert_array_equal(ballot.view(np.uint32), np.full(32, 0xAAAAAAAA))
    for mode, expected in (("any", 1), ("all", 0), ("uni", 0)):
        body = f"{odd} vote.sync.{mode}.pred %p2, %p1, {everyone}; selp.b32 %r1, 1, 0, %p2;"
        assert (lanes(body) == expected).all()
    assert (lanes(f"redux.sync.add.s32 %r1, %t, {everyone};") == 496).all()
    leader = lanes(f"elect.sync %r2|%p1, {everyone}; selp.b32 %r1, 1, 0, %p1;")
    np.testing.assert_array_equal(leader, LANES == 0)


def test_divergent_lanes_meet_again():
    """Lanes take different branches of different length and shuffle afterwards."""
    body = """
        setp.lt.u32 %p1, %t, 9; mov.b32 %r1, %t;
        @%p1 bra SHORT;
        add.s32 %r1, %r1, 100; add.s32 %r1, %r1, 100; bra JOIN;
        SHORT: add.s32 %r1, %r1, 1;
        JOIN: shfl.sync.bfly.b32 %r1, %r1, 31, 31, 0xffffffff;
    """
    value = np.where(LANES < 9, LANES + 1, LANES + 200)
    np.testing.assert_array_equal(lanes(body), value[::-1])


def test_incomplete_warp_is_a_deadlock():
    body = "setp.lt.u32 %p1, %t, 9; @%p1 ret; shfl.sync.bfly.b32 %r1, %t, 1, 31, 0xffffffff;"
    with pytest.raises(ptx.Deadlock, match="thread 9 and 22 more waits for the rest of its warp"):
        lanes(body)


# ---- ldmatrix, stmatrix ----------------------------------------------------------------------

TO_SHARED = """
    mov.u32 %r10, buffer; shl.b32 %r11, %t, 4; add.s32 %r12, %r10, %r11;
    mad.wide.u32 %d1, %t, 16, %a;
    ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d1];
    st.shared.v4.b32 [%r12], {%r1, %r2, %r3, %r4};
    bar.warp.sync 0xffffffff;
"""


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count, trans):
    # four 8x8 matrices, a row of 16 bytes per lane
    matrices = torch.arange(256, dtype=torch.int16).reshape(4, 8, 8)
    registers = ", ".join(f"%r{20 + i}" for i in range(count))
    body = (
        TO_SHARED
        + f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, [%r12];"
    )
    for i in range(count):
        body += f"mad.wide.u32 %d2, %t, 4, %out; st.global.b32 [%d2+{128 * i}], %r{20 + i};"
    out = run(body, torch.zeros(count, 32, dtype=torch.int32), matrices, shared_bytes=512)
    pairs = out.view(torch.int16).reshape(count, 32, 2)
    for lane in range(32):
        row, column = lane // 4, 2 * (lane % 4)
        for i in range(count):
            matrix = matrices[i].T if trans else matrices[i]
            assert torch.equal(pairs[i, lane], matrix[row, column : column + 2])


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_stmatrix_undoes_ldmatrix(trans):
    matrices = torch.arange(256, dtype=torch.int16).reshape(4, 8, 8)
    registers = "{%r20, %r21, %r22, %r23}"
    body = (
        TO_SHARED
        + f"""
        ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {registers}, [%r12];
        stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r12+512], {registers};
        bar.warp.sync 0xffffffff;
        ld.shared.v4.b32 {{%r1, %r2, %r3, %r4}}, [%r12+512];
        mad.wide.u32 %d2, %t, 16, %out; st.global.v4.b32 [%d2], {{%r1, %r2, %r3, %r4}};
    """
    )
    out = run(body, torch.zeros_like(matrices), matrices, shared_bytes=1024)
    assert torch.equal(out, matrices)


def test_movmatrix_transposes():
    matrix = torch.arange(64, dtype=torch.int16).reshape(8, 8)
    body = """
        mad.wide.u32 %d1, %t, 4, %a; ld.global.b32 %r1, [%d1];
        movmatrix.sync.aligned.m8n8.trans.b16 %r2, %r1;
        mad.wide.u32 %d2, %t, 4, %out; st.global.b32 [%d2], %r2;
    """
    assert torch.equal(run(body, torch.zeros_like(matrix), matrix), matrix.T)


# ---- mma.sync --------------------------------------------------------------------------------

SHAPES = [
    ("f32.bf16.bf16.f32", torch.bfloat16, 16),
    ("f32.f16.f16.f32", torch.float16, 16),
    ("f16.f16.f16.f16", torch.float16, 16),
    ("f32.f16.f16.f32", torch.float16, 8),
    ("f32.tf32.tf32.f32", torch.float32, 8),
    ("f32.tf32.tf32.f32", torch.float32, 4),
]


def fragments(lane, k, per):
    """``(rows and columns of A, of B, of C)`` that a lane holds, in register order."""
    g, t = lane // 4, lane % 4
    blocks = range(k // (4 * per))
    a = [(g + 8 * h, 4 * per * j + t * per + e) for j in blocks for h in (0, 1) for e in range(per)]
    b = [(4 * per * j + t * per + e, g) for j in blocks for e in range(per)]
    c = [(g + 8 * h, 2 * t + e) for h in (0, 1) for e in (0, 1)]
    return a, b, c


@pytest.mark.parametrize(("types", "dtype", "k"), SHAPES, ids=lambda x: str(x))
def test_mma_sync(types, dtype, k):
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-4, 5, (16, k), generator=generator).to(dtype)
    b = torch.randint(-4, 5, (k, 8), generator=generator).to(dtype)
    c_dtype = torch.float16 if types.startswith("f16") else torch.float32
    c = torch.randint(-4, 5, (16, 8), generator=generator).to(c_dtype)
    per = 4 // a.element_size()

    def scatter(matrix, which):
        places = [fragments(lane, k, per)[which] for lane in range(32)]
        return torch.stack([torch.stack([matrix[i, j] for i, j in p]) for p in places])

    operands = scatter(a, 0), scatter(b, 1), scatter(c, 2)
    body, counts = "", [x[0].numel() * x.element_size() // 4 for x in operands]
    names = []
    for x, (pointer, count) in enumerate(zip("abc", counts, strict=True)):
        names.append([f"%r{10 * (x + 1) + i}" for i in range(count)])
        body += f"mad.wide.u32 %d1, %t, {4 * count}, %{pointer};"
        for i, register in enumerate(names[-1]):
            body += f"ld.global.b32 {register}, [%d1+{4 * i}];"
    a_list, b_list, c_list = ("{" + ", ".join(n) + "}" for n in names)
    body += f"mma.sync.aligned.m16n8k{k}.row.col.{types} {c_list}, {a_list}, {b_list}, {c_list};"
    body += f"mad.wide.u32 %d1, %t, {4 * counts[2]}, %out;"
    for i, register in enumerate(names[2]):
        body += f"st.global.b32 [%d1+{4 * i}], {register};"
    out = run(body, torch.zeros_like(operands[2]), *operands)
    # small integers: every format is exact
    expected = (a.double() @ b.double() + c.double()).to(c_dtype)
    assert torch.equal(out, scatter(expected, 2))


# ---- barriers --------------------------------------------------------------------------------


def test_named_barriers_pass_values_between_warps():
    """Warp 1 waits on barrier 1 for warp 0 only; warps 2 and 3 exit early."""
    body = """
        mov.u32 %r10, buffer; and.b32 %r11, %t, 31; shl.b32 %r12, %r11, 2; add.s32 %r13, %r10, %r12;
        setp.ge.u32 %p1, %t, 64; @%p1 ret;
        setp.ge.u32 %p2, %t, 32; @%p2 bra CONSUMER;
        mul.lo.u32 %r1, %t, 3; st.shared.b32 [%r13], %r1;
        bar.arrive 1, 64; ret;
        CONSUMER: bar.sync 1, 64;
        ld.shared.b32 %r1, [%r13];
        mad.wide.u32 %d1, %r11, 4, %out; st.global.b32 [%d1], %r1;
    """
    out = run(body, torch.zeros(32, dtype=torch.int32), threads=128, shared_bytes=128,
              check_races=True)  # fmt: skip
    np.testing.assert_array_equal(out.numpy(), 3 * LANES)


def test_warps_may_name_their_own_barrier():
    """One instruction, four barriers of one pair of warps each."""
    body = """
        mov.u32 %r10, buffer; mad.lo.u32 %r11, %t, 4, %r10; xor.b32 %r12, %t, 32;
        mad.lo.u32 %r13, %r12, 4, %r10;
        st.shared.b32 [%r11], %t;
        shr.u32 %r14, %t, 6; add.u32 %r14, %r14, 1; barrier.sync %r14, 64;
        ld.shared.b32 %r1, [%r13];
        mad.wide.u32 %d1, %t, 4, %out; st.global.b32 [%d1], %r1;
    """
    out = run(body, torch.zeros(256, dtype=torch.int32), threads=256, shared_bytes=1024,
              check_races=True)  # fmt: skip
    assert torch.equal(out, torch.arange(256, dtype=torch.int32) ^ 32)


def test_barrier_reduction():
    body = """
        setp.lt.u32 %p1, %t, 50;
        bar.red.popc.u32 %r1, 0, %p1;
        bar.red.and.pred %p2, 0, %p1; selp.b32 %r2, 1000, 0, %p2; add.s32 %r1, %r1, %r2;
        bar.red.or.pred %p2, 0, %p1; selp.b32 %r2, 2000, 0, %p2; add.s32 %r1, %r1, %r2;
        mad.wide.u32 %d1, %t, 4, %out; st.global.b32 [%d1], %r1;
    """
    out = run(body, torch.zeros(64, dtype=torch.int32), threads=64)
    assert (out == 2050).all()


def test_missing_thread_is_a_deadlock():
    body = "setp.lt.u32 %p1, %t, 32; @%p1 ret; bar.sync 0;"
    with pytest.raises(
        ptx.Deadlock, match=r"barrier 0: 32 of 64 threads arrived in CTA \(0, 0, 0\)"
    ):
        run(body, torch.zeros(1), threads=64)
