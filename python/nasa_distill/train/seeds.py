"""Where every random number comes from."""

from __future__ import annotations

import torch


def generator(seed: int, step: int, process: int = 0) -> torch.Generator:
    """The noise of a step depends on seed, step and process alone: there is no state to resume."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 1_009 + process)
