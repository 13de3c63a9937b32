"""Calls that need no words.

A call like one that was checked before, but for the sizes, goes to its operator at once, where the
operators check for themselves (`Backend.checks`): at batch 1 the checks of `_checks.py`, which find
words for what is wrong, would cost the host more than the operator. One that refuses sends the call
back to them.
"""

from __future__ import annotations

import contextlib
import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from nasa_kernels._checks import Call
from nasa_kernels._joint.shared import is_small
from nasa_kernels.backends import RECORDS

# queries of the texts' own where there are none
NO_TEXT = (0, 0)
# what an operator raises, or Python before it; not a compiler's errors, nor what stops a program
REFUSALS = (RuntimeError, ValueError, TypeError, IndexError)
_INFINITY = float("inf")
_BOOL, _FLOAT = torch.bool, torch.float32
# keys that PyTorch's dispatcher sees in every call of this thread: those of modes, of functional
# transforms and of tracing are among them while there are any
_included = torch._C._dispatch_tls_local_include_set
_is_profiled = torch._C._autograd._profiler_enabled
# of any device; it costs the host half of what the question for one does
_is_autocast = torch._C._is_any_autocast_enabled


def _plain() -> tuple[int, ...]:
    """Those keys where there is nothing of all that, and in inference mode."""
    found = []
    for mode in (contextlib.nullcontext(), torch.inference_mode()):
        with mode:
            keys = _included()
            found.append(keys.raw_repr())
    is_plain = not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch.jit.is_tracing()
    )
    return tuple(found) if is_plain else ()


_PLAIN = _plain()
# of function, back end and rule as they were asked for, and of q's dtype, device and head_dim
_known: dict[tuple, Known] = {}


class Known(NamedTuple):
    """What the checks found out for calls like this one."""

    operator: Any
    # the operator's arguments behind the scale: its number for the rule, where it has more than one
    rest: tuple
    backend: str
    device_type: str
    scale: float
    # what the operator runs, where that is Python of ours
    function: Any = None
    # of joint attention, what does the same for a small image, in one launch, where q's dtype has
    # that; and the same once more where it is an operator, which has defaults for its last numbers
    one_launch: Any = None
    brief: Any = None


def joint_operator(
    known: Known, text: int, q: Tensor, shape: torch.Size, keys_values: tuple[Tensor, ...]
) -> Any:
    """What to call for a joint attention with so many queries of the texts' own, `shape` that of q;
    None where the checks must say what is wrong.
    """
    one = known.one_launch
    if one is not None and is_small(shape, keys_values[0].shape[1], text):
        # no operator of PyTorch's is called past its checks
        return one if one is known.brief else past_operator(known, one)
    return past_operator(known, known.function) if like(q, shape, *keys_values) else None


def past_operator(known: Known, function: Any) -> Any:
    """What to call where the operator runs Python of ours: that at once, which saves the host as
    much as a launch costs it. Who looks at operators or transforms them, as modes, tracers and
    profilers do, gets the operator.

    function: `known.function`, or None where there is none.
    """
    if function is None or _is_profiled() or _included().raw_repr() not in _PLAIN:
        return known.operator
    return function


def quick(
    asked: tuple,
    q: Tensor,
    others: tuple[Tensor, ...],
    mask_pos: Tensor | None,
    mask_neg: Tensor | None,
    alpha: float | Tensor,
    scale: float | None,
) -> tuple[Known, Tensor | None, float, float, torch.Size] | None:
    """Whether a call may go to its operator at once, and with which alpha map, alpha and scale; and
    the shape of q, since to ask a tensor costs the host. None: check it first.

    Not looked at are shapes and strides, and dtypes and devices of keys and values: the operator
    refuses what it cannot take.
    """
    if is_compiling():
        return None
    try:
        shape = q.shape
        known = _known.get((asked, q.dtype, q.device, shape[3]))
    except (AttributeError, TypeError, IndexError):
        return None
    if (
        known is None
        or type(q) is not Tensor
        or _is_autocast()
        and torch.is_autocast_enabled(known.device_type)
        or forward_ad._current_level >= 0
    ):
        return None
    if torch.is_grad_enabled():
        if q.requires_grad or isinstance(alpha, Tensor) and alpha.requires_grad:
            return None
        for x in others:
            if x.requires_grad:
                return None
    if mask_pos is not None and not _is_mask(mask_pos, q):
        return None
    if mask_neg is not None and not _is_mask(mask_neg, q):
        return None
    if scale is None:
        scale = known.scale
    elif type(scale) is not float or not 0 < scale < _INFINITY:
        return None
    if type(alpha) is float or type(alpha) is int:
        if -_INFINITY < alpha < _INFINITY:
            return known, None, alpha, scale, shape
    elif type(alpha) is Tensor and alpha.dtype is _FLOAT and alpha.device == q.device:
        return known, alpha, 0.0, scale, shape
    return None


def _is_mask(mask: Tensor, q: Tensor) -> bool:
    dtype = mask.dtype
    return (
        (dtype is _BOOL or dtype is _FLOAT or dtype is q.dtype)
        and mask.device == q.device
        and not mask.requires_grad
    )


def remember(
    asked: tuple, call: Call, operator: Any, rest: tuple = (), cross: str = "", joint: str = ""
) -> None:
    """A checked call: the next one like it is quick.

    cross, joint: The function that the operator runs, of that module of the record.
    """
    q, record = call.q, RECORDS[call.backend]
    if (
        record.checks
        and not (call.differentiable or call.under_autocast)
        and not is_compiling()
        and type(q) is Tensor
        and q.device.type != "meta"
    ):
        modules, name = (record.cross, cross) if cross else (record.joint, joint)
        function = one_launch = None
        if modules is not None:
            module = importlib.import_module(modules.forward)
            function = getattr(module, name)
            if q.dtype is not _FLOAT:
                one_launch = getattr(module, "ONE_LAUNCH", {}).get(name)
        # what an operator's own `__call__`, in Python, calls with the same arguments
        operator = getattr(operator, "_op", operator)
        key = (asked, q.dtype, q.device, q.shape[3])
        one = getattr(one_launch, "_op", one_launch)
        _known[key] = Known(
            operator, rest, call.backend, q.device.type, q.shape[3] ** -0.5, function,
            one, one if isinstance(one_launch, OpOverload) else None,
        )  # fmt: skip


def are_two(text_queries: Any) -> bool:
    """Whether they are two numbers of queries; whether q has as many, the operators find out."""
    return (
        type(text_queries) is tuple
        and len(text_queries) == 2
        and type(text_queries[0]) is int
        and type(text_queries[1]) is int
    )


def like(q: Tensor, of_q: torch.Size, k: Tensor, v: Tensor, *prompts: Tensor) -> bool:
    """Whether q, of shape `of_q`, and the image's k and v agree in batch, heads, dtype, device and
    layout, and k and v in length, where PyTorch's attention is called past its checks. And whether
    keys and values of the prompts have the heads of the image's, of which their operator sees
    nothing.
    """
    # every question to a tensor costs the host: none is asked twice
    of_k = k.shape
    if len(of_q) != 4 or len(of_k) != 4:
        return False
    b, _, h, d = of_q
    b_k, _, heads, d_k = of_k
    if heads != h and (heads == 0 or h % heads):
        return False
    if b_k != b or d_k != d or v.shape != of_k:
        return False
    for x in prompts:
        shape = x.shape
        if len(shape) != 4 or shape[2] != heads and shape[2] != 1:
            return False
    dtype, device = q.dtype, q.device
    return (
        k.dtype is dtype
        and v.dtype is dtype
        and k.device == device
        and v.device == device
        and q.stride(3) == k.stride(3) == v.stride(3) == 1
    )
