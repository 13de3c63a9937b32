"""State spaces, atomics, bounds and cp.async of the interpreter."""

import numpy as np
import ptx
import pytest
import torch

INDEX = torch.arange(64, dtype=torch.int32)


def run(body, out, *inputs, threads=64, shared_bytes=0, **options):
    names = "abcd"[: len(inputs)]
    kernel = ptx.program(body, "out", *names, shared_bytes=shared_bytes)
    memory = ptx.Memory()
    addresses = [memory.upload(x) for x in (out, *inputs)]
    report = kernel.launch((1,), threads, addresses, memory, **options)
    return memory.download(addresses[0], out), report


def load(width: int, pointer: str = "%a") -> str:
    return f"mad.wide.u32 %d1, %t, {width}, {pointer};"


def store(width: int = 4) -> str:
    return f"mad.wide.u32 %d2, %t, {width}, %out; "


# ---- loads and stores ------------------------------------------------------------------------


def test_vectors_of_every_width():
    source = torch.arange(64 * 16, dtype=torch.int64).to(torch.uint8).reshape(64, 16)
    for kind, count in [("b8", 4), ("b16", 2), ("b16", 4), ("b32", 1), ("b32", 4), ("b64", 2)]:
        prefix = {"b8": "%h", "b16": "%h", "b32": "%r", "b64": "%d"}[kind]
        first = 10
        names = ", ".join(f"{prefix}{first + i}" for i in range(count))
        form, operand = (f".v{count}", f"{{{names}}}") if count > 1 else ("", names)
        width = count * int(kind[1:]) // 8
        body = load(16) + f"ld.global{form}.{kind} {operand}, [%d1];"
        body += store(16) + f"st.global{form}.{kind} [%d2], {operand};"
        out, _ = run(body, torch.zeros_like(source), source)
        assert torch.equal(out[:, :width], source[:, :width])
        assert not out[:, width:].any()


def test_narrow_loads_extend():
    source = torch.arange(-32, 32, dtype=torch.int8)
    for kind, dtype in (("s8", torch.int8), ("u8", torch.uint8)):
        body = load(1) + f"ld.global.{kind} %r1, [%d1];" + store() + "st.global.b32 [%d2], %r1;"
        out, _ = run(body, torch.zeros(64, dtype=torch.int32), source)
        assert torch.equal(out, source.view(dtype).int())


def test_local_memory_is_private():
    kernel = """
        .local .align 8 .b8 spill[16];
        .reg .b64 %sp; mov.u64 %sp, spill; cvta.local.u64 %sp, %sp;
        st.u32 [%sp+4], %t; bar.sync 0; ld.u32 %r1, [%sp+4];
    """
    out, _ = run(kernel + store() + "st.global.b32 [%d2], %r1;", torch.zeros_like(INDEX))
    assert torch.equal(out, INDEX)


def test_generic_addresses_reach_shared_and_global_memory():
    body = """
        mov.u64 %d5, buffer; cvta.shared.u64 %d5, %d5;
        shl.b32 %r1, %t, 2; cvt.u64.u32 %d6, %r1; add.s64 %d5, %d5, %d6;
        setp.lt.u32 %p1, %t, 32;
        selp.b64 %d7, %d5, %d1, %p1;
        st.b32 [%d5], 7; ld.b32 %r2, [%d7];
    """
    out, _ = run(load(4) + body + store() + "st.global.b32 [%d2], %r2;", torch.zeros_like(INDEX),
                 INDEX, shared_bytes=256)  # fmt: skip
    assert torch.equal(out, torch.where(INDEX < 32, 7, INDEX))


def test_constants_and_parameters():
    text = ptx.module("""
        .const .align 4 .b32 table[4] = {10, 20, 30, 40};
        .visible .entry k(.param .u64 out, .param .align 8 .b8 s[16]) {
            .reg .b32 %r<9>; .reg .b64 %d<9>; .reg .f32 %f<3>;
            mov.u32 %r1, %tid.x; and.b32 %r2, %r1, 3; mov.u64 %d1, table;
            mad.wide.u32 %d2, %r2, 4, %d1; ld.const.b32 %r3, [%d2];
            ld.param.b32 %r4, [s+12]; add.s32 %r3, %r3, %r4;
            ld.param.u64 %d3, [out]; mad.wide.u32 %d4, %r1, 4, %d3; st.global.b32 [%d4], %r3;
            ret;
        }
    """)
    memory, out = ptx.Memory(), torch.zeros(32, dtype=torch.int32)
    address = memory.upload(out)
    struct = np.array([0, 0, 0, 5], np.int32).tobytes()
    ptx.load(text).launch((1,), 32, [address, struct], memory)
    assert memory.download(address, out)[:5].tolist() == [15, 25, 35, 45, 15]


def test_strided_tensors_keep_their_layout():
    base = torch.arange(64 * 3, dtype=torch.int32).reshape(64, 3)
    column = base[:, 1]
    body = load(12) + "ld.global.b32 %r1, [%d1];" + store() + "st.global.b32 [%d2], %r1;"
    out, _ = run(body, torch.zeros_like(INDEX), column)
    assert torch.equal(out, column)


# ---- bounds ----------------------------------------------------------------------------------


def test_load_past_the_end():
    body = load(4) + "ld.global.b32 %r1, [%d1+4];"
    with pytest.raises(
        ptx.OutOfBounds, match=r"thread 63: load from .* 0 bytes past the end of \(64"
    ):
        run(body, torch.zeros(1), INDEX)


def test_store_before_the_start():
    with pytest.raises(
        ptx.OutOfBounds, match=r"CTA \(0, 0, 0\) thread 0: store to .* 4 bytes before"
    ):
        run(store() + "st.global.b32 [%d2+-4], %t;", torch.zeros(64))


def test_store_between_rows():
    out = torch.zeros(64, 3)[:, :2]
    body = store(12) + "st.global.v2.b32 [%d2], {%t, %t};"
    aligned = "mad.wide.u32 %d2, %t, 16, %out; st.global.v2.b32 [%d2], {%t, %t};"
    run(aligned, torch.zeros(64, 4)[:, :2])
    with pytest.raises(ptx.Misaligned):
        run(body, out)
    with pytest.raises(ptx.OutOfBounds, match="between the rows"):
        run(store(12) + "st.global.b32 [%d2+8], %t;", out, threads=32)


def test_reading_between_rows_is_poison():
    source = torch.zeros(64, 3)[:, :2]
    body = load(12) + "ld.global.b32 %r1, [%d1+8];" + store() + "st.global.b32 [%d2], %r1;"
    out, _ = run(body, torch.zeros(64), source[:63], threads=32)
    assert out[:32].isnan().all()


def test_misaligned_vector():
    with pytest.raises(ptx.Misaligned, match="thread 1: address .* is not a multiple of 16"):
        run(load(4) + "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d1];", torch.zeros(1), INDEX)


def test_shared_out_of_bounds():
    body = "mov.u32 %r1, buffer; mad.lo.u32 %r1, %t, 4, %r1; st.shared.b32 [%r1], %t;"
    with pytest.raises(
        ptx.OutOfBounds, match=r"thread 32: shared address 0x480 .* 32 of 64 threads"
    ):
        run(body, torch.zeros(1), shared_bytes=128)


def test_unread_shared_memory_is_nan():
    body = "mov.u32 %r1, buffer; ld.shared.b32 %r2, [%r1];" + store() + "st.global.b32 [%d2], %r2;"
    out, _ = run(body, torch.zeros(64), shared_bytes=128)
    assert out.isnan().all()


def test_unwritten_register_is_nan():
    out, _ = run(
        "add.f32 %f1, %f2, 0f3F800000;" + store() + "st.global.f32 [%d2], %f1;", torch.zeros(64)
    )
    assert out.isnan().all()


# ---- atomics ---------------------------------------------------------------------------------


def test_atomics_return_the_old_value_in_some_order():
    body = "atom.global.add.u32 %r1, [%a], 3;" + store() + "st.global.b32 [%d2], %r1;"
    out, _ = run(body, torch.zeros_like(INDEX), torch.full((1,), 5, dtype=torch.int32))
    assert sorted(out.tolist()) == [5 + 3 * i for i in range(64)]


@pytest.mark.parametrize(
    ("operation", "expected"),
    [("min.s32", 0), ("max.s32", 63), ("add.s32", 2016 + 9), ("xor.b32", 9), ("or.b32", 63)],
)
def test_reductions(operation, expected):
    out, _ = run(f"red.global.{operation} [%out], %t;", torch.tensor([9], dtype=torch.int32))
    assert out.item() == (max(expected, 9) if operation == "max.s32" else expected)


def test_packed_and_vector_reductions():
    body = "mov.b32 %r1, 0x3f803f80; red.global.add.noftz.bf16x2 [%out], %r1;"
    out, _ = run(body, torch.zeros(2, dtype=torch.bfloat16))
    assert out.tolist() == [64, 64]
    body = "mov.b32 %f1, 0f3F000000; red.global.add.v2.f32 [%out], {%f1, %f1};"
    out, _ = run(body, torch.zeros(2))
    assert out.tolist() == [32, 32]


def test_compare_and_swap_elects_one_thread():
    body = "atom.global.cas.b32 %r1, [%a], 0, 1; setp.eq.b32 %p1, %r1, 0;"
    body += "@%p1 red.global.add.u32 [%out], 1;"
    out, _ = run(body, torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
    assert out.item() == 1


def test_a_spinning_thread_lets_the_others_run():
    """Warp 0 polls a flag that warp 1 raises; its lower pc must not starve warp 1."""
    body = """
        setp.ge.u32 %p1, %t, 32; @%p1 bra RAISE;
        SPIN: ld.acquire.gpu.global.b32 %r1, [%out]; setp.eq.b32 %p2, %r1, 0; @%p2 bra SPIN;
        ret;
        RAISE: st.release.gpu.global.b32 [%out], 1;
    """
    run(body, torch.zeros(1, dtype=torch.int32), max_steps=1000)


def test_a_lock_is_passed_on():
    """Thread by thread: a lock taken by compare and swap guards an ordinary addition."""
    body = """
        TRY: atom.global.cas.b32 %r1, [%a], 0, 1; setp.ne.b32 %p1, %r1, 0; @%p1 bra TRY;
        ld.volatile.global.b32 %r2, [%out]; add.s32 %r2, %r2, 1; st.volatile.global.b32 [%out], %r2;
        atom.global.exch.b32 %r1, [%a], 0;
    """
    out, _ = run(body, torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
    assert out.item() == 64


# ---- cp.async --------------------------------------------------------------------------------

COPY = load(16) + "mov.u32 %r10, buffer; mad.lo.u32 %r11, %t, 16, %r10;"
BACK = "ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r11];" + store(16)
BACK += "st.global.v4.b32 [%d2], {%r1, %r2, %r3, %r4};"
SOURCE = torch.randn(64, 4)


@pytest.mark.parametrize("wait", ["cp.async.wait_group 0;", "cp.async.wait_all;"])
def test_copy_arrives_after_the_wait(wait):
    body = COPY + "cp.async.cg.shared.global [%r11], [%d1], 16; cp.async.commit_group;"
    out, _ = run(body + wait + BACK, torch.zeros(64, 4), SOURCE, shared_bytes=1024)
    assert torch.equal(out, SOURCE)
    out, _ = run(body + BACK, torch.zeros(64, 4), SOURCE, shared_bytes=1024)
    assert out.isnan().all()


def test_wait_group_leaves_the_newest_groups_in_flight():
    body = (
        COPY
        + """
        cp.async.ca.shared.global [%r11], [%d1], 8; cp.async.commit_group;
        cp.async.ca.shared.global [%r11+8], [%d1+8], 8; cp.async.commit_group;
        cp.async.wait_group 1;
    """
    )
    out, _ = run(body + BACK, torch.zeros(64, 4), SOURCE, shared_bytes=1024)
    assert torch.equal(out[:, :2], SOURCE[:, :2])
    assert out[:, 2:].isnan().all()


def test_short_copy_fills_with_zeros():
    body = (
        COPY
        + """
        setp.lt.u32 %p1, %t, 60; selp.b32 %r12, 16, 0, %p1; setp.eq.u32 %p2, %t, 59;
        selp.b32 %r12, 4, %r12, %p2;
        cp.async.cg.shared.global [%r11], [%d1], 16, %r12; cp.async.wait_all;
    """
    )
    # rows 60 to 63 lie outside of the tensor and are not read
    source = SOURCE[:60]
    out, _ = run(body + BACK, torch.ones(64, 4), source, shared_bytes=1024)
    expected = torch.zeros(64, 4)
    expected[:59], expected[59, 0] = SOURCE[:59], SOURCE[59, 0]
    assert torch.equal(out, expected)


def test_copy_out_of_bounds():
    body = COPY + "cp.async.cg.shared.global [%r11], [%d1], 16;"
    with pytest.raises(ptx.OutOfBounds, match="thread 60"):
        run(body, torch.zeros(1), SOURCE[:60], shared_bytes=1024)


# ---- bank conflicts --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pitch", "width", "conflicts"),
    [(4, 1, 0), (8, 1, 1), (128, 1, 31), (132, 1, 0), (0, 1, 0), (16, 4, 0), (32, 4, 4)],
)
def test_bank_conflicts_of_a_strided_store(pitch, width, conflicts):
    body = f"mov.u32 %r1, buffer; mad.lo.u32 %r1, %t, {pitch}, %r1;"
    body += "st.shared.b32 [%r1], 0;" if width == 1 else "st.shared.v4.b32 [%r1], {%t, %t, %t, %t};"
    _, report = run(body, torch.zeros(1), threads=32, shared_bytes=8192, count_bank_conflicts=True)
    assert report.bank_conflicts.total() == conflicts


@pytest.mark.parametrize(("pitch", "conflicts"), [(128, 4 * 7), (144, 0), (16, 0)])
def test_bank_conflicts_of_ldmatrix(pitch, conflicts):
    """Rows 128 bytes apart share their banks; 16 bytes of padding spread them."""
    body = f"mov.u32 %r1, buffer; mad.lo.u32 %r1, %t, {pitch}, %r1;"
    body += "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r2, %r3, %r4, %r5}, [%r1];"
    _, report = run(body, torch.zeros(1), threads=32, shared_bytes=8192, count_bank_conflicts=True)
    assert report.bank_conflicts.total() == conflicts
