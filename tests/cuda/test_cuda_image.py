"""Joint attention in one launch: the CUDA C++ kernel that attends to the image's keys before those
of the prompts, executed on the CPU from its PTX.

It is held to fp64, and to the bits of the launch for the prompts alone beside the O_s and
log-sum-exp that it left, which are held to fp64 as well.
"""

import math
from typing import NamedTuple

import ptx
import pytest
import test_cuda_joint_backward
import torch
from support.cuda_emulation import RULES, nvcc
from support.cuda_image import Attended, beside, forward_image
from support.formula import attend, exact_and_budget_of_joint
from test_cuda_faults import Fault, plant_in_calls
from test_cuda_forward import strided
from torch import Tensor

from nasa_kernels.testing import budget, eager_attention, largest_score

pytestmark = pytest.mark.skipif(nvcc() is None, reason="no nvcc: the PTX cannot be built")

DTYPES = (torch.float16, torch.bfloat16)
NAN = float("nan")


class Shape(NamedTuple):
    name: str
    b: int
    l: int
    h: int
    n: int  # keys of the image
    n_pos: int
    n_neg: int
    d: int
    text_pos: int = 0
    text_neg: int = 0
    h_kv: int | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def text(self) -> dict[str, int]:
        return {"text_pos": self.text_pos, "text_neg": self.text_neg}


# two blocks of the image's keys, and rows of every kind in one tile
MIXED = Shape("mixed", 1, 40, 1, 150, 30, 20, 64, 11, 9)
# tiles of the image, of both texts, and of the negative text alone
TILES = Shape("tiles", 1, 150, 1, 70, 77, 30, 64, 10, 20)
SHAPES = (
    TILES,
    Shape("flux", 1, 40, 1, 129, 140, 33, 128, 10, 3),
    Shape("grouped", 2, 20, 4, 40, 9, 12, 64, 3, 2, h_kv=2),
    Shape("one-head-of-keys", 1, 20, 3, 40, 9, 12, 64, h_kv=1),
    Shape("whole-blocks", 1, 17, 1, 128, 128, 128, 64),
    Shape("odd-d", 2, 19, 2, 31, 7, 9, 33, 2, 5),
    Shape("even-d", 1, 19, 2, 31, 7, 9, 42, 2, 5),
    Shape("two-warps-to-a-row", 1, 70, 1, 140, 10, 30, 160, 5, 6),
    Shape("four-warps-to-a-row", 1, 35, 1, 130, 20, 9, 256, 5, 6),
    Shape("no-positive", 1, 18, 1, 20, 0, 9, 64, 0, 4),
    Shape("no-negative", 1, 18, 1, 20, 9, 0, 64),
    Shape("no-image", 1, 18, 1, 0, 9, 12, 64, 3, 2),
    Shape("image-alone", 1, 18, 1, 140, 0, 0, 64),
    Shape("no-keys", 1, 18, 1, 0, 0, 0, 64),
    Shape("one", 1, 1, 1, 1, 1, 1, 1),
)


def make(shape: Shape, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    h_kv = shape.h_kv or shape.h
    sizes = {"q": (shape.l, shape.h)}
    for name, n in (("", shape.n), ("_pos", shape.n_pos), ("_neg", shape.n_neg)):
        sizes |= {f"k{name}": (n, h_kv), f"v{name}": (n, h_kv)}
    return {
        name: torch.randn(shape.b, n, h, shape.d, generator=generator).to(dtype)
        for name, (n, h) in sizes.items()
    }


def check(shape: Shape, dtype: torch.dtype, alpha=0.6, rule="nasa", **masks) -> Attended:
    inputs = make(shape, dtype)
    how = {"alpha": alpha, "rule": rule, **shape.text, **masks}
    found = forward_image(**inputs, **how)
    group = shape.h // (shape.h_kv or shape.h)
    repeated = {
        name: x if name == "q" else x.repeat_interleave(group, dim=2) for name, x in inputs.items()
    }
    exact, allowed = exact_and_budget_of_joint(
        repeated, alpha, rule, (shape.text_pos, shape.text_neg), **masks
    )
    allowed.check(found.o, exact)
    check_shared(found, repeated)
    return found


def check_bits(shape: Shape, dtype: torch.dtype, alpha=0.6, rule="nasa", **masks) -> None:
    """And that it goes on as the launch for the prompts alone does."""
    found = check(shape, dtype, alpha, rule, **masks)
    how = {"alpha": alpha, "rule": rule, **shape.text, **masks}
    assert torch.equal(found.o, beside(found, make(shape, dtype), "long", **how))


def check_shared(found: Attended, inputs: dict[str, Tensor]) -> None:
    q, k, v = (inputs[name].double() for name in "qkv")
    scale = q.shape[3] ** -0.5
    exact = attend(q, k, v, None, scale)
    if not k.shape[1]:
        assert found.o_shared.count_nonzero() == 0
        assert (found.lse_shared == -math.inf).all()
        return
    eager = eager_attention(inputs["q"], inputs["k"], inputs["v"], None, scale)
    image = {name: inputs[name] for name in "qkv"}
    allowed = budget(exact, eager, largest_score(image), inputs["q"].dtype)
    allowed.check(found.o_shared, exact, "O_s")
    lse = torch.einsum("blhd,bnhd->bhln", q, k).mul(scale).logsumexp(-1)
    # scores in fp32, in products of 16-bit numbers
    assert ((found.lse_shared - lse).abs() <= 2**-20 * (1 + lse.abs())).all()


@pytest.mark.parametrize("rule", RULES)
def test_rules_match_fp64(rule):
    check_bits(MIXED, DTYPES[RULES.index(rule) % 2], rule=rule)


# two rules, which end in other code, take turns
@pytest.mark.parametrize(
    ("shape", "rule"),
    [(shape, ("nasa-cross", "projected")[i % 2]) for i, shape in enumerate(SHAPES)],
    ids=str,
)
def test_shapes_match_fp64(shape, rule):
    check(shape, torch.bfloat16, alpha=0.8, rule=rule)


def test_masks_and_alpha_per_query_match_fp64():
    shape = MIXED._replace(n_pos=140)
    generator = torch.Generator().manual_seed(3)
    masks = {
        f"mask_{side}": torch.rand(1, n, generator=generator) < 0.6
        for side, n in (("pos", shape.n_pos), ("neg", shape.n_neg))
    }
    alpha = torch.linspace(-1, 2, shape.l)[None, :, None].expand(1, -1, shape.h)
    check_bits(shape, torch.float16, alpha, "nasa-text", **masks)


@pytest.mark.parametrize("scale", [-0.2, 0.3])
def test_any_scale(scale):
    """A negative one takes the way of masked keys."""
    inputs, how = make(MIXED, torch.bfloat16), {"alpha": 0.5, "rule": "nasa", "scale": scale}
    found = forward_image(**inputs, **how)
    k, v, k_pos, v_pos = (inputs[name].double() for name in ("k", "v", "k_pos", "v_pos"))
    exact = attend(
        inputs["q"].double(), torch.cat([k, k_pos], 1), torch.cat([v, v_pos], 1), None, scale
    )
    plain = forward_image(**inputs, **how | {"alpha": 0.0})
    torch.testing.assert_close(plain.o.double(), exact, rtol=0.02, atol=0.02)
    assert torch.equal(found.o, beside(found, inputs, "long", **how))


@pytest.mark.parametrize("shape", [MIXED._replace(text_pos=0, text_neg=0), TILES], ids=str)
def test_alpha_zero_is_the_attention_over_image_and_positive_keys(shape):
    rule = "nasa-text" if shape.text_neg else "nasa"
    inputs = make(shape, torch.bfloat16)
    none = {"k_neg": inputs["k_neg"][:, :0], "v_neg": inputs["v_neg"][:, :0]}
    rows = slice(0, shape.l - shape.text_neg)
    alone = forward_image(**(inputs | none), alpha=0.0, rule=rule, text_pos=shape.text_pos)
    inputs["v_neg"][:, 3:] = NAN
    zeros = torch.zeros(1, shape.l, shape.h)
    for alpha in (0.0, zeros):
        o = forward_image(**inputs, alpha=alpha, rule=rule, **shape.text).o
        assert torch.equal(o[:, rows], alone.o[:, rows])


def test_equal_prompts_cancel_to_zero():
    inputs = make(MIXED._replace(n_neg=MIXED.n_pos), torch.float16)
    inputs |= {"k_neg": inputs["k_pos"], "v_neg": inputs["v_pos"]}
    assert forward_image(**inputs, alpha=1.0).o.count_nonzero() == 0


@pytest.mark.parametrize("how", ["bhnd", "odd-start"])
def test_strides_do_not_matter(how):
    """Of the image's keys: where rows start anywhere they are copied element by element."""
    inputs = make(MIXED._replace(d=40, h=2), torch.float16)
    expected = forward_image(**inputs, **MIXED.text)
    views = inputs | {name: strided(inputs[name], how) for name in "kv"}
    found = forward_image(**views, **MIXED.text)
    assert all(map(torch.equal, found, expected))


def test_the_backward_pass_starts_from_what_it_left(monkeypatch):
    def attend_image(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        found = forward_image(q, k, v, *(k[:, :0],) * 4, alpha=0.0, scale=scale)
        return found.o_shared, found.lse_shared

    monkeypatch.setattr(test_cuda_joint_backward, "attend_shared", attend_image)
    test_cuda_joint_backward.check(test_cuda_joint_backward.MIXED, torch.bfloat16, "nasa")


# ---- planted faults ------------------------------------------------------------------------------


def planted(name: str, pattern: str, replacement: str, which: int | None = 0) -> Fault:
    return Fault(name, "forward_long", pattern, replacement, which)


STORE = r"st\.global\.(?:u|b|f)32[^;]*;"
FAULTS = (
    # (n + 127) / 128 blocks of the image's keys become n / 128
    planted("lost-last-block", r"add\.s32\s+(%r\d+), (%r\d+), 127;", r"mov.b32 \1, \2;", 1),
    # of the first row
    planted("lost-rescale", r"ex2\.approx\.ftz\.f32\s+(%\w+), [^;]*;", r"mov.f32 \1, 0f3F800000;"),
    planted("lost-base", r"0f3F317218", "0f3F800000", None),
    planted("lost-sum", r"rcp\.approx\.ftz\.f32", "mov.f32"),
    planted("lost-columns", STORE, ""),
)


def test_without_a_fault_it_is_green():
    check(MIXED, torch.bfloat16)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_caught(fault, monkeypatch):
    plant_in_calls(fault, monkeypatch)
    with pytest.raises((ptx.Fault, AssertionError)) as caught:
        check(MIXED, torch.bfloat16)
    assert not isinstance(caught.value, ptx.Unsupported), "the edit is not PTX any more"
