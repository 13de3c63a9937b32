"""Images from a pipeline: drawn, saved, side by side, with a negative prompt and without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from nasa_diffusers.api import nasa
from nasa_diffusers.methods import NAG, NASA, VSF, Method, ProjectedNASA
from nasa_diffusers.report import Report
from nasa_diffusers.scalars import is_int, is_real

METHODS: dict[str, Any] = {"nasa": NASA, "projected": ProjectedNASA, "nag": NAG, "vsf": VSF}
LABEL_HEIGHT = 16
GAP = 4  # between two images


@dataclass(frozen=True)
class Wish:
    """What to draw, and what not.

    Raises:
        ValueError: Something is missing, or no number of its kind. The message says what.
    """

    prompt: str
    negative: str
    steps: int = 4
    seed: int = 0
    guidance: float = 0.0
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        for name, text in (("prompt", self.prompt), ("negative prompt", self.negative)):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"draw: the {name} is empty; it must be a text")
        if not is_int(self.steps) or self.steps < 1:
            raise ValueError(f"draw: steps must be a whole number from 1 on, got {self.steps!r}")
        if not is_int(self.seed) or not 0 <= self.seed < 2**63:
            raise ValueError(
                f"draw: the seed must be a whole number from 0 up to 2**63 - 1, got {self.seed!r}"
            )
        if not is_real(self.guidance) or not 0 <= self.guidance < float("inf"):
            raise ValueError(
                f"draw: the guidance scale must be a number from 0 on, got {self.guidance!r}"
            )
        for name, size in (("height", self.height), ("width", self.width)):
            if size is not None and (not is_int(size) or size < 1):
                raise ValueError(f"draw: the {name} must be a number of pixels, got {size!r}")


@dataclass(frozen=True)
class Compared:
    """The same noise without and with the negative prompt; a video has several frames."""

    without: list[Image.Image]
    guided: list[list[Image.Image]]  # by each method
    reports: list[Report]


def method_of(name: str, strength: float | None) -> Method:
    """A method by its name and strength: alpha, of NAG its scale. `None`: the family's default."""
    if name not in METHODS:
        raise ValueError(f"draw: no method {name!r}; there are {', '.join(METHODS)}")
    if METHODS[name] is NAG:
        return NAG(scale=strength)
    return METHODS[name](alpha=strength)


def compare(pipe: Any, wish: Wish, methods: Sequence[Method]) -> Compared:
    """Draw with the pipeline as it is, then by each method; NASA is off afterwards in any case."""
    without = draw(pipe, wish)
    guided, reports = [], []
    for method in methods:
        with nasa(pipe, wish.negative, method) as handle:
            guided.append(draw(pipe, wish))
            reports.append(handle.report())
    return Compared(without, guided, reports)


def draw(pipe: Any, wanted: Any) -> list[Image.Image]:
    """One image, or the frames of one video, of a `Wish` or the options of a command line."""
    call: dict[str, Any] = {}
    if wanted.height is not None or wanted.width is not None:
        # given one of them, some pipelines take neither
        if wanted.height is None or wanted.width is None:
            raise ValueError("draw: height and width go together: give both, or none")
        call = {"height": wanted.height, "width": wanted.width}
    output = pipe(
        wanted.prompt,
        num_inference_steps=wanted.steps,
        guidance_scale=wanted.guidance,
        generator=torch.Generator().manual_seed(wanted.seed),
        output_type="pil",
        **call,
    )
    frames = getattr(output, "frames", None)
    return output.images if frames is None else frames[0]


def save(images: list[Image.Image], path: Path) -> Path:
    """A PNG, or a GIF for the frames of a video."""
    if len(images) == 1:
        path = path.parent / f"{path.name}.png"
        images[0].save(path)
    else:
        path = path.parent / f"{path.name}.gif"
        images[0].save(path, save_all=True, append_images=images[1:])
    return path


def grid(images: list[Image.Image], labels: list[str]) -> Image.Image:
    """Images side by side, each over its label."""
    width, height = images[0].size
    apart = width + GAP
    canvas = Image.new("RGB", (apart * len(images) - GAP, height + LABEL_HEIGHT), "white")
    pen = ImageDraw.Draw(canvas)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        canvas.paste(image, (i * apart, 0))
        pen.text((i * apart + 2, height + 2), label, fill="black")
    return canvas


def stack(rows: Sequence[Image.Image]) -> Image.Image:
    """Pictures under each other."""
    canvas = Image.new("RGB", (max(x.width for x in rows), sum(x.height for x in rows)), "white")
    top = 0
    for row in rows:
        canvas.paste(row, (0, top))
        top += row.height
    return canvas


def enlarged(image: Image.Image, least: int = 256) -> Image.Image:
    """A small image, its pixels as squares, at least `least` pixels wide; any other as it is."""
    factor = -(-least // image.width)
    if factor == 1:
        return image
    size = (image.width * factor, image.height * factor)
    return image.resize(size, Image.Resampling.NEAREST)
