"""Forward parity of every back end against fp64, under the accuracy rule of `testing.py`."""

import pytest
import torch
from support.cases import (
    BACKENDS,
    DEVICE,
    DTYPES,
    EDGES,
    MODELS,
    crossed,
    is_long_in_fp32,
    make_inputs,
    mask_of,
    strided,
)
from support.formula import exact_and_budget

from nasa_kernels import nasa_attention
from nasa_kernels.testing import MODEL_SHAPES, Shape

BASIC = Shape("basic", 2, 70, 2, 64, 77, 33)
# the rule "projected": every way to hold a prompt, and what makes rows of zeros
PROJECTED = tuple(shape for shape in (*MODELS, *EDGES) if shape.l <= 80 and shape.n_pos < 300)


@pytest.mark.parametrize(("backend", "shape", "dtype"), crossed(MODELS + EDGES), ids=str)
def test_matches_fp64(backend, shape, dtype):
    inputs = make_inputs(shape, dtype, DEVICE)
    o = nasa_attention(**inputs, alpha=0.6, backend=backend)
    assert o.dtype == dtype
    assert o.is_contiguous()
    exact, budget = exact_and_budget(inputs, 0.6)
    budget.check(o, exact)


@pytest.mark.parametrize(("backend", "shape", "dtype"), crossed(PROJECTED), ids=str)
def test_projected_matches_fp64(backend, shape, dtype):
    inputs = make_inputs(shape, dtype, DEVICE)
    o = nasa_attention(**inputs, alpha=2.0, rule="projected", backend=backend)
    assert o.dtype == dtype
    assert o.is_contiguous()
    exact, budget = exact_and_budget(inputs, 2.0, rule="projected")
    budget.check(o, exact)


@pytest.mark.parametrize(
    ("backend", "n_pos", "n_neg", "dtype"),
    [
        (backend, n_pos, n_neg, dtype)
        for backend in BACKENDS
        # resident and streamed
        for n_pos, n_neg in ((77, 33), (200, 77))
        for dtype in DTYPES
        if not is_long_in_fp32(backend, dtype, n_pos)
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("kind", "rule"),
    [("bool", "nasa"), ("bias", "nasa"), ("huge", "nasa"), ("bias", "projected")],
)
def test_masks(backend, kind, rule, n_pos, n_neg, dtype):
    inputs = make_inputs(BASIC._replace(n_pos=n_pos, n_neg=n_neg), dtype, DEVICE)
    masks = {"mask_pos": mask_of(kind, 2, n_pos), "mask_neg": mask_of(kind, 2, n_neg, seed=2)}
    o = nasa_attention(**inputs, alpha=0.6, rule=rule, **masks, backend=backend)
    exact, budget = exact_and_budget(inputs, 0.6, rule=rule, **masks)
    budget.check(o, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_in_the_dtype_of_q(backend, dtype):
    """A pipeline's additive mask has the dtype of its activations."""
    inputs = make_inputs(BASIC, dtype, DEVICE)
    mask = mask_of("bias", 2, 77).to(dtype)
    o = nasa_attention(**inputs, alpha=0.6, mask_pos=mask, backend=backend)
    assert torch.equal(
        o, nasa_attention(**inputs, alpha=0.6, mask_pos=mask.float(), backend=backend)
    )


@pytest.mark.parametrize(
    ("size", "rule"),
    [
        *((size, "nasa") for size in [(), (2, 1, 1), (1, 70, 1), (2,), (2, 70, 2)]),
        ((2, 70, 2), "projected"),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_alpha_tensors(backend, size, rule):
    """All, per sample, per region, per head, per row. Any strides."""
    inputs = make_inputs(BASIC, torch.float16, DEVICE)
    generator = torch.Generator().manual_seed(3)
    alpha = torch.randn(size, generator=generator).to(DEVICE)
    o = nasa_attention(**inputs, alpha=alpha, rule=rule, backend=backend)
    exact, budget = exact_and_budget(inputs, alpha, rule=rule)
    budget.check(o, exact)


@pytest.mark.parametrize(
    ("backend", "shape", "dtype"),
    [
        (backend, shape, dtype)
        for backend in BACKENDS
        for shape in (BASIC, BASIC._replace(d=40, n_pos=150))
        for dtype in (torch.float32, torch.bfloat16)
        if not is_long_in_fp32(backend, dtype, shape.n_pos)
    ],
    ids=str,
)
def test_strides(backend, shape, dtype):
    """Slices of larger buffers, whose other elements are NaN, give the same bits."""
    inputs = make_inputs(shape, dtype, DEVICE)
    plain = nasa_attention(**inputs, alpha=0.6, backend=backend)
    views = {name: strided(x) for name, x in inputs.items()}
    assert not any(x.is_contiguous() for x in views.values())
    o = nasa_attention(**views, alpha=0.6, backend=backend)
    assert o.is_contiguous()
    torch.testing.assert_close(o, plain, rtol=0, atol=0 if backend == "triton" else 1e-5)


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1), (1, 1)], ids=["batch", "heads", "both"])
@pytest.mark.parametrize("expanded", [False, True], ids=["size-1", "stride-0"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_prompt_for_all(backend, expanded, sizes):
    """K and V of one sample or one head are read where they are, as if they were repeated."""
    inputs = make_inputs(BASIC, torch.float16, DEVICE)
    shared, copied = dict(inputs), dict(inputs)
    for name in ("k_pos", "v_pos", "k_neg", "v_neg"):
        small = inputs[name][: sizes[0], :, : sizes[1]]
        full = small.expand(2, -1, 2, -1)
        shared[name], copied[name] = full if expanded else small, full.contiguous()
    o = nasa_attention(**shared, alpha=0.6, backend=backend)
    expected = nasa_attention(**copied, alpha=0.6, backend=backend)
    torch.testing.assert_close(o, expected, rtol=0, atol=0 if backend == "triton" else 1e-3)


@pytest.mark.parametrize("scale", [0.01, 1.0, -0.3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_scale(backend, scale):
    inputs = make_inputs(BASIC, torch.float32, DEVICE)
    o = nasa_attention(**inputs, alpha=0.6, scale=scale, backend=backend)
    exact, budget = exact_and_budget(inputs, 0.6, scale=scale)
    budget.check(o, exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_do_not_overflow(backend):
    """Scores of a few hundred: exp would overflow fp32 without its shift."""
    inputs = make_inputs(BASIC._replace(n_neg=200), torch.float32, DEVICE)
    inputs = {name: x * 30 if name[0] in "qk" else x for name, x in inputs.items()}
    o = nasa_attention(**inputs, alpha=0.6, backend=backend)
    exact, budget = exact_and_budget(inputs, 0.6)
    budget.check(o, exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shared_tokens(backend):
    """Prompts that share most of their tokens, alpha 1: where eager's roundings cancel worst.

    One rounding instead of four: at most 0.7 of eager's error is expected here, in bf16; of `cpu`
    and `sdpa`, which round each Z as well, no more than eager's.
    """
    inputs = make_inputs(BASIC._replace(n_neg=77), torch.bfloat16, DEVICE)
    for letter in "kv":
        inputs[f"{letter}_neg"] = inputs[f"{letter}_pos"].clone()
        inputs[f"{letter}_neg"][:, :10] *= -1
    o = nasa_attention(**inputs, alpha=1.0, backend=backend)
    exact, budget = exact_and_budget(inputs, 1.0)
    share = 1.0 if backend in ("cpu", "sdpa") else 0.7
    budget._replace(l2=share * budget.l2).check(o, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", MODEL_SHAPES, ids=str)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_whole_models(backend, shape, dtype):
    """Every layer at its real size, judged on 512 of its queries: fp64 of all would not fit."""
    inputs = make_inputs(shape, dtype, DEVICE)
    o = nasa_attention(**inputs, alpha=0.6, backend=backend)
    rows = torch.linspace(0, shape.l - 1, min(shape.l, 512)).long().to(DEVICE)
    exact, budget = exact_and_budget({**inputs, "q": inputs["q"][:, rows]}, 0.6)
    budget.check(o[:, rows], exact)
