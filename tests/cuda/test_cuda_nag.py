"""Normalised attention guidance in the CUDA C++ kernels, executed on the CPU from their PTX.

Two launches of the attention leave Z+ and Z-, and a kernel makes O of them, row by row over all
heads: so what can go wrong is who of the lanes and warps of a row adds what.
"""

import ctypes

import pytest
import torch
from support.cuda_emulation import (
    REPORTS,
    Joint,
    NagParams,
    assert_as_accurate_as_eager,
    eager,
    nag,
    nag_blend,
    nvcc,
)
from test_cuda_forward import NAN, Shape, make
from test_cuda_launch import H200, recorded, recorder, use  # noqa: F401, a fixture

from nasa_kernels.nag import blend

pytestmark = pytest.mark.skipif(nvcc() is None, reason="no nvcc: the PTX cannot be built")

# heads and head_dim: of a warp, with lanes that have nothing; of two warps; of four, all lanes
# busy; of eight; of more than eight keep; rows that begin anywhere, of a warp and of two
WIDTHS = [(2, 64), (20, 72), (40, 128), (64, 112), (81, 128), (3, 33), (11, 121)]
SETTINGS = (3.0, 3.6)


def halves(b: int, l: int, h: int, d: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    z_pos, z_neg = (torch.randn(b, l, h, d, generator=generator).to(dtype) for _ in range(2))
    return z_pos, z_neg


def check(o: torch.Tensor, z_pos, z_neg, alpha, settings) -> None:
    """The result is rounded once; the norms and the factor are a few roundings of fp32."""
    with_map = isinstance(alpha, torch.Tensor)
    number, share = (0.0, alpha.double()) if with_map else (alpha, None)
    exact = blend(z_pos.double(), z_neg.double(), share, number, *settings)
    allowed = torch.finfo(o.dtype).eps / 2 * exact.abs() + 2**-20 * exact.abs().max()
    assert ((o.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("width", WIDTHS, ids=lambda x: f"h{x[0]}-d{x[1]}")
def test_rows_of_every_width(width):
    """Of fp16 with a number and the sum of magnitudes, of bf16 with a map and the root of squares:
    in both some rows are longer than the limit, and some are not."""
    z_pos, z_neg = halves(2, 3, *width, torch.float16)
    z_neg[1] *= 0.1
    check(nag_blend(z_pos, z_neg, 0.25, *SETTINGS), z_pos, z_neg, 0.25, SETTINGS)
    z_pos, z_neg = z_pos.bfloat16(), z_neg.bfloat16()
    alpha = torch.tensor([0.5, 0.0, 1.25]).view(1, 3, 1).expand(2, 3, 1)
    settings = (*SETTINGS, 2)
    o = nag_blend(z_pos, z_neg, alpha, *settings)
    check(o, z_pos, z_neg, alpha, settings)
    assert torch.equal(o[:, 1], z_pos[:, 1]) and not torch.equal(o[:, 0], z_pos[:, 0])


@pytest.mark.parametrize("width", [(2, 64), (11, 121)], ids=str)
def test_nothing_grows_out_of_nothing_and_nan_stays_where_it_counts(width):
    z_pos, z_neg = halves(1, 4, *width, torch.bfloat16)
    z_pos[:, 0] = 0
    z_pos[:, 1], z_neg[:, 1] = 0, 0
    z_neg[:, 2:] = NAN
    alpha = torch.tensor([0.5, 0.5, 0.0, 0.5]).view(1, 4, 1)
    o = nag_blend(z_pos, z_neg, alpha, *SETTINGS)
    assert o[:, :2].count_nonzero() == 0
    assert torch.equal(o[:, 2], z_pos[:, 2]) and o[:, 3].isnan().all()


@pytest.mark.parametrize("width", [(2, 64), (3, 33), (20, 72)], ids=str)
def test_queries_of_the_texts_have_their_own(width):
    """Nine rows of a sample: five of the image, three of the positive text, one of the other."""
    z_pos, z_neg = halves(2, 9, *width, torch.float16)
    alpha = torch.rand(2, 5, 1, generator=torch.Generator().manual_seed(1))
    o = nag_blend(z_pos, z_neg, alpha, *SETTINGS, text_pos=3, text_neg=1)
    check(o[:, :5], z_pos[:, :5], z_neg[:, :5], alpha, SETTINGS)
    assert torch.equal(o[:, 5:8], z_pos[:, 5:8]) and torch.equal(o[:, 8:], z_neg[:, 8:])


def exact_nag(inputs: dict, alpha: float, **masks) -> torch.Tensor:
    """In the dtype of the inputs, from two whole attentions."""
    q, k_pos, v_pos, k_neg, v_neg = inputs.values()

    def alone(k, v, mask):
        return eager(q, k, v, k, v, 0.0, mask, None)

    z_pos = alone(k_pos, v_pos, masks.get("mask_pos"))
    return blend(z_pos, alone(k_neg, v_neg, masks.get("mask_neg")), None, alpha, *SETTINGS)


@pytest.mark.parametrize(
    ("shape", "path"),
    [
        (Shape("sdxl", 1, 33, 2, 77, 40, 64), "short"),
        (Shape("sdxl", 1, 33, 2, 77, 40, 64), "sm90-short"),
        (Shape("wan", 1, 33, 1, 140, 130, 128), "long"),
    ],
    ids=str,
)
def test_the_whole_matches_fp64(shape, path):
    inputs = make(shape, torch.bfloat16)
    generator = torch.Generator().manual_seed(3)
    masks = {"mask_neg": torch.rand(1, shape.n_neg, generator=generator) < 0.6}
    o = nag(**inputs, alpha=0.5, nag_scale=3.0, nag_tau=3.6, **masks, path=path)
    exact = exact_nag({name: x.double() for name, x in inputs.items()}, 0.5, **masks)
    assert_as_accurate_as_eager(o, exact, exact_nag(inputs, 0.5, **masks))


def test_joint_attention_is_the_plain_one_over_either_prompt():
    """Of each image query over [image; prompt], of each text's query over its own."""
    shape = Shape("joint", 1, 24, 2, 20, 15, 64)
    inputs = make(shape, torch.float16)
    generator = torch.Generator().manual_seed(5)
    k, v = (torch.randn(1, 30, 2, 64, generator=generator).half() for _ in range(2))
    wide = {name: x.double() for name, x in inputs.items()}
    scores = torch.einsum("blhd,bnhd->bhln", wide["q"], k.double()) / 8
    o_shared = torch.einsum("bhln,bnhd->blhd", scores.softmax(-1), v.double()).half()
    joint = Joint(o_shared, scores.logsumexp(-1).float(), text_pos=4, text_neg=3)
    o = nag(**inputs, alpha=0.5, nag_scale=3.0, nag_tau=3.6, joint=joint)

    def together(dtype, side: str) -> torch.Tensor:
        keys = torch.cat((k, inputs[f"k_{side}"]), 1).to(dtype)
        values = torch.cat((v, inputs[f"v_{side}"]), 1).to(dtype)
        return eager(inputs["q"].to(dtype), keys, values, keys, values, 0.0)

    def expected(dtype) -> torch.Tensor:
        z_pos, z_neg = together(dtype, "pos"), together(dtype, "neg")
        image = blend(z_pos[:, :17], z_neg[:, :17], None, 0.5, *SETTINGS)
        return torch.cat((image, z_pos[:, 17:21], z_neg[:, 21:]), 1)

    # the attention over the image is rounded once more
    low = expected(torch.float64) + 1.5 * (
        expected(torch.float16).double() - expected(torch.float64)
    )
    assert_as_accurate_as_eager(o, expected(torch.float64), low)


@pytest.mark.parametrize("width", WIDTHS, ids=lambda x: f"h{x[0]}-d{x[1]}")
def test_the_launcher_launches_what_the_emulation_runs(recorder, width):  # noqa: F811
    z_pos, z_neg = halves(1, 3, *width, torch.bfloat16)
    # nothing of a row without a share is read, and the launch is the same
    nag_blend(z_pos, z_neg, 0.0, *SETTINGS)
    launch = REPORTS[-1]
    params = NagParams.from_buffer_copy(launch.args[0])
    params.row_warps = 0
    use(recorder, H200)
    assert recorder.test_nag_blend(ctypes.byref(params)) == 0
    assert recorder.test_launches() == 1
    record = recorder.test_launch(0).contents
    name = launch.kernel.name
    assert (
        record.kernel.decode().split("nag_blend_kernelI")[1] == name.split("nag_blend_kernelI")[1]
    )
    assert recorded(record)[1:] == ((launch.grid, 1, 1), launch.block, 0)
    assert bytes(record.arguments)[: ctypes.sizeof(params)] == bytes(launch.args[0])
