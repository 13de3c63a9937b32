"""Rows of images under each other, each row over its label."""

from __future__ import annotations

import torch
from nasa_diffusers.cli import grid
from PIL import Image


def rows(labelled: list[tuple[str, torch.Tensor]]) -> Image.Image:
    """One row for each label; images `[n, 3, height, width]` in [0, 1]."""
    return stack([grid([strip(images)], [label]) for label, images in labelled])


def strip(images: torch.Tensor, size: int = 64) -> Image.Image:
    """Images `[n, 3, height, width]` in [0, 1], side by side and enlarged."""
    pixels = torch.cat(list(images.cpu()), dim=2).permute(1, 2, 0)
    picture = Image.fromarray((pixels * 255).round().byte().numpy())
    return picture.resize((size * len(images), size), Image.Resampling.NEAREST)


def stack(pictures: list[Image.Image]) -> Image.Image:
    """Pictures one below the other."""
    canvas = Image.new("RGB", (pictures[0].width, sum(p.height for p in pictures)), "white")
    top = 0
    for picture in pictures:
        canvas.paste(picture, (0, top))
        top += picture.height
    return canvas
