"""Registered operators. Per back end:

    forward_NAME     O, without a gradient: what inference calls
    backward_NAME    the gradients that are asked for
    attention_NAME   forward_NAME with backward_NAME as its gradient: what training calls

Inference has an operator of its own because a registered gradient costs microseconds of host time
in every call, used or not.

Torch only. A back end is imported when its operator first runs, so importing the package, tracing
and counting need neither Triton nor a GPU. A call crosses the operator boundary once.

Shapes, in the terms of `attention.py`, whose checks every call has passed: q, grad_o [b, l, h, d];
k, v [b, n, h, d] with stride 0 where a prompt is shared; masks [b, n]; alpha_map [b, l, h] in
fp32, or None and then `alpha` is the strength.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

BACKENDS = ("cuda", "triton", "cpu")

_PROMPTS = "Tensor k_pos, Tensor v_pos, Tensor k_neg, Tensor v_neg"
_REST = "Tensor? mask_pos, Tensor? mask_neg, Tensor? alpha_map, float alpha, float scale"
FORWARD_SCHEMA = f"(Tensor q, {_PROMPTS}, {_REST}) -> Tensor"
# the gradients of q, k_pos, v_pos, k_neg, v_neg and alpha_map; empty where `needs` says False
BACKWARD_SCHEMA = (
    f"(Tensor grad_o, Tensor q, {_PROMPTS}, {_REST}, bool[6] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
# positions of the inputs that have a gradient, in the arguments of the forward operator
_DIFFERENTIABLE = (0, 1, 2, 3, 4, 7)


def _forward_triton(*args):
    from nasa_kernels._triton.forward import forward

    return forward(*args)


def _backward_triton(*args):
    from nasa_kernels._triton.backward import backward

    return backward(*args)


def _forward_cpu(*args):
    from nasa_kernels.cpu import forward

    return forward(*args)


def _backward_cpu(*args):
    from nasa_kernels.cpu import backward

    return backward(*args)


# CPU for Triton as well: tests run the kernels there in its interpreter. The `cuda` operators get
# their implementation from the compiled extension.
_IMPLEMENTATIONS: dict[str, tuple[Callable, Callable, tuple[str, ...]]] = {
    "triton": (_forward_triton, _backward_triton, ("CUDA", "CPU")),
    "cpu": (_forward_cpu, _backward_cpu, ("CPU",)),
}


def _forward_fake(
    q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, alpha, scale
) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _backward_fake(
    grad_o, q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, alpha, scale, needs
) -> tuple[Tensor, ...]:
    tensors = (q, k_pos, v_pos, k_neg, v_neg)
    gradients = [
        torch.empty(x.shape if needed else (0,), dtype=q.dtype, device=q.device)
        for x, needed in zip(tensors, needs[:5], strict=True)
    ]
    shape = q.shape[:3] if needs[5] else (0,)
    return *gradients, torch.empty(shape, dtype=torch.float32, device=q.device)


def _forward_flops(q, k_pos, v_pos, k_neg, v_neg, *args, out_shape=None, **kwargs) -> int:
    """Q K^T and P V of both prompts, at 2 FLOPs a multiply-add, as PyTorch counts attention."""
    return 2 * _pairs(q, k_pos, k_neg) * 2


def _backward_flops(
    grad_o, q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, alpha, scale, needs,
    *args, out_shape=None, **kwargs,
) -> int:  # fmt: skip
    """Q K^T again and dO V^T, then one product for each of dQ, dK and dV that is asked for."""
    both = 2 + needs[0]
    flops = both * 2 * _pairs(q, k_pos, k_neg)
    flops += (needs[1] + needs[2]) * 2 * _pairs(q, k_pos)
    return flops + (needs[3] + needs[4]) * 2 * _pairs(q, k_neg)


def _pairs(q, *prompts) -> int:
    """b h l n d of a product between the queries and the keys of `prompts`, given as shapes."""
    b, l, h, d = q
    return b * h * l * d * sum(k[1] for k in prompts)


def _save_inputs(ctx, inputs, output) -> None:
    *tensors, ctx.alpha, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(backward_operator) -> Callable:
    def backward(ctx, grad_o):
        needs = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
        gradients = backward_operator(grad_o, *ctx.saved_tensors, ctx.alpha, ctx.scale, needs)
        all_inputs: list[Tensor | None] = [None] * 10
        for i, needed, gradient in zip(_DIFFERENTIABLE, needs, gradients, strict=True):
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


def _register(backend: str) -> tuple[Callable, Callable]:
    """Define the operators of a back end; return `forward_NAME` and `attention_NAME`."""
    tags = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)
    packets = []
    for kind, schema, fake, flops in (
        ("forward", FORWARD_SCHEMA, _forward_fake, _forward_flops),
        ("backward", BACKWARD_SCHEMA, _backward_fake, _backward_flops),
        ("attention", FORWARD_SCHEMA, _forward_fake, _forward_flops),
    ):
        name = f"nasa_kernels::{kind}_{backend}"
        # define/impl, not custom_op: the eager call costs microseconds, and so do these kernels
        torch.library.define(name, schema, tags=tags)
        torch.library.register_fake(name, fake)
        packets.append(getattr(torch.ops.nasa_kernels, f"{kind}_{backend}"))
        register_flop_formula(packets[-1])(flops)
    forward, backward, attention = (packet.default for packet in packets)

    if backend in _IMPLEMENTATIONS:
        run_forward, run_backward, devices = _IMPLEMENTATIONS[backend]
        torch.library.impl(forward.name(), devices, run_forward)
        torch.library.impl(backward.name(), devices, run_backward)
    torch.library.impl(attention.name(), "CompositeExplicitAutograd", forward)
    torch.library.register_autograd(
        attention.name(), _differentiate(backward), setup_context=_save_inputs
    )
    torch.library.register_autograd(
        backward.name(), _refuse_second_derivative, setup_context=_ignore_inputs
    )
    return forward, attention


_OPERATORS = {backend: _register(backend) for backend in BACKENDS}
FORWARD = {backend: forward for backend, (forward, _) in _OPERATORS.items()}
ATTENTION = {backend: attention for backend, (_, attention) in _OPERATORS.items()}
