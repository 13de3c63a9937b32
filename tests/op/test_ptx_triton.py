"""The PTX that Triton makes of the NASA kernels, launchers included, against fp64.

True bf16, which Triton's own interpreter does not have, and the instructions of both generations:
mma.sync on sm_80, wgmma on sm_90. Shared memory races are looked for in every launch.
"""

import os
import re
from typing import NamedTuple

import ptx
import pytest
import torch

from nasa_kernels._joint import shared
from nasa_kernels.reference import (
    RULES,
    nasa_attention_reference,
    nasa_joint_attention_reference,
)

triton = pytest.importorskip("triton")

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1",
    reason="Triton decides at import whether it compiles; run these without TRITON_INTERPRET",
)
# Triton 3.6 has no proxy fence between cp.async and wgmma, 3.9 has
FENCES = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Case(NamedTuple):
    arch: int
    dtype: torch.dtype
    d: int
    n_pos: int = 77
    n_neg: int = 33
    l: int = 70  # noqa: E741
    h: int = 2
    masks: bool = False
    alpha_map: bool = False
    backward: bool = True
    rule: str = "nasa"

    def __str__(self) -> str:
        extras = [n for n in ("masks", "alpha_map") if getattr(self, n)]
        extras += [self.rule] if self.rule != "nasa" else []
        name = f"sm{self.arch}-{str(self.dtype)[6:]}-l{self.l}-n{self.n_pos}+{self.n_neg}-d{self.d}"
        return "-".join([name, *extras])


CASES = [
    # both prompts on chip
    Case(90, BF16, 64),
    Case(80, BF16, 64, masks=True),
    # head_dims that are no power of two: 40, 72 and 160 are cut into blocks
    Case(90, FP16, 40, h=1, masks=True, alpha_map=True),
    Case(90, BF16, 72, h=1),
    Case(80, FP16, 160, h=1, backward=False),
    # a prompt that is streamed, ragged in its last block
    Case(90, BF16, 64, n_pos=200, h=1, masks=True, backward=False),
    # one query and one key
    Case(80, FP16, 40, n_pos=1, n_neg=1, l=1, h=1, backward=False),
    # the projected rule: sums of rows in one block of d, in two, and of what is streamed
    Case(90, BF16, 64, h=1, n_pos=40, rule="projected"),
    Case(80, FP16, 40, h=1, n_pos=40, alpha_map=True, rule="projected"),
    Case(90, BF16, 128, n_pos=130, n_neg=150, h=1, l=20, backward=False, rule="projected"),
    # fp32 is multiplied in fp32
    Case(80, FP32, 40, n_pos=21, l=20, h=1, backward=False),
]


def make_inputs(case: Case):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(case.dtype)

    prompts = [
        randn(1, n, case.h, case.d) for n in (case.n_pos, case.n_pos, case.n_neg, case.n_neg)
    ]
    q = randn(1, case.l, case.h, case.d)
    mask_pos = mask_neg = alpha_map = None
    if case.masks:
        mask_pos = torch.rand(1, case.n_pos, generator=generator) > 0.3
        mask_neg = torch.randn(1, case.n_neg, generator=generator)
    if case.alpha_map:
        alpha_map = torch.rand(1, case.l, case.h, generator=generator)
    return [q, *prompts], (mask_pos, mask_neg), alpha_map, randn(1, case.l, case.h, case.d)


def exact(tensors, masks, alpha, grad_o, rule="nasa"):
    """The result and the gradients of the inputs, in fp64."""
    leaves = [x.double().requires_grad_() for x in tensors]
    alpha = alpha.double().requires_grad_() if isinstance(alpha, torch.Tensor) else alpha
    o = nasa_attention_reference(*leaves, alpha, rule=rule, mask_pos=masks[0], mask_neg=masks[1])
    wanted = [*leaves, alpha] if isinstance(alpha, torch.Tensor) else leaves
    return [o.detach(), *torch.autograd.grad(o, wanted, grad_o.double())]


def assert_close(name: str, actual, expected, dtype) -> None:
    """Within one unit in the last place of the largest value.

    The result is rounded to dtype (half a unit), and so are P and dS before they are multiplied;
    those errors average out over the keys. In fp32 only the order of the sums differs.
    """
    assert torch.isfinite(actual).all(), name
    error = (actual.double() - expected).abs().max().item()
    units = 8 if dtype == FP32 else 1
    budget = units * torch.finfo(dtype).eps * expected.abs().max().item()
    assert error <= budget, f"{name}: max error {error:.2e}, budget {budget:.2e}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_fp64(case):
    tensors, masks, alpha_map, grad_o = make_inputs(case)
    alpha, scale = 0.7, case.d**-0.5
    given = alpha if alpha_map is None else alpha_map
    expected = exact(tensors, masks, given, grad_o, case.rule)
    arguments = (*tensors, *masks, alpha_map, alpha, scale, RULES.index(case.rule))
    with ptx.triton_on_cpu(case.arch, check_races=True, proxy_fences=FENCES) as reports:
        actual = [torch.ops.nasa_kernels.forward_triton(*arguments)]
        if case.backward:
            needs = [True] * 5 + [alpha_map is not None]
            actual += torch.ops.nasa_kernels.backward_triton(grad_o, *arguments, needs)
    names = ["o", "dq", "dk_pos", "dv_pos", "dk_neg", "dv_neg", "dalpha"]
    for name, x, y in zip(names, actual, expected, strict=False):
        # dalpha is fp32, summed from values of dtype
        assert_close(name, x, y, case.dtype)
    issued = " ".join(opcode for report in reports for opcode in report.counts)
    if case.dtype != FP32:
        assert ("wgmma" if case.arch == 90 else "mma.sync") in issued


@pytest.mark.parametrize(
    ("arch", "dtype", "rule", "one_launch"),
    [(90, BF16, "sum", True), (80, FP16, "vsf", True), (90, BF16, "nasa", False)],
    ids=str,
)
def test_joint_attention_matches_fp64(arch, dtype, rule, one_launch, monkeypatch):
    """Forward and backward; tiles that see one text only, and tiles that see both. Beside a small
    image, and beside one that PyTorch attends to."""
    if not one_launch:
        monkeypatch.setattr(shared, "_one_launch", 0)
    generator = torch.Generator().manual_seed(0)
    text_pos, text_neg, image, scale = 90, 12, 30, 0.2
    lengths = (image + text_pos + text_neg, 50, 50, 21, 21, 33, 33)
    tensors = [torch.randn(1, n, 1, 32, generator=generator).to(dtype) for n in lengths]
    grad_o = torch.randn(tensors[0].shape, generator=generator).to(dtype)
    mask = torch.randn(1, 33, generator=generator)
    mask[:, 3] = float("-inf")
    alpha_map = torch.rand(1, lengths[0], 1, generator=generator)
    leaves = [x.double().requires_grad_() for x in (*tensors, alpha_map)]
    o = nasa_joint_attention_reference(
        *leaves, rule=rule, text_queries=(text_pos, text_neg), mask_neg=mask, scale=scale
    )
    expected = [o.detach(), *torch.autograd.grad(o, leaves, grad_o.double())]
    arguments = (
        *tensors, None, mask, alpha_map, 0.0, scale, RULES.index(rule), text_pos, text_neg
    )  # fmt: skip
    with ptx.triton_on_cpu(arch, check_races=True, proxy_fences=FENCES):
        o, *kept = torch.ops.nasa_kernels.joint_attention_triton(*arguments)
        assert torch.equal(torch.ops.nasa_kernels.joint_forward_triton(*arguments), o)
        found = torch.ops.nasa_kernels.joint_backward_triton(grad_o, *kept, *arguments, [True] * 8)
    names = ("o", "dq", "dk", "dv", "dk_pos", "dv_pos", "dk_neg", "dv_neg", "dalpha")
    for name, x, y in zip(names, (o, *found), expected, strict=True):
        assert_close(name, x, y, dtype)


def test_inputs_are_views():
    """q, k, v as slices of one projection, a prompt shared by the batch: nothing is copied."""
    torch.manual_seed(0)
    q = torch.randn(2, 70, 3, 2, 64).half()[:, :, 1]
    k, v = torch.randn(1, 77, 2, 2, 64).half().expand(2, -1, -1, -1, -1).unbind(2)
    tensors = [q, k, v, k, v]
    expected = nasa_attention_reference(*(x.double() for x in tensors), 0.5)
    with ptx.triton_on_cpu(90, check_races=True, proxy_fences=FENCES):
        o = torch.ops.nasa_kernels.forward_triton(*tensors, None, None, None, 0.5, 64**-0.5, 0)
    assert_close("o", o, expected, FP16)


@pytest.mark.parametrize("arch", [80, 90])
def test_equal_prompts_cancel_or_leave_z_pos(arch):
    case = Case(arch, BF16, 64, n_neg=77)
    (q, k, v, _, _), *_ = make_inputs(case)

    def attend(alpha: float, rule: str):
        with ptx.triton_on_cpu(arch):
            return torch.ops.nasa_kernels.forward_triton(
                q, k, v, k, v, None, None, None, alpha, 0.125, RULES.index(rule)
            )

    assert attend(1.0, "nasa").count_nonzero() == 0
    assert torch.equal(attend(2.5, "projected"), attend(0.0, "nasa"))


# what is lost from the forward kernel's PTX, and what finds it; None: the comparison with fp64
FAULTS = {
    "barriers": (r"bar\.sync\s+0;", ";", ptx.Hazard),
    "waits for copies": (r"cp\.async\.wait_group\s+\d+;", ";", ptx.Hazard),
    "waits for wgmma": (r"wgmma\.wait_group\S*\s+0;", ";", ptx.Hazard),
    "wgmma fences": (r"wgmma\.fence\S*;", ";", ptx.Hazard),
    "masks": (r"selp\.f32(\s+%r\d+, %r\d+), 0fFF800000,", r"selp.f32\1, 0f00000000,", None),
    "the minus sign": (r"neg\.f32", "mov.f32", None),
    "bounds of loads": (r"(cp\.async\.cg[^;]*), %r\d+;", r"\1;", ptx.OutOfBounds),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_found(fault):
    """Odd lengths leave rows and keys to mask, so every one of these matters."""
    pattern, replacement, found = FAULTS[fault]
    case = Case(90, BF16, 64)
    tensors, masks, _, grad_o = make_inputs(case)
    arguments = (*tensors, *masks, None, 0.7, 0.125, 0)

    def edit(text: str) -> str:
        edited, count = re.subn(pattern, replacement, text)
        assert count, "the fault was not planted"
        return edited

    def run():
        options = {"check_races": found is not None, "proxy_fences": FENCES}
        with ptx.triton_on_cpu(90, edit=edit, **options):
            return torch.ops.nasa_kernels.forward_triton(*arguments)

    if found:
        with pytest.raises(found):
            run()
        return
    with pytest.raises(AssertionError, match="max error|^o$"):
        assert_close("o", run(), exact(tensors, masks, 0.7, grad_o)[0], BF16)
