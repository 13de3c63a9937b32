"""The race detector on its own: what orders two accesses to shared memory, and what does not.

Every sound program here becomes a racy one by losing one instruction. The order in which the
interpreter happens to run the warps hides none of them from it.
"""

import ptx
import pytest
import torch

SHARED = 1024


def run(body: str, threads: int = 96, **options) -> torch.Tensor:
    """Warp-wide registers: %r1 the lane, %r2 the warp, %r3 buffer, %r4 buffer + 4 * lane."""
    setup = """
        and.b32 %r1, %t, 31; shr.u32 %r2, %t, 5; mov.u32 %r3, buffer;
        mad.lo.u32 %r4, %r1, 4, %r3;
        setp.eq.u32 %p0, %r2, 0; setp.eq.u32 %p1, %r2, 1; setp.eq.u32 %p2, %r2, 2;
    """
    out, memory = torch.zeros(threads, dtype=torch.int32), ptx.Memory()
    address = memory.upload(out)
    kernel = ptx.program(setup + body, "out", shared_bytes=SHARED)
    kernel.launch((2,), threads, [address], memory, check_races=True, **options)
    return memory.download(address, out)


def racy(body: str, message: str, **options) -> None:
    with pytest.raises(ptx.Hazard, match=message):
        run(body, **options)


WRITE = "@%p0 st.shared.b32 [%r4], %r1;"
READ = "@%p1 ld.shared.b32 %r5, [%r4];"
ANOTHER = "by another warp"


def test_barrier_orders_write_and_read():
    run(WRITE + "bar.sync 0;" + READ)
    racy(WRITE + READ, f"reads shared 0x400..0x403, written at line .* {ANOTHER}")


def test_barrier_orders_read_and_write():
    filled = WRITE + "bar.sync 0;" + READ
    run(filled + "bar.sync 0;" + WRITE)
    racy(filled + WRITE, f"overwrites shared .* read at line .* {ANOTHER}")


def test_barrier_orders_two_writes():
    other = WRITE.replace("%p0", "%p1")
    run(WRITE + "bar.sync 0;" + other)
    racy(WRITE + other, f"overwrites shared .* written at line .* {ANOTHER}")


def test_one_instruction_of_two_warps():
    """Two warps store to one word at once; one value is harmless, two are not."""
    run("st.shared.b32 [%r4], %r1;")
    racy("st.shared.b32 [%r4], %t;", "so does another warp at the same time")


def test_a_warp_is_ordered_with_itself():
    run(WRITE + "@%p0 ld.shared.b32 %r5, [%r4];" + WRITE)


def test_a_barrier_of_other_warps_orders_nothing():
    others = "@%p1 bar.sync 1, 64; @%p2 bar.sync 1, 64;"
    run(WRITE + "@%p0 bar.arrive 1, 64; @%p1 bar.sync 1, 64;" + READ)
    racy(WRITE + others + READ, ANOTHER)


def test_order_is_transitive():
    """Warp 0 meets warp 2 at one barrier, warp 2 meets warp 1 at another."""
    first = "@%p0 bar.arrive 1, 64; @%p2 bar.sync 1, 64;"
    second = "@%p2 bar.arrive 2, 64; @%p1 bar.sync 2, 64;"
    run(WRITE + first + second + READ)
    # the second barrier before the first: warp 2 has nothing to pass on
    racy(WRITE + second + first + READ, ANOTHER)


def test_an_arrival_covers_what_came_before_it_only():
    late = "@%p0 bar.arrive 1, 64;" + WRITE + "@%p1 bar.sync 1, 64;" + READ
    racy(late, ANOTHER)


MBARRIER = """
    add.u32 %r8, %r3, 512; setp.eq.u32 %p3, %t, 0;
    @%p3 mbarrier.init.shared::cta.b64 [%r8], 32;
    bar.sync 0;
"""
ARRIVE = "@%p0 mbarrier.arrive.shared::cta.b64 _, [%r8];"
WAIT = """
    @!%p1 bra PASSED;
    SPIN: mbarrier.try_wait.parity.shared::cta.b64 %p4, [%r8], 0; @!%p4 bra SPIN;
    PASSED:
"""


def test_mbarrier_orders_the_arriving_with_the_waiting():
    run(MBARRIER + WRITE + ARRIVE + WAIT + READ)
    racy(MBARRIER + WRITE + ARRIVE + READ, ANOTHER)
    racy(MBARRIER + ARRIVE + WRITE + WAIT + READ, ANOTHER)
    racy(MBARRIER.replace("bar.sync 0;", "") + WRITE + ARRIVE + WAIT + READ, ANOTHER)


def test_atomics_do_not_race_with_each_other():
    clear = "@%p0 st.shared.b32 [%r4], 0; bar.sync 0;"
    add = "red.shared.add.u32 [%r3], 1;"
    run(clear + add)
    racy(clear + add + READ, ANOTHER)
    racy(clear.replace("bar.sync 0;", "") + add, ANOTHER)


COPY = """
    mad.wide.u32 %d1, %r1, 4, %out;
    @%p0 cp.async.ca.shared.global [%r4], [%d1], 4;
    @%p0 cp.async.commit_group;
"""


def test_copy_needs_its_wait_and_a_barrier():
    wait = "@%p0 cp.async.wait_group 0;"
    run(COPY + wait + "bar.sync 0;" + READ)
    racy(COPY + "bar.sync 0;" + wait + READ, ANOTHER)
    racy(COPY + wait + READ, ANOTHER)
    racy(COPY + "bar.sync 0;" + READ + wait, "while the copy of line .* is in flight")


def test_copy_over_what_others_still_read():
    sound = WRITE + "bar.sync 0;" + READ + "bar.sync 0;" + COPY + "cp.async.wait_all;"
    run(sound)
    racy(WRITE + "bar.sync 0;" + READ + COPY, f"overwrites shared .* read at line .* {ANOTHER}")


def test_unwritten_shared_memory():
    racy("ld.shared.b32 %r5, [%r4];", "which nobody wrote")
    run("ld.shared.b32 %r5, [%r4];", allow_uninitialized=True)


def test_narrow_neighbours_do_not_race():
    """Two warps write the two halves of every word."""
    body = "mad.lo.u32 %r6, %r2, 2, %r4; cvt.u16.u32 %h1, %t; st.shared.b16 [%r6], %h1;"
    run(body, threads=64)
    racy(body.replace(", 2, %r4", ", 0, %r4"), "so does another warp", threads=64)
