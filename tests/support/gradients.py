"""Gradients of every back end against those of the formula in fp64, under the accuracy rule."""

import torch
from torch import Tensor

from nasa_kernels import nasa_attention, nasa_joint_attention
from nasa_kernels.testing import (
    Budget,
    budget,
    eager_attention,
    largest_score,
    without_nan,
)
from support import formula


def gradients(function, inputs, alpha, grad_o, **options) -> dict[str, Tensor]:
    """Of all inputs, and of alpha where it is a tensor."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    if isinstance(alpha, Tensor):
        leaves["alpha"] = alpha = alpha.detach().requires_grad_()
    o = function(**{name: leaves[name] for name in inputs}, alpha=alpha, **options)
    # alpha 0 leaves the negative prompt out of the graph of the reference
    found = torch.autograd.grad(
        o, list(leaves.values()), grad_o, allow_unused=True, materialize_grads=True
    )
    return dict(zip(leaves, found, strict=True))


def eager(**call) -> Tensor:
    """Algorithm 1, every step rounded."""
    return formula.nasa(**call, attend=eager_attention)


def eager_joint(**call) -> Tensor:
    """Whole attentions over joined keys, every step rounded."""
    return formula.joint(**call, attend=eager_attention)


def check_gradients(backend, inputs, alpha, **options) -> dict[str, Tensor]:
    # weights, dO V^T - u, their product, the result
    functions = (nasa_attention, formula.nasa, eager)
    roundings = 4 + _more_roundings(options.get("rule"))
    return _check(functions, roundings, backend, inputs, alpha, **options)


def check_joint_gradients(backend, inputs, alpha, rule, text_queries, **masks) -> dict[str, Tensor]:
    # the weights, the attention over the shared keys, dO V^T - u, their product, the result
    functions = (nasa_joint_attention, formula.joint, eager_joint)
    options = {"rule": rule, "text_queries": text_queries, **masks}
    roundings = 5 + _more_roundings(rule)
    return _check(functions, roundings, backend, inputs, alpha, **options)


def _more_roundings(rule: str | None) -> int:
    """Z+, Z- and their gradients, where a back end's operators do not know the rule."""
    return 4 if rule == "projected" else 0


def _check(functions, roundings, backend, inputs, alpha, **options) -> dict[str, Tensor]:
    ours, exactly, eagerly = functions
    q = inputs["q"]
    grad_o = torch.randn(q.shape, generator=torch.Generator().manual_seed(7)).to(q)
    actual = gradients(ours, inputs, alpha, grad_o, backend=backend, **options)
    clean = without_nan(inputs)
    exact_alpha = alpha.double() if isinstance(alpha, Tensor) else alpha
    exact = gradients(exactly, formula.doubles(clean), exact_alpha, grad_o.double(), **options)
    rounded = gradients(eagerly, clean, alpha, grad_o, **options)
    score = largest_score(inputs)
    for name, expected in exact.items():
        assert actual[name].dtype == (torch.float32 if name == "alpha" else q.dtype)
        theirs = rounded[name].nan_to_num(0.0)
        rule = budget(expected, theirs, score, q.dtype, roundings=roundings)
        if name[0] in "qk" and grad_o.numel():
            zero = _budget_of_zero(clean, grad_o, exact_alpha)
            # fp64 does not always come out at 0 either
            rule = zero if expected.norm() <= 2**-29 * zero.l2 else rule
        rule.check(actual[name], expected, f"gradient of {name}")
    return actual


def _budget_of_zero(inputs, grad_o, alpha) -> Budget:
    """Allowed to the gradients of q and of the keys where they are 0: under a softmax of one key.

    They are sums of P (dP - u), in which dP = dO . v and u = dO . Z are equal then. Who adds up
    both in fp32, in different orders, is left with their rounding, also where eager is not.
    """
    longest = {name: x.double().norm(dim=-1).max() for name, x in inputs.items() if x.numel()}
    keys = max(x for name, x in longest.items() if name[0] in "qk")
    values = max((x for name, x in longest.items() if name[0] == "v"), default=0.0)
    weight = 1 + torch.as_tensor(alpha).abs().max()
    of_a_score = 2**-23 * weight * values * grad_o.double().norm(dim=-1).max()
    one = (of_a_score * keys * grad_o.shape[-1] ** -0.5).item()
    return Budget(l2=one * grad_o[..., 0].numel() ** 0.5, worst=one)
