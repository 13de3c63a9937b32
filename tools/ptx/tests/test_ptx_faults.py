"""Planted faults: every one of them must be found, and the kernels they are planted in must not.

Two CUDA kernels that use all the machinery (fixtures/gemm_sm80.cu, gemm_sm90.cu) run from the PTX
that nvcc made of them, with one thing changed at a time.
"""

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import ptx
import pytest
import torch

FIXTURES = Path(__file__).parent / "fixtures"
ARCHITECTURES = {"gemm_sm80": "80", "gemm_sm90": "90a"}


def inputs(m: int, n: int, k: int):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(m, k, generator=generator).bfloat16()
    b = torch.randn(k, n, generator=generator).bfloat16()
    return a, b, (a.double() @ b.double())


def wrong(actual, expected) -> bool:
    """Further off than the rounding of the result to bf16; NaN is."""
    return not ((actual.double() - expected).abs() <= expected.abs() * 2**-8 + 1e-3).all()


def gemm_sm80(text: str, **options) -> tuple[bool, ptx.Report]:
    """C = A B. Returns ``(the result is wrong, report)``."""
    m, n, k = 72, 104, 136
    a, b, expected = inputs(m, n, k)
    memory, c = ptx.Memory(), torch.full((m, n), float("nan")).bfloat16()
    addresses = [memory.upload(x) for x in (a, b, c)]
    report = ptx.load(text, "gemm").launch((2, 2), 128, [*addresses, m, n, k], memory, **options)
    return wrong(memory.download(addresses[2], c), expected), report


def gemm_sm90(text: str, swizzle_a: int = 128, **options) -> tuple[bool, ptx.Report]:
    """C = A B^T, with 5 steps along k over 2 stages."""
    m, n, k = 72, 104, 296
    a, b, expected = inputs(m, n, k)
    b = b.T.contiguous()
    memory, c = ptx.Memory(), torch.full((m, n), float("nan")).bfloat16()
    tensors = ((a, swizzle_a), (b, 128), (c, 128))
    addresses = [memory.upload(x) for x, _ in tensors]
    box = {128: (64, 64), 64: (64, 32)}
    maps = [
        ptx.tensor_map(memory, address, x, box[swizzle], swizzle)
        for address, (x, swizzle) in zip(addresses, tensors, strict=True)
    ]
    report = ptx.load(text, "gemm").launch((2, 2), 256, [*maps, 5], memory, 5 * 8192, **options)
    return wrong(memory.download(addresses[2], c), expected), report


RUN = {"gemm_sm80": gemm_sm80, "gemm_sm90": gemm_sm90}


def text_of(kernel: str) -> str:
    return (FIXTURES / f"{kernel}.ptx").read_text(encoding="utf-8")


@pytest.mark.parametrize("kernel", RUN)
def test_sound_kernel_passes(kernel):
    bad, report = RUN[kernel](text_of(kernel), check_races=True, count_bank_conflicts=True)
    assert not bad
    # padded rows, swizzled tiles
    assert report.bank_conflicts.total() == 0


@pytest.mark.parametrize("kernel", RUN)
def test_fresh_ptx_passes(kernel, tmp_path):
    """What the nvcc at hand makes of the sources, not only what is checked in."""
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc")
    arch, target = ARCHITECTURES[kernel], tmp_path / "out.ptx"
    command = ["nvcc", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-std=c++17", "-ptx", "-o"]
    subprocess.run([*command, str(target), str(FIXTURES / f"{kernel}.cu")], check=True)
    assert not RUN[kernel](target.read_text(encoding="utf-8"), check_races=True)[0]


class Fault(NamedTuple):
    name: str
    pattern: str
    replacement: str
    # the error that names it; None: the result is wrong (NaN counts)
    found: tuple[type, str] | None
    # which match is changed, counted from 0; None for all
    which: int | None = None


def hazard(message: str):
    return ptx.Hazard, message


SM80 = [
    Fault("no cp.async wait", r"cp\.async\.wait_group 1;", ";", hazard("in flight")),
    Fault("waits for a group too few", r"wait_group 1;", "wait_group 2;", hazard("in flight")),
    Fault(
        "no barrier before the reads",
        r"bar\.sync\s+0;",
        ";",
        hazard("reads .* written .* by another warp"),
        0,
    ),
    Fault(
        "no barrier after the reads",
        r"bar\.sync\s+0;",
        ";",
        hazard("overwrites .* read .* by another warp"),
        1,
    ),
    Fault("lost .trans", r"x4\.trans", "x4", None),
    Fault(
        "fragments of A swapped",
        r"ldmatrix(\S*x4\.shared\.b16) \{(%r\d+), (%r\d+), (%r\d+),",
        r"ldmatrix\1 {\2, \4, \3,",
        None,
    ),
    Fault("halves of B swapped", r"\}, \{(%r\d+), (%r\d+)\}, \{", r"}, {\2, \1}, {", None, 0),
    Fault(
        "columns of C swapped",
        r"cvt\.rn\.bf16x2\.f32 (%r\d+), (%f\d+), (%f\d+)",
        r"cvt.rn.bf16x2.f32 \1, \3, \2",
        None,
    ),
    Fault("fp16 instead of bf16", r"f32\.bf16\.bf16\.f32", "f32.f16.f16.f32", None),
    Fault(
        "store without its bounds",
        r"@%p\d+ bra\s+\S+;(?=(?:(?!bra)[\s\S])*?st\.global)",
        ";",
        (ptx.OutOfBounds, "store to .* past the end"),
    ),
    Fault(
        "load without its bounds",
        r"(cp\.async\.cg\S+ \[%r\d+\], \[%rd\d+\], 16), %r\d+;",
        r"\1;",
        (ptx.OutOfBounds, "load from"),
    ),
    Fault(
        "misaligned row", r"(ldmatrix.* \[%r\d+)\]", r"\1+8]", (ptx.Misaligned, "multiple of 16"), 0
    ),
    Fault("shuffled warp", r"mov\.u32(\s+)(%r\d+), %tid\.x;", r"mov.u32\1\2, %laneid;", None),
]

# a descriptor without its address: leading 16, stride 1024, swizzle 128
DESCRIPTOR = str(1 << 62 | 1024 >> 4 << 32 | 1 << 16)
WRONG_STRIDE = str(1 << 62 | 512 >> 4 << 32 | 1 << 16)
WRONG_SWIZZLE = str(2 << 62 | 1024 >> 4 << 32 | 1 << 16)
EXPECT = r"(expect_tx.*) 16384;"
IN_USE = hazard("may still read|before wgmma.wait_group|by another warp")

SM90 = [
    Fault("wrong stride in the descriptor", DESCRIPTOR, WRONG_STRIDE, None),
    Fault("wrong swizzle in the descriptor", DESCRIPTOR, WRONG_SWIZZLE, None),
    Fault("k does not advance", r"16324;", "16320;", None),
    Fault("negated product", r"(wgmma\S+ .*), 1, 1, 1, 0, 0;", r"\1, 1, -1, 1, 0, 0;", None),
    Fault("fp16 instead of bf16", r"f32\.bf16\.bf16 ", "f32.f16.f16 ", None),
    Fault("no wgmma.fence", r"wgmma\.fence\S*;", ";", hazard("after the last wgmma.fence")),
    Fault("no wgmma wait", r"wgmma\.wait_group\S* 0;", ";", IN_USE),
    Fault(
        "waits for a wgmma group too few",
        r"wgmma\.wait_group(\S*) 0;",
        r"wgmma.wait_group\1 1;",
        IN_USE,
    ),
    Fault(
        "expects too many bytes",
        EXPECT,
        r"\1 16400;",
        (ptx.Deadlock, "lacks 0 of 1 arrivals and 16 bytes"),
    ),
    Fault("expects too few bytes", EXPECT, r"\1 8192;", (ptx.BarrierMisuse, "more bytes arrive")),
    Fault(
        "consumer forgets to arrive",
        r"mbarrier\.arrive\.shared::cta\.b64 _, \[%r\d+\];",
        ";",
        (ptx.Deadlock, "lacks 128 of 128 arrivals"),
    ),
    Fault(
        "producer forgets to arrive",
        r"mbarrier\.arrive\.expect_tx",
        "mbarrier.expect_tx.relaxed.cta",
        (ptx.Deadlock, "lacks 1 of 1 arrivals"),
    ),
    Fault(
        "empty barrier counts too few",
        r"(mbarrier\.init\S+ \[%r\d+\]), 128;",
        r"\1, 64;",
        (ptx.BarrierMisuse, "more than 64 arrivals"),
    ),
    Fault(
        "consumer waits for the wrong parity",
        r"(and\.b32\s+)%r18, %r25, 1;",
        r"\1%r18, %r25, 1; xor.b32 %r18, %r18, 1;",
        hazard("in flight|nobody wrote"),
    ),
    Fault(
        "producer waits for the wrong parity",
        r"not\.b32\s+(%r\d+), (%r\d+);",
        r"mov.b32 \1, \2;",
        (ptx.Deadlock, "lacks 128 of 128 arrivals"),
    ),
    Fault(
        "no barrier after the mbarriers' init",
        r"bar\.sync\s+0;",
        ";",
        (ptx.Fault, "another warp|not initialised"),
    ),
    Fault(
        "stages overlap",
        r"and\.b32\s+(%r\d+), (%r\d+), 16384;",
        r"and.b32 \1, \2, 8192;",
        hazard("in flight"),
    ),
    Fault("tile of A in place of B", r"\[%rd25, ", "[%rd24, ", None),
    Fault(
        "no proxy fence before the store",
        r"fence\.proxy\.async\S*;",
        ";",
        hazard("without fence.proxy.async"),
    ),
    Fault("no barrier before the store", r"bar\.sync 1, 128;", ";", hazard("by another warp")),
    Fault(
        "barrier counts too many",
        r"bar\.sync 1, 128;",
        "bar.sync 1, 160;",
        (ptx.Deadlock, "128 of 160 threads"),
    ),
    Fault(
        "store is not waited for",
        r"cp\.async\.bulk\.wait_group\.read 0;",
        ";",
        hazard("exits while a bulk store"),
    ),
    Fault(
        "store is not committed", r"cp\.async\.bulk\.commit_group;", ";", hazard("never committed")
    ),
    Fault("lost swizzle of C", r"xor\.b32(\s+%r\d+, %r\d+), %r\d+;", r"xor.b32\1, 0;", None),
]


def plant(fault: Fault, text: str) -> str:
    matches = list(re.finditer(fault.pattern, text))
    chosen = matches if fault.which is None else [matches[fault.which]]
    for match in reversed(chosen):
        text = text[: match.start()] + match.expand(fault.replacement) + text[match.end() :]
    return text


@pytest.mark.parametrize(
    ("kernel", "fault"),
    [("gemm_sm80", f) for f in SM80] + [("gemm_sm90", f) for f in SM90],
    ids=lambda x: x.name.replace(" ", "-") if isinstance(x, Fault) else x,
)
def test_planted_fault_is_found(kernel, fault):
    text = plant(fault, text_of(kernel))
    assert text != text_of(kernel), "the fault was not planted"
    if fault.found is None:
        assert RUN[kernel](text)[0]
        return
    kind, message = fault.found
    with pytest.raises(kind, match=message):
        RUN[kernel](text, check_races=True)


def test_tensor_map_of_the_wrong_swizzle():
    """The kernel believes in 128 bytes; half of every row is missing, so the barrier never ends."""
    with pytest.raises(ptx.Deadlock):
        gemm_sm90(text_of("gemm_sm90"), swizzle_a=64)


def test_lost_padding_shows_as_bank_conflicts():
    """Rows of 64 bytes instead of 80: two rows share their banks with the next two."""
    source = text_of("gemm_sm80")
    text = re.sub(r"mad\.lo\.s32(.*), 80, ", r"mad.lo.s32\1, 64, ", source)
    text = re.sub(r"mul\.lo\.s32(.*), 80;", r"mul.lo.s32\1, 64;", text)
    assert text != source
    _, report = gemm_sm80(text, count_bank_conflicts=True)
    assert report.bank_conflicts.total() > 0
