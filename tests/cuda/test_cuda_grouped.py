"""Keys of fewer heads than the queries in the CUDA C++ kernels, executed on the CPU from their PTX.

Head i of Q looks at head i // group of K and V. The kernels read those where they are, so the bits
are those of a call whose keys are repeated for each head; dK and dV are sums over the group.
"""

import pytest
import torch
from support.cuda_emulation import (
    Joint,
    assert_as_accurate_as_eager,
    backward,
    eager,
    forward,
    nvcc,
)
from test_cuda_backward import autograd, make_grad
from test_cuda_forward import Shape, make
from test_cuda_joint import attend
from test_cuda_joint_backward import MIXED
from test_cuda_joint_backward import backward as joint_backward
from test_cuda_joint_backward import make as make_segments
from test_cuda_joint_backward import make_grad as make_joint_grad

pytestmark = pytest.mark.skipif(nvcc() is None, reason="no nvcc: the PTX cannot be built")

SHORT = Shape("short", 1, 20, 4, 30, 20, 64)
LONG = Shape("long", 1, 20, 4, 140, 20, 64)
PATHS = {"short": SHORT, "long": LONG, "sm90-short": SHORT, "sm90-long": LONG}


def grouped(inputs: dict, group: int) -> tuple[dict, dict]:
    """The inputs with one head of keys for each group of heads, and those repeated for each."""
    few = {name: x if name == "q" else x[:, :, ::group].contiguous() for name, x in inputs.items()}
    return few, {
        name: x if name == "q" else x.repeat_interleave(group, dim=2) for name, x in few.items()
    }


@pytest.mark.parametrize("path", PATHS)
def test_bits_are_those_of_repeated_keys(path):
    few, repeated = grouped(make(PATHS[path], torch.bfloat16), 2)
    o = forward(**few, path=path)
    assert torch.equal(o, forward(**repeated, path=path))
    exact = eager(**{name: x.double() for name, x in repeated.items()}, alpha=0.5)
    assert_as_accurate_as_eager(o, exact, eager(**repeated, alpha=0.5))


@pytest.mark.parametrize("path", PATHS)
def test_three_to_a_group_with_a_mask_and_one_prompt_for_all(path):
    """Under the projected rule. The negative prompt has one head and one sample, with strides of 0,
    and beside it there are groups."""
    shape = PATHS[path]._replace(b=2, l=5, h=6)
    few, repeated = grouped(make(shape, torch.bfloat16), 3)
    for name in ("k_neg", "v_neg"):
        one = few[name][:1, :, :1]
        few[name], repeated[name] = (one.expand(2, -1, h, -1) for h in (2, 6))
    how = {"mask_pos": (torch.arange(shape.n_pos) % 3 > 0).expand(2, -1), "rule": "projected"}
    assert torch.equal(forward(**few, **how, path=path), forward(**repeated, **how, path=path))


@pytest.mark.parametrize("path", PATHS)
def test_beside_shared_keys(path):
    shape = PATHS[path]
    few, repeated = grouped(make(shape, torch.bfloat16), 2)
    q = few["q"].double()
    generator = torch.Generator().manual_seed(5)
    k, v = (torch.randn(q.shape[0], 50, *q.shape[2:], generator=generator) for _ in "kv")
    o, lse = attend(q, k.double(), v.double())
    joint = Joint(o.bfloat16(), lse.float(), rule="nasa", text_pos=4, text_neg=5)
    o = forward(**few, path=path, joint=joint)
    assert torch.equal(o, forward(**repeated, path=path, joint=joint))


def check_gradients(actual: dict, few: dict, repeated: dict, exact: dict, low: dict, group: int):
    """Of K and V: the sum over the heads of a group."""
    for name, gradient in actual.items():
        theirs = [x[name] for x in (exact, low)]
        if name[0] in "kv":
            assert gradient.shape == few[name].shape
            theirs = [x.unflatten(2, (-1, group)).sum(3) for x in theirs]
        assert_as_accurate_as_eager(gradient, *theirs)


@pytest.mark.parametrize(("group", "splits", "l"), [(2, 1, 20), (3, 2, 130)])
def test_gradients_of_keys_are_summed_over_the_group(group, splits, l):
    shape = Shape("backward", 1, l, 2 * group, 20, 90 if splits == 1 else 30, 48)
    few, repeated = grouped(make(shape, torch.bfloat16), group)
    grad_o = make_grad(few)
    actual = backward(grad_o, **few, splits=splits)
    exact = autograd(repeated, grad_o, 0.5, torch.float64)
    low = autograd(repeated, grad_o, 0.5, torch.bfloat16)
    check_gradients(actual, few, repeated, exact, low, group)
    # of the queries nothing is different
    theirs = backward(grad_o, **repeated, splits=splits)
    for name in ("q", "alpha"):
        assert torch.equal(actual[name], theirs[name])


def test_gradients_of_a_joint_attention():
    few, repeated = grouped(make_segments(MIXED._replace(image=9, h=4), torch.bfloat16), 2)
    grad_o = make_joint_grad(few)
    # the image's keys go to PyTorch's attention first
    actual = joint_backward(grad_o, few, 0.5, text=MIXED.text)
    theirs = joint_backward(grad_o, repeated, 0.5, text=MIXED.text)
    for name in ("q", "alpha"):
        assert torch.equal(actual[name], theirs[name])
    for name in set(actual) - {"q", "alpha"}:
        expected = theirs[name].double().unflatten(2, (-1, 2)).sum(3)
        assert actual[name].shape == few[name].shape
        # each of the two was rounded by itself there
        torch.testing.assert_close(actual[name].double(), expected, rtol=2**-7, atol=2**-7)
