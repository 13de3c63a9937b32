"""Gradients of every back end against fp64, under the accuracy rule of `testing.py`."""

import pytest
import torch
from support import formula
from support.cases import (
    BACKENDS,
    DEVICE,
    EDGES,
    MODELS,
    crossed,
    is_long_in_fp32,
    make_inputs,
    mask_of,
)
from support.gradients import check_gradients, gradients

from nasa_kernels import nasa_attention
from nasa_kernels.testing import MODEL_SHAPES, Shape

BASIC = Shape("basic", 2, 35, 2, 64, 77, 33)
# one of each head_dim and length: the interpreter is slow
SHAPES = tuple(
    shape._replace(l=min(shape.l, 33), h=1)
    for shape in MODELS + EDGES
    if shape.name not in ("longest", "sd15-8", "sd21-8")
)


@pytest.mark.parametrize(("backend", "shape", "dtype"), crossed(SHAPES), ids=str)
def test_matches_fp64(backend, shape, dtype):
    check_gradients(backend, make_inputs(shape, dtype, DEVICE), alpha=0.6)


@pytest.mark.parametrize("size", [(), (2, 1, 1), (1, 35, 1), (2,), (2, 35, 2)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_alpha_tensors(backend, size):
    generator = torch.Generator().manual_seed(3)
    alpha = torch.randn(size, generator=generator).to(DEVICE)
    check_gradients(backend, make_inputs(BASIC, torch.float16, DEVICE), alpha)


@pytest.mark.parametrize("l", [1024, 1025, 4096])
def test_many_queries_in_bf16_on_the_cpu(l):
    """Their gradients of keys and values are sums over all queries, which bf16 must not add up."""
    shape = BASIC._replace(b=1, l=l)
    check_gradients("cpu", make_inputs(shape, torch.bfloat16, "cpu"), 0.6)


@pytest.mark.parametrize(
    ("backend", "n_pos", "n_neg", "dtype"),
    [
        (backend, n_pos, n_neg, dtype)
        for backend in BACKENDS
        # resident and streamed
        for n_pos, n_neg in ((77, 33), (150, 77))
        for dtype in (torch.float32, torch.bfloat16)
        if not is_long_in_fp32(backend, dtype, n_pos)
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["bool", "bias", "huge"])
def test_masks(backend, kind, n_pos, n_neg, dtype):
    inputs = make_inputs(BASIC._replace(n_pos=n_pos, n_neg=n_neg), dtype, DEVICE)
    masks = {"mask_pos": mask_of(kind, 2, n_pos), "mask_neg": mask_of(kind, 2, n_neg, seed=2)}
    check_gradients(backend, inputs, alpha=0.6, **masks)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_rows_get_exact_zeros(backend):
    """Even where the masked rows of K and V hold NaN."""
    inputs = make_inputs(BASIC, torch.float32, DEVICE)
    mask = mask_of("bool", 2, 77)
    for name in ("k_pos", "v_pos"):
        inputs[name] = torch.where(mask[..., None, None], inputs[name], float("nan"))
    grad_o = torch.ones_like(inputs["q"])
    found = gradients(nasa_attention, inputs, 0.6, grad_o, mask_pos=mask, backend=backend)
    assert all(torch.isfinite(x).all() for x in found.values())
    assert found["k_pos"][~mask].count_nonzero() == 0
    assert found["v_pos"][~mask].count_nonzero() == 0
    assert found["v_pos"][mask].count_nonzero() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_sample_without_keys(backend):
    """All keys of sample 0 masked: its Z is 0, and nothing of it has a gradient."""
    inputs = make_inputs(BASIC, torch.float32, DEVICE)
    mask = torch.ones(2, 33, dtype=torch.bool, device=DEVICE)
    mask[0] = False
    found = gradients(
        nasa_attention, inputs, 0.6, torch.ones_like(inputs["q"]), mask_neg=mask, backend=backend
    )
    q = inputs["q"].clone().requires_grad_()
    nasa_attention(**{**inputs, "q": q}, alpha=0.0, backend=backend).sum().backward()
    torch.testing.assert_close(found["q"][0], q.grad[0], rtol=1e-5, atol=1e-6)
    for name in ("k_neg", "v_neg"):
        assert found[name][0].count_nonzero() == 0
        assert found[name][1].count_nonzero() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_shared_prompts(backend):
    """Strided q, one prompt for the batch, and a gradient of O that is a broadcast scalar."""
    inputs = make_inputs(BASIC, torch.float32, DEVICE)
    inputs |= {name: inputs[name][:1] for name in ("k_neg", "v_neg")}
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    views = {name: strided_leaf(x) for name, x in leaves.items()}
    nasa_attention(**views, alpha=0.6, backend=backend).sum().backward()
    doubles = {name: x.double().requires_grad_() for name, x in inputs.items()}
    formula.nasa(**doubles, alpha=0.6).sum().backward()
    for name, x in leaves.items():
        torch.testing.assert_close(x.grad, doubles[name].grad.float(), rtol=1e-4, atol=2e-5)


def strided_leaf(x):
    return torch.nn.functional.pad(x, (2, 1, 1, 0))[:, :, 1:, 2 : x.shape[3] + 2]


@pytest.mark.parametrize("wanted", ["q", "k_pos", "v_pos", "k_neg", "v_neg", "alpha"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_gradient_alone(backend, wanted):
    """What is not asked for is not computed, and does not change what is."""
    inputs = make_inputs(BASIC, torch.float32, DEVICE)
    alpha = torch.tensor([[0.3, 0.7]], device=DEVICE).expand(35, 2)
    grad_o = torch.randn_like(inputs["q"])
    everything = gradients(nasa_attention, inputs, alpha, grad_o, backend=backend)
    leaves = {**inputs, "alpha": alpha.contiguous()}
    leaves[wanted] = leaves[wanted].clone().requires_grad_()
    o = nasa_attention(**leaves, backend=backend)
    o.backward(grad_o)
    assert torch.equal(leaves[wanted].grad, everything[wanted])


@pytest.mark.parametrize("backend", BACKENDS)
def test_deterministic(backend):
    inputs = make_inputs(BASIC._replace(l=150), torch.bfloat16, DEVICE)
    alpha = torch.full((), 0.6, device=DEVICE)
    grad_o = torch.randn_like(inputs["q"])
    first, second = (
        gradients(nasa_attention, inputs, alpha, grad_o, backend=backend) for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name == "triton"])
def test_split_queries(backend, monkeypatch):
    """Where heads do not fill a GPU, the queries are split and the parts summed."""
    from nasa_kernels._triton import backward

    inputs = make_inputs(BASIC._replace(b=1, l=150, h=1), torch.float16, DEVICE)
    monkeypatch.setattr(backward, "multiprocessors", lambda device: 3)
    check_gradients(backend, inputs, alpha=0.6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [s for s in MODEL_SHAPES if s.l <= 4096], ids=str)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_whole_models(backend, shape, dtype):
    alpha = torch.tensor(0.6, device=DEVICE)
    check_gradients(backend, make_inputs(shape._replace(h=2), dtype, DEVICE), alpha)
