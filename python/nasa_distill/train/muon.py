"""Muon (Jordan et al., 2024): momentum whose singular values are all made 1."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

# of the quintic that takes singular values towards 1, from Jordan's implementation
QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
OUTER = {"conv_in", "conv_out", "pos_embed"}  # of images: first and last layers


class Muon(torch.optim.Optimizer):
    """For matrices, and for convolutions `[out, in, h, w]` as the matrices `[out, in h w]`.

        m <- 0.95 m + 0.05 g,    p <- p - lr sqrt(max(1, rows / columns)) U V^T

    where `U S V^T` is `g` moved to `m` by as much again (Nesterov). `torch.optim.Muon` takes no
    convolutions.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient, state = parameter.grad, self.state[parameter]
                if gradient is None:
                    continue
                mean = state.setdefault("mean", torch.zeros_like(parameter))
                mean.lerp_(gradient, 1 - group["momentum"])
                update = gradient.lerp(mean, group["momentum"]).flatten(1)
                rows, columns = update.shape
                scale = max(1.0, rows / columns) ** 0.5
                update = orthogonal(update).view(parameter.shape)
                parameter.sub_(update, alpha=group["lr"] * scale)


def orthogonal(matrix: Tensor) -> Tensor:
    """About `U V^T` of `U S V^T`, by Newton and Schulz: singular values between 0.7 and 1.2."""
    a, b, c = QUINTIC
    x = matrix / (matrix.norm() + 1e-7)
    wide = x.T if x.shape[0] > x.shape[1] else x
    for _ in range(ITERATIONS):
        square = wide @ wide.T
        wide = a * wide + (b * square + c * square @ square) @ wide
    return wide.T if x.shape[0] > x.shape[1] else wide


def split(module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters for Muon, the matrices between the first layer and the last; and the others."""
    inner: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in module.named_parameters():
        is_outer = parameter.dim() < 2 or not OUTER.isdisjoint(name.split("."))
        (others if is_outer else inner).append(parameter)
    return inner, others
