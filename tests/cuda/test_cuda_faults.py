"""The test of the tests: faults planted in the kernels must turn them red.

A fault is an edit of the PTX of one kernel, of the kind a wrong line of csrc would make. It is
caught when the interpreter refuses to go on (a race, a missing wait, an address out of bounds) or
when the result misses the accuracy rule.
"""

import re
from typing import NamedTuple

import ptx
import pytest
import torch
from support import cuda_emulation
from support.cuda_emulation import assert_as_accurate_as_eager, eager, nvcc
from test_cuda_backward import autograd, make_grad
from test_cuda_forward import NAN, Shape, make
from test_cuda_grouped import grouped
from test_cuda_joint import make_joint, oracle
from test_cuda_joint_backward import TILES
from test_cuda_joint_backward import check as check_joint_gradients

pytestmark = pytest.mark.skipif(nvcc() is None, reason="no nvcc: the PTX cannot be built")


class Fault(NamedTuple):
    name: str
    file: str
    pattern: str
    replacement: str
    which: int | None = 0  # of the matches; None edits all of them
    joint: bool = False  # looked for beside the shared keys of a joint attention
    rule: str = "nasa"
    grouped: bool = False  # looked for with keys that serve two heads of the queries each

    def __str__(self) -> str:
        return f"{self.file}-{self.name}"


def swap_b(match: re.Match) -> str:
    return f"{match[1]}{{{match[3]}, {match[2]}}}{match[4]}"


MMA_B = r"(mma\.sync[^;]*?\}, )\{(%r\d+)\s*, ?(%r\d+)\}([^;]*;)"
PACK = r"(cvt\.rn\.bf16x2\.f32 %r\d+, )(%\w+), (%\w+);"
COPY = r"(cp\.async\.cg\.shared\.global \[%r\d+\], \[%rd\d+\], 16), %r\d+;"
SHUFFLE = r"shfl\.sync\.bfly\.b32\s+(%r\d+)\|%p\d+, (%r\d+)[^;]*;"
# matrix descriptors: swizzle 128B, 1024 bytes to the next 8 rows; for V 80 rows to the next atom
HIGH = 1 << 62 | 64 << 32
LEADING = 640 << 16
WGMMA_FENCE = r"wgmma\.fence\.sync\.aligned;"
WGMMA_WAIT = r"wgmma\.wait_group\.sync\.aligned 0;"
PROXY_FENCE = r"fence\.proxy\.async\.shared::cta;"
GROUP_BARRIER = r"barrier\.sync[^;]*;"
ARRIVE = r"mbarrier\.arrive\.shared::cta\.b64 _, [^;]*;"
# In forward_sm90_long with masks: 0 Q, then arrived and clean of: 1-2 the first K of the negative
# prompt, 3-4 the next K, 5-6 V of the keys before, 7-8 the last V, 9-16 those of the positive one,
# 17 O_s, 18-21 the free slots, 22-25 warps that clean (K free, V arrived; both prompts). Without,
# as beside shared keys here: 0 Q, 1-4 and 5-8 K, K, V, V of the prompts, 9 O_s.
WAIT = r"mbarrier\.try_wait\.parity\.shared::cta\.b64 complete, [^;]*;"
PASS = "setp.eq.u32 complete, 0, 0;"
# csrc/layouts.h: head_at, as the compiler writes it
HEAD_AT = r"(mul\.wide\.u32\s+(%rd\d+), %r\d+, %r\d+;\s*shl\.b64\s+%rd\d+, \2), 1;"
HEAD_OF_MAP = r"(mul\.wide\.u32\s+(%rd\d+), %r\d+, %r\d+;\s*shr\.u64\s+%rd\d+, \2), 31;"
FAULTS = (
    Fault("missing-block-barrier", "forward_short", r"bar\.sync\s+0;", "", -1),
    Fault("late-wait", "forward_short", r"(cp\.async\.wait_group) 0;", r"\1 1;", None),
    Fault("not-transposed", "forward_short", r"x4\.trans", "x4"),
    Fault("swapped-fragment", "forward_short", MMA_B, swap_b),
    Fault("swapped-pair", "forward_short", PACK, r"\1\3, \2;"),
    Fault("lost-tail", "forward_short", r"0fFF800000", "0f00000000", None),
    Fault("lost-lane", "forward_short", SHUFFLE, r"mov.b32 \1, \2;", 1),
    Fault("lost-rows", "forward_short", r"@%p\d+ (bra[^;]*;[^@]{0,2000}?st\.global\.v4)", r"\1"),
    Fault("lost-zero-fill", "forward_short", COPY, r"\1;", None),
    Fault("missing-barrier-for-k", "forward_long", r"bar\.sync\s+0;", "", 0),
    Fault("missing-barrier-for-v", "forward_long", r"bar\.sync\s+0;", "", 2),
    Fault("missing-wait-for-k", "forward_long", r"cp\.async\.wait_group 1;", "", 1),
    Fault("late-wait", "forward_long", r"(cp\.async\.wait_group) 1;", r"\1 2;", 3),
    Fault("joint-missing-wait", "forward_long", r"cp\.async\.wait_group 0;", "", -1, True),
    Fault("joint-lost-base", "forward_long", r"0f3FB8AA3B", "0f3F800000", None, True),
    Fault("joint-lost-logarithm", "forward_long", r"lg2\.approx\.ftz\.f32", "mov.f32", -1, True),
    Fault("joint-missing-wait", "forward_short", r"cp\.async\.wait_group 0;", "", 0, True),
    Fault("joint-lost-logarithm", "forward_short", r"lg2\.approx\.ftz\.f32", "mov.f32", 0, True),
    Fault("missing-barrier", "backward_queries", r"bar\.sync\s+0;", "", 0),
    Fault("missing-barrier-for-scores", "backward_queries", r"bar\.sync\s+0;", "", 2),
    Fault("not-transposed", "backward_queries", r"x4\.trans", "x4"),
    Fault("missing-barrier", "backward_keys", r"bar\.sync\s+0;", "", -1),
    Fault("late-wait", "backward_keys", r"(cp\.async\.wait_group) 1;", r"\1 2;", None),
    Fault("swapped-fragment", "backward_keys", MMA_B, swap_b, -1),
    Fault("joint-lost-lane-of-u", "backward_queries", SHUFFLE, r"mov.b32 \1, \2;", -1, True),
    Fault("joint-hidden-tiles", "backward_keys", r"selp\.b32\s+(%r\d+), 0, %r\d+, %p\d+;",
          r"mov.b32 \1, 0;", None, True),
    Fault("missing-wgmma-wait", "forward_sm90_short", r"(wgmma\.wait_group\.sync\.aligned) 1;",
          r"\1 2;"),
    Fault("missing-wgmma-fence", "forward_sm90_short", WGMMA_FENCE, "", 1),
    Fault("missing-proxy-fence", "forward_sm90_short", PROXY_FENCE, "", -1),
    Fault("missing-group-barrier", "forward_sm90_short", GROUP_BARRIER, "", -1),
    Fault("missing-wait-for-store", "forward_sm90_short",
          r"cp\.async\.bulk\.wait_group\.read 0;", ""),
    Fault("wrong-swizzle", "forward_sm90_short", str(HIGH),
          str(HIGH + (1 << 62) - (1 << 64)), None),
    Fault("wrong-stride", "forward_sm90_short", str(HIGH), str(HIGH - (32 << 32)), None),
    Fault("wrong-leading-offset", "forward_sm90_short", str(LEADING), str(1 << 16), None),
    Fault("wrong-box-bytes", "forward_sm90_short", r"(expect_tx[^;]*), (%r\d+);", r"\1, 8192;", -1),
    Fault("missing-wait-for-grids", "forward_sm90_short", r"griddepcontrol\.wait;", ""),
    Fault("missing-wait-for-grids", "forward_sm90_long", r"griddepcontrol\.wait;", ""),
    Fault("joint-missing-wait", "forward_sm90_short", WAIT, PASS, -1, True),
    Fault("joint-missing-group-barrier", "forward_sm90_short", GROUP_BARRIER, "", 0, True),
    Fault("joint-lost-logarithm", "forward_sm90_short", r"lg2\.approx\.ftz\.f32", "mov.f32", 0,
          True),
    Fault("missing-wait-for-k", "forward_sm90_long", WAIT, PASS, 3),
    Fault("missing-wait-for-clean-bias", "forward_sm90_long", WAIT, PASS, 2),
    Fault("missing-wait-for-clean-v", "forward_sm90_long", WAIT, PASS, 6),
    Fault("cleans-before-v-arrives", "forward_sm90_long", WAIT, PASS, 23),
    Fault("bias-in-use", "forward_sm90_long", WAIT, PASS, 24),
    Fault("slot-in-use", "forward_sm90_long", WAIT, PASS, 21),
    Fault("lost-arrival", "forward_sm90_long", ARRIVE, "", 5),
    Fault("missing-wgmma-wait", "forward_sm90_long", WGMMA_WAIT, "", 0),
    Fault("scores-under-way", "forward_sm90_long", r"(wgmma\.wait_group\.sync\.aligned) 1;",
          r"\1 2;", 0),
    Fault("frees-v-in-use", "forward_sm90_long", WGMMA_WAIT, "", 1),
    Fault("missing-wgmma-fence", "forward_sm90_long", WGMMA_FENCE, "", 1),
    Fault("missing-proxy-fence", "forward_sm90_long", PROXY_FENCE, "", 1),
    Fault("lost-sum", "forward_sm90_long", r"setp\.ne\.b32 add, %r\d+, 0;",
          "setp.ne.b32 add, 0, 0;", 12),
    Fault("joint-missing-wait", "forward_sm90_long", WAIT, PASS, 9, True),
    Fault("joint-missing-group-barrier", "forward_sm90_long", GROUP_BARRIER, "", 0, True),
    Fault("joint-missing-proxy-fence", "forward_sm90_long", PROXY_FENCE, "", -1, True),
    *(Fault("grouped-lost-head", file, HEAD_AT, r"\1, 0;", None, grouped=True)
      for file in ("forward_long", "backward_queries")),
    *(Fault("grouped-lost-head", file, HEAD_OF_MAP, r"\1, 32;", None, grouped=True)
      for file in ("forward_sm90_short", "forward_sm90_long")),
    *(Fault("projected-lost-root", file, r"rsqrt\.approx\.ftz\.f32", "mov.f32", None,
            rule="projected")
      for file in ("forward_short", "forward_long", "forward_sm90_short", "forward_sm90_long")),
    Fault("projected-lost-lane", "forward_short", SHUFFLE, r"mov.b32 \1, \2;", -1,
          rule="projected"),
    Fault("projected-missing-barrier", "forward_long", r"bar\.sync\s+0;", "", -1,
          rule="projected"),
)  # fmt: skip


def plant(fault: Fault, text: str) -> str:
    """The PTX text of one kernel with the fault in it."""
    matches = list(re.finditer(fault.pattern, text))
    if not matches:
        raise ValueError(f"{fault}: nothing to edit")
    chosen = matches if fault.which is None else [matches[fault.which]]
    for match in reversed(chosen):
        if isinstance(fault.replacement, str):
            new = match.expand(fault.replacement)
        else:
            new = fault.replacement(match)
        if new == match[0]:
            raise ValueError(f"{fault}: the edit changes nothing")
        text = text[: match.start()] + new + text[match.end() :]
    return text


SHAPES = {
    "forward_short": Shape("fault", 1, 150, 1, 77, 60, 64),
    "forward_long": Shape("fault", 1, 40, 1, 300, 200, 64),
    "forward_sm90_short": Shape("fault", 1, 64 * 7 + 5, 1, 77, 60, 72),
    "forward_sm90_long": Shape("fault", 1, 64 * 3 + 5, 1, 270, 300, 72),
    "backward_queries": Shape("fault", 1, 40, 1, 60, 170, 64),
    "backward_keys": Shape("fault", 1, 200, 1, 100, 60, 64),
}
PATHS = {
    "forward_short": "short",
    "forward_long": "long",
    "forward_sm90_short": "sm90-short",
    "forward_sm90_long": "sm90-long",
}


def run_joint(file: str) -> None:
    """Rows of all kinds beside shared keys, held to the accuracy rule."""
    if file.startswith("backward"):
        check_joint_gradients(TILES, torch.bfloat16, "nasa")
        return
    shape = SHAPES[file]
    inputs = make(shape, torch.bfloat16)
    joint = make_joint(shape, torch.bfloat16, text_pos=shape.l // 4, text_neg=shape.l // 4)
    o = cuda_emulation.forward(**inputs, joint=joint, path=PATHS[file])
    wide = {name: x.double() for name, x in inputs.items()}
    exact = oracle(wide, joint._replace(o=joint.o.double()), 0.5)
    assert_as_accurate_as_eager(o, exact, oracle(inputs, joint, 0.5))


def run(file: str, rule: str = "nasa") -> None:
    """A call of the kernels in `file`, held to the accuracy rule; a masked key holds NaN."""
    shape = SHAPES[file]
    if rule == "projected" and file == "forward_long":
        # two warps share the columns of a row
        shape = shape._replace(d=160)
    inputs = make(shape, torch.bfloat16, seed=1)
    mask = {"mask_neg": (torch.arange(shape.n_neg) > 0)[None]}
    exact_inputs = {name: x.double() for name, x in inputs.items()}
    poisoned = {name: x.clone() for name, x in inputs.items()}
    for name in ("k_neg", "v_neg"):
        poisoned[name][:, 0] = NAN
    if file.startswith("backward"):
        grad_o = make_grad(inputs)
        actual = cuda_emulation.backward(grad_o, **poisoned, **mask)
        exact = autograd(exact_inputs, grad_o, 0.5, torch.float64, **mask)
        low = autograd(inputs, grad_o, 0.5, torch.bfloat16, **mask)
        for name, gradient in actual.items():
            assert_as_accurate_as_eager(gradient, exact[name], low[name])
        return
    how = {"alpha": 0.5, "rule": rule} | mask
    o = cuda_emulation.forward(**poisoned, **how, path=PATHS[file])
    assert_as_accurate_as_eager(o, eager(**exact_inputs, **how), eager(**inputs, **how))


def run_grouped(file: str) -> None:
    """Two heads of keys for four of the queries, held to the accuracy rule."""
    shape = SHAPES[file]._replace(l=20, h=4)
    few, inputs = grouped(make(shape, torch.bfloat16), 2)
    wide = {name: x.double() for name, x in inputs.items()}
    if file.startswith("backward"):
        grad_o = make_grad(inputs)
        actual = cuda_emulation.backward(grad_o, **few, needs=(True, *(False,) * 5))["q"]
        exact = autograd(wide, grad_o, 0.5, torch.float64)["q"]
        low = autograd(inputs, grad_o, 0.5, torch.bfloat16)["q"]
    else:
        actual = cuda_emulation.forward(**few, path=PATHS[file])
        exact, low = eager(**wide, alpha=0.5), eager(**inputs, alpha=0.5)
    assert_as_accurate_as_eager(actual, exact, low)


def faulty_kernel(fault: Fault, sound: ptx.LoadedKernel) -> ptx.LoadedKernel:
    text = cuda_emulation.source(fault.file)
    start = text.index(f".entry {sound.name}")
    end = text.find(".entry ", start + 1)
    end = end if end > 0 else len(text)
    return ptx.load(text[:start] + plant(fault, text[start:end]) + text[end:], sound.name)


@pytest.mark.parametrize("file", SHAPES)
def test_without_a_fault_the_call_is_green(file):
    run(file)


@pytest.mark.parametrize("file", PATHS)
def test_without_a_fault_the_joint_call_is_green(file):
    run_joint(file)


@pytest.mark.parametrize("file", PATHS)
def test_without_a_fault_the_projected_call_is_green(file):
    run(file, "projected")


def plant_in_calls(fault: Fault, monkeypatch) -> None:
    sound = cuda_emulation.kernel

    def kernel(file: str, name: str, *sizes) -> ptx.LoadedKernel:
        loaded = sound(file, name, *sizes)
        if file != fault.file or name == "sum_splits_kernel":
            return loaded
        return faulty_kernel(fault, loaded)

    monkeypatch.setattr(cuda_emulation, "kernel", kernel)


def test_a_parked_operand_that_is_lost_is_caught(monkeypatch):
    """Of two fragments of rows against 128 keys, without masks."""
    inputs = make(Shape("fault", 1, 32, 1, 120, 100, 72), torch.bfloat16)
    parked = Fault("lost-operand", "forward_short", r"st\.shared\.v4\.[bu]32[^;]*;", "")
    plant_in_calls(parked, monkeypatch)
    with pytest.raises((ptx.Fault, AssertionError)):
        o = cuda_emulation.forward(**inputs, path="short")
        wide = {name: x.double() for name, x in inputs.items()}
        assert_as_accurate_as_eager(o, eager(**wide, alpha=0.5), eager(**inputs, alpha=0.5))


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_fault_is_caught(fault, monkeypatch):
    plant_in_calls(fault, monkeypatch)
    with pytest.raises((ptx.Fault, AssertionError)) as caught:
        if fault.grouped:
            run_grouped(fault.file)
        elif fault.joint:
            run_joint(fault.file)
        else:
            run(fault.file, fault.rule)
    assert not isinstance(caught.value, ptx.Unsupported), "the edit is not PTX any more"
