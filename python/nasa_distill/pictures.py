"""Rows of images under each other: each over its label, or beside it and in titled blocks."""

from __future__ import annotations

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

LABEL_HEIGHT = 16
LABEL_WIDTH, TITLE_HEIGHT, GAP = 150, 40, 6  # of `blocks`, whose text is this high:
TITLE, LABEL = 17, 14

Block = tuple[str, list[tuple[str, Tensor]]]  # a title, and rows of images with their labels


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


def blocks(titled: list[Block], size: int = 128) -> Image.Image:
    """Each title over its rows, each label to the left of its images.

    A label may have several lines.
    """
    count = max(len(images) for _, labelled in titled for _, images in labelled)
    pitch = size + GAP
    heights = [TITLE_HEIGHT + pitch * len(labelled) for _, labelled in titled]
    canvas = Image.new("RGB", (LABEL_WIDTH + pitch * count, sum(heights) + GAP), "white")
    pen = ImageDraw.Draw(canvas)
    fonts = [ImageFont.load_default(height) for height in (TITLE, LABEL)]
    top = 0
    for (title, labelled), height in zip(titled, heights, strict=True):
        pen.text((GAP, top + TITLE_HEIGHT / 2), title, "black", fonts[0], "lm")
        for number, (label, images) in enumerate(labelled):
            y = top + TITLE_HEIGHT + pitch * number
            pen.multiline_text((GAP, y + size / 2), label, "black", fonts[1], "lm")
            for column, image in enumerate(images):
                canvas.paste(strip(image[None], size), (LABEL_WIDTH + pitch * column, y))
        top += height
    return canvas
