"""Random shapes, strides, masks, alphas and dtypes, forward and backward."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.cases import BACKENDS, DEVICE, DTYPES, make_inputs, mask_of, strided
from support.formula import exact_and_budget
from support.gradients import check_gradients, check_joint_gradients

from nasa_kernels import nasa_attention
from nasa_kernels.reference import CROSS_RULES, RULES
from nasa_kernels.testing import Shape

EXAMPLES = 200 if DEVICE.type == "cuda" else 12
# how long an example takes depends on what else the machine does
UNTIMED = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])

shapes = st.builds(
    Shape,
    name=st.just("fuzz"),
    b=st.integers(1, 2),
    l=st.integers(1, 24),
    h=st.integers(1, 2),
    d=st.one_of(st.integers(1, 256), st.sampled_from([8, 40, 64, 72, 80, 112, 128, 160])),
    n_pos=st.integers(0, 140),
    n_neg=st.integers(0, 140),
)
masks = st.sampled_from([None, "bool", "bias", "huge"])
alphas = st.one_of(
    st.floats(-2, 2, width=32),
    st.sampled_from([(), ("b", 1, 1), ("l", 1), ("h",), ("b", "l", "h")]),
)


def build(shape, alpha, mask_pos, mask_neg, strides, shared, dtype):
    inputs = make_inputs(shape, dtype, DEVICE)
    if shared:
        inputs |= {name: inputs[name][:1, :, :1] for name in ("k_neg", "v_neg")}
    if strides:
        inputs = {name: strided(x) for name, x in inputs.items()}
    options = {}
    if mask_pos:
        options["mask_pos"] = mask_of(mask_pos, shape.b, shape.n_pos)
    if mask_neg:
        options["mask_neg"] = mask_of(mask_neg, shape.b, shape.n_neg, seed=2)
    if isinstance(alpha, tuple):
        sizes = [getattr(shape, size) if isinstance(size, str) else size for size in alpha]
        alpha = torch.randn(sizes, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    return inputs, alpha, options


CALLS = {
    "shape": shapes,
    "alpha": alphas,
    "mask_pos": masks,
    "mask_neg": masks,
    "strides": st.booleans(),
    "shared": st.booleans(),
    "dtype": st.sampled_from(DTYPES),
    "backend": st.sampled_from(BACKENDS),
}
cross_rules = st.sampled_from(CROSS_RULES)


@settings(UNTIMED, max_examples=4 * EXAMPLES)
@given(**CALLS, rule=cross_rules, group=st.sampled_from([1, 1, 2, 3]))
def test_forward(backend, rule, shape, group, **call):
    """`group`: how many heads of q look at one of the keys."""
    shape = shape._replace(h=shape.h * group)
    inputs, alpha, options = build(shape, **call)
    options["rule"] = rule
    few = {name: x if name == "q" else x[:, :, ::group] for name, x in inputs.items()}
    o = nasa_attention(**few, alpha=alpha, backend=backend, **options)
    inputs = {
        name: x if x.shape[2] in (1, shape.h) else x.repeat_interleave(group, dim=2)
        for name, x in few.items()
    }
    exact, budget = exact_and_budget(inputs, alpha, **options)
    budget.check(o, exact)


@settings(UNTIMED, max_examples=EXAMPLES)
@given(**CALLS, rule=cross_rules)
def test_backward(backend, rule, shape, shared, strides, **call):
    # leaves are contiguous and whole: views of them are other tests' business
    shape = shape._replace(l=min(shape.l, 9), b=1, h=1)
    inputs, alpha, options = build(shape, shared=False, strides=False, **call)
    check_gradients(backend, inputs, alpha, rule=rule, **options)


@settings(UNTIMED, max_examples=2 * EXAMPLES)
@given(
    # not of fewer sizes: what a sum over queries cancels is no error of the kernels
    **CALLS | {"alpha": st.one_of(st.floats(-2, 2, width=32), st.just(("b", "l", "h")))},
    rule=st.sampled_from(RULES),
    n=st.integers(0, 40),
    text=st.tuples(st.integers(0, 6), st.integers(0, 6)),
)
def test_joint_backward(backend, shape, shared, rule, n, text, **call):
    # small: six launches in the interpreter
    shape = shape._replace(
        l=min(shape.l, 9) + sum(text), h=min(shape.h, 3 - shape.b), d=1 + shape.d % 80,
        n_pos=shape.n_pos % 50, n_neg=shape.n_neg % 50,
    )  # fmt: skip
    if n == 1 and 0 in (shape.n_pos, shape.n_neg):
        # under a softmax of one key dQ is 0, of which no error is a share
        n = 2
    inputs, alpha, options = build(shape, shared=False, **call)
    image = make_inputs(shape._replace(n_pos=n), call["dtype"], DEVICE, seed=4)
    q = inputs.pop("q")
    inputs = {"q": q, "k": image["k_pos"], "v": image["v_pos"], **inputs}
    check_joint_gradients(backend, inputs, alpha, rule, text, **options)
