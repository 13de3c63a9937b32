"""The CUDA C++ backward kernels against fp64 autograd, executed on the CPU from their PTX."""

import pytest
import torch
from support.cuda_emulation import assert_as_accurate_as_eager, backward, eager, nvcc
from test_cuda_forward import ALPHAS, EDGES, MODELS, Shape, cut_out, in_turn, make, strided

pytestmark = pytest.mark.skipif(nvcc() is None, reason="no nvcc: the PTX cannot be built")

NAMES = ("q", "k_pos", "v_pos", "k_neg", "v_neg")


def make_grad(inputs: dict) -> torch.Tensor:
    q = inputs["q"]
    return torch.randn(q.shape, generator=torch.Generator().manual_seed(9)).to(q.dtype)


def autograd(inputs: dict, grad_o, alpha, dtype: torch.dtype, **masks) -> dict[str, torch.Tensor]:
    """Gradients of eager PyTorch in `dtype`; alpha's in fp32 or better, as the op gives it."""
    leaves = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
    alpha = alpha if torch.is_tensor(alpha) else torch.tensor(float(alpha))
    rows = inputs["q"].shape[:3]
    wide = dtype if dtype == torch.float64 else torch.float32
    alpha = alpha.expand(rows).to(wide).clone().requires_grad_()
    masks = {k: m.to(dtype) if torch.is_tensor(m) and m.is_floating_point() else m
             for k, m in masks.items()}  # fmt: skip
    o = eager(**leaves, alpha=alpha, **masks)
    grads = torch.autograd.grad(o, (*leaves.values(), alpha), grad_o.to(o.dtype))
    return dict(zip((*NAMES, "alpha"), grads, strict=True))


def check(inputs: dict, alpha=0.5, splits: int = 1, **masks) -> dict[str, torch.Tensor]:
    grad_o = make_grad(inputs)
    actual = backward(grad_o, **inputs, alpha=alpha, splits=splits, **masks)
    exact = autograd(inputs, grad_o, alpha, torch.float64, **masks)
    low = autograd(inputs, grad_o, alpha, inputs["q"].dtype, **masks)
    assert actual.keys() == exact.keys()
    for name, gradient in actual.items():
        assert_as_accurate_as_eager(gradient, exact[name], low[name])
    return actual


@pytest.mark.parametrize(("shape", "dtype"), in_turn(MODELS), ids=str)
def test_matches_fp64(shape, dtype):
    check(make(shape, dtype))


@pytest.mark.parametrize(
    ("shape", "dtype"), in_turn([s for s in EDGES if s.n_pos and s.n_neg and s.d > 1]), ids=str
)
def test_edges_match_fp64(shape, dtype):
    check(make(shape, dtype), alpha=-1.25)


@pytest.mark.parametrize("alpha", ["region", "all"])
def test_alpha_maps_match_fp64(alpha):
    check(make(MODELS[3], torch.bfloat16), ALPHAS[alpha])


SPLIT = Shape("split", 1, 330, 1, 30, 90, 48)


def test_splits_match_fp64():
    """Also where the last split has no rows: six tiles of rows, four splits of two."""
    check(make(SPLIT, torch.bfloat16), splits=4)


def test_one_key_has_no_gradient_but_v():
    """Softmax over one key is 1 whatever q and k are."""
    gradients = backward(*_with_grad(make(Shape("one-key", 1, 20, 1, 1, 1, 64), torch.float16)))
    for name in ("q", "k_pos", "k_neg"):
        assert gradients[name].abs().max() <= 1e-3


def _with_grad(inputs: dict) -> tuple[torch.Tensor, ...]:
    return make_grad(inputs), *inputs.values()


@pytest.mark.parametrize("shape", [MODELS[0], Shape("long", 1, 33, 1, 150, 40, 48)], ids=str)
def test_masked_keys_are_absent(shape):
    inputs = make(shape, torch.float16)
    grad_o = make_grad(inputs)
    cut, masks, ones = cut_out(inputs)
    actual = backward(grad_o, **inputs, **masks)
    expected = backward(grad_o, **cut, **ones)
    for name in ("q", "alpha"):
        assert torch.equal(actual[name], expected[name])
    for side, keep in (("pos", masks["mask_pos"][0]), ("neg", masks["mask_neg"][0] == 0)):
        for name in (f"k_{side}", f"v_{side}"):
            assert torch.equal(actual[name][:, keep], expected[name])
            assert actual[name][:, ~keep].count_nonzero() == 0


def test_masks_match_fp64():
    shape = MODELS[3]
    generator = torch.Generator().manual_seed(3)
    mask_pos = torch.randn(shape.b, shape.n_pos, generator=generator) * 2
    mask_neg = torch.rand(shape.b, shape.n_neg, generator=generator) < 0.6
    check(make(shape, torch.float16), mask_pos=mask_pos, mask_neg=mask_neg)


@pytest.mark.parametrize("empty", ["pos", "neg"])
def test_a_prompt_without_keys_has_no_gradient(empty):
    inputs = make(Shape("empty", 1, 20, 1, 9, 9, 64), torch.float16)
    grad_o = make_grad(inputs)
    whole = backward(grad_o, **inputs, alpha=1.0)
    for name in (f"k_{empty}", f"v_{empty}"):
        inputs[name] = inputs[name][:, :0]
    actual = backward(grad_o, **inputs, alpha=1.0)
    other = "neg" if empty == "pos" else "pos"
    for name in (f"k_{other}", f"v_{other}"):
        assert torch.equal(actual[name], whole[name])
    if empty == "neg":
        assert actual["alpha"].count_nonzero() == 0


def test_alpha_zero_gives_the_negative_prompt_no_gradient():
    gradients = backward(*_with_grad(make(MODELS[0], torch.bfloat16)), alpha=0.0)
    for name in ("k_neg", "v_neg"):
        assert gradients[name].count_nonzero() == 0
    assert gradients["alpha"].count_nonzero() > 0


def test_only_what_is_needed_is_written_and_nothing_changes():
    inputs = make(MODELS[0], torch.bfloat16)
    grad_o = make_grad(inputs)
    whole = backward(grad_o, **inputs)
    for i, name in enumerate((*NAMES, "alpha")):
        needs = tuple(j == i for j in range(6))
        alone = backward(grad_o, **inputs, needs=needs)
        assert alone.keys() == {name}
        assert torch.equal(alone[name], whole[name])


@pytest.mark.parametrize("how", ["bhnd", "odd-rows", "odd-start"])
def test_strides_do_not_matter(how):
    inputs = make(Shape("strides", 2, 18, 2, 21, 30, 40), torch.float16)
    grad_o = make_grad(inputs)
    views = {name: strided(x, how) for name, x in inputs.items()}
    expected = backward(grad_o, **inputs)
    for name, gradient in backward(strided(grad_o, how), **views).items():
        assert torch.equal(gradient, expected[name])


def test_a_broadcast_prompt_gets_a_gradient_for_each_row():
    inputs = make(Shape("broadcast", 3, 17, 2, 30, 30, 64), torch.bfloat16)
    one = {name: x[:1, :, :1].expand(3, -1, 2, -1) for name, x in inputs.items() if name != "q"}
    one["q"] = inputs["q"]
    grad_o = make_grad(inputs)
    expected = backward(grad_o, **{name: x.contiguous() for name, x in one.items()})
    for name, gradient in backward(grad_o, **one).items():
        assert torch.equal(gradient, expected[name])
