"""The gradients of a joint attention by the CUDA C++ kernels, executed on the CPU from their PTX.

What runs is `_cuda/joint.py`, its operators emulated: the rules between the launches are those of
every back end, held to fp64 by tests/op/test_joint_backward.py.
"""

from typing import NamedTuple

import pytest
import torch
from support import formula
from support.cuda_emulation import (
    REPORTS,
    BackwardParams,
    assert_as_accurate_as_eager,
    joint_backward_operators,
    nvcc,
)
from support.gradients import eager_joint, gradients
from test_cuda_forward import NAN, strided

from nasa_kernels._cuda import joint as cuda_joint
from nasa_kernels._joint.shared import attend_shared
from nasa_kernels.backends import RECORDS

RULES = RECORDS["cuda"].joint_backward_rules

pytestmark = pytest.mark.skipif(nvcc() is None, reason="no nvcc: the PTX cannot be built")

NAMES = ("q", "k", "v", "k_pos", "v_pos", "k_neg", "v_neg")


class Shape(NamedTuple):
    name: str
    b: int
    image: int
    h: int
    d: int
    n: int
    n_pos: int
    n_neg: int
    text: tuple[int, int] = (0, 0)  # queries

    def __str__(self) -> str:
        return self.name


# rows of every kind in one tile
MIXED = Shape("mixed", 1, 41, 1, 64, 30, 17, 12, (17, 12))
# tiles of one kind alone, and with two blocks of keys in each segment
TILES = Shape("tiles", 1, 40, 1, 32, 90, 100, 90, (100, 90))


def make(shape: Shape, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = (shape.image + sum(shape.text), shape.n, shape.n, shape.n_pos, shape.n_pos,
               shape.n_neg, shape.n_neg)  # fmt: skip
    return {
        name: torch.randn(shape.b, length, shape.h, shape.d, generator=generator).to(dtype)
        for name, length in zip(NAMES, lengths, strict=True)
    }


def make_grad(inputs: dict) -> torch.Tensor:
    q = inputs["q"]
    return torch.randn(q.shape, generator=torch.Generator().manual_seed(9)).to(q.dtype)


def alpha_of(inputs: dict) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(inputs["q"].shape[:3], generator=generator)


def backward(
    grad_o, inputs, alpha, rule="nasa", text=(0, 0), mask_pos=None, mask_neg=None,
    needs=(True,) * 8, splits=1,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The gradients that `needs` asks for, alpha's last."""
    joint_backward_operators().splits = splits
    q, k, v = (inputs[name].contiguous() for name in NAMES[:3])
    scale = q.shape[-1] ** -0.5
    alpha_map, number = (alpha, 0.0) if torch.is_tensor(alpha) else (None, alpha)
    found = cuda_joint.backward(
        grad_o, *attend_shared(q, k, v, scale), *inputs.values(), mask_pos, mask_neg,
        alpha_map, number, scale, RULES.index(rule), *text, list(needs),
    )  # fmt: skip
    named = zip((*NAMES, "alpha"), found, needs, strict=True)
    for name, gradient, needed in named:
        assert needed or gradient.numel() == 0, name
    named = zip((*NAMES, "alpha"), found, needs, strict=True)
    return {name: gradient for name, gradient, needed in named if needed}


def check(shape: Shape, dtype: torch.dtype, rule: str, splits=1, **masks) -> dict:
    inputs = make(shape, dtype)
    grad_o, alpha = make_grad(inputs), alpha_of(inputs)
    actual = backward(grad_o, inputs, alpha, rule, shape.text, splits=splits, **masks)
    options = {"rule": rule, "text_queries": shape.text, **masks}
    wide = {name: x.double() for name, x in inputs.items()}
    exact = gradients(formula.joint, wide, alpha.double(), grad_o.double(), **options)
    low = gradients(eager_joint, inputs, alpha, grad_o, **options)
    for name, expected in exact.items():
        if expected.numel():
            assert_as_accurate_as_eager(actual[name], expected, low[name].nan_to_num())
    return actual


@pytest.mark.parametrize(
    ("rule", "dtype"), [*((rule, torch.bfloat16) for rule in RULES), ("nasa", torch.float16)],
    ids=str,
)  # fmt: skip
def test_rules_match_fp64(rule, dtype):
    """What a rule is does not reach the kernels: they read its weights."""
    check(MIXED, dtype, rule)


@pytest.mark.parametrize(
    ("shape", "rule"),
    [
        (TILES, "nasa"),
        (Shape("flux", 2, 20, 2, 128, 40, 33, 20, (33, 20)), "nasa-cross"),
        (Shape("two-shares", 1, 20, 1, 160, 90, 12, 9, (12, 9)), "vsf"),
        (Shape("four-shares", 1, 17, 1, 256, 20, 12, 9), "nasa-text"),
        (Shape("odd-d", 2, 19, 3, 33, 31, 7, 9, (2, 5)), "nasa-text"),
        (Shape("d40", 1, 65, 2, 40, 60, 81, 3, (0, 4)), "nasa"),
        (Shape("no-shared", 1, 20, 1, 64, 0, 12, 16, (12, 16)), "nasa"),
        (Shape("no-negative", 1, 20, 1, 64, 24, 12, 0), "vsf"),
        (Shape("no-positive", 1, 20, 1, 64, 24, 0, 12, (0, 3)), "nasa-cross"),
        (Shape("only-text", 1, 0, 2, 40, 24, 12, 8, (12, 8)), "nasa"),
    ],
    ids=str,
)
def test_shapes_match_fp64(shape, rule):
    check(shape, torch.bfloat16, rule)


def test_only_tiles_that_see_a_segment_are_walked():
    """230 rows, 4 tiles: those of one text alone are left out for the other prompt."""
    REPORTS.clear()
    inputs = make(TILES, torch.bfloat16)
    backward(make_grad(inputs), inputs, 0.5, text=TILES.text)
    walks = [
        BackwardParams.from_buffer_copy(launch.args[0])
        for launch in REPORTS
        if "backward_keys" in launch.kernel.name
    ]
    # rows 40 to 139 are of the positive text, those from 140 on of the negative one
    assert [(p.first_hidden, p.hidden) for p in walks] == [(0, 0), (3, 1), (1, 1)]


@pytest.mark.parametrize("rule", RULES)
def test_masks_match_fp64(rule):
    """With NaN in masked rows, which get zeros, and a sample whose negative has no key left."""
    shape = Shape("masks", 2, 20, 1, 64, 15, 17, 12, (3, 4))
    generator = torch.Generator().manual_seed(3)
    mask_pos = torch.rand(2, 17, generator=generator) < 0.6
    mask_neg = torch.randn(2, 12, generator=generator)
    mask_neg[1] = float("-inf")
    masks = {"mask_pos": mask_pos, "mask_neg": mask_neg}
    sound = check(shape, torch.float16, rule, **masks)
    inputs = make(shape, torch.float16)
    for side, absent in (("pos", ~mask_pos), ("neg", mask_neg == float("-inf"))):
        inputs[f"k_{side}"][absent] = inputs[f"v_{side}"][absent] = NAN
        assert sound[f"k_{side}"][absent].count_nonzero() == 0
        assert sound[f"v_{side}"][absent].count_nonzero() == 0
    poisoned = backward(make_grad(inputs), inputs, alpha_of(inputs), rule, shape.text, **masks)
    for name, gradient in poisoned.items():
        assert torch.equal(gradient, sound[name]), name


def test_splits_match_fp64():
    """Also where the last split has no rows: three tiles that see the positive prompt, for 4."""
    check(TILES, torch.bfloat16, "vsf", splits=4)


def test_only_what_is_needed_is_written_and_nothing_changes():
    inputs = make(MIXED, torch.bfloat16)
    grad_o, alpha = make_grad(inputs), alpha_of(inputs)
    whole = backward(grad_o, inputs, alpha, "nasa-text", MIXED.text)
    for i, name in enumerate((*NAMES, "alpha")):
        needs = tuple(j == i for j in range(8))
        alone = backward(grad_o, inputs, alpha, "nasa-text", MIXED.text, needs=needs)
        assert alone.keys() == {name}
        assert torch.equal(alone[name], whole[name])


@pytest.mark.parametrize("how", ["bhnd", "odd-rows"])
def test_strides_do_not_matter(how):
    shape = Shape("strides", 2, 18, 2, 40, 12, 21, 10, (2, 3))
    inputs = make(shape, torch.float16)
    grad_o, alpha = make_grad(inputs), alpha_of(inputs)
    expected = backward(grad_o, inputs, alpha, "nasa", shape.text)
    views = {name: strided(x, how) for name, x in inputs.items()}
    for name, gradient in backward(strided(grad_o, how), views, alpha, "nasa", shape.text).items():
        assert torch.equal(gradient, expected[name]), name


def test_a_text_takes_no_gradient_from_the_other_prompt():
    """Of its own output, in tiles of one kind of rows and in tiles of all."""
    inputs = make(TILES, torch.bfloat16)
    rows = {"pos": slice(40, 140), "neg": slice(140, None)}
    for own, other in (("pos", "neg"), ("neg", "pos")):
        grad_o = torch.zeros_like(inputs["q"])
        grad_o[:, rows[own]] = make_grad(inputs)[:, rows[own]]
        needs = tuple(name in (f"k_{other}", f"v_{other}", f"k_{own}") for name in (*NAMES, ""))
        found = backward(grad_o, inputs, 0.6, "nasa", TILES.text, needs=needs)
        assert found[f"k_{own}"].count_nonzero() > 0
        for name in (f"k_{other}", f"v_{other}"):
            assert found[name].count_nonzero() == 0


@pytest.mark.parametrize(
    "weighed",
    [
        lambda rows: (rows.lse, rows.c, -rows.c * rows.u),
        lambda rows: (rows.lse, rows.c, rows.dlse + rows.c * rows.u),
        lambda rows: (rows.lse, torch.ones_like(rows.c), rows.dlse - rows.c * rows.u),
    ],
    ids=["no-dlse", "sign-of-u", "no-weight"],
)
def test_a_fault_between_the_launches_is_seen(weighed, monkeypatch):
    monkeypatch.setattr(cuda_joint, "_weighed", weighed)
    with pytest.raises(AssertionError):
        check(MIXED, torch.bfloat16, "nasa")
