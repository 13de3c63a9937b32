"""Triton's own PTX in the interpreter: kernels that everybody knows, against torch in fp64.

Triton's compiler is an independent author of wgmma descriptors, swizzles, TMA maps and pipelines:
that its kernels come out right is the evidence that these are understood right.
"""

import os
import re

import ptx
import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1",
    reason="Triton decides at import whether it compiles; run these without TRITON_INTERPRET",
)
# Triton 3.6 has no proxy fence between cp.async and wgmma, 3.9 has
FENCES = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)


@triton.jit
def matmul_kernel(
    A, B, C, M, N, K, stride_am, stride_bk, stride_cm,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, BLOCK_K)
    c = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, K, BLOCK_K):
        kk = start + k
        a = tl.load(
            A + i[:, None] * stride_am + kk[None, :],
            mask=(i < M)[:, None] & (kk < K)[None, :],
            other=0.0,
        )
        b = tl.load(
            B + kk[:, None] * stride_bk + j[None, :],
            mask=(kk < K)[:, None] & (j < N)[None, :],
            other=0.0,
        )
        c = tl.dot(a, b, c, input_precision=PRECISION)
    tl.store(C + i[:, None] * stride_cm + j[None, :], c, mask=(i < M)[:, None] & (j < N)[None, :])


def error(actual, expected) -> float:
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


def run_matmul(dtype, precision, stages, arch, **options):
    torch.manual_seed(0)
    a, b, c = torch.randn(70, 104).to(dtype), torch.randn(104, 80).to(dtype), torch.empty(70, 80)
    args = {"A": a, "B": b, "C": c, "M": 70, "N": 80, "K": 104}
    args |= {"stride_am": 104, "stride_bk": 80, "stride_cm": 80}
    constants = {"BLOCK": 64, "BLOCK_K": 32, "PRECISION": precision}
    report = ptx.run_triton(
        matmul_kernel, (2, 2), args, constants, num_stages=stages, arch=arch, **options
    )
    return error(c, a.double() @ b.double()), report


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "precision", "stages", "tolerance"),
    [
        (torch.bfloat16, "ieee", 3, 1e-6),
        (torch.float16, "ieee", 1, 1e-6),
        (torch.float32, "tf32", 2, 1e-3),
        (torch.float32, "ieee", 1, 1e-6),
    ],
    ids=["bf16-3-stages", "fp16", "tf32-2-stages", "fp32"],
)
def test_matmul(dtype, precision, stages, tolerance, arch):
    options = {"check_races": True, "proxy_fences": FENCES}
    worst, report = run_matmul(dtype, precision, stages, arch, **options)
    # the product of two bf16 is exact in fp32
    assert worst < tolerance
    issued = " ".join(report.counts)
    if precision != "ieee" or dtype != torch.float32:
        assert ("wgmma" if arch == 90 else "mma.sync") in issued
    if stages > 1:
        assert "cp.async" in issued


@triton.jit
def matmul_tma_kernel(A, B, C, K, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    i, j = tl.program_id(0) * BLOCK, tl.program_id(1) * BLOCK
    c = tl.zeros([BLOCK, BLOCK], tl.float32)
    for k in range(0, K, BLOCK_K):
        c = tl.dot(A.load([i, k]), B.load([j, k]).T, c)
    C.store([i, j], c.to(tl.bfloat16))


@pytest.mark.parametrize("block_k", [16, 32, 64], ids="swizzle{}".format)
def test_matmul_by_tma(block_k):
    """Tensor descriptors: TMA loads and stores, mbarriers, every swizzle, ragged edges."""
    torch.manual_seed(0)
    a, b = torch.randn(100, 136).bfloat16(), torch.randn(72, 136).bfloat16()
    c = torch.zeros(100, 72).bfloat16()
    args = {n: TensorDescriptor.from_tensor(x, [64, block_k]) for n, x in (("A", a), ("B", b))}
    args |= {"C": TensorDescriptor.from_tensor(c, [64, 64]), "K": 136}
    report = ptx.run_triton(
        matmul_tma_kernel, (2, 2), args, {"BLOCK": 64, "BLOCK_K": block_k}, check_races=True
    )
    assert error(c, a.double() @ b.double().T) < 4e-3
    issued = " ".join(report.counts)
    assert all(x in issued for x in ("cp.async.bulk.tensor", "mbarrier.try_wait", "wgmma"))


@triton.jit
def softmax_kernel(X, Y, N, stride, BLOCK: tl.constexpr):
    row, j = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(X + row * stride + j, mask=j < N, other=float("-inf")).to(tl.float32)
    p = tl.exp(x - tl.max(x, 0))
    tl.store(Y + row * stride + j, p / tl.sum(p, 0), mask=j < N)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_softmax(dtype):
    x = torch.randn(5, 300).to(dtype)
    y = torch.empty_like(x)
    args = {"X": x, "Y": y, "N": 300, "stride": 300}
    ptx.run_triton(softmax_kernel, (5,), args, {"BLOCK": 512}, arch=80, check_races=True)
    assert error(y, x.double().softmax(1)) < (4e-3 if dtype == torch.bfloat16 else 1e-6)


@triton.jit
def attention_kernel(Q, K, V, OUT, L, N, scale, D: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, D)
    q = tl.load(Q + i[:, None] * D + d[None, :], mask=(i < L)[:, None], other=0.0)
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    s = tl.zeros([BLOCK], tl.float32)
    o = tl.zeros([BLOCK, D], tl.float32)
    for start in range(0, N, BLOCK):
        j = start + tl.arange(0, BLOCK)
        k = tl.load(K + j[:, None] * D + d[None, :], mask=(j < N)[:, None], other=0.0)
        v = tl.load(V + j[:, None] * D + d[None, :], mask=(j < N)[:, None], other=0.0)
        x = tl.where((j < N)[None, :], tl.dot(q, k.T) * scale, float("-inf"))
        m_new = tl.maximum(m, tl.max(x, 1))
        p = tl.exp2(x - m_new[:, None])
        decay = tl.exp2(m - m_new)
        s = s * decay + tl.sum(p, 1)
        o = tl.dot(p.to(v.dtype), v, o * decay[:, None])
        m = m_new
    tl.store(OUT + i[:, None] * D + d[None, :], o / s[:, None], mask=(i < L)[:, None])


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("stages", [1, 3])
def test_attention(stages, arch):
    torch.manual_seed(0)
    q, k, v = torch.randn(70, 64).half(), torch.randn(200, 64).half(), torch.randn(200, 64).half()
    o = torch.empty_like(q)
    args = {"Q": q, "K": k, "V": v, "OUT": o, "L": 70, "N": 200, "scale": 0.125 * 1.44269504}
    ptx.run_triton(
        attention_kernel, (2,), args, {"D": 64, "BLOCK": 64}, num_stages=stages, arch=arch,
        check_races=True, proxy_fences=FENCES,
    )  # fmt: skip
    expected = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert error(o, expected) < 1e-3


@triton.jit
def histogram_kernel(X, COUNT, TOTAL, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + i, mask=i < N, other=0)
    tl.atomic_add(COUNT + x, 1, mask=i < N)
    tl.atomic_add(TOTAL, tl.sum(x.to(tl.float32), 0))


def test_atomics_across_programs():
    x = torch.randint(0, 10, (1000,), dtype=torch.int32)
    count, total = torch.zeros(10, dtype=torch.int32), torch.zeros(1)
    args = {"X": x, "COUNT": count, "TOTAL": total, "N": 1000}
    ptx.run_triton(histogram_kernel, (4,), args, {"BLOCK": 256})
    assert torch.equal(count, x.bincount(minlength=10).int())
    assert total.item() == x.sum()


def test_launch_interception_takes_positional_and_named_arguments():
    x = torch.randn(2, 300)
    y = torch.empty_like(x)
    with ptx.triton_on_cpu(arch=80) as reports:
        softmax_kernel[(2,)](x, y, 300, stride=300, BLOCK=512, num_warps=2)
    assert len(reports) == 1 and reports[0].steps > 0
    assert error(y, x.double().softmax(1)) < 1e-6


def test_compiled_kernels_are_kept():
    x = torch.randn(1, 300)
    args = {"X": x, "Y": x.clone(), "N": 300, "stride": 300}
    first = ptx.compile_triton(softmax_kernel, args, {"BLOCK": 512}, arch=80)
    assert ptx.compile_triton(softmax_kernel, args, {"BLOCK": 512}, arch=80) is first


def test_unknown_argument_is_named():
    with pytest.raises(
        ValueError, match=re.escape("softmax_kernel: arguments missing or unknown: ['Z', 'stride']")
    ):
        ptx.compile_triton(softmax_kernel, {"X": 0, "Y": 0, "N": 1, "Z": 2}, {"BLOCK": 512})
