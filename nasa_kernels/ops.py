"""Registered operators. Per back end:

    forward_NAME     O, without a gradient: what inference calls
    attention_NAME   the same with backward_NAME as its gradient: what training calls. Beside O it
                     returns what backward_NAME wants to have kept
    backward_NAME    the gradients that are asked for

and for joint attention `joint_forward_NAME`, `joint_attention_NAME`, `joint_backward_NAME`, and
`joint_pair_NAME`, which leaves the attention over [shared; pos] and that over [shared; neg] apart.
Inference has an operator of its own because a registered gradient costs microseconds of host time
in every call, used or not.

Torch only. A back end is imported when its operator first runs, so importing the package, tracing
and counting need neither Triton nor a GPU. A call crosses the operator boundary once.

Shapes, in the terms of `attention.py` and `joint.py`, whose checks every call has passed:
q, grad_o [b, l, h, d]; k, v [b, n, h, d] with stride 0 where a prompt is shared; masks [b, n];
alpha_map [b, l, h] in fp32, or None and then `alpha` is the strength; `rule` an index of RULES.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, library
from torch.utils.flop_counter import register_flop_formula

BACKENDS = ("cuda", "triton", "cpu")
JOINT_BACKENDS = ("cuda", "triton", "cpu")
# those that leave Z+ and Z- of joint attention apart; elsewhere each is a call
JOINT_PAIR_BACKENDS = ("triton", "cpu")
_TAGS = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)
# CPU for Triton as well: tests run the kernels there in its interpreter
_DEVICES = {"cuda": ("CUDA",), "triton": ("CUDA", "CPU"), "cpu": ("CPU",)}
_JOINT_MODULES = {
    "cuda": "nasa_kernels._cuda",
    "triton": "nasa_kernels._triton.joint",
    "cpu": "nasa_kernels.cpu_joint",
}

_PROMPTS = "Tensor k_pos, Tensor v_pos, Tensor k_neg, Tensor v_neg"
_REST = "Tensor? mask_pos, Tensor? mask_neg, Tensor? alpha_map, float alpha, float scale"
_INPUTS = f"Tensor q, {_PROMPTS}, {_REST}"
_JOINT_INPUTS = (
    f"Tensor q, Tensor k, Tensor v, {_PROMPTS}, {_REST}, int rule, int text_pos, int text_neg"
)
_PAIR_INPUTS = (
    f"Tensor q, Tensor k, Tensor v, {_PROMPTS}, Tensor? mask_pos, Tensor? mask_neg, float scale,"
    " int text_pos, int text_neg"
)
FORWARD_SCHEMA = f"({_INPUTS}) -> Tensor"
# What attention_NAME keeps for backward_NAME. The kernels rebuild what they need on chip; PyTorch's
# parts would have to run the forward pass again.
_KEPT = {"cpu": ("z_pos", "lse_pos", "z_neg", "lse_neg")}
_JOINT_KEPT = ("o_shared", "lse_shared")


def _attention_schema(inputs: str, kept: Sequence[str]) -> str:
    return f"({inputs}) -> " + ("(Tensor" + ", Tensor" * len(kept) + ")" if kept else "Tensor")


def _backward_schema(inputs: str, kept: Sequence[str], gradients: int) -> str:
    """A gradient is empty where `needs` says False."""
    tensors = "".join(f"Tensor {name}, " for name in kept)
    returned = ", ".join(["Tensor"] * gradients)
    return f"(Tensor grad_o, {tensors}{inputs}, bool[{gradients}] needs) -> ({returned})"


# ------------------------------------------------------------------------------------------ fakes


def _forward_fake(q, *args) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _attention_fake(backend: str) -> Callable:
    def fake(q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, alpha, scale):
        from nasa_kernels.cpu import kept

        return _forward_fake(q), *kept(q, k_pos, k_neg, alpha_map, alpha)

    return fake if backend in _KEPT else _forward_fake


def _joint_attention_fake(backend: str) -> Callable:
    def fake(q, *args) -> tuple[Tensor, ...]:
        b, l, h, _ = q.shape
        dtype = torch.float32 if backend == "cpu" else q.dtype
        o_shared = torch.empty(q.shape, dtype=dtype, device=q.device)
        lse_shared = torch.empty((b, h, l), dtype=torch.float32, device=q.device)
        return _forward_fake(q), o_shared, lse_shared

    return fake


def _joint_pair_fake(q, *args) -> tuple[Tensor, ...]:
    """The queries of the image, then those of one text."""
    b, l, h, d = q.shape
    *_, text_pos, text_neg = args
    return tuple(
        torch.empty((b, rows, h, d), dtype=q.dtype, device=q.device)
        for rows in (l - text_neg, l - text_pos)
    )


def _backward_fake(*args) -> tuple[Tensor, ...]:
    *_, q, k_pos, v_pos, k_neg, v_neg, _, _, _, _, _, needs = args
    return _gradients_fake((q, k_pos, v_pos, k_neg, v_neg), needs)


def _joint_backward_fake(*args) -> tuple[Tensor, ...]:
    *_, q, k, v, k_pos, v_pos, k_neg, v_neg, _, _, _, _, _, _, _, _, needs = args
    return _gradients_fake((q, k, v, k_pos, v_pos, k_neg, v_neg), needs)


def _gradients_fake(tensors: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    q = tensors[0]
    gradients = [
        torch.empty(x.shape if needed else (0,), dtype=q.dtype, device=q.device)
        for x, needed in zip(tensors, needs[:-1], strict=True)
    ]
    shape = q.shape[:3] if needs[-1] else (0,)
    return *gradients, torch.empty(shape, dtype=torch.float32, device=q.device)


def _joint_statistics_fake(grad_o, o_shared, q, *args) -> Tensor:
    b, l, h, _ = q.shape
    return torch.empty((2, 3, b, h, l), dtype=torch.float32, device=q.device)


def _joint_queries_fake(grad_o, o_shared, q, *args) -> Tensor:
    return _forward_fake(q)


def _joint_keys_fake(grad_o, q, k, v, *args) -> tuple[Tensor, ...]:
    return tuple(k.new_empty(k.shape if needed else (0,)) for needed in args[-1])


# ------------------------------------------------------------------------------------------ FLOPs
# at 2 a multiply-add, as PyTorch counts attention; the arguments are shapes


def _forward_flops(q, k_pos, v_pos, k_neg, v_neg, *args, out_shape=None, **kwargs) -> int:
    """Q K^T and P V of both prompts."""
    return 2 * _product(q, k_pos, k_neg)


def _joint_forward_flops(
    q, k, v, k_pos, v_pos, k_neg, v_neg, *args, out_shape=None, **kwargs
) -> int:
    """Q K^T and P V of the three segments; queries of one text do not see the other."""
    *_, text_pos, text_neg = args
    return 2 * (
        _product(q, k) + _product(q, k_pos, less=text_neg) + _product(q, k_neg, less=text_pos)
    )


def _backward_flops(*args, out_shape=None, **kwargs) -> int:
    *_, q, k_pos, _, k_neg, _, _, _, _, _, _, needs = args
    return _gradient_flops((_product(q, k_pos), _product(q, k_neg)), needs)


def _joint_backward_flops(*args, out_shape=None, **kwargs) -> int:
    *_, q, k, _, k_pos, _, k_neg, _, _, _, _, _, _, _, text_pos, text_neg, needs = args
    products = (
        _product(q, k),
        _product(q, k_pos, less=text_neg),
        _product(q, k_neg, less=text_pos),
    )
    return _gradient_flops(products, needs)


def _gradient_flops(products: Sequence[int], needs: Sequence[bool]) -> int:
    """Q K^T again and dO V^T, then one product for each of dQ, dK and dV that is asked for."""
    flops = (2 + needs[0]) * sum(products)
    for i, product in enumerate(products):
        flops += (needs[1 + 2 * i] + needs[2 + 2 * i]) * product
    return flops


def _joint_statistics_flops(
    grad_o, o_shared, q, k_pos, v_pos, k_neg, *args, out_shape=None, **kwargs
) -> int:
    """Q K^T and dO V^T of both prompts."""
    *_, text_pos, text_neg = args
    return 2 * (_product(q, k_pos, less=text_neg) + _product(q, k_neg, less=text_pos))


def _joint_queries_flops(
    grad_o, o_shared, q, k, v, k_pos, v_pos, k_neg, *args, out_shape=None, **kwargs
) -> int:
    """Q K^T again, dO V^T and dS K of the three segments."""
    *_, text_pos, text_neg = args
    return 3 * (
        _product(q, k) + _product(q, k_pos, less=text_neg) + _product(q, k_neg, less=text_pos)
    )


def _joint_keys_flops(grad_o, q, k, *args, out_shape=None, **kwargs) -> int:
    *_, first_hidden, end_hidden, needs = args
    return (2 + sum(needs)) * _product(q, k, less=end_hidden - first_hidden)


def _product(q, *segments, less: int = 0) -> int:
    """Of the queries, all but `less`, with the keys of the segments."""
    b, l, h, d = q
    return 2 * b * h * (l - less) * d * sum(k[1] for k in segments)


def _no_flops(*args, out_shape=None, **kwargs) -> int:
    """PyTorch counts products of matrices, and nothing of what works element by element."""
    return 0


# --------------------------------------------------------------------------------------- autograd


def _keep(ctx, inputs, output) -> None:
    tensors = [x for x in inputs if x is None or isinstance(x, Tensor)]
    # the numbers stand behind the tensors
    ctx.numbers = inputs[len(tensors) :]
    ctx.save_for_backward(*(output[1:] if isinstance(output, tuple) else ()), *tensors)
    ctx.set_materialize_grads(False)


def _differentiate(backward_operator, differentiable: Sequence[int]) -> Callable:
    """`differentiable`: the positions of the inputs that have a gradient."""

    def backward(ctx, grad_o, *nothing):
        all_inputs: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if grad_o is None:
            return tuple(all_inputs)
        needs = [ctx.needs_input_grad[i] for i in differentiable]
        gradients = backward_operator(grad_o, *ctx.saved_tensors, *ctx.numbers, needs)
        for i, needed, gradient in zip(differentiable, needs, gradients, strict=True):
            all_inputs[i] = gradient if needed else None
        return tuple(all_inputs)

    return backward


def _refuse_second_derivative(ctx, *gradients):
    raise RuntimeError(
        "nasa_attention: the fused back ends have no second derivative; use backend='reference', "
        "which can be differentiated as often as you like"
    )


def _ignore_inputs(ctx, inputs, output) -> None:
    """Nothing is kept for a second derivative, which is refused."""


# ----------------------------------------------------------------------------------- registration


def _lazily(module: str, function: str) -> Callable:
    def implementation(*args):
        return getattr(importlib.import_module(module), function)(*args)

    return implementation


def _define(name: str, schema: str, fake: Callable, flops: Callable) -> Any:
    # define/impl, not custom_op: the eager call costs microseconds, and so do these kernels
    library.define(f"nasa_kernels::{name}", schema, tags=_TAGS)
    library.register_fake(f"nasa_kernels::{name}", fake)
    packet = getattr(torch.ops.nasa_kernels, name)
    register_flop_formula(packet)(flops)
    return packet.default


def _connect(attention, backward, differentiable: Sequence[int]) -> None:
    library.register_autograd(
        attention.name(), _differentiate(backward, differentiable), setup_context=_keep
    )
    library.register_autograd(
        backward.name(), _refuse_second_derivative, setup_context=_ignore_inputs
    )


def _register(backend: str) -> tuple[Any, Any]:
    """Define the operators of a back end; return `forward_NAME` and `attention_NAME`."""
    kept = _KEPT.get(backend, ())
    forward = _define(f"forward_{backend}", FORWARD_SCHEMA, _forward_fake, _forward_flops)
    attention = _define(
        f"attention_{backend}",
        _attention_schema(_INPUTS, kept),
        _attention_fake(backend),
        _forward_flops,
    )
    backward = _define(
        f"backward_{backend}", _backward_schema(_INPUTS, kept, 6), _backward_fake, _backward_flops
    )
    # the `cuda` operators get their implementation from the compiled extension
    modules = {
        "triton": ("nasa_kernels._triton.forward", "nasa_kernels._triton.backward"),
        "cpu": ("nasa_kernels.cpu", "nasa_kernels.cpu"),
    }
    if backend in modules:
        of_forward, of_backward = modules[backend]
        devices = _DEVICES[backend]
        library.impl(forward.name(), devices, _lazily(of_forward, "forward"))
        library.impl(backward.name(), devices, _lazily(of_backward, "backward"))
    if kept:
        library.impl(attention.name(), devices, _lazily(of_forward, "attention"))
    else:
        library.impl(attention.name(), "CompositeExplicitAutograd", forward)
    _connect(attention, backward, (0, 1, 2, 3, 4, 7))
    return forward, attention


def _register_joint(backend: str, function: str, inputs: str, result: str, fake: Callable) -> Any:
    """`joint_FUNCTION_NAME`: both launches, without a gradient."""
    operator = _define(
        f"joint_{function}_{backend}", f"({inputs}) -> {result}", fake, _joint_forward_flops
    )
    library.impl(operator.name(), _DEVICES[backend], _lazily(_JOINT_MODULES[backend], function))
    return operator


def _register_joint_gradient(backend: str) -> Any:
    """Define `joint_backward_NAME`, and define and return `joint_attention_NAME`."""
    attention = _define(
        f"joint_attention_{backend}",
        _attention_schema(_JOINT_INPUTS, _JOINT_KEPT),
        _joint_attention_fake(backend),
        _joint_forward_flops,
    )
    backward = _define(
        f"joint_backward_{backend}",
        _backward_schema(_JOINT_INPUTS, _JOINT_KEPT, 8),
        _joint_backward_fake,
        _joint_backward_flops,
    )
    of_attention = of_backward = _JOINT_MODULES[backend]
    if backend == "triton":
        of_backward = "nasa_kernels._triton.joint_backward"
    devices = _DEVICES[backend]
    library.impl(attention.name(), devices, _lazily(of_attention, "attention"))
    library.impl(backward.name(), devices, _lazily(of_backward, "backward"))
    _connect(attention, backward, (0, 1, 2, 3, 4, 5, 6, 9))
    return attention


# the second launch of the CUDA C++ kernels, implemented by the compiled extension
_define(
    "forward_joint_cuda",
    f"({_INPUTS}, Tensor o_shared, Tensor lse_shared, int rule, int text_pos, int text_neg)"
    " -> Tensor",
    _forward_fake,
    _forward_flops,
)
# and the launches of the backward pass: statistics of the rows, dQ, dK and dV of one segment
_define(
    "joint_statistics_cuda",
    f"(Tensor grad_o, Tensor o_shared, Tensor q, {_PROMPTS}, Tensor? mask_pos, Tensor? mask_neg,"
    " float scale, int text_pos, int text_neg) -> Tensor",
    _joint_statistics_fake,
    _joint_statistics_flops,
)
_define(
    "joint_queries_cuda",
    f"(Tensor grad_o, Tensor o_shared, Tensor q, Tensor k, Tensor v, {_PROMPTS}, Tensor? mask_pos,"
    " Tensor? mask_neg, Tensor lse, Tensor weight, Tensor shift, float scale, int text_pos,"
    " int text_neg) -> Tensor",
    _joint_queries_fake,
    _joint_queries_flops,
)
_define(
    "joint_keys_cuda",
    "(Tensor grad_o, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor lse, Tensor weight,"
    " Tensor shift, float scale, int first_hidden, int end_hidden, bool[2] needs)"
    " -> (Tensor, Tensor)",
    _joint_keys_fake,
    _joint_keys_flops,
)
_OPERATORS = {backend: _register(backend) for backend in BACKENDS}
FORWARD = {backend: forward for backend, (forward, _) in _OPERATORS.items()}
ATTENTION = {backend: attention for backend, (_, attention) in _OPERATORS.items()}
JOINT_FORWARD = {
    backend: _register_joint(backend, "forward", _JOINT_INPUTS, "Tensor", _forward_fake)
    for backend in JOINT_BACKENDS
}
JOINT_ATTENTION = {backend: _register_joint_gradient(backend) for backend in JOINT_BACKENDS}
JOINT_PAIR = {
    backend: _register_joint(backend, "pair", _PAIR_INPUTS, "(Tensor, Tensor)", _joint_pair_fake)
    for backend in JOINT_PAIR_BACKENDS
}

# the end of normalised attention guidance: `nag.py` has its formula
BLEND = _define(
    "nag_blend_triton",
    "(Tensor z_pos, Tensor z_neg, Tensor? alpha_map, float alpha, float nag_scale, float nag_tau,"
    " int nag_norm=1) -> Tensor",
    _forward_fake,
    _no_flops,
)
library.impl(BLEND.name(), _DEVICES["triton"], _lazily("nasa_kernels._triton.nag", "blend"))
