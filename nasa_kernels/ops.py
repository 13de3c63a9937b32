"""Registered operators. Per back end:

    forward_NAME     O, without a gradient: what inference calls
    nag_NAME         normalised attention guidance, without a gradient, where the record has it
    attention_NAME   the same with backward_NAME as its gradient: what training calls. Beside O it
                     returns what is saved for backward_NAME
    backward_NAME    the gradients that are asked for

and for joint attention `joint_forward_NAME`, `joint_attention_NAME`, `joint_backward_NAME`,
`joint_nag_NAME`, and `joint_pair_NAME`, which leaves the attention over [shared; pos] and that over
[shared; neg] apart.
Inference has an operator of its own because a registered gradient costs microseconds of host time
in every call, used or not.

Torch only. A back end is imported when its operator first runs, so importing the package, tracing
and counting need neither Triton nor a GPU. A call crosses the operator boundary once.

`backends.RECORDS` says what differs between the back ends. `_flops.py` has the FLOP formulas.

A rule is an index of RULES. The operators of joint attention always take one. Those of
cross-attention take it as the last of their inputs (`backward_NAME` has `needs` behind it) where
the record lists more rules than "nasa", forward by `rules` and backward by `backward_rules`.

Shapes, in the terms of `attention.py` and `joint_attention.py`, after `_checks.prepare`:
q, grad_o [b, l, h, d]; k, v [b, n, h_kv, d] with stride 0 where a prompt is shared; masks [b, n];
alpha_map [b, l, h] in fp32, or None and then `alpha` is the strength.
"""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, library
from torch.utils.flop_counter import register_flop_formula

from nasa_kernels import _flops
from nasa_kernels.backends import FUSED, RECORDS, Backend

_TAGS = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)

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
_NAG_SETTINGS = "float nag_scale, float nag_tau, int nag_norm"
_NAG_INPUTS = f"{_INPUTS}, {_NAG_SETTINGS}"
_JOINT_NAG_INPUTS = (
    f"Tensor q, Tensor k, Tensor v, {_PROMPTS}, {_REST}, {_NAG_SETTINGS}, int text_pos,"
    " int text_neg"
)


def _with_defaults(inputs: str) -> str:
    """Numbers that most calls leave out: each one given costs the dispatcher 0.2 us of the host."""
    for number, usual in (("nag_norm", 1), ("text_pos", 0), ("text_neg", 0)):
        inputs = inputs.replace(f"int {number}", f"int {number}={usual}")
    return inputs


def _inputs(takes_rule: bool) -> str:
    return _INPUTS + ", int rule" if takes_rule else _INPUTS


def _attention_schema(inputs: str, kept: Sequence[str]) -> str:
    return f"({inputs}) -> " + ("(Tensor" + ", Tensor" * len(kept) + ")" if kept else "Tensor")


def _backward_schema(inputs: str, kept: Sequence[str], gradients: int) -> str:
    """A gradient is empty where `needs` says False."""
    tensors = "".join(f"Tensor {name}, " for name in kept)
    returned = ", ".join(["Tensor"] * gradients)
    return f"(Tensor grad_o, {tensors}{inputs}, bool[{gradients}] needs) -> ({returned})"


# ------------------------------------------------------------------------------------------ fakes


def _of_one_device(fake: Callable) -> Callable:
    """`fake`, which PyTorch also calls where one tensor of several has no device: nothing would be
    computed then, and no one would be told."""

    def checked(*args):
        kinds = {x.is_meta for x in args if isinstance(x, Tensor)}
        if len(kinds) > 1:
            raise ValueError("nasa_kernels: some tensors are on a device and some on none")
        return fake(*args)

    return checked


def _forward_fake(q, *args) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _attention_fake(backend: Backend) -> Callable:
    def fake(q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, alpha, scale, *rule):
        if backend.cross is None:
            return _forward_fake(q), *(_nothing(q, x) for x in (q.dtype, None, q.dtype, None))
        from nasa_kernels._cpu.attention import kept

        return _forward_fake(q), *kept(q, k_pos, k_neg, alpha_map, alpha)

    return fake if backend.keeps else _forward_fake


def _joint_attention_fake(backend: Backend) -> Callable:
    def fake(q, *args) -> tuple[Tensor, ...]:
        if backend.joint is None:
            return _forward_fake(q), _nothing(q, torch.float32), _nothing(q)
        b, l, h, _ = q.shape
        dtype = q.dtype if backend.shared_dtype is None else backend.shared_dtype
        o_shared = torch.empty(q.shape, dtype=dtype, device=q.device)
        lse_shared = torch.empty((b, h, l), dtype=torch.float32, device=q.device)
        return _forward_fake(q), o_shared, lse_shared

    return fake


def _nothing(q: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What is not kept: an empty [b, l, h, d] of a dtype, or an empty log-sum-exp [b, h, l]."""
    if dtype is None:
        return torch.empty((0, 0, 0), dtype=torch.float32, device=q.device)
    return torch.empty((0, 0, 0, 0), dtype=dtype, device=q.device)


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


def _without_rule(function: Callable) -> Callable:
    """`function` for a backward operator that takes a rule, which stands before the last."""

    def for_any_rule(*args, **options):
        return function(*args[:-2], args[-1], **options)

    return for_any_rule


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


# --------------------------------------------------------------------------------------- autograd


def _keep(ctx, inputs, output) -> None:
    tensors = [x for x in inputs if x is None or isinstance(x, Tensor)]
    # the numbers stand behind the tensors
    ctx.numbers = inputs[len(tensors) :]
    ctx.save_for_backward(*(output[1:] if isinstance(output, tuple) else ()), *tensors)
    ctx.set_materialize_grads(False)


def _differentiate(
    backward_operator, differentiable: Sequence[int], numbers: int | None
) -> Callable:
    """`differentiable`: the positions of the inputs that have a gradient. `numbers`: how many of
    those behind the tensors the backward operator takes; None for all."""

    def backward(ctx, grad_o, *nothing):
        all_inputs: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if grad_o is None:
            return tuple(all_inputs)
        needs = [ctx.needs_input_grad[i] for i in differentiable]
        gradients = backward_operator(grad_o, *ctx.saved_tensors, *ctx.numbers[:numbers], needs)
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


def _implement(operator: Any, backend: Backend, module: str, function: str) -> None:
    """Import the module when the operator first runs."""

    def implementation(*args):
        return getattr(importlib.import_module(module), function)(*args)

    devices = [device.upper() for device in backend.devices]
    library.impl(operator.name(), devices, implementation)


def _define(name: str, schema: str, fake: Callable, flops: Callable) -> Any:
    # define/impl, not custom_op: the eager call costs microseconds, and so do these kernels
    library.define(f"nasa_kernels::{name}", schema, tags=_TAGS)
    library.register_fake(f"nasa_kernels::{name}", _of_one_device(fake))
    packet = getattr(torch.ops.nasa_kernels, name)
    register_flop_formula(packet)(flops)
    return packet.default


def _connect(
    attention, backward, differentiable: Sequence[int], numbers: int | None = None
) -> None:
    library.register_autograd(
        attention.name(), _differentiate(backward, differentiable, numbers), setup_context=_keep
    )
    library.register_autograd(
        backward.name(), _refuse_second_derivative, setup_context=_ignore_inputs
    )


def _register(backend: Backend) -> tuple[Any, Any]:
    """Define the operators of a back end; return `forward_NAME` and `attention_NAME`."""
    name, keeps = backend.name, backend.keeps
    inputs = _inputs(backend.takes_rule)
    forward = _define(f"forward_{name}", f"({inputs}) -> Tensor", _forward_fake, _flops.forward)
    attention = _define(
        f"attention_{name}",
        _attention_schema(inputs, keeps),
        _attention_fake(backend),
        _flops.forward,
    )
    backward_takes_rule = len(backend.backward_rules) > 1
    backward = _define(
        f"backward_{name}",
        _backward_schema(_inputs(backward_takes_rule), keeps, 6),
        _without_rule(_backward_fake) if backward_takes_rule else _backward_fake,
        _without_rule(_flops.backward) if backward_takes_rule else _flops.backward,
    )
    # else a compiled library implements them
    if backend.cross is not None:
        _implement(forward, backend, backend.cross.forward, "forward")
        _implement(backward, backend, backend.cross.backward, "backward")
        if keeps:
            _implement(attention, backend, backend.cross.forward, "attention")
    if not keeps:
        library.impl(attention.name(), "CompositeExplicitAutograd", forward)
    # alpha and scale, and the rule
    _connect(attention, backward, (0, 1, 2, 3, 4, 7), None if backward_takes_rule else 2)
    return forward, attention


def _register_nag(backend: Backend) -> Any:
    operator = _define(
        f"nag_{backend.name}", f"({_NAG_INPUTS}) -> Tensor", _forward_fake, _flops.forward
    )
    if backend.cross is not None:
        _implement(operator, backend, backend.cross.forward, "nag")
    return operator


def _register_joint(
    backend: Backend, function: str, inputs: str, result: str, fake: Callable
) -> Any:
    """`joint_FUNCTION_NAME`: both launches, without a gradient."""
    operator = _define(
        f"joint_{function}_{backend.name}", f"({inputs}) -> {result}", fake, _flops.joint_forward
    )
    if backend.joint is not None:
        _implement(operator, backend, backend.joint.forward, function)
    return operator


def _register_joint_gradient(backend: Backend) -> Any:
    """Define `joint_backward_NAME`, and define and return `joint_attention_NAME`."""
    attention = _define(
        f"joint_attention_{backend.name}",
        _attention_schema(_JOINT_INPUTS, backend.joint_keeps),
        _joint_attention_fake(backend),
        _flops.joint_forward,
    )
    backward = _define(
        f"joint_backward_{backend.name}",
        _backward_schema(_JOINT_INPUTS, backend.joint_keeps, 8),
        _joint_backward_fake,
        _flops.joint_backward,
    )
    if backend.joint is not None:
        _implement(attention, backend, backend.joint.forward, "attention")
        _implement(backward, backend, backend.joint.backward, "backward")
    _connect(attention, backward, (0, 1, 2, 3, 4, 5, 6, 9))
    return attention


# a process has one of each operator
if hasattr(torch.ops.nasa_kernels, "forward_joint_cuda"):
    raise ImportError(
        "nasa_kernels: its operators are in this process already, from another copy of the package "
        "or from this one before it was loaded again; restart Python, and where two are installed "
        f"keep one (this is {Path(__file__).parent})"
    )

# what follows the first launch in the CUDA C++ kernels, implemented by the compiled extension
_define(
    "forward_joint_cuda",
    f"({_INPUTS}, Tensor o_shared, Tensor lse_shared, int rule, int text_pos, int text_neg)"
    " -> Tensor",
    _forward_fake,
    _flops.forward,
)
_define(
    "nag_joint_cuda",
    f"({_INPUTS}, Tensor o_shared, Tensor lse_shared, {_NAG_SETTINGS}, int text_pos, int text_neg)"
    " -> Tensor",
    _forward_fake,
    _flops.forward,
)
# all of a joint attention in one launch, which attends to the image's keys as well, and NAG with it
_define(
    "forward_image_cuda",
    f"({_with_defaults(_JOINT_INPUTS)}) -> Tensor",
    _forward_fake,
    _flops.joint_image,
)
_define(
    "attention_image_cuda",
    f"({_JOINT_INPUTS}) -> (Tensor, Tensor, Tensor)",
    _joint_attention_fake(RECORDS["cuda"]),
    _flops.joint_forward,
)
_define(
    "nag_image_cuda",
    f"({_with_defaults(_JOINT_NAG_INPUTS)}) -> Tensor",
    _forward_fake,
    _flops.nag_image,
)
# and the launches of the backward pass: statistics of the rows, dQ, dK and dV of one segment
_define(
    "joint_statistics_cuda",
    f"(Tensor grad_o, Tensor o_shared, Tensor q, {_PROMPTS}, Tensor? mask_pos, Tensor? mask_neg,"
    " float scale, int text_pos, int text_neg) -> Tensor",
    _joint_statistics_fake,
    _flops.joint_statistics,
)
_define(
    "joint_queries_cuda",
    f"(Tensor grad_o, Tensor o_shared, Tensor q, Tensor k, Tensor v, {_PROMPTS}, Tensor? mask_pos,"
    " Tensor? mask_neg, Tensor lse, Tensor weight, Tensor shift, float scale, int text_pos,"
    " int text_neg) -> Tensor",
    _joint_queries_fake,
    _flops.joint_queries,
)
_define(
    "joint_keys_cuda",
    "(Tensor grad_o, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor lse, Tensor weight,"
    " Tensor shift, float scale, int first_hidden, int end_hidden, bool[2] needs)"
    " -> (Tensor, Tensor)",
    _joint_keys_fake,
    _flops.joint_keys,
)
_OPERATORS = {name: _register(RECORDS[name]) for name in FUSED}
FORWARD = {name: forward for name, (forward, _) in _OPERATORS.items()}
ATTENTION = {name: attention for name, (_, attention) in _OPERATORS.items()}
_FUSED = [RECORDS[name] for name in FUSED]
JOINT_FORWARD = {
    backend.name: _register_joint(backend, "forward", _JOINT_INPUTS, "Tensor", _forward_fake)
    for backend in _FUSED
}
JOINT_ATTENTION = {backend.name: _register_joint_gradient(backend) for backend in _FUSED}
JOINT_PAIR = {
    backend.name: _register_joint(
        backend, "pair", _PAIR_INPUTS, "(Tensor, Tensor)", _joint_pair_fake
    )
    for backend in _FUSED
    if backend.has_pair
}

# normalised attention guidance, of cross-attention and of joint attention
NAG = {backend.name: _register_nag(backend) for backend in _FUSED if backend.has_nag}
JOINT_NAG = {
    backend.name: _register_joint(backend, "nag", _JOINT_NAG_INPUTS, "Tensor", _forward_fake)
    for backend in _FUSED
    if backend.has_nag
}
