"""Averages of weights over the steps of a run, by PyTorch's `AveragedModel`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def average_of(network: nn.Module, decay: Callable[[int], float]) -> AveragedModel:
    """A copy of `network` that `update_parameters(network)` moves by `1 - decay(n)` of the way.

    Args:
        decay: Of the number of averaged networks, 1 at the first update: the copy counts as one.
    """

    def follow(mean: Tensor, now: Tensor, count: Any) -> Tensor:
        return mean.lerp(now, 1 - decay(int(count)))

    average = AveragedModel(network, avg_fn=follow)
    average.eval().requires_grad_(False)
    resume(average, 0)
    return average


def resume(average: AveragedModel, steps: int) -> None:
    """Count as many updates as there were, without the copy that it began with."""
    with torch.no_grad():
        average.n_averaged.fill_(steps + 1)
