"""Rule "projected": answers that are known exactly, its gradient, several negative prompts."""

import re

import pytest
import torch
from support import formula
from support.cases import BACKENDS, DEVICE, DTYPES, make_inputs, mask_of
from support.gradients import check_gradients, check_joint_gradients, gradients
from torch.utils.flop_counter import FlopCounterMode

from nasa_kernels import (
    Negative,
    _projected,
    backends,
    nasa_attention,
    nasa_joint_attention,
    ops,
    projected_attention,
    projected_joint_attention,
)
from nasa_kernels.testing import Shape, budget, largest_score

EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
JOINT_BACKENDS = tuple(name for name in (*ops.JOINT_FORWARD, "reference") if name in BACKENDS)
EVERY_JOINT_BACKEND = pytest.mark.parametrize("backend", JOINT_BACKENDS)
SMALL = Shape("small", 2, 19, 2, 24, 13, 9)
STREAMED = Shape("streamed", 1, 17, 1, 40, 200, 200)
BOTH = pytest.mark.parametrize("shape", [SMALL, STREAMED], ids=str)
ALPHAS = (-0.7, 0.3, 2.5, 100.0)


def project(inputs, alpha, backend, **options):
    return nasa_attention(**inputs, alpha=alpha, rule="projected", backend=backend, **options)


def plain(inputs, backend):
    return nasa_attention(**inputs, alpha=0, backend=backend)


def joint_inputs(dtype=torch.float32, text=(3, 4)):
    """Of 19 queries of the image, of 7 shared keys, of 5 and 4 keys of the texts."""
    generator = torch.Generator().manual_seed(2)
    names = ("q", "k", "v", "k_pos", "v_pos", "k_neg", "v_neg")
    lengths = (19 + sum(text), 7, 7, 5, 5, 4, 4)
    return {
        name: torch.randn(2, n, 3, 16, generator=generator).to(DEVICE, dtype)
        for name, n in zip(names, lengths, strict=True)
    }


# ---- answers that are known ----------------------------------------------------------------------


@BOTH
@EVERY_DTYPE
@EVERY_BACKEND
def test_equal_prompts_give_z_pos_exactly(backend, dtype, shape):
    """At every alpha: the three sums are one sum, and D is 0."""
    inputs = make_inputs(shape._replace(n_neg=shape.n_pos), dtype, DEVICE)
    inputs |= {"k_neg": inputs["k_pos"], "v_neg": inputs["v_pos"]}
    expected = plain(inputs, backend)
    for alpha in ALPHAS:
        assert torch.equal(project(inputs, alpha, backend), expected)


@EVERY_JOINT_BACKEND
def test_equal_prompts_give_z_pos_exactly_in_joint_attention(backend):
    inputs = joint_inputs(torch.float16)
    inputs |= {"k_neg": inputs["k_pos"], "v_neg": inputs["v_pos"]}
    options = {"text_queries": (3, 4), "backend": backend}
    expected = nasa_joint_attention(**inputs, alpha=0.0, **options)
    for alpha in ALPHAS:
        o = nasa_joint_attention(**inputs, alpha=alpha, rule="projected", **options)
        assert torch.equal(o[:, :19], expected[:, :19])


@EVERY_BACKEND
@pytest.mark.parametrize("factor", [2.0, -0.25, 3.1])
def test_a_negative_that_is_a_multiple_of_the_positive_takes_nothing(backend, factor):
    inputs = make_inputs(SMALL._replace(n_neg=SMALL.n_pos), torch.float32, DEVICE)
    inputs |= {"k_neg": inputs["k_pos"], "v_neg": inputs["v_pos"] * factor}
    expected = plain(inputs, backend)
    # the rounding of t is all that is left of D
    atol = 0 if factor in (2.0, -0.25) else 8 * 2**-23 * abs(factor) * expected.abs().max().item()
    torch.testing.assert_close(project(inputs, 2.0, backend), expected, rtol=0, atol=atol)


@BOTH
@EVERY_DTYPE
@EVERY_BACKEND
def test_alpha_zero_is_plain_attention(backend, dtype, shape):
    """Bit for bit: as a number, as a tensor, with no negative keys, and whatever Z- holds."""
    inputs = make_inputs(shape, dtype, DEVICE)
    expected = plain(inputs, backend)
    zero = torch.zeros((), device=DEVICE)
    assert torch.equal(project(inputs, 0, backend), expected)
    assert torch.equal(project(inputs, zero, backend), expected)
    none = {**inputs, "k_neg": inputs["k_neg"][:, :0], "v_neg": inputs["v_neg"][:, :0]}
    assert torch.equal(project(none, 0.7, backend), expected)
    for value in (float("nan"), float("inf")):
        inputs["v_neg"] = torch.full_like(inputs["v_neg"], value)
        assert torch.equal(project(inputs, 0, backend), expected)
        assert torch.equal(project(inputs, zero, backend), expected)


@EVERY_JOINT_BACKEND
def test_alpha_zero_is_plain_joint_attention(backend):
    inputs, text = joint_inputs(torch.float16), {"text_queries": (3, 0), "backend": backend}
    inputs["q"] = inputs["q"][:, :22]
    expected = nasa_joint_attention(**inputs, alpha=0.0, **text)
    inputs["v_neg"] = torch.full_like(inputs["v_neg"], float("nan"))
    for alpha in (0.0, torch.zeros((), device=DEVICE)):
        o = nasa_joint_attention(**inputs, alpha=alpha, rule="projected", **text)
        assert torch.equal(o, expected)


@EVERY_BACKEND
def test_alpha_splits(backend):
    """A map of alphas is each alpha on its rows."""
    inputs = make_inputs(SMALL, torch.float16, DEVICE)
    index = torch.arange(2 * 19 * 2, device=DEVICE).view(2, 19, 2) % 3
    values = (0.0, 0.25, 2.0)
    alpha = torch.tensor(values, device=DEVICE)[index]
    o = project(inputs, alpha, backend)
    for i, value in enumerate(values):
        assert torch.equal(o[index == i], project(inputs, value, backend)[index == i])


@EVERY_DTYPE
@EVERY_BACKEND
def test_one_key_of_each(backend, dtype):
    """Z+ = (3, 0), Z- = (1, 4): D = (0, 4), and at alpha 1 O points along (3, -4), 3 long."""
    inputs = make_inputs(SMALL._replace(n_pos=1, n_neg=1, d=2), dtype, DEVICE)
    inputs["v_pos"][:] = torch.tensor([3.0, 0.0], dtype=dtype, device=DEVICE)
    inputs["v_neg"][:] = torch.tensor([1.0, 4.0], dtype=dtype, device=DEVICE)
    o = project(inputs, 1.0, backend)
    expected = torch.tensor([1.8, -2.4], dtype=torch.float64, device=DEVICE).expand(o.shape)
    u = torch.finfo(dtype).eps
    torch.testing.assert_close(o.double(), expected, rtol=max(u / 2, 2**-21), atol=0)


@EVERY_DTYPE
@EVERY_BACKEND
def test_the_length_is_that_of_z_pos(backend, dtype):
    inputs = make_inputs(SMALL, dtype, DEVICE)
    length = plain(inputs, backend).double().norm(dim=-1)
    for alpha in ALPHAS:
        o = project(inputs, alpha, backend).double().norm(dim=-1)
        torch.testing.assert_close(o, length, rtol=4 * torch.finfo(dtype).eps, atol=0)


@EVERY_BACKEND
def test_what_is_taken_stands_at_a_right_angle(backend):
    """<O, Z+> = r <Z+, Z+> with r below 1, and more of Z- is gone with a larger alpha."""
    inputs = make_inputs(SMALL, torch.float32, DEVICE)
    swapped = {"k_pos": "k_neg", "v_pos": "v_neg"}
    z_pos = plain(inputs, backend)
    z_neg = plain({**inputs, **{a: inputs[b] for a, b in swapped.items()}}, backend)
    d = z_neg - (z_neg * z_pos).sum(-1, True) / (z_pos * z_pos).sum(-1, True) * z_pos
    before = torch.zeros_like(d[..., 0])
    for alpha in (0.3, 1.0, 2.5):
        along = -(project(inputs, alpha, backend) * d).sum(-1)
        assert (along > before).all()
        before = along


@EVERY_BACKEND
def test_scaling_the_negative_values_scales_alpha(backend):
    """By a power of two bit for bit: D scales, and nothing rounds."""
    inputs = make_inputs(SMALL, torch.float32, DEVICE)
    o = project(inputs, 0.5, backend)
    for factor, exact in ((0.5, True), (4.0, True), (-2.0, True), (1.7, False)):
        scaled = {**inputs, "v_neg": inputs["v_neg"] * factor}
        tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(project(scaled, 0.5 / factor, backend), o, **tolerance)


@EVERY_BACKEND
def test_scaling_the_positive_values_scales_the_result_at_a_scaled_alpha(backend):
    inputs = make_inputs(SMALL, torch.float32, DEVICE)
    o = project(inputs, 0.5, backend)
    scaled = {**inputs, "v_pos": inputs["v_pos"] * 4}
    torch.testing.assert_close(project(scaled, 2.0, backend), o * 4, rtol=0, atol=0)


@EVERY_BACKEND
def test_a_large_alpha_turns_z_pos_to_minus_d(backend):
    inputs = make_inputs(SMALL, torch.float32, DEVICE)
    z = {
        side: formula.attend(
            inputs["q"].double(), inputs[f"k_{side}"].double(), inputs[f"v_{side}"].double(),
            None, 24**-0.5,
        )
        for side in ("pos", "neg")
    }  # fmt: skip
    squared = (z["pos"] * z["pos"]).sum(-1, keepdim=True)
    d = z["neg"] - (z["neg"] * z["pos"]).sum(-1, keepdim=True) / squared * z["pos"]
    expected = -d / d.norm(dim=-1, keepdim=True) * squared.sqrt()
    o = project(inputs, 1e6, backend).double()
    torch.testing.assert_close(o, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(project(inputs, -1e6, backend).double(), -o, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", ["no-keys", "masked", "zero-values", "sums-to-zero"])
@EVERY_BACKEND
def test_rows_of_zeros_stay_zeros(backend, which):
    """Z+ is 0, by three ways, and no direction is left to project on."""
    inputs, options = make_inputs(SMALL, torch.float32, DEVICE), {}
    if which == "no-keys":
        inputs |= {name: inputs[name][:, :0] for name in ("k_pos", "v_pos")}
    elif which == "masked":
        options["mask_pos"] = torch.zeros(2, 13, dtype=torch.bool, device=DEVICE)
    elif which == "zero-values":
        inputs["v_pos"].zero_()
    else:
        inputs["q"].zero_()
        inputs["v_pos"] = inputs["v_pos"][:, :2].mul(4).round()
        inputs["k_pos"] = inputs["k_pos"][:, :2]
        inputs["v_pos"][:, 1] = -inputs["v_pos"][:, 0]
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    o = project(leaves, 2.0, backend, **options)
    assert o.count_nonzero() == 0
    o.backward(torch.ones_like(o))
    for name in ("k_neg", "v_neg"):
        assert leaves[name].grad is None or leaves[name].grad.count_nonzero() == 0
    assert all(x.grad is None or x.grad.isfinite().all() for x in leaves.values())


@EVERY_BACKEND
def test_order_of_the_keys_does_not_matter(backend):
    inputs = make_inputs(SMALL._replace(n_pos=9), torch.float32, DEVICE)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(5))
    permuted = {name: x if name == "q" else x[:, order] for name, x in inputs.items()}
    expected = project(inputs, 2.0, backend)
    torch.testing.assert_close(project(permuted, 2.0, backend), expected, rtol=1e-5, atol=2e-6)


@EVERY_JOINT_BACKEND
def test_without_shared_keys_it_is_cross_attention(backend):
    inputs = joint_inputs(text=(0, 0))
    inputs |= {name: inputs[name][:, :0] for name in ("k", "v")}
    cross = {name: inputs[name] for name in ("q", "k_pos", "v_pos", "k_neg", "v_neg")}
    o = nasa_joint_attention(**inputs, alpha=1.5, rule="projected", backend=backend)
    torch.testing.assert_close(o, project(cross, 1.5, backend), rtol=1e-5, atol=2e-6)


# ---- gradients -----------------------------------------------------------------------------------


@EVERY_DTYPE
@EVERY_BACKEND
def test_gradients_match_fp64(backend, dtype):
    alpha = torch.randn(2, 19, 2, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    check_gradients(backend, make_inputs(SMALL, dtype, DEVICE), alpha, rule="projected")


@EVERY_BACKEND
def test_gradients_at_alpha_zero(backend):
    """Of a tensor: alpha has one, D stands at a right angle; Z- has none, Z+ that of attention."""
    inputs = make_inputs(SMALL, torch.float32, DEVICE)
    zero = torch.zeros(2, 19, 2, device=DEVICE)
    found = check_gradients(backend, inputs, zero, rule="projected")
    assert found["alpha"].count_nonzero() > 0
    assert found["k_neg"].count_nonzero() == found["v_neg"].count_nonzero() == 0


@pytest.mark.parametrize("wanted", ["z_pos", "z_neg", "alpha"])
def test_the_gradient_of_the_blend_is_that_of_the_reference(wanted):
    """In fp64, with rows of zeros, an alpha of 0 and an inf that it hides, one input at a time."""
    generator = torch.Generator().manual_seed(0)
    z_pos, z_neg, grad_o = torch.randn(3, 2, 6, 3, 8, generator=generator, dtype=torch.float64)
    alpha = torch.randn(2, 6, 3, generator=generator, dtype=torch.float64)
    z_pos[0, 0], z_neg[0, 1], alpha[0, 2], alpha[1, 0, 0] = 0, 0, 0, 0
    leaves = {"z_pos": z_pos, "z_neg": z_neg, "alpha": alpha}
    leaves[wanted].requires_grad_()
    expected = formula.project(z_pos, z_neg, alpha[..., None])
    (by_formula,) = torch.autograd.grad(expected, leaves[wanted], grad_o)
    if wanted == "z_pos":
        # a row of zeros stays where it is put: the gradient of Z+ goes through
        by_formula[0, 0] = grad_o[0, 0]
    hidden = z_neg.detach().clone()
    hidden[1, 0, 0, 3] = float("inf")
    z_neg = z_neg if wanted == "z_neg" else hidden
    o = _projected.blend(z_pos, z_neg, alpha, 0.0)
    torch.testing.assert_close(o, expected)
    (found,) = torch.autograd.grad(o, leaves[wanted], grad_o)
    if wanted == "alpha":
        found[1, 0, 0] = by_formula[1, 0, 0]
    torch.testing.assert_close(found, by_formula)


def test_gradcheck_and_gradgradcheck():
    inputs = make_inputs(SMALL, torch.float64, DEVICE)
    small = [x[:, :3].detach().requires_grad_() for x in inputs.values()]
    alpha = torch.rand(2, 1, 2, dtype=torch.float64, device=DEVICE, requires_grad=True)
    masks = {
        "mask_pos": mask_of("bool", 2, 13)[:, :3],
        "mask_neg": mask_of("bias", 2, 9)[:, :3].double(),
    }

    def function(*x):
        return nasa_attention(*x, **masks, rule="projected", backend="reference")

    assert torch.autograd.gradcheck(function, (*small, alpha), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (*small, alpha), fast_mode=True)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_gradcheck_of_fused_back_ends(backend):
    inputs = make_inputs(SMALL._replace(b=1, l=3, h=1, d=4, n_pos=4, n_neg=3), torch.float32, "cpu")
    inputs = [x.to(DEVICE).requires_grad_() for x in inputs.values()]
    alpha = torch.tensor(0.5, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *x: nasa_attention(*x, rule="projected", backend=backend),
        (*inputs, alpha), eps=1e-2, atol=2e-3, rtol=2e-2, fast_mode=backend == "triton",
    )  # fmt: skip


def test_the_backward_pass_keeps_z_and_nothing_in_fp32():
    z_pos, z_neg = (torch.randn(2, 5, 3, 8).bfloat16().requires_grad_() for _ in range(2))
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x)
    with hooks:
        _projected.blend(z_pos, z_neg, None, 1.5).float().sum().backward()
    assert [x.dtype for x in kept] == [torch.bfloat16] * 2


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name in backends.FUSED])
def test_second_derivatives_are_refused(backend):
    inputs = make_inputs(SMALL, torch.float32, DEVICE)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    o = project(leaves, 0.5, backend)
    (gradient,) = torch.autograd.grad(o.square().sum(), leaves["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use backend='reference'"):
        gradient.sum().backward()


# ---- compilation, counting, autocast -------------------------------------------------------------


@EVERY_BACKEND
def test_compiles_whole(backend):
    def loss(alpha, **x):
        return project(x, alpha, backend).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = make_inputs(SMALL, torch.float32, DEVICE)
    for alpha in (0.3, 0.6):
        torch.testing.assert_close(compiled(alpha, **inputs), loss(alpha, **inputs))
    leaves = [x.requires_grad_() for x in inputs.values()]
    alpha = torch.tensor(0.5, device=DEVICE, requires_grad=True)
    found = torch.autograd.grad(compiled(alpha, **inputs), [*leaves, alpha])
    expected = torch.autograd.grad(loss(alpha, **inputs), [*leaves, alpha])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@EVERY_JOINT_BACKEND
def test_joint_attention_compiles_whole(backend):
    def block(alpha, **x):
        return nasa_joint_attention(
            **x, alpha=alpha, rule="projected", text_queries=(3, 4), backend=backend
        )

    torch._dynamo.reset()
    inputs = joint_inputs()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(0.6, **inputs), block(0.6, **inputs))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("device", ["meta", DEVICE], ids=str)
# `sdpa` is counted by PyTorch, which has no formula for its own attention on the CPU
@pytest.mark.parametrize("backend", [None, *(name for name in BACKENDS if name != "sdpa")])
def test_its_flops_are_those_of_nasa(backend, device, backward):
    def count(rule):
        inputs = {k: x.to(device) for k, x in make_inputs(SMALL, torch.float32, "cpu").items()}
        for x in inputs.values():
            x.requires_grad_(backward)
        with FlopCounterMode(display=False) as counter:
            o = nasa_attention(**inputs, alpha=0.5, rule=rule, backend=backend)
            if backward:
                o.backward(torch.ones_like(o))
        return counter.get_total_flops()

    flops = count("nasa")
    assert count("projected") == flops
    # PyTorch's counter has no formula for its attention on a CPU
    assert flops > 0 or backend == "sdpa"


@EVERY_BACKEND
def test_autocast(backend):
    inputs = make_inputs(SMALL, torch.float32, DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        o = project(inputs, 1.5, backend)
    cast = {name: x.bfloat16() for name, x in inputs.items()}
    assert torch.equal(o, project(cast, 1.5, backend))


@EVERY_BACKEND
def test_a_void_prompt_costs_nothing(backend):
    """No call of an operator, and no product, that sees the keys of the other prompt."""
    if backends.RECORDS[backend].fuses("projected", False):
        pytest.skip("one operator, which is counted by the shapes that it gets")
    inputs = {k: x.to("meta") for k, x in make_inputs(SMALL, torch.float32, "cpu").items()}
    pairs = SMALL.b * SMALL.h * SMALL.l * SMALL.d

    def flops(alpha, **changes):
        with FlopCounterMode(display=False) as counter:
            project(inputs | changes, alpha, backend)
        return counter.get_total_flops()

    assert flops(0.0) == 4 * pairs * SMALL.n_pos
    nothing = {name: inputs[name][:, :0] for name in ("k_pos", "v_pos")}
    assert flops(1.5, **nothing) in (0, 4 * pairs * SMALL.n_neg * (backend == "reference"))


# ---- several negative prompts --------------------------------------------------------------------


def negatives_of(inputs, alphas, masks=(None, None, None)):
    """Three prompts, of 9, 13 and 4 keys."""
    keys = (inputs["k_neg"], inputs["v_pos"], inputs["k_pos"][:, :4] * 0.5)
    values = (inputs["v_neg"], inputs["k_pos"], inputs["v_pos"][:, 1:5] - 0.25)
    return [Negative(*x) for x in zip(keys, values, alphas, masks, strict=True)]


def by_formula(inputs, negatives, mask_pos=None):
    """In the dtype of the inputs, the sum first."""
    scale = inputs["q"].shape[-1] ** -0.5
    exact = inputs["q"].dtype == torch.float64
    attend = formula.attend if exact else formula.eager_attention
    z_pos = attend(inputs["q"], inputs["k_pos"], inputs["v_pos"], mask_pos, scale)
    w = torch.zeros_like(z_pos)
    for k, v, alpha, mask in negatives:
        alpha = formula._per_row(inputs["q"], alpha)
        w = w + alpha * attend(inputs["q"], k, v, mask, scale)
    return formula.project(z_pos, w, torch.ones_like(w[..., :1]))


@EVERY_DTYPE
@EVERY_BACKEND
def test_several_negatives_match_fp64(backend, dtype):
    inputs = make_inputs(SMALL, dtype, DEVICE)
    per_image = torch.tensor([[[0.5]], [[-1.0]]], device=DEVICE)
    alphas = (1.5, torch.rand(19, 1, generator=torch.Generator().manual_seed(1)).to(DEVICE))
    masks = (mask_of("bool", 2, 9), None, mask_of("bias", 2, 4))
    negatives = negatives_of(inputs, (*alphas, per_image), masks)
    o = projected_attention(
        inputs["q"], inputs["k_pos"], inputs["v_pos"], negatives, backend=backend
    )
    exact = by_formula(
        formula.doubles(inputs), negatives_of(formula.doubles(inputs), (*alphas, per_image), masks)
    )
    eager = by_formula(inputs, negatives)
    budget(exact, eager, largest_score(inputs), dtype, roundings=6).check(o, exact)


@EVERY_BACKEND
def test_to_project_each_and_to_project_the_sum_is_the_same(backend):
    """Two halves of one alpha are the whole of it; what has alpha 0 is not looked at."""
    inputs = make_inputs(SMALL, torch.float32, DEVICE)
    q, k, v, k_neg, v_neg = inputs.values()
    expected = project(inputs, 1.5, backend)

    def several(*negatives):
        return projected_attention(q, k, v, negatives, backend=backend)

    assert torch.equal(several((k_neg, v_neg, 1.5)), expected)
    halves = several((k_neg, v_neg, 1.0), (k_neg, v_neg, 0.5))
    torch.testing.assert_close(halves, expected, rtol=1e-5, atol=2e-6)
    nan = torch.full_like(v_neg, float("nan"))
    zero = torch.zeros(2, 1, 1, device=DEVICE)
    for off in (0.0, zero):
        with_nothing = several((k_neg, v_neg, 1.5), (k_neg, nan, off))
        torch.testing.assert_close(with_nothing, expected, rtol=1e-5, atol=2e-6)
    both_off = several((k_neg, nan, 0.0), (k_neg, nan, 0.0))
    assert torch.equal(both_off, plain(inputs, backend))


@EVERY_BACKEND
def test_gradients_of_several_negatives(backend):
    inputs = make_inputs(SMALL, torch.float32, DEVICE)
    grad_o = torch.randn_like(inputs["q"])

    def ours(alpha, **x):
        negatives = negatives_of(x, (alpha, 0.5, -0.25))
        return projected_attention(x["q"], x["k_pos"], x["v_pos"], negatives, backend=backend)

    def exactly(alpha, **x):
        return by_formula(x, negatives_of(x, (alpha, 0.5, -0.25)))

    alpha = torch.tensor([[[0.5]], [[1.0]]], device=DEVICE)
    found = gradients(ours, inputs, alpha, grad_o)
    expected = gradients(exactly, formula.doubles(inputs), alpha.double(), grad_o.double())
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x.float(), rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("texts", [None, (3, 4, 2, 0)], ids=str)
@EVERY_JOINT_BACKEND
def test_several_negatives_in_joint_attention(backend, texts):
    inputs = joint_inputs(text=(9, 0) if texts else (0, 0))
    k_pos, v_pos, k_neg, v_neg = (inputs[x] for x in ("k_pos", "v_pos", "k_neg", "v_neg"))
    per_query = torch.rand(19, 1, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    negatives = [(k_neg, v_neg, 0.5), (v_pos, k_pos, per_query), (v_neg, k_neg, 0.0)]
    q, k, v = (inputs[x] for x in "qkv")
    o = projected_joint_attention(
        q, k, v, k_pos, v_pos, negatives, text_queries=texts, backend=backend
    )
    assert o.shape == q.shape

    def over(rows, keys, values):
        prompt = torch.cat((k, keys), 1).double(), torch.cat((v, values), 1).double()
        return formula.attend(rows.double(), *prompt, None, 0.25)

    image = q[:, :19]
    w = 0.5 * over(image, k_neg, v_neg) + per_query[:, :, None] * over(image, v_pos, k_pos)
    parts = [formula.project(over(image, k_pos, v_pos), w, torch.ones_like(w[..., :1]))]
    if texts:
        own = q[:, 19:].split(texts, dim=1)
        keys = ((k_pos, v_pos), *((k, v) for k, v, _ in negatives))
        parts += [over(rows, *prompt) for rows, prompt in zip(own, keys, strict=True)]
    torch.testing.assert_close(o.double(), torch.cat(parts, 1), rtol=1e-5, atol=5e-6)


@EVERY_JOINT_BACKEND
def test_one_negative_in_joint_attention_is_the_one_operator(backend):
    inputs = joint_inputs()
    q, k, v, k_pos, v_pos, k_neg, v_neg = inputs.values()
    per_query = torch.rand(2, 19, 3, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    padded = torch.nn.functional.pad(per_query, (0, 0, 0, 7))
    options = {"text_queries": (3, 4), "backend": backend}
    for alpha, full in ((0.7, 0.7), (per_query, padded), (per_query[0, 0], per_query[0, 0])):
        expected = nasa_joint_attention(**inputs, alpha=full, rule="projected", **options)
        negatives = [Negative(k_neg, v_neg, alpha)]
        o = projected_joint_attention(q, k, v, k_pos, v_pos, negatives, **options)
        assert torch.equal(o, expected)


@EVERY_JOINT_BACKEND
def test_joint_gradients_match_fp64(backend):
    inputs = joint_inputs(torch.float16)
    alpha = torch.randn(2, 26, 3, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    check_joint_gradients(backend, inputs, alpha, "projected", (3, 4))


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["nasa-cross", "vsf", None, 5])
def test_an_unknown_rule_names_the_rules(rule):
    inputs = make_inputs(SMALL, torch.float32, DEVICE)
    message = f"nasa_attention: rule must be one of ('nasa', 'projected'), got {rule!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        nasa_attention(**inputs, alpha=0.5, rule=rule)


WRONG = {
    "none": ({"negatives": []}, "at least one Negative(k, v, alpha, mask), got an empty one"),
    "type": ({"negatives": 5}, "at least one Negative(k, v, alpha, mask), got int"),
    "pair": ({"negatives": [torch.zeros(2)]}, "negatives[0] must be a Negative(k, v, alpha, mask)"),
    "texts": ({"text_queries": (3, 4)}, "text_queries must be 3 integers, the queries of the pos"),
    "many": ({"text_queries": (30, 4, 2)}, "no more than the 26 queries of q together"),
    "text-type": ({"text_queries": 5}, "text_queries must be 3 integers"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    changes, message = WRONG[case]
    q, k, v, k_pos, v_pos, k_neg, v_neg = joint_inputs().values()
    negatives = changes.pop("negatives", [(k_neg, v_neg, 0.5), (k_neg, v_neg, 0.25)])
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        projected_joint_attention(q, k, v, k_pos, v_pos, negatives, **changes)
    assert str(error.value).startswith("projected_joint_attention: ")


def test_the_alpha_of_a_negative_is_checked_against_the_image():
    q, k, v, k_pos, v_pos, k_neg, v_neg = joint_inputs().values()
    negatives = [(k_neg, v_neg, torch.zeros(26, 1, device=DEVICE)), (k_neg, v_neg, 0.5)]
    with pytest.raises(ValueError, match=re.escape("broadcast to [b, l, h] [2, 19, 3]")):
        projected_joint_attention(
            q, k, v, k_pos, v_pos, negatives, text_queries=(3, 4, 0), backend=None
        )


def test_a_record_says_which_rules_its_operators_take():
    for name in backends.FUSED:
        record = backends.RECORDS[name]
        assert record.rules[0] == record.backward_rules[0] == "nasa"
        assert set(backends.JOINT_RULES) <= set(record.joint_rules)
        takes = "int rule" in str(ops.FORWARD[name]._schema)
        assert takes == ("projected" in record.rules)
        assert takes == ("int rule" in str(ops.ATTENTION[name]._schema))
        backward = getattr(torch.ops.nasa_kernels, f"backward_{name}").default
        assert ("int rule" in str(backward._schema)) == ("projected" in record.backward_rules)
