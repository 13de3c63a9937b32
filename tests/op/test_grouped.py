"""Grouped queries: keys and values of fewer heads, of which head i of q looks at i // group.

Judged by the formula in fp64 on keys that are repeated for each head; and by the same call on
those, whose bits must be the same where the kernels are.
"""

import pytest
import torch
from support.cases import DEVICE, mask_of, strided
from support.formula import exact_and_budget, exact_and_budget_of_joint
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nasa_kernels import (
    backends,
    nag_attention,
    nag_joint_attention,
    nasa_attention,
    nasa_joint_attention,
)
from nasa_kernels.reference import CROSS_RULES, RULES
from nasa_kernels.testing import Shape, make_inputs

BACKENDS = tuple(name for name in backends.NAMES if backends.why_not(name, DEVICE) is None)
# PyTorch's own may take another kernel for repeated keys
FUSED = tuple(name for name in BACKENDS if name in backends.FUSED)
# 48 heads for 12 of the keys (Krea 2), 24 for 8 (Lumina 2), 16 for 8 (ACE-Step): as many to a
# group, fewer of them, and for the interpreter fewest
GROUPS = {4: 8, 3: 6, 2: 4}
SMALL = Shape("small", 1, 9, 4, 16, 7, 5)
STREAMED = Shape("streamed", 1, 17, 4, 40, 140, 20)
NAG = {"nag_scale": 4.0, "nag_tau": 2.0, "nag_alpha": 0.5}
NAMES = ("q", "k", "v", "k_pos", "v_pos", "k_neg", "v_neg")


def few_and_repeated(shape: Shape, group: int, dtype=torch.float32, image: int = 0):
    """Inputs with a head of keys for each group of heads of q, and the same repeated for each head.
    `image`: so many keys that both prompts share.
    """
    inputs = make_inputs(shape, dtype, DEVICE)
    if image:
        more = make_inputs(shape._replace(n_pos=image), dtype, DEVICE, seed=4)
        inputs |= {"k": more["k_pos"], "v": more["v_pos"]}
        inputs = {name: inputs[name] for name in NAMES}
    few = {name: x if name == "q" else x[:, :, ::group].contiguous() for name, x in inputs.items()}
    return few, repeated(few, group)


def repeated(inputs: dict[str, Tensor], group: int) -> dict[str, Tensor]:
    return {
        name: x if name == "q" else x.repeat_interleave(group, dim=2) for name, x in inputs.items()
    }


def masks_of(shape: Shape) -> dict[str, Tensor]:
    return {
        "mask_pos": mask_of("bool", shape.b, shape.n_pos),
        "mask_neg": mask_of("bias", shape.b, shape.n_neg, seed=2),
    }


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("rule", CROSS_RULES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_cross_attention(backend, rule, group):
    shape = SMALL._replace(b=2 if group == 3 else 1, h=GROUPS[group])
    few, same = few_and_repeated(shape, group)
    options = {"alpha": 0.6, "rule": rule, **masks_of(shape)}
    o = nasa_attention(**few, **options, backend=backend)
    exact, budget = exact_and_budget(same, **options)
    budget.check(o, exact)
    if backend in FUSED:
        assert torch.equal(o, nasa_attention(**same, **options, backend=backend))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_types_and_prompts_that_are_streamed(backend, dtype):
    few, same = few_and_repeated(STREAMED, 2, dtype)
    # rows that begin anywhere
    o = nasa_attention(**{name: strided(x) for name, x in few.items()}, alpha=0.6, backend=backend)
    exact, budget = exact_and_budget(same, 0.6)
    budget.check(o, exact)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_joint_attention(backend, rule):
    few, same = few_and_repeated(SMALL, 2, image=11)
    options = {"alpha": 0.6, "rule": rule, "text_queries": (3, 2), **masks_of(SMALL)}
    o = nasa_joint_attention(**few, **options, backend=backend)
    exact, budget = exact_and_budget_of_joint(same, **options)
    budget.check(o, exact)
    if backend in FUSED:
        assert torch.equal(o, nasa_joint_attention(**same, **options, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_normalised_attention_guidance(backend):
    """Its norm is over the heads of the queries."""
    few, same = few_and_repeated(SMALL, 2)
    for _ in range(2):  # the second one is quick
        o = nag_attention(**few, **NAG, backend=backend)
        exact = nag_attention(
            **{name: x.double() for name, x in same.items()}, **NAG, backend="reference"
        )
        torch.testing.assert_close(o.double(), exact, rtol=1e-5, atol=1e-6)
    few, same = few_and_repeated(SMALL, 2, image=11)
    options = NAG | {"text_queries": (3, 2), "backend": backend}
    o = nag_joint_attention(**few, **options)
    options["backend"] = "reference"
    exact = nag_joint_attention(**{name: x.double() for name, x in same.items()}, **options)
    torch.testing.assert_close(o.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_prompt_for_a_batch_and_one_head_beside_groups(backend):
    few, _ = few_and_repeated(SMALL._replace(b=2), 2)
    few |= {"k_pos": few["k_pos"][:1], "v_pos": few["v_pos"][:1].expand(2, -1, -1, -1)}
    few |= {"k_neg": few["k_neg"][:1, :, :1], "v_neg": few["v_neg"][:1, :, :1]}
    heads = {"k_pos": 2, "v_pos": 2, "k_neg": 4, "v_neg": 4}
    same = {
        name: x if name == "q" else x.expand(2, -1, -1, -1).repeat_interleave(heads[name], dim=2)
        for name, x in few.items()
    }
    for _ in range(2):  # the second one is quick
        o = nasa_attention(**few, alpha=0.6, backend=backend)
        exact, budget = exact_and_budget(same, 0.6)
        budget.check(o, exact)


# ---- gradients -----------------------------------------------------------------------------------


def gradients(function, inputs, **options) -> dict[str, Tensor]:
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    o = function(**leaves, **options)
    grad_o = torch.randn(o.shape, generator=torch.Generator().manual_seed(7)).to(o)
    return dict(zip(leaves, torch.autograd.grad(o, list(leaves.values()), grad_o), strict=True))


@pytest.mark.parametrize("rule", CROSS_RULES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend, rule):
    few, _ = few_and_repeated(SMALL, 2)
    options = {"alpha": 0.6, "rule": rule, **masks_of(SMALL)}
    check_gradients(nasa_attention, few, 2, backend, options)


@pytest.mark.parametrize("rule", ["nasa", "projected"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_joint_attention(backend, rule):
    few, _ = few_and_repeated(SMALL, 2, image=11)
    options = {"alpha": 0.6, "rule": rule, "text_queries": (3, 2)}
    check_gradients(nasa_joint_attention, few, 2, backend, options)


def check_gradients(function, few, group, backend, options):
    """Those of the reference in fp64 through keys that are repeated, which sums over the group."""

    def of_repeated(**inputs):
        given = {name: inputs.pop(name) for name in NAMES if name in inputs}
        return function(**repeated(given, group), **inputs)

    found = gradients(function, few, **options, backend=backend)
    doubles = {name: x.double() for name, x in few.items()}
    exact = gradients(of_repeated, doubles, **options, backend="reference")
    for name, expected in exact.items():
        assert found[name].shape == few[name].shape
        error = (found[name].double() - expected).norm() / expected.norm()
        assert error < 2e-6, f"{name}: {error:.1e}"


def test_gradients_of_half_types_are_rounded_once():
    """Each head's own would be rounded before their sum."""
    few, same = few_and_repeated(STREAMED, 2, torch.bfloat16)
    for backend in FUSED:
        found = gradients(nasa_attention, few, alpha=0.6, backend=backend)
        theirs = gradients(nasa_attention, same, alpha=0.6, backend=backend)
        doubles = {name: x.double() for name, x in same.items()}
        exact = gradients(nasa_attention, doubles, alpha=0.6, backend="reference")
        for name in ("k_pos", "v_pos", "k_neg", "v_neg"):
            summed = [x[name].unflatten(2, (-1, 2)).double().sum(3) for x in (exact, theirs)]
            error, apart = ((x.double() - summed[0]).norm() for x in (found[name], summed[1]))
            assert error <= 1.05 * apart, f"{backend}, {name}"


# ---- FLOPs, errors -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", FUSED)
def test_flops_are_those_of_all_heads_of_the_queries(backend):
    few, same = few_and_repeated(SMALL, 2)
    counted = []
    for inputs in (few, same):
        leaves = {name: x.to("meta").requires_grad_() for name, x in inputs.items()}
        with FlopCounterMode(display=False) as counter:
            o = nasa_attention(**leaves, alpha=0.6, backend=backend)
            o.sum().backward()
        assert all(x.grad.shape == x.shape for x in leaves.values())
        counted.append(counter.get_total_flops())
    product = 2 * 9 * 4 * 16 * (7 + 5)
    assert counted[0] == counted[1] == (2 + 5) * product


# heads of q are 6, those of the others 2: tensors of other heads, and what is said of them
WRONG = (
    (
        {"k_pos": 4, "v_pos": 4},
        "k_pos must be [1 or 1, n, 2 or 1, 16] to match q [1, 9, 6, 16], got [1, 7, 4, 16]; heads "
        "that each serve a group of the 6 of q must be a divisor of them",
    ),
    ({"k_pos": 12, "v_pos": 12}, "must be a divisor of them"),
    ({"k_pos": 0, "v_pos": 0}, "must be a divisor of them"),
    (
        {"v_pos": 3},
        "v_pos must be [1 or 1, n, 2 or 1, 16] to match q [1, 9, 6, 16], got [1, 7, 3, 16]; keys "
        "and values of all prompts, and of the image, must have the same heads, here 2: repeat",
    ),
    ({"k_neg": 3, "v_neg": 3}, "k_neg must be [1 or 1, n, 2 or 1, 16] to match q"),
    ({"k_neg": 6, "v_neg": 6}, "must have the same heads, here 2"),
)
WRONG_IMAGES = (
    ({"k": 3, "v": 3}, "k_pos must be [1 or 1, n, 3 or 1, 16] to match q"),
    ({"k": 6, "v": 6}, "must have the same heads, here 6"),
)


@pytest.mark.parametrize(
    "function", [nasa_joint_attention, nag_joint_attention, nasa_attention, nag_attention]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_that_do_not_fit_are_refused(backend, function):
    """Also by a call that comes again, which is quick."""
    is_joint = "joint" in function.__name__
    few, _ = few_and_repeated(SMALL._replace(h=6), 3, image=11 if is_joint else 0)
    options = NAG if "nag" in function.__name__ else {"alpha": 0.6}
    function(**few, **options, backend=backend)
    for heads, message in WRONG + WRONG_IMAGES if is_joint else WRONG:
        bad = dict(few)
        for name, h in heads.items():
            b, n, _, d = few[name].shape
            bad[name] = torch.zeros(b, n, h, d, device=DEVICE)
        # where nothing but the prompt that comes first says how many there are
        message = (
            message if is_joint or "k_pos" not in heads else message.replace("2 or 1", "6 or 1")
        )
        with pytest.raises(ValueError) as caught:
            function(**bad, **options, backend=backend)
        assert message in str(caught.value) and function.__name__ in str(caught.value)
        assert "\n" not in str(caught.value)


def test_under_compile():
    few, same = few_and_repeated(SMALL, 2)
    compiled = torch.compile(nasa_attention, fullgraph=True, backend="eager")
    o = compiled(**few, alpha=0.6, backend="cpu" if DEVICE.type == "cpu" else None)
    exact, budget = exact_and_budget(same, 0.6)
    budget.check(o, exact)
