"""The attributes of an image, how often each value occurs, and its render.

An image is one choice of every attribute, so there are 288 images and all of them are known.
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
        """How often it occurs."""
        return math.prod(RATES[name][getattr(self, name)] for name in ATTRIBUTES)


@cache
def scenes() -> tuple[Scene, ...]:
    return tuple(Scene(*values) for values in itertools.product(*RATES.values()))


def render(scene: Scene) -> Tensor:
    """`[3, 32, 32]` in [-1, 1]."""
    axis = torch.arange(SIZE) + 0.5 - SIZE / 2
    y, x = axis[:, None], axis[None, :]
    ground, colour = _rgb(scene.ground), _rgb(scene.colour)
    fill = colour.expand(3, SIZE, SIZE)
    if scene.texture == "striped":
        is_dark = (torch.arange(SIZE) // STRIPE % 2 == 1)[:, None]
        fill = torch.where(is_dark, 0.2 * colour + 0.8 * ground, fill)
    # distance to the outline in pixels, negative inside; one pixel of anti-aliasing
    coverage = (0.5 - _distance(scene.shape, x, y, RADIUS[scene.size])).clamp(0, 1)
    image = coverage * fill + (1 - coverage) * ground
    if scene.defect == "blurry":
        image = _blur(image)
    elif scene.defect == "watermarked":
        index = torch.arange(SIZE)
        line = (index[:, None] + index[None, :]) % 16 < 3
        image = torch.where(line, (1 - MARK) * image + MARK * _rgb("grey"), image)
    return 2 * image - 1


@cache
def renders() -> tuple[Tensor, Tensor]:
    """Every image there is, in the order of `scenes()`.

    Returns:
        Images `[288, 3, 32, 32]` in [-1, 1], and how often each occurs `[288]`, in float64 and
        adding up to 1.
    """
    rates = torch.tensor([scene.rate for scene in scenes()], dtype=torch.float64)
    return torch.stack([render(scene) for scene in scenes()]), rates


def _distance(shape: str, x: Tensor, y: Tensor, radius: float) -> Tensor:
    if shape == "circle":
        return (x * x + y * y).sqrt() - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - radius
    # an upright triangle of the same height as the circle
    side = (2 * x.abs() - (y + radius)) / math.sqrt(5)
    return torch.maximum(y - radius, side)


def _blur(image: Tensor) -> Tensor:
    taps = torch.arange(-5, 6, dtype=torch.float32)
    kernel = (-0.5 * (taps / BLUR) ** 2).exp()
    kernel /= kernel.sum()
    padded = F.pad(image[:, None], (5, 5, 5, 5), mode="replicate")
    rows = F.conv2d(padded, kernel.view(1, 1, 1, -1))
    return F.conv2d(rows, kernel.view(1, 1, -1, 1))[:, 0]


def _rgb(name: str) -> Tensor:
    return torch.tensor(RGB[name]).view(3, 1, 1)
