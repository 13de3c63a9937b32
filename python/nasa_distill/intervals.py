"""Shares with their uncertainty."""

from __future__ import annotations

import math
from dataclasses import dataclass

Z = 1.959964  # of a 95 % interval


@dataclass(frozen=True)
class Share:
    """`count` of `n`, with Wilson's 95 % interval."""

    count: int
    n: int

    @property
    def value(self) -> float:
        return self.count / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Low and high end (Wilson, 1927); (0, 1) where nothing was counted."""
        if not self.n:
            return 0.0, 1.0
        p, n = self.value, self.n
        centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
        half = Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
        return max(0.0, centre - half), min(1.0, centre + half)

    def __str__(self) -> str:
        """In percent: `56.1 (53.2-59.0)`."""
        if not self.n:
            return "-"
        low, high = self.interval
        return f"{100 * self.value:.1f} ({100 * low:.1f}-{100 * high:.1f})"
