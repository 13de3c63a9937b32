"""The rule "projected" for the back ends whose operators do not know it: Z+ and Z- come apart, from
the operators that they have, and are put together here, in plain PyTorch and in fp32.

    O = r (Z+ - alpha D)        D = Z- - t Z+        r = 1 / sqrt(1 + alpha^2 s)
    t = <Z-, Z+> / <Z+, Z+>     s = <D, D> / <Z+, Z+>

per head and query; `reference.project` is the formula, and this file its gradient. Of G = dO:

    g_p = <G, Z+>       g_d = <G, D>        dr = g_p - alpha g_d
    dalpha = -r g_d - alpha s r^3 dr        ds = -alpha^2 r^3 dr / 2
    dZ- = -alpha r (G - g_p Z+ / <Z+, Z+>) + 2 ds D / <Z+, Z+>
    dZ+ = r (1 + alpha t) G + ((alpha r g_p - 2 t ds) D - (alpha r g_p t + 2 s ds) Z+) / <Z+, Z+>

A row of zeros in Z+ has dZ+ = G, and 0 for the others. Kept for the backward pass are Z+, Z- and
alpha; all else is three sums of each row, made again.
"""

import torch
from torch import Tensor

from nasa_kernels.reference import looked_at, project


def blend(z_pos: Tensor, z_neg: Tensor, alpha_map: Tensor | None, alpha: float) -> Tensor:
    """O [b, l, h, d] of the rule, in the dtype of Z+ and contiguous.

    alpha_map: [b, l, h] in fp32, or None and then alpha is the strength. Z- may be in fp32.
    """
    inputs = (z_pos, z_neg) if alpha_map is None else (z_pos, z_neg, alpha_map)
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return _Blend.apply(z_pos, z_neg, alpha_map, alpha)
    return _forward(z_pos, z_neg, alpha_map, alpha)


def weighted(z_neg: Tensor, alpha_map: Tensor | None, alpha: float) -> Tensor:
    """alpha Z- in fp32. Over several negative prompts it adds up, and `blend` of the sum under
    alpha 1 takes what each alone would take, since a projection is linear.
    """
    z_neg = z_neg.to(_computed_in(z_neg))
    if alpha_map is None:
        return alpha * z_neg
    weight = _per_row(alpha_map, z_neg)
    return weight * looked_at(z_neg, weight)


def gradients(
    grad_o: Tensor, z_pos: Tensor, z_neg: Tensor, alpha_map: Tensor | None, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dZ+, dZ- [b, l, h, d] and dalpha [b, l, h], in fp32 (fp64 of fp64)."""
    dtype = _computed_in(z_pos)
    g, p, n = (x.to(dtype) for x in (grad_o, z_pos, z_neg))
    a: float | Tensor = alpha
    if alpha_map is not None:
        a = _per_row(alpha_map, p)
        n = looked_at(n, a)
    # [b, l, h, 1]
    squared = _dot(p, p)
    exists = squared > 0
    squared = torch.where(exists, squared, 1.0)
    t = _dot(n, p) / squared
    d = n - t * p
    s = _dot(d, d) / squared
    r = 1 / (1 + a * a * s).sqrt()

    g_p, g_d = _dot(g, p), _dot(g, d)
    # r^3 dr
    dr = r * r * r * (g_p - a * g_d)
    ds = -0.5 * a * a * dr
    # of dO, what t takes along Z+
    along = a * r * g_p
    dz_neg = a * r * (g_p / squared * p - g) + 2 * ds / squared * d
    dz_pos = r * (1 + a * t) * g + (
        (along - 2 * t * ds) / squared * d - (along * t + 2 * s * ds) / squared * p
    )
    dalpha = -r * g_d - a * s * dr
    return (
        torch.where(exists, dz_pos, g),
        torch.where(exists, dz_neg, 0.0),
        torch.where(exists, dalpha, 0.0).squeeze(-1),
    )


class _Blend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z_pos, z_neg, alpha_map, alpha):
        ctx.save_for_backward(z_pos, z_neg, alpha_map)
        ctx.alpha = alpha
        return _forward(z_pos, z_neg, alpha_map, alpha)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_o):
        z_pos, z_neg, alpha_map = ctx.saved_tensors
        dz_pos, dz_neg, dalpha = gradients(grad_o, z_pos, z_neg, alpha_map, ctx.alpha)
        needs = ctx.needs_input_grad
        return (
            dz_pos.to(z_pos.dtype) if needs[0] else None,
            dz_neg.to(z_neg.dtype) if needs[1] else None,
            dalpha if needs[2] else None,
            None,
        )


def _forward(z_pos: Tensor, z_neg: Tensor, alpha_map: Tensor | None, alpha: float) -> Tensor:
    dtype = _computed_in(z_pos)
    p, n = z_pos.to(dtype), z_neg.to(dtype)
    o = project(p, n, alpha if alpha_map is None else _per_row(alpha_map, p))
    return o.to(z_pos.dtype).contiguous()


def _computed_in(z: Tensor) -> torch.dtype:
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def _per_row(alpha_map: Tensor, z: Tensor) -> Tensor:
    """[b, l, h] -> [b, l, h, 1]"""
    return alpha_map.to(z.dtype).unsqueeze(-1)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """<x, y> of each row: [b, l, h, 1]."""
    return (x * y).sum(-1, keepdim=True)
