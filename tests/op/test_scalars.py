"""Every number of the public functions may be NumPy's or a tensor without dimensions."""

import numpy as np
import pytest
import torch
from support.cases import DEVICE, make_inputs

from nasa_kernels import (
    nag_attention,
    nag_joint_attention,
    nasa_attention,
    nasa_joint_attention,
)
from nasa_kernels.testing import Shape

SHAPE = Shape("small", 2, 9, 3, 16, 5, 7)
KINDS = {
    "float32": np.float32,
    "float64": np.float64,
    "float16": np.float16,
    "array": np.array,
    "torch32": torch.tensor,
    "torch64": lambda x: torch.tensor(x, dtype=torch.float64),
    "torch16": lambda x: torch.tensor(x, dtype=torch.bfloat16),
}
INTEGERS = {"int64": np.int64, "int8": np.int8, "torch": torch.tensor}
NAG = {"nag_scale": 4.0, "nag_tau": 1.5, "nag_alpha": 0.25}
# exact in every dtype
CALLS = {
    "nasa": (nasa_attention, {"alpha": 0.5, "scale": 0.25}),
    "nasa-joint": (nasa_joint_attention, {"alpha": 0.5, "scale": 0.25}),
    "nag": (nag_attention, NAG | {"scale": 0.25}),
    "nag-joint": (nag_joint_attention, NAG | {"scale": 0.25}),
}
WHOLE = {"nag": {"nag_norm": 2}, "nag-joint": {"nag_norm": 2}}
TEXTS = {"nasa-joint": (2, 3), "nag-joint": (2, 3)}


def inputs_of(name):
    inputs = make_inputs(SHAPE, torch.float32, DEVICE)
    if name.endswith("joint"):
        inputs |= {"k": inputs["k_pos"][:, :4], "v": inputs["v_pos"][:, :4]}
    return inputs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", CALLS)
def test_reals(call, kind):
    function, numbers = CALLS[call]
    inputs = inputs_of(call)
    expected = function(**inputs, **numbers)
    typed = {name: KINDS[kind](value) for name, value in numbers.items()}
    assert torch.equal(function(**inputs, **typed), expected)
    for name in numbers:
        other = {**numbers, name: KINDS[kind](0.75)}
        assert not torch.equal(function(**inputs, **other), expected)


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("call", CALLS)
def test_integers(call, kind):
    """Also where a real number is asked for."""
    function, numbers = CALLS[call]
    plain = dict.fromkeys(numbers, 2) | WHOLE.get(call, {})
    typed = {name: INTEGERS[kind](value) for name, value in plain.items()}
    if call in TEXTS:
        plain["text_queries"] = TEXTS[call]
        typed["text_queries"] = tuple(map(INTEGERS[kind], TEXTS[call]))
    inputs = inputs_of(call)
    assert torch.equal(function(**inputs, **typed), function(**inputs, **plain))


@pytest.mark.parametrize(
    "wrong", [True, np.True_, torch.tensor(True)], ids=["python", "numpy", "torch"]
)
@pytest.mark.parametrize("call", CALLS)
def test_true_is_no_number(call, wrong):
    function, numbers = CALLS[call]
    for name in {**numbers, **WHOLE.get(call, {})}:
        with pytest.raises(ValueError, match=f"{name} must be"):
            function(**inputs_of(call), **{**numbers, name: wrong})
    if call in TEXTS:
        with pytest.raises(ValueError, match="text_queries must be two integers"):
            function(**inputs_of(call), **numbers, text_queries=(wrong, 0))


def test_a_scale_that_learns_is_refused():
    """Its gradient would be lost."""
    scale = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(ValueError, match="scale must be a number, got Tensor"):
        nasa_attention(**inputs_of("nasa"), alpha=0.5, scale=scale)


def test_an_alpha_that_learns_does():
    alpha = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    o = nasa_attention(**inputs_of("nasa"), alpha=alpha)
    o.sum().backward()
    plus = nasa_attention(**inputs_of("nasa"), alpha=0.0).sum()
    minus = nasa_attention(**inputs_of("nasa"), alpha=1.0).sum()
    torch.testing.assert_close(alpha.grad, (minus - plus).double(), rtol=1e-4, atol=1e-4)
