"""Who computes the operation: our back ends, and what a user would run instead.

A provider is one entry of `PROVIDERS`. Its `attend` takes `arrange(inputs)` and the alpha, and
returns `[b, l, h, d]`. `arrange` is not timed: it stands for a layout that the layer before could
have written itself.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import kinds
from bench.attention import sdpa
from bench.timing import Around
from bench.work import Work, attention_work
from nasa_kernels import backends, nasa_attention
from nasa_kernels.testing import Shape, cpu_composition, make_inputs, why_no_cpu_kernels

Inputs = dict[str, Any]  # q, k_pos, v_pos, k_neg, v_neg
BASELINE = "algorithm-1"


@dataclass(frozen=True)
class Case:
    """One call of the operation."""

    shape: Shape
    dtype: torch.dtype
    device: torch.device
    direction: str = "forward"
    kind: str = ""  # one of `kinds.KINDS`; none: `nasa_attention` over two whole prompts

    def __str__(self) -> str:
        return f"{self.kind}-{self.shape}" if self.kind else str(self.shape)

    def inputs(self) -> Inputs:
        make = kinds.KINDS[self.kind].make if self.kind else make_inputs
        return make(self.shape, self.dtype, self.device)

    def work(self, guided: bool) -> Work:
        if self.kind:
            return kinds.KINDS[self.kind].work(self.shape, self.dtype, guided)
        return attention_work(self.shape, self.dtype, self.direction, guided)


@dataclass(frozen=True)
class Provider:
    name: str
    attend: Callable[[Any, float], Tensor]
    arrange: Callable[[Inputs], Any] = lambda inputs: inputs
    # one sentence why it does not run, or None
    refuse: Callable[[Case], str | None] = lambda case: None
    around: Around = contextlib.nullcontext
    ours: bool = False
    guided: bool = True  # False: it attends to the positive prompt only
    compiled: bool = False  # seconds of compilation for each case
    backend: str | None = None  # of ours

    def alpha(self, alpha: float) -> float:
        """The alpha whose exact result this provider should give."""
        return alpha if self.guided else 0.0


# ---- ours ----------------------------------------------------------------------------------------


def _ours(backend: str) -> Provider:
    def attend(inputs: Inputs, alpha: float) -> Tensor:
        return nasa_attention(**inputs, alpha=alpha, backend=backend)

    def refuse(case: Case) -> str | None:
        backward = case.direction == "backward"
        reason = backends.why_not(backend, case.device)
        if reason is None and case.dtype not in backends.RECORDS[backend].dtypes:
            reason = f"it does not take {case.dtype}"
        if reason is None and backend == "triton" and case.device.type == "cpu":
            reason = "its interpreter on a CPU is for tests"
        if reason is None:
            reason = backends.why_not_head_dim(backend, case.device, case.shape.d, backward)
        return reason

    return Provider(f"nasa-{backend}", attend, refuse=refuse, ours=True, backend=backend)


class Composition(torch.autograd.Function):
    """What `cpu` runs where its kernels were not built: PyTorch's attention for each prompt."""

    @staticmethod
    def forward(ctx, alpha: float, scale: float, *tensors: Tensor) -> Tensor:
        call: tuple[Any, ...] = (*tensors, None, None, None, alpha, scale)
        o, *kept = cpu_composition.attention(*call)
        ctx.save_for_backward(*kept, *tensors)
        ctx.numbers = alpha, scale
        return o

    @staticmethod
    def backward(ctx, *grad_o: Tensor):
        needs = [True] * 5 + [False]
        call: tuple[Any, ...] = (*ctx.saved_tensors, None, None, None, *ctx.numbers, needs)
        *gradients, _ = cpu_composition.backward(*grad_o, *call)
        return None, None, *gradients


def composition(inputs: Inputs, alpha: float) -> Tensor:
    scale = inputs["q"].shape[-1] ** -0.5
    if torch.is_grad_enabled():
        return Composition.apply(alpha, scale, *inputs.values())
    call: tuple[Any, ...] = (*inputs.values(), None, None, None, alpha, scale)
    return cpu_composition.forward(*call)


def _needs_cpu_kernels(case: Case) -> str | None:
    if case.device.type != "cpu":
        return "it is for CPU tensors"
    return "it is what nasa-cpu runs here" if why_no_cpu_kernels() is not None else None


# ---- PyTorch -------------------------------------------------------------------------------------


def stock(inputs: Inputs, alpha: float) -> Tensor:
    """What a pipeline without a negative prompt does."""
    return sdpa(inputs["q"], inputs["k_pos"], inputs["v_pos"])


def two_calls(inputs: Inputs, alpha: float, attend: Callable = sdpa) -> Tensor:
    """Algorithm 1 as a user writes it: two attention calls, a product and a difference."""
    z_pos = attend(inputs["q"], inputs["k_pos"], inputs["v_pos"])
    z_neg = attend(inputs["q"], inputs["k_neg"], inputs["v_neg"])
    return z_pos - alpha * z_neg


def stack(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Both prompts as one batch, which one projection could have written. Q twice: in place for
    one image, a copy for more, since a batch has one stride."""
    q = inputs["q"]
    k, v = (torch.cat([inputs[f"{x}_pos"], inputs[f"{x}_neg"]]) for x in "kv")
    return q.expand(2, -1, -1, -1) if len(q) == 1 else torch.cat([q, q]), k, v


def stacked(arranged: tuple[Tensor, Tensor, Tensor], alpha: float) -> Tensor:
    """One attention call over a doubled batch and one fused epilogue."""
    z_pos, z_neg = sdpa(*arranged).chunk(2)
    return torch.sub(z_pos, z_neg, alpha=alpha)


def _unequal(case: Case) -> str | None:
    equal = case.shape.n_pos == case.shape.n_neg
    return None if equal else "it stacks the prompts, which must have one length"


def _needs_cuda(case: Case) -> str | None:
    return None if case.device.type == "cuda" else "it needs an NVIDIA GPU"


def _forced(name: str, backend: SDPBackend) -> Provider:
    """Algorithm 1 with one of PyTorch's own attention back ends; PyTorch says if it cannot."""
    return Provider(
        f"algorithm-1-{name}",
        two_calls,
        refuse=_needs_cuda,
        around=functools.partial(sdpa_kernel, backend),
    )


# ---- compiled ------------------------------------------------------------------------------------


class Compiled:
    """A function under torch.compile, for one static shape at a time.

    `fullgraph` makes a recompilation limit an error; it would silently run eagerly otherwise.
    Buffers of the forward pass are not donated: a backward pass is timed more than once.
    """

    def __init__(self, function: Callable[[Inputs, float], Tensor]):
        self.function = function
        self._compiled: Callable | None = None

    def __call__(self, inputs: Inputs, alpha: float) -> Tensor:
        if self._compiled is None:
            self._compiled = torch.compile(self.function, fullgraph=True, dynamic=False)
        with torch._functorch.config.patch(donated_buffer=False):
            return self._compiled(inputs, alpha)

    def reset(self) -> None:
        self._compiled = None


def flex(inputs: Inputs, alpha: float) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return flex_attention(q, k, v).transpose(1, 2)  # type: ignore[union-attr]

    return two_calls(inputs, alpha, attend)


# ---- other packages ------------------------------------------------------------------------------


def _installed(package: str) -> Callable[[Case], str | None]:
    def refuse(case: Case) -> str | None:
        if importlib.util.find_spec(package) is None:
            return f"the package {package} is not installed"
        if case.dtype == torch.float32:
            return "it takes fp16 and bf16"
        return _needs_cuda(case)

    return refuse


def xformers(inputs: Inputs, alpha: float) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return two_calls(inputs, alpha, memory_efficient_attention)


def flash_attn(inputs: Inputs, alpha: float) -> Tensor:
    from flash_attn import flash_attn_func

    return two_calls(inputs, alpha, flash_attn_func)


PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        *(_ours(backend) for backend in backends.NAMES if backend != "reference"),
        Provider("nasa-cpu-without-kernels", composition, refuse=_needs_cpu_kernels, ours=True),
        Provider("stock", stock, guided=False),
        Provider(BASELINE, two_calls),
        Provider("algorithm-1-compiled", Compiled(two_calls), compiled=True),
        Provider("stacked", stacked, arrange=stack, refuse=_unequal),
        _forced("cudnn", SDPBackend.CUDNN_ATTENTION),
        _forced("flash", SDPBackend.FLASH_ATTENTION),
        _forced("efficient", SDPBackend.EFFICIENT_ATTENTION),
        _forced("math", SDPBackend.MATH),
        Provider("flex", Compiled(flex), compiled=True),
        Provider("xformers", xformers, refuse=_installed("xformers")),
        Provider("flash-attn", flash_attn, refuse=_installed("flash_attn")),
    )
}


def for_kind(provider: Provider, kind: str) -> Provider | None:
    """The provider on calls of a kind; None where it is not one of them."""
    if not kind:
        return provider
    of = kinds.KINDS[kind]
    if provider.backend is not None:
        backend = provider.backend
        return replace(provider, attend=lambda inputs, alpha: of.ours(inputs, alpha, backend))
    if provider.name == "stock":
        return replace(provider, attend=lambda inputs, alpha: of.stock(inputs))
    return replace(provider, attend=of.two_calls) if provider.name == BASELINE else None
