"""Rows of images under each other, each row over its label."""

from __future__ import annotations

import torch
from PIL import Image, ImageDraw
from torch import Tensor

LABEL_HEIGHT = 16


def rows(labelled: list[tuple[str, Tensor]], size: int = 64) -> Image.Image:
    """One row for each label; images `[n, 3, height, width]` in [0, 1], each `size` pixels wide."""
    strips = [(label, strip(images, size)) for label, images in labelled]
    width = max(picture.width for _, picture in strips)
    canvas = Image.new("RGB", (width, len(strips) * (size + LABEL_HEIGHT)), "white")
    pen = ImageDraw.Draw(canvas)
    for number, (label, picture) in enumerate(strips):
        top = number * (size + LABEL_HEIGHT)
        canvas.paste(picture, (0, top))
        pen.text((2, top + size + 2), label, fill="black")
    return canvas


def strip(images: Tensor, size: int) -> Image.Image:
    """Images side by side, each enlarged to `size` without smoothing."""
    pixels = torch.cat(list(images.cpu()), dim=2).permute(1, 2, 0)
    picture = Image.fromarray((pixels * 255).round().byte().numpy())
    return picture.resize((size * len(images), size), Image.Resampling.NEAREST)
