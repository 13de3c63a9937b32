"""The back end of two attention calls, beyond what every back end must pass."""

import math

import pytest
import torch
from support.cases import make_inputs
from torch.utils._python_dispatch import TorchDispatchMode

from nasa_kernels import nasa_attention, nasa_joint_attention
from nasa_kernels.testing import Shape

SHAPE = Shape("long", 1, 640, 2, 16, 512, 384)


class Largest(TorchDispatchMode):
    """The most elements of a tensor that any operator returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple) else (result,):
            # a view is no memory of its own
            if isinstance(x, torch.Tensor) and x.numel() and x.is_contiguous():
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_no_scores_are_kept(backend, masked):
    """Nothing is larger than an input; the reference, which keeps the scores, is seen to."""
    inputs = make_inputs(SHAPE, torch.float32, "cpu")
    mask = torch.ones(1, 384, dtype=torch.bool) if masked else None
    with Largest() as largest:
        nasa_attention(**inputs, alpha=0.5, mask_neg=mask, backend=backend)
    assert (largest.elements <= SHAPE.l * SHAPE.h * SHAPE.d) == (backend == "sdpa")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("joint", [False, True], ids=["cross", "joint"])
def test_a_bias_is_not_rounded(joint, dtype):
    """A key with a bias of log(m) is m keys, also where half precision has no log(m): 1000 keys
    of one kind and one of another, whose value alone is not 0."""
    torch.manual_seed(0)
    q = torch.zeros(1, 3, 1, 8, dtype=dtype)
    k = torch.zeros(1, 2, 1, 8, dtype=dtype)
    v = torch.stack((torch.ones(8), torch.zeros(8)))[None, :, None].to(dtype)
    mask = torch.tensor([[math.log(1000.0), 0.0]])
    nothing = k[:, :0]
    keys = (k, v, nothing, nothing)
    if joint:
        o = nasa_joint_attention(q, nothing, nothing, *keys, 0.0, mask_pos=mask, backend="sdpa")
    else:
        o = nasa_attention(q, *keys, 0.0, mask_pos=mask, backend="sdpa")
    assert torch.equal(o, torch.full_like(o, 1000 / 1001))


def test_alpha_keeps_its_precision():
    """An alpha map is fp32 whatever q is: 1 / 3 in half precision would show."""
    v = torch.full((1, 1, 1, 8), 3.0, dtype=torch.float16)
    q, nothing = torch.zeros_like(v), v[:, :0]
    third = torch.full((1, 1, 1), 1 / 3)
    for joint in (False, True):
        image = (nothing, nothing) if joint else ()
        attend = nasa_joint_attention if joint else nasa_attention
        o = attend(q, *image, v, v / 3, q, v, third, backend="sdpa")
        assert (o == 0).all(), joint
