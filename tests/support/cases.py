"""The cases that every back end has to pass, and small helpers to build them."""

from typing import Any

import torch
from torch import Tensor

from nasa_kernels import backends
from nasa_kernels.reference import RULES
from nasa_kernels.testing import MODEL_SHAPES, Shape, make_inputs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FUSED = backends.FUSED
# the fused back ends that run on this machine; Triton on a CPU is its interpreter
BACKENDS = tuple(name for name in backends.NAMES if backends.why_not(name, DEVICE) is None)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Every head_dim and length of the supported models, queries cut to what the interpreter can do.
MODELS = tuple(
    shape._replace(l=min(shape.l, 80 if shape.n_pos < 300 else 33), h=2) for shape in MODEL_SHAPES
)
EDGES = (
    Shape("one-of-each", 1, 1, 1, 8, 1, 1),
    Shape("odd-d", 1, 65, 2, 33, 17, 31),
    Shape("smallest-d", 2, 3, 1, 1, 5, 2),
    Shape("widest-d", 1, 19, 1, 256, 40, 77),
    Shape("d100", 1, 70, 1, 100, 13, 16),
    Shape("no-negative-keys", 2, 33, 2, 64, 77, 0),
    Shape("no-positive-keys", 2, 33, 2, 64, 0, 77),
    Shape("no-keys", 1, 5, 1, 16, 0, 0),
    Shape("no-queries", 2, 0, 2, 64, 77, 77),
    Shape("no-batch", 0, 4, 2, 64, 77, 77),
    Shape("short-and-long", 1, 40, 1, 64, 77, 513),
    Shape("long-and-short", 1, 40, 1, 64, 513, 77),
    Shape("block-edge", 1, 64, 1, 64, 128, 129),
    Shape("tiles", 1, 193, 2, 40, 96, 112),
    Shape("longest", 1, 17, 1, 16, 4096, 4095),
)


def strided(x: Tensor) -> Tensor:
    """The same values as a slice of a larger [b, h, n, d] buffer full of NaN."""
    b, n, h, d = x.shape
    buffer = torch.full((b, h + 1, n + 2, d + 3), float("nan"), dtype=x.dtype, device=x.device)
    view = buffer[:, 1:, 1 : n + 1, 2 : d + 2].transpose(1, 2)
    view.copy_(x)
    return view


def mask_of(kind: str, b: int, n: int, seed: int = 1) -> Tensor:
    """`bool`, `bias` (0, -inf and finite) or `huge` (0 and -10000): [b, n], key 0 present."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(b, n, generator=generator) > 0.4
    if n:
        keep[:, 0] = True
    if kind == "bool":
        return keep.to(DEVICE)
    if kind == "huge":
        return torch.where(keep, 0.0, -10000.0).to(DEVICE)
    bias = torch.randn(b, n, generator=generator)
    return torch.where(keep, bias, float("-inf")).to(DEVICE)


def with_rule(operator: Any, arguments: tuple, rule: str = "nasa") -> tuple:
    """The inputs of an operator of cross-attention, with the rule where its back end takes one."""
    takes_rule = "int rule" in str(operator._schema)
    return (*arguments, RULES.index(rule)) if takes_rule else arguments


def refuses_dtype(backend: str | None, error: ValueError) -> bool:
    """Whether a test of every back end met the one refusal there is to be: `cuda` has no fp32."""
    found = f"backend {backend!r} takes torch." in str(error) and "q of torch.float32" in str(error)
    return backend == "cuda" and found


__all__ = [
    "BACKENDS",
    "DEVICE",
    "DTYPES",
    "EDGES",
    "FUSED",
    "MODELS",
    "make_inputs",
    "mask_of",
    "refuses_dtype",
    "strided",
    "with_rule",
]
