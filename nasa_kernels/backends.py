"""Which back ends run here, which one a call takes, and one sentence why each other does not.

    cuda       CUDA C++ kernels        NVIDIA GPUs, fp16 and bf16
    triton     Triton kernels          NVIDIA GPUs of compute capability 8.0 and up
    cpu        C++ kernels             CPU tensors; without a compiler PyTorch's attention
    reference  plain PyTorch           everything, fp64 included

A back end named by the caller is never replaced by another; `None` takes the first that runs, in
the order of `_PREFERENCE`.
"""

import functools
import importlib.util
import os

import torch
from torch import Tensor

from nasa_kernels import _cuda

NAMES = ("cuda", "triton", "cpu", "reference")

# Order of preference by device. The CUDA C++ kernels come before Triton when a benchmark row shows
# that they win. On meta tensors nothing runs: a fused operator gives shape and FLOPs.
_PREFERENCE = {
    "cuda": ("triton", "cuda", "reference"),
    "cpu": ("cpu", "reference"),
    "meta": ("triton", "cpu"),
}
_DTYPES = {
    "cuda": (torch.float16, torch.bfloat16),
    "triton": (torch.float16, torch.bfloat16, torch.float32),
    "cpu": (torch.float16, torch.bfloat16, torch.float32),
    "reference": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
}
MAX_HEAD_DIM = 256


@functools.cache
def why_not(name: str, device: torch.device) -> str | None:
    """None when back end `name` runs on tensors of `device`, otherwise one sentence why not."""
    if name == "reference":
        return None
    if name == "cpu":
        return None if device.type in ("cpu", "meta") else "it runs on CPU tensors only"
    if device.type == "meta":
        return None
    if name == "cuda":
        return _cuda.why_not(device)
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; pip install 'triton>=3.6'"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"its kernels need compute capability 8.0, this GPU has {major}.{minor}"
        return None
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return (
        f"Triton runs on NVIDIA GPUs, not on {device.type} tensors "
        "(TRITON_INTERPRET=1 runs it on the CPU, slowly, for tests)"
    )


@torch.compiler.assume_constant_result
def available(device: torch.device) -> tuple[str, ...]:
    """The back ends that run on tensors of `device`, in the order of `NAMES`."""
    return tuple(name for name in NAMES if why_not(name, device) is None)


_choices: dict[tuple, str] = {}


@torch.compiler.assume_constant_result
def choose(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int = 64,
    differentiable: bool = False,
) -> str:
    """The back end that `backend=None` takes."""
    # a dictionary and not functools.cache: the compiler does not look through the latter
    key = (device, dtype, head_dim, differentiable)
    choice = _choices.get(key)
    if choice is None:
        candidates = _PREFERENCE.get(device.type, ())
        running = [
            name
            for name in candidates
            if dtype in _DTYPES[name]
            and not why_not(name, device)
            and not (name == "cuda" and _cuda.supports(device, head_dim, differentiable))
        ]
        choice = _choices[key] = running[0] if running else "reference"
    return choice


def require(function: str, name: str, q: Tensor, differentiable: bool = False) -> None:
    """Raise unless back end `name` takes a call with this `q`."""
    if name not in NAMES:
        raise ValueError(f"{function}: backend must be None or one of {NAMES}, got {name!r}")
    reason = _refusal(name, q.device)
    if reason is not None:
        here = ", ".join(repr(other) for other in available(q.device))
        raise RuntimeError(
            f"{function}: backend {name!r} does not run here: {reason}. Available: {here}."
        )
    if q.dtype not in _DTYPES[name]:
        dtypes = ", ".join(str(dtype) for dtype in _DTYPES[name])
        raise ValueError(
            f"{function}: backend {name!r} takes {dtypes}, got q of {q.dtype}; "
            "cast the inputs or use backend='reference'"
        )
    if name == "cuda" and q.device.type == "cuda":
        reason = _shape_refusal(q.device, q.shape[3], differentiable)
        if reason is not None:
            raise ValueError(f"{function}: backend 'cuda' does not take this call: {reason}")


@torch.compiler.assume_constant_result
def _shape_refusal(device: torch.device, head_dim: int, backward: bool) -> str | None:
    return _cuda.supports(device, head_dim, backward)


@torch.compiler.assume_constant_result
def _refusal(name: str, device: torch.device) -> str | None:
    return why_not(name, device)
