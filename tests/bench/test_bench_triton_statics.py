"""The counts of what Triton compiles: that they are what was asked, and that none becomes worse."""

import pytest

from bench import machine_code, statics, triton_statics
from bench.triton_statics import ARCHES, SIZES

HOPPER = next(gpu for gpu in statics.GPUS if gpu.name == "H100")
compiles = pytest.mark.skipif(machine_code.tools() is None, reason="no cuobjdump and nvdisasm")


def row(shape: str, kernel: str) -> statics.Row:
    return next(
        r
        for r in triton_statics.recorded()
        if r.gpu == "H100" and r.shape.startswith(shape) and r.kernel == kernel
    )


def test_every_row_says_that_it_is_a_model_and_the_page_is_made_of_them():
    rows = triton_statics.recorded()
    assert {r.kind for r in rows} == {"model"}
    # forward, dQ, and dK and dV; of the projected rule forward and dZ
    assert len(rows) == len(ARCHES) * len(statics.SHAPES) * 5
    text = triton_statics.PAGE.read_text(encoding="utf-8")
    version = text.split("from what Triton ")[1].split(" compiles")[0]
    assert text == triton_statics.page(rows, version)


@pytest.mark.parametrize(
    ("shape", "kernel", "most"),
    [
        ("sdxl-64", "forward", 850),
        ("sd15-64", "forward", 910),
        ("pixart-1024", "forward", 1400),
        # a block of 64 keys: no product is made by two groups of warps
        ("wan-1.3b", "forward", 490),
        ("wan-1.3b", "forward projected", 490),
        ("sana-1.6b", "forward", 490),
        ("wan-1.3b", "dK dV", 750),
    ],
)
def test_hoppers_kernels_issue_no_more_than_was_asked(shape, kernel, most):
    assert row(shape, kernel).cycles["issue"] <= most


@pytest.mark.parametrize(
    ("shape", "kernel"),
    [("sdxl-64", "forward"), ("sdxl-64", "forward projected"), ("sd15-64", "forward")],
)
def test_three_programs_of_the_commonest_layers_share_a_multiprocessor(shape, kernel):
    assert row(shape, kernel).blocks_per_sm == 3


def test_layers_in_batches_fill_a_gpu():
    """As far as whole tiles can; streamed ones, which nobody spreads, nearly so."""
    rows = triton_statics.recorded()
    assert {r.gpu for r in rows} == set(ARCHES)
    found = statics.uneven(rows)
    for x in found:
        assert x.grid >= (0.94 if x.layer == "sd3-text" else x.most - 0.001), x
    # below 148 multiprocessors one layer, by 0.002
    assert {(x.layer, x.b) for x in found if x.gpu.sms < 148} <= {("sd15-16", 16)}


def test_the_rows_cover_every_shape():
    assert {(s.d, s.n_pos) for s in statics.SHAPES} == set(SIZES)


@compiles
def test_no_kernel_became_worse():
    """Both ways to hold a prompt. Everything has a ceiling of 3 %."""
    before = {(r.shape, r.kernel): r for r in triton_statics.recorded() if r.gpu == "H100"}
    found = triton_statics.rows_of(HOPPER, triton_statics.compiled_for(90, ((64, 77), (128, 512))))
    assert len(found) > 10
    for now in found:
        old = before[now.shape, now.kernel]
        assert now.shared <= old.shared and now.blocks_per_sm >= old.blocks_per_sm, now
        for pipe, cycles in now.cycles.items():
            assert cycles <= 1.03 * old.cycles[pipe], f"{now.shape} {now.kernel}: {pipe} {cycles}"
