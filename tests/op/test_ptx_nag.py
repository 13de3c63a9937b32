"""The PTX that Triton makes of NAG's kernel, launcher included, against fp64.

True bf16 and the real reductions over warps; shared memory races are looked for in every launch.
"""

import os

import ptx
import pytest
import torch

from nasa_kernels.nag import blend

pytest.importorskip("triton")

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1",
    reason="Triton decides at import whether it compiles; run these without TRITON_INTERPRET",
)


@pytest.mark.parametrize(
    ("with_map", "norm"), [(True, 1), (False, 1), (True, 2)], ids=["map", "number", "map-norm-2"]
)
@pytest.mark.parametrize(
    ("arch", "dtype", "heads", "d"),
    [
        # one block, two, and several of a row; a ragged end; 8 warps
        (90, torch.bfloat16, 2, 64),
        (90, torch.float16, 16, 72),
        (80, torch.bfloat16, 3, 33),
        (80, torch.float32, 5, 64),
        (90, torch.bfloat16, 40, 128),
    ],
    ids=str,
)
def test_blend(arch, dtype, heads, d, with_map, norm):
    from nasa_kernels._triton import nag

    generator = torch.Generator().manual_seed(0)
    z_pos, z_neg = (torch.randn(2, 3, heads, d, generator=generator).to(dtype) for _ in range(2))
    share = torch.tensor([0.0, 0.25]).view(2, 1, 1).expand(2, 3, 1) if with_map else None
    # some rows are longer than the limit, some are not
    settings = (0.25, 3.0, 3.6, norm)
    with ptx.triton_on_cpu(arch=arch) as reports:
        o = nag.blend(z_pos, z_neg, share, *settings)
    assert len(reports) == 1
    exact = blend(z_pos.double(), z_neg.double(), share, *settings)
    u = torch.finfo(dtype).eps / 2
    # the result is rounded once; the norms and the factor are a few roundings of fp32
    allowed = u * exact.abs() + 2**-20 * exact.abs().max()
    assert ((o.double() - exact).abs() <= allowed).all()
    if with_map:
        assert torch.equal(o[0], z_pos[0])
