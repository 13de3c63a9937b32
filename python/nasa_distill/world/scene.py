"""The attributes of an image, how often each value occurs, and its render.

An image is one choice of every attribute and one of nine positions, so the images are finitely many
and all of them are known: 288 choices, 2592 renders.
"""

from __future__ import annotations

import itertools
import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

SIZE = 32
# what a prompt leaves open is drawn at these rates
RATES: dict[str, dict[str, float]] = {
    "colour": {"red": 0.4, "green": 0.2, "blue": 0.2, "yellow": 0.2},
    "shape": {"circle": 0.5, "square": 0.25, "triangle": 0.25},
    "texture": {"solid": 0.5, "striped": 0.5},
    "ground": {"black": 0.5, "white": 0.5},
    "size": {"small": 0.5, "large": 0.5},
    "defect": {"clean": 0.5, "blurry": 0.25, "watermarked": 0.25},
}
ATTRIBUTES = tuple(RATES)
RGB = {
    "red": (0.95, 0.1, 0.1),
    "green": (0.1, 0.8, 0.2),
    "blue": (0.2, 0.3, 1.0),
    "yellow": (0.95, 0.85, 0.1),
    "black": (0.06, 0.06, 0.08),
    "white": (0.95, 0.95, 0.95),
    "grey": (0.5, 0.5, 0.5),
}
RADIUS = {"small": 7.0, "large": 10.5}
# whole patches of the latent code, so a render and its shifted twin differ by a shift of the code
OFFSETS = (-4.0, 0.0, 4.0)
STRIPE = 4  # pixels
BLUR = 1.4  # standard deviation in pixels
MARK = 0.6  # opacity of the watermark


class Scene(NamedTuple):
    """One value for every attribute, by name."""

    colour: str
    shape: str
    texture: str
    ground: str
    size: str
    defect: str

    @property
    def rate(self) -> float:
        """How often it occurs, positions aside."""
        return math.prod(RATES[name][getattr(self, name)] for name in ATTRIBUTES)


@cache
def scenes() -> tuple[Scene, ...]:
    return tuple(Scene(*values) for values in itertools.product(*RATES.values()))


def render(scene: Scene, offsets: Tensor | None = None) -> Tensor:
    """`[m, 3, 32, 32]` in [-1, 1], the shape moved by each of the offsets `[m, 2]`: x, y pixels."""
    offsets = torch.zeros(1, 2) if offsets is None else offsets
    axis = torch.arange(SIZE) + 0.5 - SIZE / 2
    # [m, 1, 32] and [m, 32, 1]
    x, y = axis[None, None, :] - offsets[:, :1, None], axis[None, :, None] - offsets[:, 1:, None]
    ground, colour = _rgb(scene.ground), _rgb(scene.colour)
    fill = colour.expand(3, SIZE, SIZE)
    if scene.texture == "striped":
        is_dark = (torch.arange(SIZE) // STRIPE % 2 == 1)[:, None]
        fill = torch.where(is_dark, 0.2 * colour + 0.8 * ground, fill)
    # distance to the outline in pixels, negative inside; one pixel of anti-aliasing
    coverage = (0.5 - _distance(scene.shape, x, y, RADIUS[scene.size])).clamp(0, 1)[:, None]
    image = coverage * fill + (1 - coverage) * ground
    if scene.defect == "blurry":
        image = _blur(image)
    elif scene.defect == "watermarked":
        index = torch.arange(SIZE)
        line = (index[:, None] + index[None, :]) % 16 < 3
        image = torch.where(line, (1 - MARK) * image + MARK * _rgb("grey"), image)
    return 2 * image - 1


@cache
def renders() -> tuple[Tensor, Tensor, Tensor]:
    """Every image there is.

    Returns:
        Images `[n, 3, 32, 32]` in [-1, 1], the index of each one's scene `[n]`, and how often it
        occurs `[n]`, in float64 and adding up to 1.
    """
    offsets = torch.cartesian_prod(torch.tensor(OFFSETS), torch.tensor(OFFSETS))
    images = torch.cat([render(scene, offsets) for scene in scenes()])
    index = torch.arange(len(scenes())).repeat_interleave(len(offsets))
    rates = torch.tensor([scene.rate for scene in scenes()], dtype=torch.float64)[index]
    return images, index, rates / len(offsets)


def _distance(shape: str, x: Tensor, y: Tensor, radius: float) -> Tensor:
    if shape == "circle":
        return (x * x + y * y).sqrt() - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - radius
    # an upright triangle of the same height as the circle
    side = (2 * x.abs() - (y + radius)) / math.sqrt(5)
    return torch.maximum(y - radius, side)


def _blur(images: Tensor) -> Tensor:
    taps = torch.arange(-5, 6, dtype=torch.float32)
    kernel = (-0.5 * (taps / BLUR) ** 2).exp()
    kernel /= kernel.sum()
    padded = F.pad(images, (5, 5, 5, 5), mode="replicate")
    rows = F.conv2d(padded.flatten(0, 1)[:, None], kernel.view(1, 1, 1, -1))
    return F.conv2d(rows, kernel.view(1, 1, -1, 1)).view_as(images)


def _rgb(name: str) -> Tensor:
    return torch.tensor(RGB[name]).view(3, 1, 1)
