"""The gate: a result that is wrong gets no row.

The exact result is that of the fp64 reference on the same inputs. The accuracy rule of
`nasa_kernels.testing` holds for our back ends as it stands; what others made may lose twice that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nasa_kernels import nasa_attention_reference
from nasa_kernels.testing import Budget, algorithm_1, budget, exact_and_budget, largest_score

SLACK_OF_OTHERS = 2.0
# fp64 scores of one prompt that are held at a time
CHUNK_BYTES = 2**28


class WrongResult(Exception):
    """A result that does not pass; no time of it is written."""


@dataclass
class Errors:
    """The largest error, and the relative L2 error of the worst tensor."""

    largest: float = 0.0
    l2: float = 0.0

    def columns(self) -> dict[str, Any]:
        return {"max_error": self.largest, "l2_error": self.l2, "error_against": "fp64"}


def check_whole(o: Tensor, exact: Tensor, allowed: Budget, slack: float) -> Errors:
    """Compare O with fp64 at once; of fewer rows than all, with the first ones."""
    exact = exact[:, : o.shape[1]]
    _check("O", o, exact, allowed, slack)
    difference = o.double() - exact
    return Errors(difference.abs().max().item(), (difference.norm() / exact.norm()).item())


def check_forward(
    o: Tensor,
    inputs: dict[str, Tensor],
    alpha: float,
    slack: float,
    exactly: Callable[..., tuple[Tensor, Budget]] = exact_and_budget,
) -> Errors:
    """Compare O with fp64, all of its rows, some at a time."""
    q = inputs["q"]
    b, l, h, _ = q.shape
    if o.shape != q.shape:
        raise WrongResult(f"O has the shape {list(o.shape)} instead of {list(q.shape)}")
    keys = max(inputs["k_pos"].shape[1], inputs["k_neg"].shape[1], 1)
    rows = max(1, CHUNK_BYTES // (8 * b * h * keys))
    largest, error, size = 0.0, 0.0, 0.0
    for first in range(0, l, rows):
        part = slice(first, first + rows)
        exact, allowed = exactly(inputs | {"q": q[:, part]}, alpha)
        _check(f"O[:, {first}:{first + rows}]", o[:, part], exact, allowed, slack)
        difference = o[:, part].double() - exact
        largest = max(largest, difference.abs().max().item())
        error += difference.square().sum().item()
        size += exact.square().sum().item()
    return Errors(largest, (error / size) ** 0.5)


def check_backward(
    gradients: dict[str, Tensor],
    inputs: dict[str, Tensor],
    grad_o: Tensor,
    alpha: float,
    slack: float,
) -> Errors:
    """Compare the gradients named in `gradients` with fp64, sample by sample of the batch."""
    errors = Errors()
    for i in range(len(grad_o)):
        one = {name: x[i : i + 1] for name, x in inputs.items()}
        upstream = grad_o[i : i + 1]
        doubles = {name: x.double() for name, x in one.items()}
        exact = gradients_of(nasa_attention_reference, doubles, alpha, upstream.double(), gradients)
        eager = gradients_of(algorithm_1, one, alpha, upstream, gradients)
        score = largest_score(one)
        for name, expected in exact.items():
            # weights, dO V^T - u, their product, the result
            allowed = budget(expected, eager[name], score, grad_o.dtype, roundings=4)
            actual = gradients[name][i : i + 1]
            _check(f"the gradient of {name}", actual, expected, allowed, slack)
            difference = actual.double() - expected
            errors.largest = max(errors.largest, difference.abs().max().item())
            errors.l2 = max(errors.l2, (difference.norm() / expected.norm()).item())
    return errors


def gradients_of(
    function: Callable[..., Tensor],
    inputs: dict[str, Tensor],
    alpha: float,
    grad_o: Tensor,
    names: Iterable[str],
) -> dict[str, Tensor]:
    leaves: dict[str, Any] = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    wanted = list(names)
    with torch.enable_grad():
        o = function(**leaves, alpha=alpha)
        found = torch.autograd.grad(
            o, [leaves[name] for name in wanted], grad_o, allow_unused=True, materialize_grads=True
        )
    return dict(zip(wanted, found, strict=True))


def _check(what: str, actual: Tensor, exact: Tensor, allowed: Budget, slack: float) -> None:
    try:
        Budget(allowed.l2 * slack, allowed.worst * slack).check(actual, exact, what)
    except AssertionError as error:
        raise WrongResult(str(error)) from None
