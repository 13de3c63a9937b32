"""The scenes of the larger world, how often each occurs, and their renders.

A scene is one object in the middle or two side by side, and what holds for the whole image. There
are 9984, all of them known:

    objects                 12 alone, 12 x 12 as pairs: a colour and a shape each
    texture, size           of every object in the image
    ground, frame, defect   of the image; text in it is a defect
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

SIZE = 64
NUMBERS = {"single": 0.5, "pair": 0.5}
# what a prompt leaves open is drawn at these rates, of each object by itself
OBJECT_RATES: dict[str, dict[str, float]] = {
    "colour": {"red": 0.4, "green": 0.2, "blue": 0.2, "yellow": 0.2},
    "shape": {"circle": 0.5, "square": 0.25, "triangle": 0.25},
}
IMAGE_RATES: dict[str, dict[str, float]] = {
    "texture": {"solid": 0.5, "striped": 0.5},
    "size": {"small": 0.5, "large": 0.5},
    "ground": {"black": 0.5, "white": 0.5},
    "frame": {"frameless": 0.7, "framed": 0.3},
    "defect": {"clean": 0.4, "blurry": 0.2, "watermarked": 0.2, "text": 0.2},
}
RGB = {
    "red": (0.92, 0.14, 0.16),
    "green": (0.1, 0.72, 0.28),
    "blue": (0.16, 0.32, 0.95),
    "yellow": (0.98, 0.8, 0.1),
    "black": (0.06, 0.06, 0.09),
    "white": (0.95, 0.95, 0.93),
    "grey": (0.5, 0.5, 0.5),
    "ink": (0.85, 0.25, 0.75),
    "wood": (0.55, 0.36, 0.2),
    "gilt": (0.85, 0.68, 0.38),
}
# centre from the middle of the image and half the height, in pixels. A pair keeps 5 pixels from the
# line between its objects, which a blur of 4 does not cross: the judge relies on it
PLACES = {"middle": 0.0, "left": -16.0, "right": 16.0}
RADIUS = {"single": {"small": 12.0, "large": 19.0}, "pair": {"small": 8.0, "large": 11.0}}
STRIPE = {"single": 6, "pair": 4}  # pixels
DIM = 0.4  # of the colour, in the dark stripes
BLUR, REACH = 1.8, 4  # standard deviation and cut-off in pixels
MARK, PERIOD, LINE = 0.6, 24, 5  # of the watermark: opacity, distance of its lines, their width
FRAME, LIP = 5, 1  # pixels of wood, of which the inner ones are gilt
LETTERS = {
    "T": ("11111", "00100", "00100", "00100", "00100", "00100", "00100"),
    "E": ("11111", "10000", "10000", "11110", "10000", "10000", "11111"),
    "X": ("10001", "01010", "01010", "00100", "01010", "01010", "10001"),
}
WORD = "TEXT"  # twice its size, above the lower edge
WORD_BOTTOM = 8


class Object(NamedTuple):
    colour: str
    shape: str


class Scene(NamedTuple):
    """Its objects from left to right, and one value for every attribute of the image."""

    objects: tuple[Object, ...]
    texture: str
    size: str
    ground: str
    frame: str
    defect: str

    @property
    def number(self) -> str:
        return "single" if len(self.objects) == 1 else "pair"

    def described(self) -> dict[str, str]:
        """Its value of each attribute, its objects' from left to right."""
        things = {n: " ".join(getattr(x, n) for x in self.objects) for n in OBJECT_RATES}
        return things | {name: getattr(self, name) for name in (*IMAGE_RATES, "number")}

    @property
    def rate(self) -> float:
        """How often it occurs."""
        things = [OBJECT_RATES[n][getattr(x, n)] for x in self.objects for n in OBJECT_RATES]
        whole = [IMAGE_RATES[name][getattr(self, name)] for name in IMAGE_RATES]
        return NUMBERS[self.number] * math.prod(things) * math.prod(whole)


OBJECTS = tuple(itertools.starmap(Object, itertools.product(*OBJECT_RATES.values())))
# every choice of what holds for the whole image
WHOLES = tuple(itertools.product(*IMAGE_RATES.values()))


@cache
def scenes() -> tuple[Scene, ...]:
    """Singles first, then pairs; the objects vary slowest, the last the faster."""
    alone = [(thing,) for thing in OBJECTS]
    together = list(itertools.product(OBJECTS, OBJECTS))
    return tuple(Scene(objects, *whole) for objects in [*alone, *together] for whole in WHOLES)


@cache
def rates() -> Tensor:
    """How often each scene occurs: `[9984]`, in float64 and adding up to 1."""
    return torch.tensor([scene.rate for scene in scenes()], dtype=torch.float64)


def render(drawn: Sequence[Scene]) -> Tensor:
    """`[b, 3, 64, 64]` in [-1, 1]."""
    ground = torch.stack([_rgb(scene.ground) for scene in drawn])
    images = ground.expand(-1, 3, SIZE, SIZE)
    for slot in range(2):
        covers, fills = zip(*(_object(scene, slot) for scene in drawn), strict=True)
        cover = torch.stack(covers)
        images = cover * torch.stack(fills) + (1 - cover) * images
    rows = {name: [s.defect == name for s in drawn] for name in ("blurry", "watermarked", "text")}
    rows["framed"] = [scene.frame == "framed" for scene in drawn]
    for name, change in (
        ("blurry", _blur),
        ("watermarked", lambda x: _over(x, _rgb("grey"), MARK * _lines())),
        ("text", lambda x: _over(x, _rgb("ink"), _word())),
        (
            "framed",
            lambda x: _over(
                _over(x, _rgb("gilt"), _border(FRAME)), _rgb("wood"), _border(FRAME - LIP)
            ),
        ),
    ):
        chosen = torch.tensor(rows[name])
        if chosen.any():
            images = images.clone()
            images[chosen] = change(images[chosen])
    return 2 * images - 1


def _object(scene: Scene, slot: int) -> tuple[Tensor, Tensor]:
    """How much of each pixel the object covers `[1, 64, 64]`, and its fill `[3, 64, 64]`."""
    if slot >= len(scene.objects):
        return torch.zeros(1, SIZE, SIZE), torch.zeros(3, SIZE, SIZE)
    thing, number = scene.objects[slot], scene.number
    place = "middle" if number == "single" else ("left", "right")[slot]
    fill = _fill(thing.colour, scene.ground, scene.texture, STRIPE[number])
    return _cover(thing.shape, place, RADIUS[number][scene.size]), fill


@cache
def _fill(colour: str, ground: str, texture: str, stripe: int) -> Tensor:
    fill = _rgb(colour).expand(3, SIZE, SIZE)
    if texture == "solid":
        return fill
    # counted from the middle, so that the upper and the lower half of an object look alike
    is_dark = ((torch.arange(SIZE) - SIZE // 2 + stripe // 2) // stripe % 2 == 1)[:, None]
    return torch.where(is_dark, DIM * _rgb(colour) + (1 - DIM) * _rgb(ground), fill)


@cache
def _cover(shape: str, place: str, radius: float) -> Tensor:
    axis = torch.arange(SIZE) + 0.5 - SIZE / 2
    y, x = axis[:, None], axis[None, :] - PLACES[place]
    # distance to the outline in pixels, negative inside; one pixel of anti-aliasing
    return (0.5 - _distance(shape, x, y, radius)).clamp(0, 1)[None]


def _distance(shape: str, x: Tensor, y: Tensor, radius: float) -> Tensor:
    if shape == "circle":
        return (x * x + y * y).sqrt() - radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - radius
    # an upright triangle of the same height and width as the circle
    side = (2 * x.abs() - (y + radius)) / math.sqrt(5)
    return torch.maximum(y - radius, side)


def _over(images: Tensor, colour: Tensor, cover: Tensor) -> Tensor:
    return cover * colour + (1 - cover) * images


@cache
def _lines() -> Tensor:
    index = torch.arange(SIZE)
    return ((index[:, None] + index[None, :]) % PERIOD < LINE).float()


@cache
def _word() -> Tensor:
    letters = [torch.tensor([[int(x) for x in row] for row in LETTERS[name]]) for name in WORD]
    spaced = torch.cat([F.pad(letter, (0, 1)) for letter in letters], dim=1)[:, :-1]
    ink = spaced.repeat_interleave(2, 0).repeat_interleave(2, 1).float()
    height, width = ink.shape
    left, above = (SIZE - width) // 2, SIZE - WORD_BOTTOM - height
    return F.pad(ink, (left, SIZE - width - left, above, WORD_BOTTOM))


def _border(width: int) -> Tensor:
    inner = torch.zeros(SIZE - 2 * width, SIZE - 2 * width)
    return F.pad(inner, (width,) * 4, value=1.0)


def _blur(images: Tensor) -> Tensor:
    taps = torch.arange(-REACH, REACH + 1, dtype=torch.float32)
    kernel = (-0.5 * (taps / BLUR) ** 2).exp()
    kernel /= kernel.sum()
    padded = F.pad(images.flatten(0, 1)[:, None], (REACH,) * 4, mode="replicate")
    rows = F.conv2d(padded, kernel.view(1, 1, 1, -1))
    return F.conv2d(rows, kernel.view(1, 1, -1, 1))[:, 0].view_as(images)


def _rgb(name: str) -> Tensor:
    return torch.tensor(RGB[name]).view(3, 1, 1)
