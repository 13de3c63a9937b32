"""The counts of the compiled kernels: how they are made, and that no change makes them worse."""

import os
from pathlib import Path

import pytest

from bench import image_statics, machine_code, nag_statics, statics
from nasa_kernels.testing import CUDA_LIBRARY

LIBRARY = Path(os.environ.get("NASA_CUDA_LIBRARY", CUDA_LIBRARY))
built = pytest.mark.skipif(
    not LIBRARY.is_file() or machine_code.tools() is None,
    reason=f"no {LIBRARY.name}, or no cuobjdump and nvdisasm",
)

# A loop over tiles: an early retry, a shortcut for masks, an inner loop of products, a slow path
SASS = """
\t\tFunction : tile_kernel
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2], R3 ;
        /*0020*/              @!P0 BRA 0x00c0 ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R1], [R2.64] ;
        /*0040*/                   HMMA.16816.F32 R4, R8, R10, R4 ;
        /*0050*/               @P1 BRA 0x0040 ;
        /*0060*/               @P2 BRA 0x0090 ;
        /*0070*/                   FSEL R4, R4, -INF , P3 ;
        /*0080*/                   FSEL R5, R5, -INF , P3 ;
        /*0090*/                   MUFU.EX2 R4, R4 ;
        /*0098*/                   HMMA.16816.F32 R4, R8, R10, R4 ;
        /*00a0*/               @P4 CALL.REL.NOINC 0x00e0 ;
        /*00b0*/                   BRA 0x0010 ;
        /*00c0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2], R3 ;
        /*00d0*/                   BRA 0x0020 ;
        /*00e0*/                   EXIT ;
"""


def test_the_plain_path_leaves_out_retries_and_masks_and_repeats_inner_loops():
    (code,) = machine_code.parse(SASS).values()
    blocks = machine_code.blocks_of(code)
    loop, path = machine_code.tile_path(blocks)
    assert loop.head == 0x10
    counts = machine_code.count(blocks, path, loop, scores=5)
    assert counts["HMMA.16816.F32"] == 5 + 1 and counts["MUFU.EX2"] == 1
    assert "FSEL" not in counts and counts["SYNCS.PHASECHK.TRANS64.TRYWAIT"] == 1
    assert counts["BRA"] == 1 + 5 + 1 + 1
    with pytest.raises(ValueError, match="not some turns"):
        machine_code.count(blocks, path, loop, scores=0.5)


@pytest.mark.parametrize(
    ("copy", "is_wide"),
    [
        ("LDGSTS.E.BYPASS.128", True),
        ("LDGSTS.E.BYPASS.LTC128B.128", True),
        ("LDGSTS.E.BYPASS.128.ZFILL", True),
        ("STG.E.128", True),
        ("STG.E.ENL2.256", True),
        ("UTMALDG.4D", True),
        ("UTMALDG.3D.MULTICAST", True),
        ("LDGSTS.E.LTC128B.64", False),
        ("STG.E.U16", False),
        ("LDS.128", False),
    ],
)
def test_the_plain_path_meets_the_copies_of_tiles_however_they_are_spelt(copy, is_wide):
    """They stand behind a condition, and the shortest way is around them."""
    sass = SASS.replace("LDGSTS.E.BYPASS.128", copy).replace("@!P0 BRA 0x00c0", "@P0 BRA 0x0040")
    (code,) = machine_code.parse(sass).values()
    blocks = machine_code.blocks_of(code)
    loop, path = machine_code.tile_path(blocks)
    assert machine_code.count(blocks, path, loop, scores=5)[copy] == is_wide


def test_calls_without_a_condition_come_back_and_others_leave():
    (code,) = machine_code.parse(SASS.replace("@P4 CALL", "CALL")).values()
    blocks = machine_code.blocks_of(code)
    assert blocks[0x90].next == [0xB0]
    (code,) = machine_code.parse(SASS).values()
    assert machine_code.blocks_of(code)[0x90].next == [0xE0, 0xB0]


def row(gpu: str, shape: str) -> statics.Row:
    return next(r for r in statics.recorded() if r.gpu == gpu and r.shape.startswith(shape))


@pytest.mark.parametrize(
    ("shape", "most"),
    [("sd15-64", 840), ("sdxl-64", 840), ("pixart-1024", 1110), ("wan-1.3b", 520)],
)
def test_hoppers_kernels_issue_no_more_than_was_asked(shape, most):
    """Instructions of a scheduler for 64 rows; of Wan, for a tile of 128 keys of one prompt."""
    assert row("H100", shape).cycles["issue"] <= most


def test_every_row_says_that_it_is_a_model_and_the_page_is_made_of_them():
    rows = statics.recorded()
    assert {r.kind for r in rows} == {"model"}
    others = 2 * len(statics.BACKWARD_DIMS) + len(nag_statics.CHANNELS) + len(image_statics.DIMS)
    assert len(rows) == len(statics.GPUS) * (len(statics.SHAPES) + others)
    assert statics.PAGE.read_text() == statics.page(rows)


# sm_100 and sm_120 compile the source of sm_80, and their machine code is slow to take apart: three
# layers of it stand for the others
HELD = {gpu: statics.SHAPES for gpu in statics.GPUS if gpu.arch in ("sm_80", "sm_90a")}
OTHERS = tuple(s for s in statics.SHAPES if s.name in ("sdxl-64", "pixart-1024", "wan-1.3b"))


@built
@pytest.mark.parametrize("gpu", statics.GPUS, ids=lambda gpu: gpu.name)
def test_no_kernel_became_worse(gpu):
    """Registers may move within the blocks that fit; everything else has a ceiling of 2 %."""
    before = {(r.gpu, r.shape): r for r in statics.recorded()}
    for now in statics.rows_of(LIBRARY, (gpu,), HELD.get(gpu, OTHERS)):
        old = before[now.gpu, now.shape]
        assert now.kernel == old.kernel and now.shared <= old.shared
        assert now.blocks_per_sm >= old.blocks_per_sm
        for pipe, cycles in now.cycles.items():
            assert cycles <= 1.02 * old.cycles[pipe], f"{now.kernel}: {pipe} {cycles}"
        if old.projected_issue is not None:
            assert now.projected_issue <= 1.02 * old.projected_issue


@built
def test_the_backward_kernels_became_no_worse():
    before = {(r.gpu, r.kernel): r for r in statics.recorded()}
    hopper = [gpu for gpu in statics.GPUS if gpu.name == "H100"]
    found = statics.backward_rows(LIBRARY, tuple(hopper))
    assert len(found) == 2 * len(statics.BACKWARD_DIMS)
    for now in found:
        old = before[now.gpu, now.kernel]
        assert now.shared <= old.shared and now.blocks_per_sm >= old.blocks_per_sm, now
        for pipe, cycles in now.cycles.items():
            assert cycles <= 1.02 * old.cycles[pipe], f"{now.kernel}: {pipe} {cycles}"


@built
@pytest.mark.parametrize(
    ("module", "rows", "gpus"),
    [
        (nag_statics, len(nag_statics.CHANNELS), statics.GPUS),
        (image_statics, len(image_statics.DIMS), tuple(HELD)),
    ],
    ids=["the end of nag", "a small image"],
)
def test_what_has_rows_of_its_own_became_no_worse(module, rows, gpus):
    before = {(r.gpu, r.shape): r for r in statics.recorded()}
    found = module.rows_of(LIBRARY, gpus)
    assert len(found) == len(gpus) * rows
    for now in found:
        old = before[now.gpu, now.shape]
        assert now.shared <= old.shared and now.blocks_per_sm >= old.blocks_per_sm
        for pipe, cycles in now.cycles.items():
            assert cycles <= 1.02 * old.cycles[pipe], f"{now.gpu}, {now.kernel}: {pipe} {cycles}"


def test_a_small_image_costs_a_step_of_keys_what_a_long_prompt_does():
    """The loop is that of forward_long; the segments' own code stands around it."""
    for gpu in statics.GPUS:
        image = row(gpu.name, "small image, d128")
        how = statics.streamed_plan("forward_long", 128)
        long = next(r for r in statics.recorded() if (r.gpu, r.kernel) == (gpu.name, str(how)))
        assert image.cycles["issue"] <= 1.05 * long.cycles["issue"]
        assert image.cycles["shared"] == long.cycles["shared"]


# Z+ and Z- are loaded before a condition and, where they are not kept, once more behind it
BLEND = """
\t\tFunction : blend_kernel
        /*0000*/                   LDG.E R1, [R2.64] ;
        /*0010*/               @P0 BRA 0x0040 ;
        /*0020*/              @!P1 LDG.E.128 R4, [R2.64] ;
        /*0030*/              @!P1 LDG.E.128 R8, [R2.64] ;
        /*0040*/              @!P2 EXIT ;
        /*0050*/               @P3 BRA 0x0070 ;
        /*0060*/              @!P1 LDG.E.128 R4, [R2.64] ;
        /*0070*/                   FFMA R4, R4, R8, R4 ;
        /*0080*/               @P4 BRA 0x00a0 ;
        /*0090*/                   STG.E.ENL2.256 [R2.64], R4 ;
        /*00a0*/                   EXIT ;
"""


def test_a_kernel_without_tiles_is_counted_from_its_entry_to_its_end():
    (code,) = machine_code.parse(BLEND).values()
    counts = machine_code.straight_counts(machine_code.blocks_of(code), loads=2)
    assert counts == {
        "LDG.E": 1, "BRA": 3, "LDG.E.128": 2, "EXIT": 2, "FFMA": 1, "STG.E.ENL2.256": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match="no way"):
        machine_code.straight_counts(machine_code.blocks_of(code), loads=4)


@pytest.mark.parametrize("gpu", ["A100", "H100", "B200"])
def test_two_blocks_of_each_backward_kernel_share_an_sm(gpu):
    """One of four or five warps hides no latency. Only d 160 has no room for a second."""
    rows = [r for r in statics.recorded() if r.gpu == gpu and "backward" in r.kernel]
    assert len(rows) == 2 * len(statics.BACKWARD_DIMS)
    for r in rows:
        assert r.blocks_per_sm >= 2 or "160" in r.kernel, r


def test_the_tensor_cores_bound_pixart_on_a100():
    """With 16 rows a warp shared memory did: 2928 cycles."""
    r = row("A100", "pixart-1024")
    assert r.bound == "tensor" and r.cycles["shared"] <= 2400


def test_a_grid_does_less_than_is_wanted_only_where_no_whole_tiles_do_more():
    found = statics.uneven(statics.recorded())
    assert found and all(x.grid >= x.most - 0.001 for x in found), found


def test_a_small_gpu_has_eight_warps_on_an_sm():
    """With 99 KiB for a block one resides, and four warps would hide no latency."""
    for gpu in statics.GPUS:
        if gpu.shared_per_block > 101376:
            continue
        for shape in statics.SHAPES:
            resident = next(
                r for r in statics.recorded() if (r.gpu, r.shape) == (gpu.name, str(shape))
            )
            assert resident.blocks_per_sm * statics.plan(gpu, shape).threads >= 256, resident


def test_the_projected_rule_costs_little():
    """Three sums over d, and a combination of two: up to a fifth more, most at d 160."""
    for r in statics.recorded():
        if r.projected_issue is not None:
            assert r.cycles["issue"] < r.projected_issue <= 1.21 * r.cycles["issue"], r
        elif r.kernel.startswith("forward_sm90_short"):
            raise AssertionError(f"{r.kernel} has no count of the rule")


def test_a_public_kernel_stands_beside_ours():
    theirs = statics.yardsticks()
    assert {r.kind for r in theirs} == {"model"} and all("flash-attn" in r.kernel for r in theirs)
    assert all(r.kernel in statics.PAGE.read_text() for r in theirs)
