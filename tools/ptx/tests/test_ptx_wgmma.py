"""wgmma in the interpreter: every operand layout, and who owns registers and memory meanwhile."""

import ptx
import pytest
import torch
from ptx.hopper import ARRIVE, SETUP, launch, tma_load

# ---- wgmma -----------------------------------------------------------------------------------

# layout type of the descriptor by swizzle bytes
LAYOUT = {16: 0, 32: 3, 64: 2, 128: 1}


def descriptor(register: str, offset: int, swizzle: int, leading: int, stride: int) -> str:
    constant = (leading >> 4) << 16 | (stride >> 4) << 32 | LAYOUT[swizzle] << 62
    return f"""
        add.u32 %r30, %r10, {offset}; bfe.u32 %r30, %r30, 4, 14; cvt.u64.u32 {register}, %r30;
        or.b64 {register}, {register}, {constant};
    """


def operand(matrix: torch.Tensor, mn_major: bool, swizzle: int, memory, name: str, offset: int):
    """TMA loads that bring ``matrix [mn, 16]`` into wgmma's layout.

    Returns ``(loads, map, leading, stride)``. The tensor has k (K-major) or mn (MN-major) inside;
    a TMA box is as wide as the swizzle, 16 bytes for none.
    """
    source = (matrix.T if mn_major else matrix).contiguous()
    rows, columns = source.shape
    width = min(swizzle // 2, columns)
    # a K-major row has 16 elements only: wider swizzles find it in a wider tensor
    if not mn_major and swizzle > 32:
        source = torch.cat([source, torch.full((rows, swizzle // 2 - 16), 7.0).to(source)], 1)
        width = columns = swizzle // 2
    tile = ptx.tensor_map(memory, memory.upload(source), source, (rows, width),
                          0 if swizzle == 16 else swizzle)  # fmt: skip
    size = rows * width * 2
    loads = "".join(
        tma_load(name, [c, 0], offset + i * size, size)
        for i, c in enumerate(range(0, columns, width))
    )
    if not mn_major:
        return loads, tile, size, 8 * swizzle
    # none: leading goes along k, stride along mn; swizzled: the other way round
    return (loads, tile, 128, size) if swizzle == 16 else (loads, tile, size, 8 * swizzle)


@pytest.mark.parametrize("a_source", ["registers", "shared"])
@pytest.mark.parametrize("mn_major", [False, True], ids=["k-major", "mn-major"])
@pytest.mark.parametrize("swizzle", [16, 32, 64, 128])
def test_wgmma_layouts(swizzle, mn_major, a_source):
    """D = A B^T with m64n64k16, both operands brought by TMA in the same layout."""
    torch.manual_seed(0)
    a, b = torch.randint(-4, 5, (64, 16)).bfloat16(), torch.randint(-4, 5, (64, 16)).bfloat16()
    memory, out = ptx.Memory(), torch.zeros(128, 32)
    loads_a, map_a, *strides_a = operand(a, mn_major, swizzle, memory, "a", 0)
    loads_b, map_b, *strides_b = operand(b, mn_major, swizzle, memory, "b", 16384)
    body = SETUP + loads_a + loads_b + ARRIVE + descriptor("%d1", 0, swizzle, *strides_a)
    body += descriptor("%d2", 16384, swizzle, *strides_b)
    accumulators = "{" + ", ".join(f"%f{i}" for i in range(32)) + "}"
    mma, trans = "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16", int(mn_major)
    arguments = {"a": map_a, "b": map_b, "out": memory.upload(out)}
    if a_source == "registers":
        # fragments of A: 4 registers of 2 per thread, as for mma.sync, 16 rows per warp
        fragments = torch.stack([
            torch.stack([a[16 * w + g + 8 * h, 8 * j + 2 * t : 8 * j + 2 * t + 2]
                         for j in (0, 1) for h in (0, 1)])
            for w in range(4) for g in range(8) for t in range(4)
        ])  # fmt: skip
        arguments["fragments"] = memory.upload(fragments.contiguous())
        body += "mad.wide.u32 %d3, %t, 16, %fragments;"
        body += "ld.global.v4.b32 {%r40, %r41, %r42, %r43}, [%d3];"
        left, flags = "{%r40, %r41, %r42, %r43}", f"1, 1, {trans}"
    else:
        left, flags = "%d1", f"1, 1, {trans}, {trans}"
    body += f"""
        wgmma.fence.sync.aligned;
        {mma} {accumulators}, {left}, %d2, 0, {flags};
        {mma} {accumulators}, {left}, %d2, 1, {flags};
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;
        mad.wide.u32 %d4, %t, 128, %out;
    """
    body += "".join(f"st.global.f32 [%d4+{4 * i}], %f{i};" for i in range(32))
    launch(body, memory, arguments, check_races=True)
    # thread (w, g, t): per 8 columns 2 of row g, then 2 of row g + 8, of the warp's 16 rows
    d = memory.download(arguments["out"], out).reshape(4, 8, 4, 8, 2, 2)
    d = d.permute(0, 4, 1, 3, 2, 5).reshape(64, 64)
    assert torch.equal(d, 2 * (a.float() @ b.float().T))


ACCUMULATORS = "{%f0, %f1, %f2, %f3}"
MULTIPLY = (
    f"wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {ACCUMULATORS}, %d1, %d1, 1, 1, 1, 0, 0;"
)
# shared memory full of zeros, visible to the async proxy
ZEROS = """
    mov.u32 %r10, buffer; mad.lo.u32 %r12, %t, 16, %r10; mov.b32 %r1, 0;
    st.shared.v4.b32 [%r12], {%r1, %r1, %r1, %r1};
    fence.proxy.async.shared::cta; bar.sync 0;
""" + descriptor("%d1", 0, 16, 128, 256)


def multiply(before="", after="", fence="wgmma.fence.sync.aligned;", setup=ZEROS, **options):
    body = setup + before + fence + MULTIPLY + "wgmma.commit_group.sync.aligned;" + after
    launch(body, ptx.Memory(), {}, check_races=True, **options)


WAIT = "wgmma.wait_group.sync.aligned 0;"


def test_wgmma_owns_its_registers():
    multiply(after=WAIT + "add.f32 %f5, %f0, %f1;")
    with pytest.raises(ptx.Hazard, match="reads %f0 before wgmma.wait_group"):
        multiply(after="add.f32 %f5, %f0, %f1;")
    with pytest.raises(ptx.Hazard, match="writes %f2, which a wgmma in flight uses"):
        multiply(after="mov.f32 %f2, 0f00000000;")
    with pytest.raises(ptx.Hazard, match="reads %f0 before wgmma.wait_group"):
        multiply(after="wgmma.wait_group.sync.aligned 1; add.f32 %f5, %f0, %f1;")


def test_wgmma_registers_may_be_renamed_in_flight():
    multiply(after="mov.b32 %f6, %f0;" + WAIT + "add.f32 %f5, %f6, %f6;")
    with pytest.raises(ptx.Hazard, match="reads %f6 before wgmma.wait_group"):
        multiply(after="mov.b32 %f6, %f0; add.f32 %f5, %f6, %f6;")


def test_wgmma_needs_a_fence_after_register_writes():
    multiply(before="mov.f32 %f1, 0f00000000;", after=WAIT)
    with pytest.raises(ptx.Hazard, match="%f1 was written after the last wgmma.fence"):
        multiply(before="mov.f32 %f1, 0f00000000;", fence="", after=WAIT)


def test_wgmma_needs_a_proxy_fence_after_ordinary_stores():
    with pytest.raises(ptx.Hazard, match="through the async proxy without fence.proxy.async"):
        multiply(setup=ZEROS.replace("fence.proxy.async.shared::cta;", ""), after=WAIT)
    # the reader may fence as well, as Triton does
    late = ZEROS.replace("fence.proxy.async.shared::cta; bar.sync 0;",
                         "bar.sync 0; fence.proxy.async.shared::cta;")  # fmt: skip
    multiply(setup=late, after=WAIT)


def test_shared_memory_is_wgmmas_until_it_is_waited_for():
    overwrite = "bar.sync 0; st.shared.v4.b32 [%r12], {%r1, %r1, %r1, %r1};"
    multiply(after=WAIT + overwrite)
    with pytest.raises(ptx.Hazard, match="which the wgmma or bulk store of line .* may still read"):
        multiply(after=overwrite + WAIT)


def test_wgmma_needs_a_whole_warpgroup():
    with pytest.raises(ptx.Deadlock, match="waits for the rest of its warp"):
        multiply(before="setp.lt.u32 %p2, %t, 32; @%p2 ret;", after=WAIT)
