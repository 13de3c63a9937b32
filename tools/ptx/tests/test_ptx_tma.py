"""mbarriers and TMA in the interpreter: phases and parity, tiles, swizzles, bulk copies."""

import numpy as np
import ptx
import pytest
import torch
from ptx.hopper import ARRIVE, SETUP, launch, tma_load, wait

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


def test_bulk_store_must_be_waited_for():
    memory, out = ptx.Memory(), torch.zeros(64)
    store = """
        @%p1 cp.async.bulk.global.shared::cta.bulk_group [%out], [%r10], 256;
        @%p1 cp.async.bulk.commit_group;
    """
    waited = store + "@%p1 cp.async.bulk.wait_group.read 0;"
    arguments = {"out": memory.upload(out)}
    setup = """
        setp.eq.u32 %p1, %t, 0; mov.u32 %r10, buffer; mad.lo.u32 %r12, %t, 16, %r10;
        mov.b32 %r1, 0; st.shared.v4.b32 [%r12], {%r1, %r1, %r1, %r1};
        fence.proxy.async.shared::cta; bar.sync 0;
    """
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
