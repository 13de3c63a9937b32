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
        o = nag.blend(z_pos, z_neg, torch.empty_like(z_pos), share, *settings)
    assert len(reports) == 1
    exact = blend(z_pos.double(), z_neg.double(), share, *settings)
    u = torch.finfo(dtype).eps / 2
    # the result is rounded once; the norms and the factor are a few roundings of fp32
    allowed = u * exact.abs() + 2**-20 * exact.abs().max()
    assert ((o.double() - exact).abs() <= allowed).all()
    if with_map:
        assert torch.equal(o[0], z_pos[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_texts_own_queries_and_o_in_the_place_of_z(dtype):
    """Of nine rows five are the image's, three the positive text's, one the negative text's."""
    from nasa_kernels._triton import nag

    generator = torch.Generator().manual_seed(1)
    z_pos, z_neg = (torch.randn(2, n, 3, 33, generator=generator).to(dtype) for n in (8, 6))
    settings = (0.25, 3.0, 3.6, 1)
    with ptx.triton_on_cpu(arch=90) as reports:
        o = nag.blend(z_pos, z_neg, z_pos.new_empty(2, 9, 3, 33), None, *settings, 3, 1)
        image, neg = z_pos[:, :5].contiguous(), z_neg[:, :5].contiguous()
        in_place = nag.blend(image, neg, image, None, *settings)
    assert len(reports) == 2
    exact = blend(z_pos[:, :5].double(), z_neg[:, :5].double(), None, *settings)
    allowed = torch.finfo(dtype).eps / 2 * exact.abs() + 2**-20 * exact.abs().max()
    assert ((o[:, :5].double() - exact).abs() <= allowed).all()
    assert torch.equal(o[:, :5], in_place) and in_place is image
    assert torch.equal(o[:, 5:8], z_pos[:, 5:]) and torch.equal(o[:, 8:], z_neg[:, 5:])
