"""What tests, benchmarks and the demo share: model shapes, inputs, Algorithm 1, the accuracy rule.

The accuracy rule, against fp64: a back end loses no more than eager PyTorch does in the same
dtype, 1.0x in relative L2 and 1.5x in the largest error. Where eager is exact by luck (one key,
equal weights) the floor is what the format itself costs; `budget` derives it.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

# what `cpu` runs without its kernels, the library that has these, and why it is not there
from nasa_kernels import _cpu
from nasa_kernels._cpu import attention
from nasa_kernels._cuda import extension
from nasa_kernels._cuda import joint as cuda_joint
from nasa_kernels._joint import shared
from nasa_kernels._triton import grid
from nasa_kernels.reference import (
    additive_bias,
    combine,
    joint,
    nasa_attention_reference,
    nasa_joint_attention_reference,
)

# of `cpu`: what runs without its kernels, and a sentence where these are not there; the libraries
cpu_composition = attention
CPU_LIBRARY = _cpu.LIBRARY
CUDA_LIBRARY = extension.LIBRARY
why_no_cpu_kernels = _cpu.load
# the launches of joint attention on `cuda`, the first one alone, up to which image there is no such
# one, and the grids of Triton's resident kernels
attend_shared = shared.attend_shared
take_in_one_launch = shared.take_in_one_launch
joint_forward_cuda = cuda_joint.forward
joint_nag_cuda = cuda_joint.nag
triton_grid = grid


class Shape(NamedTuple):
    name: str
    b: int
    l: int
    h: int
    d: int
    n_pos: int
    n_neg: int

    def __str__(self) -> str:
        sizes = f"b{self.b}-l{self.l}-h{self.h}-d{self.d}-n{self.n_pos}+{self.n_neg}"
        return f"{self.name}-{sizes}"


# One cross-attention layer per line, batch 1, with the number of such layers in the model.
MODEL_SHAPES = {
    Shape("sd15-64", 1, 4096, 8, 40, 77, 77): 5,
    Shape("sd15-32", 1, 1024, 8, 80, 77, 77): 5,
    Shape("sd15-16", 1, 256, 8, 160, 77, 77): 5,
    Shape("sd15-8", 1, 64, 8, 160, 77, 77): 1,
    Shape("sd21-64", 1, 4096, 5, 64, 77, 77): 5,
    Shape("sd21-32", 1, 1024, 10, 64, 77, 77): 5,
    Shape("sd21-16", 1, 256, 20, 64, 77, 77): 5,
    Shape("sd21-8", 1, 64, 20, 64, 77, 77): 1,
    Shape("sdxl-64", 1, 4096, 10, 64, 77, 77): 10,
    Shape("sdxl-32", 1, 1024, 20, 64, 77, 77): 60,
    Shape("pixart-512", 1, 1024, 16, 72, 120, 120): 28,
    Shape("pixart-1024", 1, 4096, 16, 72, 120, 120): 28,
    Shape("sana-0.6b", 1, 1024, 16, 72, 300, 300): 28,
    Shape("sana-1.6b", 1, 1024, 20, 112, 300, 300): 20,
    Shape("wan-1.3b", 1, 32760, 12, 128, 512, 512): 30,
}


def make_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> dict[str, Any]:
    """q, k_pos, v_pos, k_neg, v_neg of one layer, normal."""
    generator = torch.Generator().manual_seed(seed)

    def normal(n: int) -> Tensor:
        x = torch.randn(shape.b, n, shape.h, shape.d, generator=generator)
        return x.to(device=device, dtype=dtype)

    return {
        "q": normal(shape.l),
        "k_pos": normal(shape.n_pos),
        "v_pos": normal(shape.n_pos),
        "k_neg": normal(shape.n_neg),
        "v_neg": normal(shape.n_neg),
    }


def algorithm_1(
    q: Tensor, k_pos: Tensor, v_pos: Tensor, k_neg: Tensor, v_neg: Tensor, alpha: float | Tensor, *,
    mask_pos: Tensor | None = None, mask_neg: Tensor | None = None, scale: float | None = None,
    rule: str = "nasa",
) -> Tensor:  # fmt: skip
    """The paper's Algorithm 1 in eager PyTorch, every step rounded to the dtype of q."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    if isinstance(alpha, Tensor):
        alpha = alpha.expand(q.shape[:3]).unsqueeze(-1).to(q.dtype)
    z_pos = eager_attention(q, k_pos, v_pos, mask_pos, scale)
    return combine(z_pos, eager_attention(q, k_neg, v_neg, mask_neg, scale), alpha, rule)


def eager_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(q k^T * scale + bias) v, every step rounded to the dtype of q."""
    if 1 < k.shape[2] < q.shape[2]:
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("blhd,bnhd->bhln", q, k) * scale
    if mask is not None:
        scores = scores + additive_bias(mask, q.dtype)[:, None, None, :]
    return torch.einsum("bhln,bnhd->blhd", scores.softmax(-1), v)


class Budget(NamedTuple):
    """Errors that are allowed: of the whole tensor in L2, and of its worst element."""

    l2: float
    worst: float

    def check(self, actual: Tensor, exact: Tensor, name: str = "O") -> None:
        assert actual.shape == exact.shape, f"{name}: {actual.shape} instead of {exact.shape}"
        assert torch.isfinite(actual).all(), f"{name} is not finite"
        error = actual.double() - exact
        l2, worst = error.norm().item(), error.abs().max().item() if error.numel() else 0.0
        assert l2 <= self.l2, f"{name}: L2 error {l2:.3e}, allowed {self.l2:.3e}"
        assert worst <= self.worst, f"{name}: largest error {worst:.3e}, allowed {self.worst:.3e}"


def budget(
    exact: Tensor, eager: Tensor, largest_score: float, dtype: torch.dtype, roundings: int = 2
) -> Budget:
    """The accuracy rule for one tensor.

    The floor: `roundings` independent roundings to `dtype` (the weights, the result) of unit
    roundoff u, each u / sqrt(3) in the mean square; and the fp32 exponent, in which a score s
    is off by s * 2^-24 and with it, relatively, the weight.
    """
    u = torch.finfo(dtype).eps / 2
    relative = u * (roundings / 3) ** 0.5 + 2**-23 * (1 + largest_score)
    # the mean square of few draws strays from that of many
    relative *= 1 + 2 / max(exact.numel(), 1) ** 0.5
    largest = exact.abs().max().item() if exact.numel() else 0.0
    error = eager.double() - exact
    worst = error.abs().max().item() if error.numel() else 0.0
    return Budget(
        l2=max(error.norm().item(), relative * exact.norm().item()),
        # five sigma: no element of the tests' sizes goes further
        worst=max(1.5 * worst, 5 * relative * largest),
    )


def exact_and_budget(
    inputs: dict[str, Any], alpha: float | Tensor, **options
) -> tuple[Tensor, Budget]:
    """fp64 result of the reference and the error allowed to a back end on these inputs."""
    doubles: dict[str, Any] = {name: x.double() for name, x in inputs.items()}
    exact_alpha = alpha.double() if isinstance(alpha, Tensor) else alpha
    exact = nasa_attention_reference(**doubles, alpha=exact_alpha, **options)
    eager = algorithm_1(**without_nan(inputs), alpha=alpha, **options).nan_to_num(0.0)
    dtype = inputs["q"].dtype
    return exact, budget(exact, eager, largest_score(inputs, options.get("scale")), dtype)


def exact_and_budget_of_joint(
    inputs: dict[str, Any], alpha: float | Tensor, rule: str, text_queries: tuple[int, int],
    mask_pos: Tensor | None = None, mask_neg: Tensor | None = None,
) -> tuple[Tensor, Budget]:  # fmt: skip
    """The same for joint attention; eager is whole attentions over joined keys."""
    doubles: dict[str, Any] = {name: x.double() for name, x in inputs.items()}
    exact_alpha = alpha.double() if isinstance(alpha, Tensor) else alpha
    exact = nasa_joint_attention_reference(
        **doubles, alpha=exact_alpha, rule=rule, text_queries=text_queries,
        mask_pos=mask_pos, mask_neg=mask_neg,
    )  # fmt: skip
    clean, scale = without_nan(inputs), inputs["q"].shape[-1] ** -0.5
    options = (alpha, rule, text_queries, mask_pos, mask_neg, scale)
    eager = joint(eager_attention, *(*clean.values(), *options)).nan_to_num(0.0)
    # the attention over the shared keys is rounded once more, between the launches
    return exact, budget(exact, eager, largest_score(inputs), inputs["q"].dtype, roundings=3)


def largest_score(inputs: dict[str, Tensor], scale: float | None = None) -> float:
    """A bound on |q k^T * scale|: the longest query times the longest key."""
    clean = without_nan(inputs)
    scale = inputs["q"].shape[-1] ** -0.5 if scale is None else scale

    def longest(x: Tensor) -> float:
        return x.double().norm(dim=-1).max().item() if x.numel() else 0.0

    keys = (x for name, x in clean.items() if name[0] == "k")
    return abs(scale) * longest(clean["q"]) * max(longest(k) for k in keys)


def without_nan(inputs: dict[str, Any]) -> dict[str, Any]:
    """Eager attention spreads a NaN of a masked key; it is judged on inputs that have none."""
    return {name: x.nan_to_num(0.0) for name, x in inputs.items()}
