"""Normalised attention guidance (NAG, arXiv:2505.21179), the method users compare NASA with.

    G = s Z+ - (s - 1) Z-                   Z+- = softmax(Q K+-^T * scale + bias+-) V+-
    G' = G * min(1, tau |Z+| / |G|)         |.| the norm of a query's row, over all heads
    O = a G' + (1 - a) Z+                   s = nag_scale, tau = nag_tau, a = nag_alpha

The norm is the sum of magnitudes, as the paper has it and the published code for most models; the
published code for FLUX takes the root of the sum of squares (`nag_norm=2`).

The norms need a query's whole row. On the CPU a task may be all heads of some rows, and one
operator computes and rounds all at once. On a GPU every head is another program's: there one
operator makes two or three launches, of the attention, which leaves Z+ and Z- in memory, and of a
small kernel that makes O of them. In joint attention Z+ is over [image; positive text] and Z- over
[image; negative text], as in the published code, and the operator reads the image's keys once.
Where a gradient is recorded, or a back end has no such operator, Z+ and Z- are calls, and the rest
is plain PyTorch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nasa_kernels import attention, backends, joint_attention, ops
from nasa_kernels._checks import Call, as_number, outside_autocast, prepare
from nasa_kernels._quick import (
    NO_TEXT,
    REFUSALS,
    are_two,
    joint_operator,
    past_operator,
    quick,
    remember,
)
from nasa_kernels.scalars import real, whole

_INFINITY = float("inf")
# settings that `_are_settings` found good: calls have the same numbers, as objects, again and again
_last: tuple = 1, 1, 1


def nag_attention(
    q: Tensor,
    k_pos: Tensor,
    v_pos: Tensor,
    k_neg: Tensor,
    v_neg: Tensor,
    *,
    nag_scale: float,
    nag_tau: float,
    nag_alpha: float | Tensor,
    nag_norm: int = 1,
    mask_pos: Tensor | None = None,
    mask_neg: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention under normalised attention guidance (NAG, arXiv:2505.21179).

        G = nag_scale Z+ - (nag_scale - 1) Z-
        O = nag_alpha G min(1, nag_tau |Z+| / |G|) + (1 - nag_alpha) Z+

    Z+ and Z- are the attention over either prompt, |.| is the norm over the heads and channels of
    one query. Where no gradient is recorded, `"cuda"`, `"triton"` and `"cpu"` have one operator for
    all of it. `"cpu"` rounds once; elsewhere Z+ and Z- are rounded to the dtype of `q`, and what
    follows is computed in fp32 and rounded. Deterministic, and differentiable in all tensors.

    Args:
        q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, scale, backend: As `nasa_attention`
            takes them.
        nag_scale: Extrapolation, as in the published code: 1 is off. The paper's scale is this
            minus 1, so that 0 is off there.
        nag_tau: The most by which G may exceed Z+ in magnitude; above 0.
        nag_alpha: Share of the guided result. A finite number, or an fp32 tensor on the device of
            `q` that broadcasts to `[b, l, 1]`. Where it is 0 the result is Z+, bit for bit.
        nag_norm: What |.| is: 1 the sum of magnitudes, as in the paper; 2 the root of the sum of
            squares, as in the published code for FLUX.

    Returns:
        `[b, l, h, d]`, contiguous, in the dtype of `q`.

    Raises:
        ValueError: As `nasa_attention`, or a NAG parameter is out of its range.
        RuntimeError: As `nasa_attention`.
    """
    function = "nag_attention"
    asked = (function, backend)
    plain = quick(asked, q, (k_pos, v_pos, k_neg, v_neg), mask_pos, mask_neg, nag_alpha, scale)
    if plain is not None and _are_settings(nag_scale, nag_tau, nag_norm):
        known, alpha_map, alpha, factor, _ = plain
        try:
            run = known.operator if known.function is None else past_operator(known, known.function)
            return run(
                q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, alpha, factor,
                nag_scale, nag_tau, nag_norm,
            )  # fmt: skip
        except REFUSALS:
            # the checks say what is wrong
            pass
    settings = _check_settings(function, nag_scale, nag_tau, nag_norm)
    call = prepare(
        function,
        q,
        (("_pos", k_pos, v_pos, mask_pos), ("_neg", k_neg, v_neg, mask_neg)),
        0.0,
        scale,
        backend,
    )
    alpha_map, alpha = _check_alpha(function, call.q, nag_alpha)
    if _is_one_operator(call, alpha_map):
        remember(asked, call, ops.NAG[call.backend], cross="nag")
    if alpha_map is None and alpha == 0:
        return outside_autocast(attention.attend_pos, call)
    if _is_one_operator(call, alpha_map):
        return outside_autocast(_attend_guided, call, alpha_map, alpha, settings)
    z_pos = outside_autocast(attention.attend_pos, call)
    z_neg = outside_autocast(attention.attend_neg, call)
    return blend(z_pos, z_neg, alpha_map, alpha, *settings)


def nag_joint_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pos: Tensor,
    v_pos: Tensor,
    k_neg: Tensor,
    v_neg: Tensor,
    *,
    nag_scale: float,
    nag_tau: float,
    nag_alpha: float | Tensor,
    nag_norm: int = 1,
    text_queries: tuple[int, int] = NO_TEXT,
    mask_pos: Tensor | None = None,
    mask_neg: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Joint attention (FLUX, SD3) under normalised attention guidance (NAG, arXiv:2505.21179).

    An image query gets what `nag_attention` says, of Z+ over [image; positive text] and Z- over
    [image; negative text]. Queries of the texts get their plain attention, the positive text's
    over [image; positive], the negative text's over [image; negative].

    Args:
        q, k, v, k_pos, v_pos, k_neg, v_neg, text_queries, mask_pos, mask_neg, scale, backend: As
            `nasa_joint_attention` takes them. `"cuda"`, `"triton"` and `"cpu"` read the image's
            keys once where no gradient is recorded; otherwise they are read twice.
        nag_scale, nag_tau, nag_norm: As in `nag_attention`.
        nag_alpha: As in `nag_attention`; a tensor broadcasts to `[b, image queries, 1]`.

    Returns:
        `[b, l, h, d]`, contiguous, in the dtype of `q`, its rows in the order of `q`.

    Raises:
        ValueError, RuntimeError: As `nag_attention` and `nasa_joint_attention` do.
    """
    function = "nag_joint_attention"
    asked = (function, backend)
    keys_values = (k, v, k_pos, v_pos, k_neg, v_neg)
    plain = quick(asked, q, keys_values, mask_pos, mask_neg, nag_alpha, scale)
    if (
        plain is not None
        and _are_settings(nag_scale, nag_tau, nag_norm)
        and (text_queries is NO_TEXT or are_two(text_queries))
    ):
        known, alpha_map, alpha, factor, shape = plain
        # of alpha 0 there is less to do
        if alpha_map is not None or alpha != 0:
            try:
                text_pos, text_neg = text_queries
                operator = joint_operator(known, text_pos + text_neg, q, shape, keys_values)
                if operator is not None:
                    if operator is known.brief and text_queries is NO_TEXT and nag_norm == 1:
                        return operator(
                            q, k, v, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map,
                            alpha, factor, nag_scale, nag_tau,
                        )  # fmt: skip
                    return operator(
                        q, k, v, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map,
                        alpha, factor, nag_scale, nag_tau, nag_norm, text_pos, text_neg,
                    )  # fmt: skip
            except REFUSALS:
                # the checks say what is wrong
                pass
    settings = _check_settings(function, nag_scale, nag_tau, nag_norm)
    call = prepare(
        function,
        q,
        (("", k, v, None), ("_pos", k_pos, v_pos, mask_pos), ("_neg", k_neg, v_neg, mask_neg)),
        0.0,
        scale,
        backend,
        text_queries,
    )
    image = call.q.shape[1] - call.text_pos - call.text_neg
    alpha_map, alpha = _check_alpha(function, call.q[:, :image], nag_alpha)
    if _is_one_operator(call, alpha_map):
        remember(asked, call, ops.JOINT_NAG[call.backend], joint="nag")
    if alpha_map is None and alpha == 0:
        return outside_autocast(joint_attention.attend, call, "nasa-cross")
    if _is_one_operator(call, alpha_map):
        return outside_autocast(_attend_joint_guided, call, alpha_map, alpha, settings)
    apart = outside_autocast(joint_attention.attend_apart, call)
    return apart.joined(blend(apart.z_pos, apart.z_neg, alpha_map, alpha, *settings))


def _is_one_operator(call: Call, alpha_map: Tensor | None) -> bool:
    if call.backend not in ops.NAG or call.differentiable:
        return False
    return alpha_map is None or not (alpha_map.requires_grad and torch.is_grad_enabled())


def _attend_guided(
    call: Call, alpha_map: Tensor | None, alpha: float, settings: tuple[float, float, int]
) -> Tensor:
    return ops.NAG[call.backend](
        call.q, *call.keys_values, call.mask_pos, call.mask_neg, alpha_map, alpha, call.scale,
        *settings,
    )  # fmt: skip


def _attend_joint_guided(
    call: Call, alpha_map: Tensor | None, alpha: float, settings: tuple[float, float, int]
) -> Tensor:
    return ops.JOINT_NAG[call.backend](
        call.q, *call.keys_values, call.mask_pos, call.mask_neg, alpha_map, alpha, call.scale,
        *settings, call.text_pos, call.text_neg,
    )  # fmt: skip


def reads_image_once(backend: str | None, *tensors: Tensor) -> bool:
    """Whether `nag_joint_attention` of these, q the first, reads the image's keys once for both
    prompts."""
    taken = _taken_back_end(backend, *tensors)
    return taken in ops.JOINT_NAG or taken in ops.JOINT_PAIR


def pair_backend(backend: str | None, *tensors: Tensor) -> str | None:
    """The back end whose one operator gives Z+ and Z- of a joint attention, q the first of its
    tensors; None where each of the two is a call."""
    taken = _taken_back_end(backend, *tensors)
    return taken if taken in ops.JOINT_PAIR else None


def _taken_back_end(backend: str | None, *tensors: Tensor) -> str | None:
    """Where no gradient is recorded."""
    q = tensors[0]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return None
    return backends.choose(q.device, q.dtype, q.shape[3]) if backend is None else backend


def blend(
    z_pos: Tensor,  # [b, l, h, d]
    z_neg: Tensor,
    alpha_map: Tensor | None,  # [b, l, 1], or None and then alpha is the share
    alpha: float,
    nag_scale: float,
    nag_tau: float,
    nag_norm: int = 1,
) -> Tensor:
    """What follows Z+ and Z-, in plain PyTorch: the oracle of the kernels, and their gradient."""
    dtype = z_pos.dtype
    if dtype != torch.float64:
        z_pos, z_neg = z_pos.float(), z_neg.float()
    guided = nag_scale * z_pos - (nag_scale - 1) * z_neg
    # [b, l, 1, 1]
    norm_pos, norm = (_norm(x, nag_norm) for x in (z_pos, guided))
    limit = nag_tau * norm_pos
    is_over = norm > limit
    # no division where there is nothing to shorten: 0 / 0 would spread, and so would its gradient
    shrink = torch.where(is_over, limit / torch.where(is_over, norm, 1.0), 1.0)
    if alpha_map is None:
        o = alpha * (guided * shrink) + (1 - alpha) * z_pos
    else:
        share = alpha_map.to(z_pos.dtype)[..., None]
        o = share * (guided * shrink) + (1 - share) * z_pos
        o = torch.where(share == 0, z_pos, o)
    return o.to(dtype)


def _norm(x: Tensor, nag_norm: int) -> Tensor:
    """Of each query's row over all heads, `[b, l, h, d]` to `[b, l, 1, 1]`."""
    if nag_norm == 1:
        return x.abs().sum((2, 3), keepdim=True)
    return torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)


# ---- checks --------------------------------------------------------------------------------------


def _are_settings(nag_scale: float, nag_tau: float, nag_norm: int) -> bool:
    """Whether they need no words: `_check_settings` has them, and what else it takes."""
    global _last
    scale, tau, norm = _last
    if nag_scale is scale and nag_tau is tau and nag_norm is norm:
        return True
    if (
        (type(nag_scale) is float or type(nag_scale) is int)
        and (type(nag_tau) is float or type(nag_tau) is int)
        and type(nag_norm) is int
        and -_INFINITY < nag_scale < _INFINITY
        and 0 < nag_tau < _INFINITY
        and 1 <= nag_norm <= 2
    ):
        _last = nag_scale, nag_tau, nag_norm
        return True
    return False


def _check_settings(
    function: str, nag_scale: float, nag_tau: float, nag_norm: int
) -> tuple[float, float, int]:
    nag_scale = _check_number(function, "nag_scale", nag_scale)
    nag_tau = _check_number(function, "nag_tau", nag_tau)
    if nag_tau <= 0:
        raise ValueError(f"{function}: nag_tau must be above 0, got {nag_tau}")
    norm = whole(nag_norm)
    if norm not in (1, 2):
        raise ValueError(f"{function}: nag_norm must be 1 or 2, got {nag_norm!r}")
    return nag_scale, nag_tau, norm


def _check_number(function: str, name: str, given: float) -> float:
    value = real(given)
    if value is None:
        raise ValueError(f"{function}: {name} must be a number, got {type(given).__name__}")
    # of a symbol the compiler cannot ask this
    if isinstance(value, (int, float)) and not math.isfinite(value):
        raise ValueError(f"{function}: {name} must be finite, got {value}")
    return value


def _check_alpha(
    function: str, q: Tensor, nag_alpha: float | Tensor
) -> tuple[Tensor | None, float]:
    """nag_alpha as a map `[b, l, 1]` or as a number; the other one is None or 0."""
    if not isinstance(nag_alpha, Tensor):
        return None, float(_check_number(function, "nag_alpha", nag_alpha))
    nag_alpha = as_number(nag_alpha, q)
    rows = (*q.shape[:2], 1)
    if nag_alpha.dtype != torch.float32 and not nag_alpha.dtype == q.dtype == torch.float64:
        raise ValueError(
            f"{function}: a tensor nag_alpha must be fp32, got {nag_alpha.dtype}; call "
            "nag_alpha.float()"
        )
    sizes = zip(nag_alpha.shape, rows[3 - nag_alpha.dim() :], strict=True)
    if nag_alpha.dim() > 3 or any(size not in (1, row) for size, row in sizes):
        raise ValueError(
            f"{function}: nag_alpha must broadcast to [b, l, 1] {list(rows)}, got "
            f"{list(nag_alpha.shape)}; it is the same for all heads, whose common norm it blends"
        )
    if nag_alpha.device != q.device:
        raise ValueError(
            f"{function}: nag_alpha must be on the device of q, {q.device}, got "
            f"{nag_alpha.device}; call nag_alpha.to(q.device)"
        )
    return nag_alpha.expand(rows), 0.0
