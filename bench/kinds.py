"""Calls other than `nasa_attention` over two whole prompts: masked prompts, other rules, joint
attention. Each kind says what its inputs are, what ours is, what one would write instead, and what
is exact. Forward only.

    masked      cross-attention, of whose tokens few are valid
    projected   cross-attention by the rule "projected"
    nag         normalised attention guidance in cross-attention
    joint       [image; texts] against themselves by the rule "nasa"; both texts have queries
    joint-projected, joint-nag
    grouped     cross-attention whose keys have fewer heads than the queries; joint-grouped, joint
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import baselines
from bench.attention import sdpa
from bench.work import FORWARD_INSTRUCTIONS, Work, attention_work
from nasa_kernels import nag_attention, nag_joint_attention, nasa_attention, nasa_joint_attention
from nasa_kernels.testing import (
    Budget,
    Shape,
    budget,
    eager_attention,
    exact_and_budget,
    exact_and_budget_of_joint,
    largest_score,
    make_inputs,
)

Inputs = dict[str, Any]
# valid tokens of the positive and of the negative prompt
VALID = 25, 12
NAG: dict[str, Any] = {"nag_scale": 5.0, "nag_tau": 2.5, "nag_alpha": 0.25}
# heads of the queries to one of the keys, by model
GROUPS = {"krea2": 4, "lumina2": 3, "ace-step": 2}
NOTHING = 0.0  # the alpha at which a call is one without a negative prompt


class Kind(NamedTuple):
    make: Callable[[Shape, torch.dtype, torch.device], Inputs]
    # of inputs, alpha and back end
    ours: Callable[[Inputs, float, str], Tensor]
    # what one would write instead, in PyTorch; and what a model without a negative prompt does
    two_calls: Callable[[Inputs, float], Tensor]
    stock: Callable[[Inputs], Tensor]
    # the fp64 result, and what it may be missed by. Of some rows where `is_by_row`
    exact: Callable[[Inputs, float], tuple[Tensor, Budget]]
    work: Callable[[Shape, torch.dtype, bool], Work]
    is_by_row: bool = True


# ---- cross-attention -----------------------------------------------------------------------------


def _z(x: Inputs, prompt: str) -> Tensor:
    return sdpa(x["q"], x[f"k_{prompt}"], x[f"v_{prompt}"], x.get(f"mask_{prompt}"))


def _stock(x: Inputs) -> Tensor:
    return _z(x, "pos")


def _make_masked(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    def mask(n: int, valid: int) -> Tensor:
        return (torch.arange(n, device=device) < valid).expand(shape.b, n)

    masks = {"mask_pos": mask(shape.n_pos, VALID[0]), "mask_neg": mask(shape.n_neg, VALID[1])}
    return make_inputs(shape, dtype, device) | masks


def _masked_work(shape: Shape, dtype: torch.dtype, guided: bool) -> Work:
    return _work(shape._replace(n_pos=VALID[0], n_neg=VALID[1]), dtype, guided)


def _work(shape: Shape, dtype: torch.dtype, guided: bool) -> Work:
    return attention_work(shape, dtype, guided=guided)


def _exact(x: Inputs, alpha: float, **options: Any) -> tuple[Tensor, Budget]:
    masks = {name: mask for name, mask in x.items() if name.startswith("mask")}
    tensors = {name: y for name, y in x.items() if name not in masks}
    return exact_and_budget(tensors, alpha, **masks, **options)


def _group(shape: Shape) -> int:
    return GROUPS.get(shape.name, 2)


def _few_heads(shape: Shape, x: Inputs) -> Inputs:
    """A head of keys for each group of heads of the queries."""
    of_keys = slice(None, None, _group(shape))
    return {name: y if name == "q" else y[:, :, of_keys].contiguous() for name, y in x.items()}


def _fewer_bytes(shape: Shape, dtype: torch.dtype, work: Work, keys: int) -> Work:
    """Of so many tokens, K and V of each, whose heads are fewer."""
    left_out = shape.b * (shape.h - shape.h // _group(shape)) * shape.d * 2 * keys
    return replace(work, bytes=work.bytes - left_out * dtype.itemsize)


def _grouped_work(shape: Shape, dtype: torch.dtype, guided: bool) -> Work:
    keys = shape.n_pos + (shape.n_neg if guided else 0)
    return _fewer_bytes(shape, dtype, _work(shape, dtype, guided), keys)


def project(z_pos: Tensor, z_neg: Tensor, alpha: float) -> Tensor:
    """The rule "projected" as one would write it."""
    squared = z_pos.square().sum(-1, keepdim=True)
    d = z_neg - (z_neg * z_pos).sum(-1, keepdim=True) / squared * z_pos
    guided = z_pos - alpha * d
    return guided * (z_pos.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


def _nag_settings(alpha: float) -> dict[str, Any]:
    return NAG if alpha != NOTHING else NAG | {"nag_alpha": 0.0}


def _blend(z_pos: Tensor, z_neg: Tensor) -> Tensor:
    """As published."""
    o = baselines.nag(z_pos.flatten(2), z_neg.flatten(2))
    return o.unflatten(2, z_pos.shape[2:])


def _nag_exact(x: Inputs, alpha: float) -> tuple[Tensor, Budget]:
    doubles = {name: y.double() for name, y in x.items()}
    exact = nag_attention(**doubles, **_nag_settings(alpha), backend="reference")
    scale = x["q"].shape[-1] ** -0.5
    z_pos, z_neg = (
        eager_attention(x["q"], x[f"k_{name}"], x[f"v_{name}"], None, scale)
        for name in ("pos", "neg")
    )
    eager = z_pos if alpha == NOTHING else _blend(z_pos, z_neg)
    return exact, budget(exact, eager, largest_score(x), x["q"].dtype, roundings=4)


# ---- joint attention -----------------------------------------------------------------------------


def _make_joint(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """`shape.l` queries and keys of the image, then each text's."""
    generator = torch.Generator().manual_seed(0)

    def normal(n: int) -> Tensor:
        x = torch.randn(shape.b, n, shape.h, shape.d, generator=generator)
        return x.to(device=device, dtype=dtype)

    lengths = {
        "q": shape.l + shape.n_pos + shape.n_neg,
        "k": shape.l, "v": shape.l,
        "k_pos": shape.n_pos, "v_pos": shape.n_pos,
        "k_neg": shape.n_neg, "v_neg": shape.n_neg,
    }  # fmt: skip
    return {name: normal(n) for name, n in lengths.items()}


def _texts(x: Inputs) -> tuple[int, int]:
    return x["k_pos"].shape[1], x["k_neg"].shape[1]


def _joined(x: Inputs, prompt: str) -> tuple[Tensor, Tensor]:
    return tuple(torch.cat((x[c], x[f"{c}_{prompt}"]), 1) for c in "kv")  # type: ignore[return-value]


def _joint_stock(x: Inputs) -> Tensor:
    """Of the image's and the positive text's queries."""
    l = x["q"].shape[1] - _texts(x)[1]
    return sdpa(x["q"][:, :l], *_joined(x, "pos"))


def _joint_two_calls(x: Inputs, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    image = x["k"].shape[1]
    n_pos, _ = _texts(x)
    q_neg = torch.cat((x["q"][:, :image], x["q"][:, image + n_pos :]), 1)
    pos, neg = _joint_stock(x), sdpa(q_neg, *_joined(x, "neg"))
    o = combine(pos[:, :image], neg[:, :image])
    return torch.cat((o, pos[:, image:], neg[:, image:]), 1)


def _joint_exact(x: Inputs, alpha: float, rule: str) -> tuple[Tensor, Budget]:
    return exact_and_budget_of_joint(x, alpha, rule, _texts(x))


def _joint_nag_exact(x: Inputs, alpha: float) -> tuple[Tensor, Budget]:
    options: dict[str, Any] = {"text_queries": _texts(x), "backend": "reference"}
    doubles = {name: y.double() for name, y in x.items()}
    exact = nag_joint_attention(**doubles, **_nag_settings(alpha), **options)
    if alpha == NOTHING:
        return exact, exact_and_budget_of_joint(x, 0.0, "nasa", _texts(x))[1]
    eager = _joint_two_calls(x, _blend)
    return exact, budget(exact, eager, largest_score(x), x["q"].dtype, roundings=5)


def _joint_work(shape: Shape, dtype: torch.dtype, guided: bool) -> Work:
    """Scores of each part of the queries; Q, O, K and V of all parts once."""
    image, pos, neg = shape.l, shape.n_pos, shape.n_neg if guided else 0
    pairs = image * (image + pos + neg) + pos * (image + pos) + neg * (image + neg)
    scores, rows = shape.b * shape.h * pairs, shape.b * shape.h * (image + pos + neg)
    return Work(
        bytes=4 * rows * shape.d * dtype.itemsize,
        flops=4 * scores * shape.d,
        exponentials=scores,
        instructions=int(FORWARD_INSTRUCTIONS * scores),
    )


def _joint_grouped_work(shape: Shape, dtype: torch.dtype, guided: bool) -> Work:
    keys = shape.l + shape.n_pos + (shape.n_neg if guided else 0)
    return _fewer_bytes(shape, dtype, _joint_work(shape, dtype, guided), keys)


# ---- the kinds -----------------------------------------------------------------------------------


def _joint(rule: str, combine: Callable[[Tensor, Tensor, float], Tensor]) -> Kind:
    return Kind(
        _make_joint,
        lambda x, alpha, backend: nasa_joint_attention(
            **x, alpha=alpha, rule=rule, text_queries=_texts(x), backend=backend
        ),
        lambda x, alpha: _joint_two_calls(x, lambda p, n: combine(p, n, alpha)),
        _joint_stock,
        lambda x, alpha: _joint_exact(x, alpha, rule),
        _joint_work,
        is_by_row=False,
    )


KINDS: dict[str, Kind] = {
    "masked": Kind(
        _make_masked,
        lambda x, alpha, backend: nasa_attention(**x, alpha=alpha, backend=backend),
        lambda x, alpha: _z(x, "pos") - alpha * _z(x, "neg"),
        _stock,
        _exact,
        _masked_work,
    ),
    "projected": Kind(
        make_inputs,
        lambda x, alpha, backend: nasa_attention(
            **x, alpha=alpha, rule="projected", backend=backend
        ),
        lambda x, alpha: project(_z(x, "pos"), _z(x, "neg"), alpha),
        _stock,
        lambda x, alpha: _exact(x, alpha, rule="projected"),
        _work,
    ),
    "nag": Kind(
        make_inputs,
        lambda x, alpha, backend: nag_attention(**x, **_nag_settings(alpha), backend=backend),
        lambda x, alpha: _blend(_z(x, "pos"), _z(x, "neg")),
        _stock,
        _nag_exact,
        _work,
    ),
    "grouped": Kind(
        lambda shape, dtype, device: _few_heads(shape, make_inputs(shape, dtype, device)),
        lambda x, alpha, backend: nasa_attention(**x, alpha=alpha, backend=backend),
        lambda x, alpha: _z(x, "pos") - alpha * _z(x, "neg"),
        _stock,
        _exact,
        _grouped_work,
    ),
    "joint": _joint("nasa", lambda p, n, alpha: p - alpha * n),
    "joint-grouped": _joint("nasa", lambda p, n, alpha: p - alpha * n)._replace(
        make=lambda shape, dtype, device: _few_heads(shape, _make_joint(shape, dtype, device)),
        work=_joint_grouped_work,
    ),
    "joint-projected": _joint("projected", project),
    "joint-nag": Kind(
        _make_joint,
        lambda x, alpha, backend: nag_joint_attention(
            **x, **_nag_settings(alpha), text_queries=_texts(x), backend=backend
        ),
        lambda x, alpha: _joint_two_calls(x, _blend),
        _joint_stock,
        _joint_nag_exact,
        _joint_work,
        is_by_row=False,
    ),
}
