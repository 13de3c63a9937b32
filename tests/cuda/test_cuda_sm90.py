"""The sm_90a forwards (TMA, mbarriers, wgmma) against fp64, executed on the CPU from their PTX.

The interpreter decodes the matrix descriptors, swizzles and tensor maps, delivers asynchronous
copies at the last moment that is allowed, and fails on a missing wait, fence or barrier.
"""

import pytest
import torch
from support.cuda_emulation import (
    assert_as_accurate_as_eager,
    eager,
    forward_sm90,
    nvcc,
    path_of_sm90,
)
from test_cuda_forward import ALPHAS, DTYPES, NAN, Shape, cut_out, in_turn, make, strided

pytestmark = pytest.mark.skipif(nvcc() is None, reason="no nvcc: the PTX cannot be built")

SHAPES = (
    Shape("sd15-64", 1, 65, 2, 77, 77, 40),
    Shape("sdxl", 2, 65, 2, 77, 77, 64),
    Shape("pixart-short", 1, 20, 1, 77, 20, 72),
    Shape("sd15-32", 1, 17, 1, 77, 77, 80),
    Shape("d128", 1, 130, 1, 77, 5, 128),
    Shape("sd15-16", 1, 64, 1, 77, 77, 160),
    Shape("long-clip", 1, 33, 1, 120, 77, 64),
    Shape("pixart", 1, 33, 1, 120, 120, 72),
    Shape("wan-collapsed", 1, 70, 1, 64, 128, 128),
)
SDXL, PIXART = SHAPES[1], SHAPES[7]
# prompts that pass by in tiles; the last ones would be short on one side alone
STREAMED = (
    Shape("wan", 1, 70, 1, 512, 512, 128),
    Shape("ragged", 2, 65, 2, 140, 300, 64),
    Shape("pixart-300", 1, 33, 1, 300, 129, 72),
    Shape("sd15-64", 1, 130, 1, 231, 77, 40),
    Shape("sd15-32", 1, 17, 1, 77, 154, 80),
    Shape("sd15-16", 1, 70, 1, 81, 240, 160),
)
RAGGED = STREAMED[1]
BOTH = pytest.mark.parametrize("path", ["short", "long"])


def check(inputs: dict, alpha=0.5, mask_pos=None, mask_neg=None, scale=None, **how) -> None:
    masks = {"mask_pos": mask_pos, "mask_neg": mask_neg, "scale": scale}
    o = forward_sm90(**inputs, alpha=alpha, **masks, **how)
    wide = {k: m.double() if torch.is_tensor(m) and m.is_floating_point() else m
            for k, m in masks.items()}  # fmt: skip
    exact = eager(**{k: x.double() for k, x in inputs.items()}, alpha=alpha, **wide)
    assert_as_accurate_as_eager(o, exact, eager(**inputs, alpha=alpha, **masks))


@pytest.mark.parametrize(("shape", "dtype"), in_turn([*SHAPES, *STREAMED]), ids=str)
def test_matches_fp64(shape, dtype):
    check(make(shape, dtype))


@pytest.mark.parametrize("shape", [SDXL, PIXART, RAGGED], ids=str)
def test_a_block_walks_over_many_tiles(shape):
    """Every stage of Q is used more than twice, and the last round has no tile for some groups."""
    check(make(shape._replace(b=1, h=1, l=64 * 12 + 7), torch.bfloat16))


@BOTH
def test_blocks_share_the_rows_of_a_head(path):
    inputs = make(SDXL._replace(b=1, l=64 * 4), torch.bfloat16)
    o = forward_sm90(**inputs, path=path)
    assert torch.equal(o, forward_sm90(**inputs, path=path, blocks=3))


@pytest.mark.parametrize("shape", [SHAPES[0], SDXL, PIXART, SHAPES[8], SHAPES[5]], ids=str)
def test_the_kernel_cannot_be_seen_in_the_result(shape):
    """Whether K and V stay or pass by: the bits must not tell."""
    assert path_of_sm90(shape.d, shape.n_pos, shape.n_neg) == "short"
    inputs = make(shape, torch.bfloat16)
    masks = {"mask_pos": (torch.arange(shape.n_pos) % 5 > 0).expand(shape.b, -1)}
    for mask in ({}, masks):
        short = forward_sm90(**inputs, **mask, path="short")
        assert torch.equal(short, forward_sm90(**inputs, **mask, path="long"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [SDXL, RAGGED], ids=str)
def test_equal_prompts_cancel_to_zero(shape, dtype):
    inputs = make(shape, dtype)
    inputs |= {"k_neg": inputs["k_pos"], "v_neg": inputs["v_pos"]}
    assert forward_sm90(**inputs, alpha=1.0).count_nonzero() == 0


@pytest.mark.parametrize("n_neg", [77, 128, 140])
@pytest.mark.parametrize("shape", [SDXL, PIXART, SHAPES[5], RAGGED], ids=str)
def test_alpha_zero_is_the_positive_prompt_alone(shape, n_neg):
    """Whatever the negative prompt is, and whichever kernel its length leads to."""
    inputs = make(shape, torch.bfloat16)
    none = {"k_neg": inputs["k_neg"][:, :0], "v_neg": inputs["v_neg"][:, :0]}
    alone = forward_sm90(**(inputs | none), alpha=1.0)
    other = make(shape._replace(n_neg=n_neg), torch.bfloat16, seed=1)
    inputs |= {"k_neg": other["k_neg"], "v_neg": other["v_neg"]}
    assert torch.equal(forward_sm90(**inputs, alpha=0.0), alone)
    zeros = torch.zeros(shape.b, shape.l, shape.h)
    assert torch.equal(forward_sm90(**inputs, alpha=zeros), alone)


@BOTH
def test_a_prompt_without_keys_contributes_nothing(path):
    inputs = make(SDXL, torch.bfloat16)
    none = {name: x[:, :0] for name, x in inputs.items() if name != "q"}
    negative = {"k_pos": inputs["k_neg"], "v_pos": inputs["v_neg"]}
    alone = forward_sm90(**(inputs | negative), alpha=0.0)
    without = inputs | {name: none[name] for name in ("k_pos", "v_pos")}
    assert torch.equal(forward_sm90(**without, alpha=1.0, path=path), -alone)
    assert forward_sm90(inputs["q"], **none, path=path).count_nonzero() == 0


@pytest.mark.parametrize("shape", [SDXL, PIXART, RAGGED], ids=str)
def test_masked_keys_are_absent(shape):
    """Bit for bit the result without them, NaN in their rows included."""
    inputs = make(shape, torch.float16)
    cut, masks, ones = cut_out(inputs)
    assert torch.equal(forward_sm90(**inputs, **masks), forward_sm90(**cut, **ones))
    check({k: x.nan_to_num(0) for k, x in inputs.items()}, **masks)


@pytest.mark.parametrize("shape", [SDXL, RAGGED], ids=str)
def test_a_prompt_with_every_key_masked_contributes_nothing(shape):
    inputs = make(shape, torch.bfloat16)
    nothing = torch.zeros(2, shape.n_neg, dtype=torch.bool)
    alone = forward_sm90(**inputs, alpha=0.0)
    inputs["v_neg"][:] = NAN
    assert torch.equal(forward_sm90(**inputs, alpha=0.5, mask_neg=nothing), alone)


@pytest.mark.parametrize("shape", [SDXL, STREAMED[5]], ids=str)
def test_biases_match_fp64(shape):
    """Of other values in each tile of keys, and on one side of rounds that share a ring."""
    bias = torch.randn(1, shape.n_neg, generator=torch.Generator().manual_seed(3)) * 2
    bias[:, 5] = -10000.0
    inputs = make(shape._replace(b=1, h=1, l=300), torch.float16)
    check(inputs, mask_neg=bias)


@pytest.mark.parametrize("scale", [-0.2, 0.0, 3.0])
def test_any_scale(scale):
    check(make(SHAPES[0], torch.bfloat16), scale=scale)


@pytest.mark.parametrize("alpha", ["sample", "region"])
def test_alpha_maps_match_fp64(alpha):
    check(make(SDXL, torch.bfloat16), ALPHAS[alpha])


@BOTH
@pytest.mark.parametrize("how", ["bhnd", "padded-rows", "fused-qkv"])
def test_strides_do_not_matter(how, path):
    inputs = make(Shape("strides", 2, 18, 2, 21, 30, 40), torch.float16)
    views = {name: strided(x, how) for name, x in inputs.items()}
    assert torch.equal(forward_sm90(**views, path=path), forward_sm90(**inputs, path=path))


@BOTH
def test_a_prompt_for_the_whole_batch_is_read_where_it_is(path):
    inputs = make(Shape("broadcast", 3, 17, 2, 30, 30, 64), torch.bfloat16)
    one = {name: x[:1, :, :1].expand(3, -1, 2, -1) for name, x in inputs.items() if name != "q"}
    copies = {name: x.contiguous() for name, x in one.items()}
    views = forward_sm90(inputs["q"], **one, path=path)
    assert torch.equal(views, forward_sm90(inputs["q"], **copies, path=path))


def test_large_scores_do_not_overflow():
    inputs = make(RAGGED, torch.bfloat16)
    check(inputs | {"q": inputs["q"] * 100})
