"""Lines with their uncertainty, drawn with Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

from nasa_distill.intervals import Share

WIDTH, HEIGHT = 720, 440
LEFT, RIGHT, TOP, BOTTOM = 60, 190, 40, 50
INKS = ("#1b62a5", "#c23b22", "#3a8f3a", "#7d4f9e", "#a86a00", "#5a5a5a")


class Line(NamedTuple):
    label: str
    xs: Sequence[float]
    shares: Sequence[Share]


def draw(title: str, axis: str, ticks: Sequence[float], lines: Sequence[Line], path: Path) -> None:
    """Shares in percent over `xs`, the axis from tick to tick, with 95 % intervals, as a PNG."""
    canvas = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(canvas)
    low, high = min(ticks), max(ticks)

    def at(x: float, share: float) -> tuple[float, float]:
        across = (x - low) / (high - low or 1)
        return (
            LEFT + across * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM),
        )

    pen.text((LEFT, 12), title, fill="black")
    for percent in range(0, 101, 20):
        start, end = at(low, percent / 100), at(high, percent / 100)
        pen.line([start, end], fill="#dddddd")
        pen.text((LEFT - 34, start[1] - 6), f"{percent} %", fill="black")
    for x in ticks:
        left, bottom = at(x, 0)
        pen.line([(left, bottom), (left, bottom + 4)], fill="black")
        pen.text((left - 8, bottom + 8), f"{x:g}", fill="black")
    pen.text((LEFT + (WIDTH - LEFT - RIGHT) / 2 - 20, HEIGHT - 20), axis, fill="black")
    for number, line in enumerate(lines):
        ink = INKS[number % len(INKS)]
        points = [at(x, share.value) for x, share in zip(line.xs, line.shares, strict=True)]
        pen.line(points, fill=ink, width=2)
        for x, share, point in zip(line.xs, line.shares, points, strict=True):
            ends = [at(x, end) for end in share.interval]
            pen.line(ends, fill=ink)
            pen.ellipse([point[0] - 3, point[1] - 3, point[0] + 3, point[1] + 3], fill=ink)
        pen.text((WIDTH - RIGHT + 12, TOP + 22 * number), line.label, fill=ink)
    canvas.save(path)
