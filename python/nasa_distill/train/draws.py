"""What is random in a step: prompts, noise, strengths, timesteps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nasa_distill.train.config import Settings


@dataclass
class Draws:
    """The random part of one micro-batch."""

    prompts: list[str]
    negatives: list[str]
    z: Tensor
    alpha: Tensor  # [b], one value or 0
    kappa: Tensor  # [b, 1, 1, 1]
    random: torch.Generator

    @staticmethod
    def of(
        settings: Settings,
        prompts: Sequence[str],
        negatives: Sequence[str],
        latent: tuple[int, int, int],
        rows: int,
        random: torch.Generator,
        alpha: float,
    ) -> Draws:
        def choose(pool: Sequence[str]) -> list[str]:
            return [pool[i] for i in torch.randint(len(pool), (rows,), generator=random)]

        chosen = choose(prompts)
        against = choose(negatives) if settings.needs_negatives else []
        low, high = settings.kappa
        kappa = low + (high - low) * torch.rand(rows, generator=random)
        keep = torch.rand(rows, generator=random) >= settings.p_no_negative
        z = torch.randn(rows, *latent, generator=random)
        return Draws(chosen, against, z, alpha * keep, kappa.view(-1, 1, 1, 1), random)

    def normal(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.random).to(like.device)

    def timesteps(self, low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, (len(self.prompts),), generator=self.random)
