"""The checks of the public functions: `prepare` turns their arguments into a `Call`.

`function` is the name that an error starts with.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from nasa_kernels import backends
from nasa_kernels.scalars import real, whole

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


T = TypeVar("T")
# suffix of the names, keys, values, mask per key
Segment: TypeAlias = tuple[str, Tensor, Tensor, Tensor | None]


class Call(NamedTuple):
    """A checked call of the operation."""

    q: Tensor  # [b, l, h, d]
    # k and v of each segment [b, n, h_kv, d], with strides of 0 where they are broadcast
    keys_values: tuple[Tensor, ...]
    # [b, n]
    mask_pos: Tensor | None
    mask_neg: Tensor | None
    # fp32 [b, l, h], or None and then `alpha` is the strength
    alpha_map: Tensor | None
    alpha: float
    scale: float
    # how many of the last queries are the texts' own
    text_pos: int
    text_neg: int
    # whether a gradient is recorded
    differentiable: bool
    # "cuda", "triton", "cpu" or "reference": it takes this call
    backend: str
    under_autocast: bool


def prepare(
    function: str,
    q: Tensor,
    segments: Sequence[Segment],
    alpha: float | Tensor,
    scale: float | None,
    backend: str | None,
    text_queries: tuple[int, int] | None = None,
) -> Call:
    """Check the arguments of a public function, and choose its back end.

    `segments` are the image's keys in joint attention, then the positive and the negative prompt.
    Under autocast their tensors and q are cast; the caller then runs `outside_autocast`.
    """
    device = q.device.type
    under_autocast = device != "meta" and torch.is_autocast_enabled(device)
    if under_autocast:
        dtype = torch.get_autocast_dtype(device)
        q = _cast(q, dtype)
        segments = [(side, _cast(k, dtype), _cast(v, dtype), mask) for side, k, v, mask in segments]
    _check_queries(function, q)
    keys_values: tuple[Tensor, ...] = ()
    heads = kv_heads(q, *(x for _, k, v, _ in segments for x in (k, v)))
    for side, k, v, _ in segments:
        keys_values += _check_prompt(function, q, k, v, side, heads)
    (*_, mask_pos), (*_, mask_neg) = segments[-2:]
    if mask_pos is not None:
        mask_pos = _check_mask(function, q, keys_values[-4], mask_pos, "mask_pos")
    if mask_neg is not None:
        mask_neg = _check_mask(function, q, keys_values[-2], mask_neg, "mask_neg")
    alpha_map, alpha_number = check_alpha(function, q, alpha)
    if scale is None:
        scale = q.shape[3] ** -0.5
    else:
        q, scale = _check_scale(function, q, scale)
    text_pos, text_neg = 0, 0
    if text_queries is not None:
        text_pos, text_neg = check_text_queries(function, q, text_queries)

    differentiable = torch.is_grad_enabled() and (
        q.requires_grad
        or any(x.requires_grad for x in keys_values)
        or (alpha_map is not None and alpha_map.requires_grad)
    )
    if backend is None:
        backend = backends.choose(q.device, q.dtype, q.shape[3], differentiable)
    else:
        backends.require(function, backend, q, differentiable)
    if backend != "reference":
        _check_transforms(function, differentiable, q, *keys_values)
    return Call(
        q, keys_values, mask_pos, mask_neg, alpha_map, alpha_number, scale, text_pos, text_neg,
        differentiable, backend, under_autocast,
    )  # fmt: skip


def expanded(
    q: Tensor, k_pos: Tensor, v_pos: Tensor, k_neg: Tensor, v_neg: Tensor,
    mask_pos: Tensor | None, mask_neg: Tensor | None, alpha_map: Tensor | None, *image: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The operands of an operator that was called with what the user gave, expanded as views to the
    batch of q, and K and V to the heads that they have between them. An error is worded by the
    public function, which knows its own name.

    image: K and V of the image, where they are operands of a joint attention.
    """
    function = "nasa_kernels"
    _check_queries(function, q)
    heads = kv_heads(q, *image, k_pos, v_pos, k_neg, v_neg)
    if image:
        k, v = image
        image = _check_prompt(function, q, k, v, "", heads)
    k_pos, v_pos = _check_prompt(function, q, k_pos, v_pos, "_pos", heads)
    k_neg, v_neg = _check_prompt(function, q, k_neg, v_neg, "_neg", heads)
    if mask_pos is not None:
        mask_pos = _check_mask(function, q, k_pos, mask_pos, "mask_pos")
    if mask_neg is not None:
        mask_neg = _check_mask(function, q, k_neg, mask_neg, "mask_neg")
    if alpha_map is not None:
        if alpha_map.dtype != torch.float32 or alpha_map.device != q.device:
            raise ValueError(f"{function}: alpha_map must be fp32, on the device of q")
        alpha_map, _ = check_alpha(function, q, alpha_map)
    return k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, *image


def check_rule(function: str, rule: str, rules: Sequence[str]) -> None:
    if rule not in rules:
        raise ValueError(f"{function}: rule must be one of {rules}, got {rule!r}")


def outside_autocast(run: Callable[..., T], call: Call, *args) -> T:
    """`run(call, *args)`; autocast would round the fp32 intermediates of a back end made of
    PyTorch's parts.
    """
    if not call.under_autocast:
        return run(call, *args)
    with torch.autocast(call.q.device.type, enabled=False):
        return run(call, *args)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Like an op of autocast's lower-precision list; alpha and the masks stay as they are."""
    return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x


def _check_queries(function: str, q: Tensor) -> None:
    if q.dim() != 4:
        raise ValueError(f"{function}: q must be [b, l, h, d], got {_sizes(q)}")
    if q.dtype not in _DTYPES:
        raise ValueError(
            f"{function}: q must be fp16, bf16, fp32 or fp64, got {q.dtype}; cast it first"
        )
    if not 1 <= q.shape[3] <= backends.MAX_HEAD_DIM:
        raise ValueError(
            f"{function}: head_dim d of q must be 1 to {backends.MAX_HEAD_DIM}, "
            f"got {_sizes(q)}; the layout is [b, l, h, d]"
        )
    if q.stride(3) != 1:
        _last_dimension(function, "q", q)


def kv_heads(q: Tensor, *keys_values: Tensor) -> int:
    """How many heads K and V have, where not one for all: as many as q, or a divisor, and then each
    serves a group of q's heads. The first tensor says it; `_check_prompt` asks it of the others.
    """
    h = q.shape[2]
    for x in keys_values:
        if x.dim() == 4 and x.shape[2] != 1:
            heads = x.shape[2]
            return heads if heads == h or (heads > 0 and h % heads == 0) else h
    return h


def _check_prompt(
    function: str, q: Tensor, k: Tensor, v: Tensor, side: str, h: int
) -> tuple[Tensor, Tensor]:
    """Check k and v of one side; return them expanded to the batch of q and h heads, as views."""
    b, _, _, d = q.shape
    n = k.shape[1] if k.dim() == 4 else 0
    if k.shape == v.shape == (b, n, h, d) and _like(q, k) and _like(q, v):
        return k, v
    for letter, x in (("k", k), ("v", v)):
        shape = x.shape
        if len(shape) != 4 or shape[3] != d or shape[0] not in (1, b) or shape[2] not in (1, h):
            raise ValueError(
                f"{function}: {letter}{side} must be [{b} or 1, n, {h} or 1, {d}] to match q "
                f"{_sizes(q)}, got {_sizes(x)}{_why_not_heads(q, x, h)}"
            )
        if x.dtype != q.dtype:
            raise ValueError(
                f"{function}: {letter}{side} must have the dtype of q, {q.dtype}, got "
                f"{x.dtype}; call {letter}{side}.to(q.dtype)"
            )
        if x.device != q.device:
            raise _wrong_device(function, q, f"{letter}{side}", x)
        if x.stride(3) != 1:
            _last_dimension(function, f"{letter}{side}", x)
    if v.shape[1] != n:
        raise ValueError(f"{function}: k{side} has {n} tokens but v{side} has {v.shape[1]}")
    return (
        k if k.shape[0] == b and k.shape[2] == h else k.expand(b, n, h, d),
        v if v.shape[0] == b and v.shape[2] == h else v.expand(b, n, h, d),
    )


def _why_not_heads(q: Tensor, x: Tensor, h: int) -> str:
    """The end of an error about a shape, where nothing but the heads are wrong."""
    b, _, all_heads, d = q.shape
    if x.dim() != 4 or x.shape[3] != d or x.shape[0] not in (1, b):
        return ""
    heads = x.shape[2]
    if heads == 0 or all_heads % heads:
        return (
            f"; heads that each serve a group of the {all_heads} of q must be a divisor of them, "
            "in the layout [b, n, h, d]"
        )
    return (
        f"; keys and values of all prompts, and of the image, must have the same heads, here {h}: "
        "repeat the fewer with .repeat_interleave(times, dim=2)"
    )


def _like(q: Tensor, x: Tensor) -> bool:
    return x.dtype == q.dtype and x.device == q.device and x.stride(3) == 1


def _check_mask(function: str, q: Tensor, k: Tensor, mask: Tensor, name: str) -> Tensor:
    b, n = k.shape[:2]
    if mask.dim() != 2 or mask.shape[0] not in (1, b) or mask.shape[1] != n:
        raise ValueError(
            f"{function}: {name} must be [{b} or 1, {n}], one value per key, got {_sizes(mask)}"
        )
    if mask.dtype not in (torch.bool, torch.float32, q.dtype):
        raise ValueError(
            f"{function}: {name} must be bool (True = attend) or an additive bias in fp32 or "
            f"in the dtype of q, {q.dtype}, got {mask.dtype}; for a mask of 0 and 1 call "
            f"{name}.bool()"
        )
    if mask.requires_grad:
        raise ValueError(
            f"{function}: {name} must not require a gradient, there is none for masks; call "
            f"{name}.detach()"
        )
    if mask.device != q.device:
        raise _wrong_device(function, q, name, mask)
    return mask.expand(b, n)


def check_alpha(function: str, q: Tensor, alpha: float | Tensor) -> tuple[Tensor | None, float]:
    """Return alpha as a map `[b, l, h]` or as a number; the other one is None or 0."""
    if not isinstance(alpha, Tensor):
        number = real(alpha)
        if number is None:
            raise ValueError(
                f"{function}: alpha must be a number or a tensor, got {type(alpha).__name__}"
            )
        if torch.compiler.is_compiling():
            # a number would be a constant of the graph, and each new one a recompilation
            alpha = torch.full((), number, dtype=torch.float32, device=q.device)
            return alpha.expand(q.shape[:3]), 0.0
        if not math.isfinite(number):
            raise ValueError(f"{function}: alpha must be finite, got {number}")
        return None, float(number)
    alpha = as_number(alpha, q)
    rows = q.shape[:3]
    if alpha.dtype != torch.float32 and not alpha.dtype == q.dtype == torch.float64:
        raise ValueError(
            f"{function}: a tensor alpha must be fp32, got {alpha.dtype}; call alpha.float()"
        )
    if alpha.dim() > 3 or any(
        size not in (1, row) for size, row in zip(alpha.shape, rows[3 - alpha.dim() :], strict=True)
    ):
        raise ValueError(
            f"{function}: alpha must broadcast to [b, l, h] {list(rows)}, got {_sizes(alpha)}; "
            "one value per sample is [b, 1, 1], one per head is [h]"
        )
    if alpha.device != q.device:
        raise _wrong_device(function, q, "alpha", alpha)
    return alpha.expand(rows), 0.0


def as_number(alpha: Tensor, q: Tensor) -> Tensor:
    """An alpha without dimensions, of whatever dtype and device, as the one number it is."""
    if alpha.dim() or alpha.dtype == torch.bool or alpha.is_complex() or alpha.is_meta:
        return alpha
    dtype = torch.float64 if alpha.dtype == q.dtype == torch.float64 else torch.float32
    return alpha.to(q.device, dtype)


def _check_scale(function: str, q: Tensor, scale: float) -> tuple[Tensor, float]:
    """The kernels take positive scales only: a negative one moves its sign into q, exactly."""
    given, scale = scale, real(scale)
    if scale is None:
        raise ValueError(f"{function}: scale must be a number, got {type(given).__name__}")
    if torch.compiler.is_compiling() and scale > 0:
        # a symbol, whose finiteness the compiler cannot ask for
        return q, float(scale)
    if not math.isfinite(scale) or scale == 0:
        raise ValueError(f"{function}: scale must be finite and not 0, got {scale}")
    return (-q, -float(scale)) if scale < 0 else (q, float(scale))


def check_text_queries(function: str, q: Tensor, text_queries: tuple[int, int]) -> tuple[int, int]:
    are_two = isinstance(text_queries, (tuple, list)) and len(text_queries) == 2
    text_pos, text_neg = map(whole, text_queries) if are_two else (None, None)
    if text_pos is None or text_neg is None:
        raise ValueError(
            f"{function}: text_queries must be two integers, the queries of the positive and of "
            f"the negative text, got {text_queries!r}"
        )
    if text_pos < 0 or text_neg < 0 or text_pos + text_neg > q.shape[1]:
        raise ValueError(
            f"{function}: text_queries must be at least 0 and no more than the {q.shape[1]} "
            f"queries of q together, got {text_queries!r}"
        )
    return text_pos, text_neg


def _check_transforms(function: str, differentiable: bool, *tensors: Tensor) -> None:
    """Refuse what would lose a derivative in silence, or end in an error about something else."""
    if differentiable and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{function}: the fused back ends do not take part in torch.func.grad and its "
            "relatives; call .backward() or use backend='reference'"
        )
    if forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(x).tangent is not None for x in tensors
    ):
        raise RuntimeError(
            f"{function}: the fused back ends have no forward-mode derivative; use "
            "backend='reference', which has"
        )


def _wrong_device(function: str, q: Tensor, name: str, x: Tensor) -> ValueError:
    return ValueError(
        f"{function}: {name} must be on the device of q, {q.device}, got {x.device}; call "
        f"{name}.to(q.device)"
    )


def _last_dimension(function: str, name: str, x: Tensor) -> None:
    if x.shape[3] != 1 and x.numel() > 0:
        raise ValueError(
            f"{function}: the last dimension of {name} must be contiguous, got strides "
            f"{list(x.stride())}; call {name}.contiguous()"
        )


def _sizes(x: Tensor) -> list[int]:
    return list(x.shape)
