"""The exact judge of the larger world: the nearest of its 9984 renders.

What objects a pair has left and right of the middle changes nothing on the other side, so the
nearest pair is the nearest left half and the nearest right half, for every choice of what holds
for the whole image: 1536 halves and 768 single objects are compared, and the result is that of
comparing all.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nasa_distill.world.large.captions import holds, shown
from nasa_distill.world.large.scene import OBJECTS, SIZE, WHOLES, Scene, render, scenes

# of the squared distance to the nearest render, images in [-1, 1], in the mean of the 16x16 pixels
# where it is largest: 26 dB there
VALID_BELOW = 0.01
WINDOW, STRIDE = 16, 4
CHUNK = 256
HALF = SIZE // 2


class Verdict(NamedTuple):
    """What the judge says of `b` images."""

    scene: Tensor  # [b] index into scenes()
    residual: Tensor  # [b] squared distance to its render, in the window where it is largest

    @property
    def valid(self) -> Tensor:
        """Whether the image is one of the world: `[b]` bool."""
        return self.residual < VALID_BELOW

    def shows(self, caption: str) -> Tensor:
        """Whether anything that the caption lists is in the image: `[b]` bool."""
        return shown(caption)[self.scene]

    def follows(self, caption: str) -> Tensor:
        """Whether all that the caption says is true of the image: `[b]` bool."""
        return holds(caption)[self.scene]


def local_distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared distance of two images in the window where it is largest: `[b]`."""
    error = (a - b).square().mean(1, keepdim=True)
    return F.avg_pool2d(error, WINDOW, STRIDE).flatten(1).amax(1)


@cache
def _known() -> tuple[Tensor, Tensor]:
    """Renders of single objects `[12, 64, 12288]`, and halves of pairs `[2, 12, 64, 6144]`."""

    def drawn(objects: list[tuple]) -> Tensor:
        rows = [render([Scene(x, *whole) for whole in WHOLES]) for x in objects]
        return torch.stack(rows)

    singles = drawn([(thing,) for thing in OBJECTS])
    pairs = drawn([(thing, thing) for thing in OBJECTS])
    halves = torch.stack([pairs[..., :HALF], pairs[..., HALF:]])
    return singles.flatten(2), halves.flatten(3)


@torch.no_grad()
def judge(images: Tensor) -> Verdict:
    """Find the render nearest to each image, in mean squared distance.

    Args:
        images: `[b, 3, 64, 64]` in [-1, 1]; values outside are clamped, as on a screen.

    Raises:
        ValueError: The images have another shape or are not finite.
    """
    if images.dim() != 4 or images.shape[1:] != (3, SIZE, SIZE):
        raise ValueError(
            f"judge: images must be [b, 3, {SIZE}, {SIZE}] in [-1, 1], got {list(images.shape)}"
        )
    if not torch.isfinite(images).all():
        raise ValueError("judge: images must be finite, got nan or inf; the model has diverged")
    pixels = images.detach().float().cpu().clamp(-1, 1)
    found = [nearest(x) for x in pixels.split(CHUNK)]
    scene = torch.cat(found) if found else torch.zeros(0, dtype=torch.long)
    if not len(scene):
        return Verdict(scene, torch.zeros(0))
    renders = torch.cat([render([scenes()[i] for i in x.tolist()]) for x in scene.split(CHUNK)])
    return Verdict(scene, local_distance(pixels, renders))


@torch.no_grad()
def nearest(pixels: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Index of the nearest render: `[b]`.

    Args:
        pixels: As of `judge`, in [-1, 1].
        allowed: Which of the scenes it may be, `[b, scenes]`; 0 for those that it may not.
    """
    singles, halves = _known()
    # |x - r|^2 without |x|^2, the same for all renders
    alone = _distances(pixels.flatten(1), singles)  # [b, 12, 64]
    left = _distances(pixels[..., :HALF].flatten(1), halves[0])
    right = _distances(pixels[..., HALF:].flatten(1), halves[1])
    # [b, 12, 12, 64]
    together = left[:, :, None] + right[:, None]
    # in the order of `scenes()`
    every = torch.cat([alone.flatten(1), together.flatten(1)], dim=1)
    if allowed is not None:
        every = every.masked_fill(allowed == 0, torch.inf)
    return every.argmin(1)


def _distances(pixels: Tensor, known: Tensor) -> Tensor:
    """To each of `[12, 64, n]`, but for what is the same for all: `[b, 12, 64]`."""
    flat = known.flatten(0, 1)
    found = flat.square().sum(1) - 2 * pixels @ flat.T
    return found.view(len(pixels), *known.shape[:2])
