"""The exact judge: the render nearest to an image, and the distance to it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nasa_distill.world.captions import read
from nasa_distill.world.scene import ATTRIBUTES, RATES, renders, scenes

# mean squared distance to the nearest render, images in [-1, 1]: a PSNR of 23 dB. The latent code
# alone makes up to 0.011
VALID_BELOW = 0.02


class Verdict(NamedTuple):
    """What the judge says of `b` images."""

    scene: Tensor  # [b] index into scenes()
    residual: Tensor  # [b] mean squared distance to the nearest render
    values: Tensor  # [b, 6] index of each attribute's value in RATES

    @property
    def valid(self) -> Tensor:
        """Whether the image is one of the world: `[b]` bool."""
        return self.residual < VALID_BELOW

    def shows(self, caption: str) -> Tensor:
        """Whether any value that the caption names is in the image: `[b]` bool."""
        return self._matches(caption).any(1)

    def follows(self, caption: str) -> Tensor:
        """Whether every attribute that the caption names has a value it names: `[b]` bool."""
        return self._matches(caption).sum(1) == len(read(caption))

    def _matches(self, caption: str) -> Tensor:
        """For each attribute, whether the image has a value that the caption names: `[b, 6]`."""
        named = read(caption)
        allowed = torch.zeros(len(ATTRIBUTES), max(len(v) for v in RATES.values()))
        for row, name in enumerate(ATTRIBUTES):
            for column, value in enumerate(RATES[name]):
                allowed[row, column] = value in named.get(name, ())
        return allowed[torch.arange(len(ATTRIBUTES)), self.values.cpu()].bool()


@torch.no_grad()
def judge(images: Tensor) -> Verdict:
    """Find the render nearest to each image, in mean squared distance.

    Exact on the world's own images: all renders differ.

    Args:
        images: `[b, 3, 32, 32]` in [-1, 1]; values outside are clamped, as on a screen.

    Raises:
        ValueError: The images have another shape or are not finite.
    """
    known, _ = renders()
    if images.dim() != 4 or images.shape[1:] != known.shape[1:]:
        raise ValueError(
            f"judge: images must be [b, {', '.join(map(str, known.shape[1:]))}] in [-1, 1], got "
            f"{list(images.shape)}"
        )
    if not torch.isfinite(images).all():
        raise ValueError("judge: images must be finite, got nan or inf; the model has diverged")
    pixels = images.detach().float().cpu().clamp(-1, 1).flatten(1)
    known = known.flatten(1)
    # |x - r|^2 without |x|^2, which is the same for every render
    nearest = (known.square().sum(1) - 2 * pixels @ known.T).argmin(1)
    residual = (pixels - known[nearest]).square().mean(1)
    values = torch.tensor(
        [
            [list(RATES[name]).index(getattr(scene, name)) for name in ATTRIBUTES]
            for scene in scenes()
        ]
    )
    return Verdict(nearest, residual, values[nearest])
