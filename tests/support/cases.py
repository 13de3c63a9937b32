"""The cases that every back end has to pass, and small helpers to build them."""

import os
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from nasa_kernels import backends
from nasa_kernels.reference import RULES
from nasa_kernels.testing import MODEL_SHAPES, Shape, make_inputs

# `make test-all`, before a release: what shares its code with something that `make test` has
ALL = os.environ.get("NASA_TEST_ALL") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FUSED = backends.FUSED
# the fused back ends that run on this machine; Triton on a CPU is its interpreter
BACKENDS = tuple(name for name in backends.NAMES if backends.why_not(name, DEVICE) is None)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Every head_dim and length of the supported models, queries cut to what the interpreter can do: of
# those that are one shape then, one.
_CUT = tuple(
    shape._replace(l=min(shape.l, 80 if shape.n_pos < 300 else 33), h=2) for shape in MODEL_SHAPES
)
MODELS = tuple({shape[1:]: shape for shape in _CUT[::-1]}.values())[::-1]
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


def is_long_in_fp32(backend: str, dtype: torch.dtype, keys: int) -> bool:
    """In fp32 Triton streams every prompt, by 16 keys: a longer one takes no other path, and in the
    interpreter it takes seconds."""
    return DEVICE.type == "cpu" and backend == "triton" and dtype == torch.float32 and keys > 128


def crossed(shapes: Sequence[Shape]) -> list[tuple[str, Shape, torch.dtype]]:
    """Every back end, shape and dtype; of Triton in the interpreter, which is slow, fewer.

    These pairs must stay: each shape with fp32, whose blocks are smaller and never hold a prompt,
    and with 16 bits. fp16 and bf16 have the same blocks there, and take turns.
    """
    cases = []
    for backend, (i, shape), dtype in product(BACKENDS, enumerate(shapes), DTYPES):
        if is_long_in_fp32(backend, dtype, max(shape.n_pos, shape.n_neg)):
            shape = shape._replace(l=min(shape.l, 3), h=min(shape.h, 1))
        if DEVICE.type == "cpu" and backend == "triton" and dtype == DTYPES[1 + i % 2]:
            continue
        cases.append((backend, shape, dtype))
    return cases


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
    "ALL",
    "BACKENDS",
    "DEVICE",
    "DTYPES",
    "EDGES",
    "FUSED",
    "MODELS",
    "crossed",
    "is_long_in_fp32",
    "make_inputs",
    "mask_of",
    "refuses_dtype",
    "strided",
    "with_rule",
]
