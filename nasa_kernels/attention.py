"""The public function: its contract, its checks, and the choice of a back end."""

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

from nasa_kernels import backends, ops
from nasa_kernels.reference import nasa_attention_reference

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def nasa_attention(
    q: Tensor,
    k_pos: Tensor,
    v_pos: Tensor,
    k_neg: Tensor,
    v_neg: Tensor,
    alpha: float | Tensor,
    *,
    mask_pos: Tensor | None = None,
    mask_neg: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention steered away from a negative prompt (NASA, equations 7 to 9).

        O = softmax(q k_pos^T * scale + bias_pos) v_pos
            - alpha * softmax(q k_neg^T * scale + bias_neg) v_neg

    The two softmaxes are separate: the prompts may differ in length, and `alpha = 0` is exactly
    the attention over the positive prompt alone. O is computed in fp32 and rounded once.
    Results are deterministic, bit for bit, forward and backward. Under autocast the five
    tensors are cast to the autocast dtype, as `scaled_dot_product_attention` does.

    Args:
        q: Image queries `[b, l, h, d]`, fp16, bf16 or fp32 (fp64 on the reference), d from 1 to
            256. Any strides with a contiguous last dimension; nothing is copied.
        k_pos, v_pos: Positive prompt `[b, n_pos, h, d]`, `n_pos >= 0`. b and h may be 1, or
            strides of 0: one prompt for a whole batch is read where it is.
        k_neg, v_neg: Negative prompt `[b, n_neg, h, d]`, likewise.
        alpha: Strength of the removal. A finite number, or an fp32 tensor on the device of `q`
            that broadcasts to `[b, l, h]`: 0-d for all, `[b, 1, 1]` per sample, `[b, l, 1]` per
            region. A tensor is differentiated, is read on the device, and never recompiles.
        mask_pos, mask_neg: Per key, `[b, n]` or `[1, n]`. Bool (True = attend), or additive in
            fp32 or in the dtype of `q` (0, -inf, or any finite bias). A masked key counts as
            absent whatever its row holds, NaN included; a prompt without keys contributes 0.
        scale: Softmax scale. `None` means `d ** -0.5`.
        backend: `"cuda"`, `"triton"`, `"cpu"` or `"reference"`. `None` takes the first that runs:
            on a GPU of `"triton"`, `"cuda"`, `"reference"`, on a CPU `"cpu"` (fp64: the
            reference). A back end named here is never replaced by another.

    Returns:
        `[b, l, h, d]`, contiguous, in the dtype of `q`: `o.flatten(2)` feeds `to_out` as it is.

    Raises:
        ValueError: A shape, dtype, device, layout or number is not supported. The message names
            the tensor, what it must be and what it was.
        RuntimeError: `backend` does not run here; the message says why, and what does. Or more
            than a first reverse-mode derivative was asked of a fused back end: second
            derivatives, forward mode and `torch.func.grad` are for `backend="reference"`.
    """
    device = q.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        q, k_pos, v_pos, k_neg, v_neg = _autocast(q, k_pos, v_pos, k_neg, v_neg)
        # off inside: it would round the fp32 intermediates of a back end made of PyTorch's parts
        with torch.autocast(device, enabled=False):
            return nasa_attention(
                q, k_pos, v_pos, k_neg, v_neg, alpha,
                mask_pos=mask_pos, mask_neg=mask_neg, scale=scale, backend=backend,
            )  # fmt: skip
    _check_queries(q)
    k_pos, v_pos = _check_prompt(q, k_pos, v_pos, "pos")
    k_neg, v_neg = _check_prompt(q, k_neg, v_neg, "neg")
    if mask_pos is not None:
        mask_pos = _check_mask(q, k_pos, mask_pos, "mask_pos")
    if mask_neg is not None:
        mask_neg = _check_mask(q, k_neg, mask_neg, "mask_neg")
    alpha_map, alpha_number = _check_alpha(q, alpha)
    if scale is None:
        scale = q.shape[3] ** -0.5
    else:
        q, scale = _check_scale(q, scale)

    differentiable = torch.is_grad_enabled() and (
        q.requires_grad
        or k_pos.requires_grad
        or v_pos.requires_grad
        or k_neg.requires_grad
        or v_neg.requires_grad
        or (alpha_map is not None and alpha_map.requires_grad)
    )
    if backend is None:
        backend = backends.choose(q.device, q.dtype, q.shape[3], differentiable)
    else:
        backends.require("nasa_attention", backend, q, differentiable)
    if backend == "reference":
        return nasa_attention_reference(
            q, k_pos, v_pos, k_neg, v_neg, alpha_number if alpha_map is None else alpha_map,
            mask_pos=mask_pos, mask_neg=mask_neg, scale=scale,
        )  # fmt: skip
    _check_transforms(q, k_pos, v_pos, k_neg, v_neg, differentiable)
    operator = (ops.ATTENTION if differentiable else ops.FORWARD)[backend]
    return operator(
        q, k_pos, v_pos, k_neg, v_neg, mask_pos, mask_neg, alpha_map, alpha_number, scale
    )


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast like an op of autocast's lower-precision list; alpha and the masks stay as they are."""
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(
        x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors
    )


def _check_queries(q: Tensor) -> None:
    if q.dim() != 4:
        raise ValueError(f"nasa_attention: q must be [b, l, h, d], got {_shape(q)}")
    if q.dtype not in _DTYPES:
        raise ValueError(
            f"nasa_attention: q must be fp16, bf16, fp32 or fp64, got {q.dtype}; cast it first"
        )
    if not 1 <= q.shape[3] <= backends.MAX_HEAD_DIM:
        raise ValueError(
            f"nasa_attention: head_dim d of q must be 1 to {backends.MAX_HEAD_DIM}, "
            f"got {_shape(q)}; the layout is [b, l, h, d]"
        )
    if q.stride(3) != 1:
        _check_last_dimension("q", q)


def _check_prompt(q: Tensor, k: Tensor, v: Tensor, side: str) -> tuple[Tensor, Tensor]:
    """Check one prompt and return it expanded to the batch and the heads of `q`, as views."""
    b, _, h, d = q.shape
    for letter, x in (("k", k), ("v", v)):
        shape = x.shape
        if len(shape) != 4 or shape[3] != d or shape[0] not in (1, b) or shape[2] not in (1, h):
            raise ValueError(
                f"nasa_attention: {letter}_{side} must be [{b} or 1, n, {h} or 1, {d}] to match q "
                f"{_shape(q)}, got {_shape(x)}"
            )
        if x.dtype != q.dtype:
            raise ValueError(
                f"nasa_attention: {letter}_{side} must have the dtype of q, {q.dtype}, got "
                f"{x.dtype}; call {letter}_{side}.to(q.dtype)"
            )
        if x.device != q.device:
            raise _wrong_device(q, f"{letter}_{side}", x)
        if x.stride(3) != 1:
            _check_last_dimension(f"{letter}_{side}", x)
    n = k.shape[1]
    if v.shape[1] != n:
        raise ValueError(f"nasa_attention: k_{side} has {n} tokens but v_{side} has {v.shape[1]}")
    return (
        k if k.shape[0] == b and k.shape[2] == h else k.expand(b, n, h, d),
        v if v.shape[0] == b and v.shape[2] == h else v.expand(b, n, h, d),
    )


def _check_mask(q: Tensor, k: Tensor, mask: Tensor, name: str) -> Tensor:
    b, n = k.shape[:2]
    if mask.dim() != 2 or mask.shape[0] not in (1, b) or mask.shape[1] != n:
        raise ValueError(
            f"nasa_attention: {name} must be [{b} or 1, {n}], one value per key, got {_shape(mask)}"
        )
    if mask.dtype not in (torch.bool, torch.float32, q.dtype):
        raise ValueError(
            f"nasa_attention: {name} must be bool (True = attend) or an additive bias in fp32 or "
            f"in the dtype of q, {q.dtype}, got {mask.dtype}; for a mask of 0 and 1 call "
            f"{name}.bool()"
        )
    if mask.requires_grad:
        raise ValueError(
            f"nasa_attention: {name} must not require a gradient, there is none for masks; call "
            f"{name}.detach()"
        )
    if mask.device != q.device:
        raise _wrong_device(q, name, mask)
    return mask.expand(b, n)


def _check_alpha(q: Tensor, alpha: float | Tensor) -> tuple[Tensor | None, float]:
    """Return alpha as a map `[b, l, h]` or as a number; the other one is None or 0."""
    if not isinstance(alpha, Tensor):
        if isinstance(alpha, bool) or not isinstance(alpha, (float, int, torch.SymFloat)):
            raise ValueError(
                f"nasa_attention: alpha must be a number or a tensor, got {type(alpha).__name__}"
            )
        if torch.compiler.is_compiling():
            # a number would be a constant of the graph, and each new one a recompilation
            alpha = torch.full((), alpha, dtype=torch.float32, device=q.device)
            return alpha.expand(q.shape[:3]), 0.0
        if not math.isfinite(alpha):
            raise ValueError(f"nasa_attention: alpha must be finite, got {alpha}")
        return None, float(alpha)
    rows = q.shape[:3]
    if alpha.dtype != torch.float32 and not alpha.dtype == q.dtype == torch.float64:
        raise ValueError(
            f"nasa_attention: a tensor alpha must be fp32, got {alpha.dtype}; call alpha.float()"
        )
    if alpha.dim() > 3 or any(
        size not in (1, row) for size, row in zip(alpha.shape, rows[3 - alpha.dim() :], strict=True)
    ):
        raise ValueError(
            f"nasa_attention: alpha must broadcast to [b, l, h] {list(rows)}, got {_shape(alpha)}; "
            "one value per sample is [b, 1, 1], one per head is [h]"
        )
    if alpha.device != q.device:
        raise _wrong_device(q, "alpha", alpha)
    return alpha.expand(rows), 0.0


def _check_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """The kernels take positive scales only: a negative one moves its sign into q, exactly."""
    if isinstance(scale, bool) or not isinstance(scale, (float, int, torch.SymFloat)):
        raise ValueError(f"nasa_attention: scale must be a number, got {type(scale).__name__}")
    if torch.compiler.is_compiling() and scale > 0:
        # a symbol, whose finiteness the compiler cannot ask for
        return q, float(scale)
    if not math.isfinite(scale) or scale == 0:
        raise ValueError(f"nasa_attention: scale must be finite and not 0, got {scale}")
    return (-q, -float(scale)) if scale < 0 else (q, float(scale))


def _check_transforms(
    q: Tensor, k_pos: Tensor, v_pos: Tensor, k_neg: Tensor, v_neg: Tensor, differentiable: bool
) -> None:
    """Refuse what would lose a derivative in silence, or end in an error about something else."""
    if differentiable and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "nasa_attention: the fused back ends do not take part in torch.func.grad and its "
            "relatives; call .backward() or use backend='reference'"
        )
    if forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(x).tangent is not None for x in (q, k_pos, v_pos, k_neg, v_neg)
    ):
        raise RuntimeError(
            "nasa_attention: the fused back ends have no forward-mode derivative; use "
            "backend='reference', which has"
        )


def _wrong_device(q: Tensor, name: str, x: Tensor) -> ValueError:
    return ValueError(
        f"nasa_attention: {name} must be on the device of q, {q.device}, got {x.device}; call "
        f"{name}.to(q.device)"
    )


def _check_last_dimension(name: str, x: Tensor) -> None:
    if x.shape[3] != 1 and x.numel() > 0:
        raise ValueError(
            f"nasa_attention: the last dimension of {name} must be contiguous, got strides "
            f"{list(x.stride())}; call {name}.contiguous()"
        )


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)
