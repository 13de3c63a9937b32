"""sm_90a in the interpreter: mbarriers, TMA tiles and wgmma with every layout it has."""

import numpy as np
import ptx
import pytest
import torch

# one mbarrier behind the first KiB-aligned 32 KiB of the buffer
SETUP = """
    mov.u32 %r10, buffer; add.u32 %r11, %r10, 32768;
    setp.eq.u32 %p1, %t, 0;
    @%p1 mbarrier.init.shared::cta.b64 [%r11], 1;
    fence.mbarrier_init.release.cluster;
    bar.sync 0;
"""
SHARED = 33024


def wait(parity: int, name: str = "W") -> str:
    return f"""
        {name}: mbarrier.try_wait.parity.shared::cta.b64 %p8, [%r11], {parity};
        @!%p8 bra {name};
    """


def launch(body, memory, arguments, threads=128, **options):
    """``arguments``: name -> address, or tensor map bytes."""
    parameters, lines = [], []
    for name, value in arguments.items():
        if isinstance(value, bytes):
            parameters.append(f".param .align 64 .b8 p_{name}[128]")
            lines.append(f".reg .b64 %{name}; mov.b64 %{name}, p_{name};")
            lines.append(f"cvta.param.u64 %{name}, %{name};")
        else:
            parameters.append(f".param .u64 p_{name}")
            lines.append(f".reg .b64 %{name}; ld.param.u64 %{name}, [p_{name}];")
    text = ptx.module(f"""
        .visible .entry k({", ".join(parameters)}) {{
            .reg .b32 %t, %r<64>; .reg .b64 %d<32>; .reg .f32 %f<64>; .reg .pred %p<16>;
            .shared .align 1024 .b8 buffer[{SHARED}];
            {" ".join(lines)} mov.u32 %t, %tid.x;
            {body}
            ret;
        }}
    """)
    return ptx.load(text).launch((1,), threads, list(arguments.values()), memory, **options)


# ---- mbarrier --------------------------------------------------------------------------------


def test_phases_and_parity():
    """Threads 1..127 wait for thread 0's arrival of phase 0, then of phase 1."""
    memory, out = ptx.Memory(), torch.zeros(128, dtype=torch.int32)
    body = (
        SETUP
        + """
        @%p1 mbarrier.arrive.shared::cta.b64 %d1, [%r11];
        """
        + wait(0, "FIRST")
        + "bar.sync 0; @%p1 mbarrier.arrive.shared::cta.b64 _, [%r11];"
        + wait(1, "SECOND")
        + "mad.wide.u32 %d2, %t, 4, %out; st.global.b32 [%d2], 1;"
    )
    address = memory.upload(out)
    launch(body, memory, {"out": address}, check_races=True)
    assert memory.download(address, out).all()


def test_wrong_parity_passes_at_once_and_missing_arrival_deadlocks():
    launch(SETUP + wait(1), ptx.Memory(), {})
    report = (
        r"mbarrier 0x8400 \(buffer \+ 32768\) of CTA \(0, 0, 0\): phase 0 lacks 1 of 1 arrivals "
        r"and 0 bytes; waiting: CTA \(0, 0, 0\) thread 0 and 127 more at line \d+"
    )
    with pytest.raises(ptx.Deadlock, match=report):
        launch(SETUP + wait(0), ptx.Memory(), {})


def test_try_wait_gives_up_where_the_kernel_only_peeks():
    """A peek that fails must return false: the thread itself makes the arrival it peeked for."""
    peek = "mbarrier.try_wait.parity.shared::cta.b64 %p8, [%r11], 0;"
    body = SETUP + peek + "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r11];" + wait(0)
    launch(body, ptx.Memory(), {})


def test_too_many_arrivals():
    with pytest.raises(ptx.BarrierMisuse, match="more than 1 arrivals in one phase"):
        launch(SETUP + "mbarrier.arrive.shared::cta.b64 _, [%r11];", ptx.Memory(), {})


def test_barrier_without_init():
    body = "mov.u32 %r11, buffer;" + wait(0)
    with pytest.raises(ptx.BarrierMisuse, match="was not initialised"):
        launch(body, ptx.Memory(), {})


# ---- TMA -------------------------------------------------------------------------------------


def tma_load(map_name: str, coordinates: list[int], offset: int, size: int) -> str:
    """Thread 0 loads a tile to ``buffer + offset``."""
    at = ", ".join(map(str, coordinates))
    rank = len(coordinates)
    return f"""
        add.u32 %r12, %r10, {offset};
        @%p1 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r11], {size};
        @%p1 cp.async.bulk.tensor.{rank}d.shared::cluster.global.mbarrier::complete_tx::bytes
            [%r12], [%{map_name}, {{{at}}}], [%r11];
    """


ARRIVE = "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r11];" + wait(0)


@pytest.mark.parametrize(
    ("shape", "box", "start"),
    [
        ((20, 32), (8, 16), (4, 8)),
        # tiles that leave the tensor on every side
        ((20, 32), (8, 16), (17, 24)),
        ((20, 32), (8, 16), (-3, -8)),
        ((5, 6, 16), (2, 4, 8), (4, 3, 8)),
        ((3, 4, 5, 8), (2, 2, 3, 8), (1, 3, 3, 0)),
        ((2, 3, 2, 5, 8), (1, 2, 2, 2, 8), (1, 2, 0, 4, 0)),
    ],
)
def test_tile_load_and_store(shape, box, start):
    source = torch.randn(shape).bfloat16()
    copy = torch.zeros(shape).bfloat16()
    memory = ptx.Memory()
    addresses = memory.upload(source), memory.upload(copy)
    tile = torch.zeros(box).bfloat16()
    raw = memory.upload(tile)
    at = list(reversed(start))
    size = tile.numel() * 2
    text = ", ".join(map(str, at))
    body = (
        SETUP
        + tma_load("source", at, 0, size)
        + ARRIVE
        + f"""
        shl.b32 %r13, %t, 1; add.u32 %r13, %r10, %r13; .reg .b16 %h1;
        setp.lt.u32 %p2, %t, {size // 2};
        mad.wide.u32 %d1, %t, 2, %raw;
        @%p2 ld.shared.b16 %h1, [%r13];
        @%p2 st.global.b16 [%d1], %h1;
        @%p1 cp.async.bulk.tensor.{len(box)}d.global.shared::cta.bulk_group
            [%copy, {{{text}}}], [%r10];
        @%p1 cp.async.bulk.commit_group; @%p1 cp.async.bulk.wait_group.read 0;
    """
    )
    maps = [ptx.tensor_map(memory, a, source, box) for a in addresses]
    launch(body, memory, {"source": maps[0], "copy": maps[1], "raw": raw}, check_races=True)
    # outside of the tensor: zeros in the tile, nothing in the copy
    padded = torch.nn.functional.pad(source, [8] * (2 * len(shape)))
    index = tuple(slice(8 + s, 8 + s + n) for s, n in zip(start, box, strict=True))
    assert torch.equal(memory.download(raw, tile), padded[index])
    expected = torch.zeros_like(padded)
    expected[index] = padded[index]
    inner = tuple(slice(8, 8 + n) for n in shape)
    assert torch.equal(memory.download(addresses[1], copy), expected[inner])


@pytest.mark.parametrize("swizzle", [32, 64, 128])
def test_swizzle_moves_16_byte_chunks(swizzle):
    """Chunk c of row r lies at chunk c xor (r mod rows), rows of 128 bytes counted."""
    columns = swizzle // 2
    source = torch.arange(64 * columns, dtype=torch.int16).reshape(64, columns)
    memory = ptx.Memory()
    out = torch.zeros_like(source)
    address = memory.upload(out)
    size = source.numel() * 2
    body = SETUP + tma_load("source", [0, 0], 0, size) + ARRIVE
    body += f"""
        mov.b32 %r20, 0;
        COPY: mad.lo.u32 %r21, %r20, 128, %t; setp.ge.u32 %p3, %r21, {size // 4}; @%p3 bra DONE;
        mad.lo.u32 %r22, %r21, 4, %r10; ld.shared.b32 %r23, [%r22];
        mad.wide.u32 %d1, %r21, 4, %out; st.global.b32 [%d1], %r23;
        add.u32 %r20, %r20, 1; bra COPY;
        DONE:
    """
    tile = ptx.tensor_map(memory, memory.upload(source), source, (64, columns), swizzle)
    launch(body, memory, {"source": tile, "out": address})
    flat = memory.download(address, out).reshape(-1, 8)
    chunks = swizzle // 16
    expected = torch.empty_like(flat)
    for chunk in range(len(flat)):
        row = chunk // 8 % chunks if chunks > 2 else chunk // 8 % 2
        expected[chunk ^ row] = source.reshape(-1, 8)[chunk]
    assert torch.equal(flat, expected)


def test_load_in_flight_is_poison_and_too_few_bytes_deadlock():
    source = torch.ones(8, 16).bfloat16()
    memory = ptx.Memory()
    tile = ptx.tensor_map(memory, memory.upload(source), source, (8, 16))
    out = torch.zeros(128, dtype=torch.bfloat16)
    address = memory.upload(out)
    read = """
        shl.b32 %r13, %t, 1; add.u32 %r13, %r10, %r13; .reg .b16 %h1; ld.shared.b16 %h1, [%r13];
        mad.wide.u32 %d1, %t, 2, %out; st.global.b16 [%d1], %h1;
    """
    load = SETUP + tma_load("source", [0, 0], 0, 256)
    launch(load + "bar.sync 0;" + read + ARRIVE, memory, {"source": tile, "out": address})
    assert memory.download(address, out).isnan().all()
    with pytest.raises(ptx.Hazard, match="while the copy of line .* is in flight"):
        early = load + "bar.sync 0;" + read + ARRIVE
        launch(early, memory, {"source": tile, "out": address}, check_races=True)
    with pytest.raises(ptx.Deadlock, match="lacks 0 of 1 arrivals and 256 bytes"):
        body = SETUP + tma_load("source", [0, 0], 0, 512) + ARRIVE
        launch(body, memory, {"source": tile, "out": address})
    with pytest.raises(ptx.Hazard, match="exits before its bulk load has arrived"):
        launch(load, memory, {"source": tile, "out": address})


def test_tensor_map_refuses_what_the_driver_refuses():
    memory, x = ptx.Memory(), torch.zeros(8, 64).bfloat16()
    address = memory.upload(x)
    with pytest.raises(ValueError, match="does not fit swizzle 64"):
        ptx.tensor_map(memory, address, x, (8, 64), 64)
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        odd = torch.zeros(8, 66).bfloat16()[:, :64]
        ptx.tensor_map(memory, memory.upload(odd), odd, (8, 64))
    with pytest.raises(ValueError, match="at most 256"):
        ptx.tensor_map(memory, address, x, (257, 64))


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


def test_bulk_store_must_be_waited_for():
    memory, out = ptx.Memory(), torch.zeros(64)
    store = """
        @%p1 cp.async.bulk.global.shared::cta.bulk_group [%out], [%r10], 256;
        @%p1 cp.async.bulk.commit_group;
    """
    waited = store + "@%p1 cp.async.bulk.wait_group.read 0;"
    arguments = {"out": memory.upload(out)}
    setup = "setp.eq.u32 %p1, %t, 0;" + ZEROS
    launch(setup + waited, memory, arguments, check_races=True)
    with pytest.raises(ptx.Hazard, match="exits while a bulk store reads"):
        launch(setup + store, memory, arguments)
    with pytest.raises(ptx.Hazard, match="may still read"):
        overwrite = "bar.sync 0; st.shared.v4.b32 [%r12], {%r1, %r1, %r1, %r1};"
        launch(setup + store + overwrite, memory, arguments, check_races=True)


def test_bulk_load_of_plain_bytes():
    memory, source = ptx.Memory(), torch.randn(128)
    out = torch.zeros(128)
    arguments = {"out": memory.upload(out), "source": memory.upload(source)}
    body = (
        SETUP
        + """
        @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r11], 512;
        @%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes
            [%r10], [%source], 512, [%r11];
    """
        + wait(0)
        + """
        mad.lo.u32 %r12, %t, 4, %r10; ld.shared.b32 %r13, [%r12];
        mad.wide.u32 %d1, %t, 4, %out; st.global.b32 [%d1], %r13;
    """
    )
    launch(body, memory, arguments, check_races=True)
    np.testing.assert_array_equal(memory.download(arguments["out"], out), source)
