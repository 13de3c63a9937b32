"""Which back ends run here, which one a call takes, and one sentence why each other does not.

    cuda       CUDA C++ kernels        NVIDIA GPUs, fp16 and bf16
    triton     Triton kernels          NVIDIA GPUs of compute capability 8.0 and up
    cpu        C++ kernels             CPU tensors; without a compiler PyTorch's attention
    sdpa       PyTorch's attention     any device, twice: for GPUs that are not NVIDIA's
    reference  plain PyTorch           everything, fp64 included

`RECORDS` says all that differs between them; `ops.py` registers operators by it. A back end named
by the caller is never replaced by another; `None` takes the first that runs, in the order of
`_PREFERENCE`.
"""

import functools
import importlib.metadata
import importlib.util
import os
import re
from typing import NamedTuple

import torch
from torch import Tensor

from nasa_kernels import _cpu
from nasa_kernels._cuda import extension
from nasa_kernels.reference import CROSS_RULES, RULES

_HALVES = (torch.float16, torch.bfloat16)
# the oldest Triton that the kernels are tested on
_TRITON = (3, 6)


# of joint attention, which every back end's operators take
JOINT_RULES = tuple(rule for rule in RULES if rule != "projected")


class Modules(NamedTuple):
    """Where `forward`, `attention` and `backward` of an operator are, imported when they run."""

    forward: str
    backward: str


class Backend(NamedTuple):
    name: str
    # types of device whose tensors its operators take; "cpu" of Triton is its interpreter
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    max_head_dim: int = 256
    # None: a compiled library implements them, or there are none
    cross: Modules | None = None
    joint: Modules | None = None
    # the rules that its operators take, forward and backward. What they do not take is made of
    # their plain attention, each prompt apart; where a gradient is recorded both must take it
    rules: tuple[str, ...] = ("nasa",)
    backward_rules: tuple[str, ...] = ("nasa",)
    joint_rules: tuple[str, ...] = JOINT_RULES
    joint_backward_rules: tuple[str, ...] = JOINT_RULES
    # whether its forward operators refuse what they cannot take, and broadcast keys, values, masks
    # and alpha by themselves: `_quick.py`
    checks: bool = False
    # whether it has operators for NAG, where no gradient is recorded
    has_nag: bool = False
    # whether one operator leaves Z+ and Z- of a joint attention apart; else each is a call
    has_pair: bool = False
    # saved for the backward pass beside the inputs. Kernels rebuild what they need on chip;
    # PyTorch's parts would have to run the forward pass again
    keeps: tuple[str, ...] = ()
    joint_keeps: tuple[str, ...] = ("o_shared", "lse_shared")
    # of o_shared; None: that of q
    shared_dtype: torch.dtype | None = None

    @property
    def takes_rule(self) -> bool:
        """Whether its operators of cross-attention have an argument for it."""
        return len(self.rules) > 1

    def fuses(self, rule: str, differentiable: bool) -> bool:
        """Whether one operator of cross-attention serves a call with this rule."""
        return rule in self.rules and (not differentiable or rule in self.backward_rules)

    def fuses_joint(self, rule: str, differentiable: bool) -> bool:
        return rule in self.joint_rules and (
            not differentiable or rule in self.joint_backward_rules
        )


def _cpu_record() -> Backend:
    record = Backend(
        "cpu",
        devices=("cpu",),
        dtypes=(*_HALVES, torch.float32),
        has_pair=True,
        keeps=("z_pos", "lse_pos", "z_neg", "lse_neg"),
        shared_dtype=torch.float32,
    )
    if _cpu.load() is None:
        return record._replace(
            rules=CROSS_RULES, backward_rules=CROSS_RULES,
            joint_rules=RULES, joint_backward_rules=RULES, has_nag=True,
        )  # fmt: skip
    cross, joint = "nasa_kernels._cpu.attention", "nasa_kernels._cpu.joint"
    return record._replace(cross=Modules(cross, cross), joint=Modules(joint, joint))


RECORDS = {
    record.name: record
    for record in (
        Backend(
            "cuda",
            devices=("cuda",),
            dtypes=_HALVES,
            joint=Modules("nasa_kernels._cuda.joint", "nasa_kernels._cuda.joint"),
            rules=("nasa", "projected"),
            joint_rules=RULES,
            checks=True,
            has_nag=True,
        ),
        Backend(
            "triton",
            devices=("cuda", "cpu"),
            dtypes=(*_HALVES, torch.float32),
            cross=Modules("nasa_kernels._triton.forward", "nasa_kernels._triton.backward"),
            joint=Modules("nasa_kernels._triton.joint", "nasa_kernels._triton.joint_backward"),
            checks=True,
            rules=CROSS_RULES,
            backward_rules=CROSS_RULES,
            joint_rules=RULES,
            has_nag=True,
            has_pair=True,
        ),
        _cpu_record(),
        Backend("sdpa", devices=(), dtypes=(*_HALVES, torch.float32)),
        Backend(
            "reference", devices=("cuda", "cpu"), dtypes=(*_HALVES, torch.float32, torch.float64)
        ),
    )
}
NAMES = tuple(RECORDS)
# those made of PyTorch's own operators, and those with operators of ours
PLAIN = ("sdpa", "reference")
FUSED = tuple(name for name in NAMES if name not in PLAIN)
MAX_HEAD_DIM = max(record.max_head_dim for record in RECORDS.values())

# What `None` takes, by device. The CUDA C++ kernels come before Triton when a benchmark row shows
# that they win. On meta tensors nothing runs: a fused operator gives shape and FLOPs.
_PREFERENCE = {
    "cuda": ("triton", "cuda", "sdpa", "reference"),
    "cpu": ("cpu", "reference"),
    "meta": ("triton", "cpu"),
}
_ELSEWHERE = ("sdpa", "reference")


@functools.cache
def why_not(name: str, device: torch.device) -> str | None:
    """None when back end `name` runs on tensors of `device`, otherwise one sentence why not."""
    if name in PLAIN:
        return None
    if name == "cpu":
        return None if device.type in ("cpu", "meta") else "it runs on CPU tensors only"
    if device.type == "meta":
        return None
    if name == "cuda":
        return extension.why_not(device)
    if (reason := _why_not_triton()) is not None:
        return reason
    if device.type == "cuda":
        if torch.version.hip is not None:
            return "its kernels were never run on an AMD GPU"
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


def _why_not_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; pip install 'triton>=3.6'"
    for package in ("triton", "triton-windows", "pytorch-triton"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        major, minor = re.findall(r"\d+", version)[:2]
        if (int(major), int(minor)) < _TRITON:
            return f"its kernels need Triton 3.6 or newer, {package} {version} is installed"
        return None
    return None


def why_not_head_dim(
    name: str, device: torch.device, head_dim: int, differentiable: bool = False
) -> str | None:
    """None when a back end that runs on `device` takes this head_dim there, otherwise why not."""
    if head_dim > RECORDS[name].max_head_dim:
        return f"its kernels take a head_dim of 1 to {RECORDS[name].max_head_dim}, got {head_dim}"
    if name != "cuda" or device.type != "cuda":
        return None
    return _kernel_refusal(device, head_dim, differentiable)


@torch.compiler.assume_constant_result
def _kernel_refusal(device: torch.device, head_dim: int, backward: bool) -> str | None:
    return extension.why_not_head_dim(device, head_dim, backward)


@torch.compiler.assume_constant_result
def available(device: torch.device) -> tuple[str, ...]:
    """The back ends that run on tensors of `device`, in the order of `NAMES`."""
    return tuple(name for name in NAMES if why_not(name, device) is None)


_running: dict[tuple[torch.device, torch.dtype], tuple[str, ...]] = {}


@torch.compiler.assume_constant_result
def _candidates(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    # a dictionary and not functools.cache: the compiler does not look through the latter
    found = _running.get((device, dtype))
    if found is None:
        found = _running[device, dtype] = tuple(
            name
            for name in _PREFERENCE.get(device.type, _ELSEWHERE)
            if dtype in RECORDS[name].dtypes and why_not(name, device) is None
        )
    return found


def choose(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int = 64,
    differentiable: bool = False,
) -> str:
    """The back end that `backend=None` takes."""
    for name in _candidates(device, dtype):
        if why_not_head_dim(name, device, head_dim, differentiable) is None:
            return name
    return "reference"


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
    if q.dtype not in RECORDS[name].dtypes:
        dtypes = ", ".join(str(dtype) for dtype in RECORDS[name].dtypes)
        raise ValueError(
            f"{function}: backend {name!r} takes {dtypes}, got q of {q.dtype}; "
            "cast the inputs or use backend='reference'"
        )
    reason = why_not_head_dim(name, q.device, q.shape[3], differentiable)
    if reason is not None:
        raise ValueError(f"{function}: backend {name!r} does not take this call: {reason}")


@torch.compiler.assume_constant_result
def _refusal(name: str, device: torch.device) -> str | None:
    return why_not(name, device)
