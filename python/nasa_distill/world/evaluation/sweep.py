"""One picture of what a negative prompt does: a row per method, its strength rising to the right.

All of 100 images are counted in each cell. Shown are those of the first noises that without a
negative prompt give what it names, each in a frame that says what the judge sees in it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from nasa_distill.scalars import plain
from nasa_distill.train.networks import load
from nasa_distill.train.seeds import generator
from nasa_distill.world.evaluation.evaluate import NONE, Counts, Method, draw
from nasa_distill.world.evaluation.prompts import pairs_of
from nasa_distill.world.kinds import of_images, world_of

IMAGES = 100  # judged in each cell
SHOWN = (2, 4)  # rows and columns
ENLARGED = 64  # pixels of a shown image
FRAME = 2  # pixels of the small image
AS_ASKED, STILL_THERE, BROKEN = "#009e73", "#d55e00", "#999999"


class Row(NamedTuple):
    label: str
    strength: str
    method: str
    strengths: tuple[float, ...]


ROWS = (
    Row("guidance\n(CFG)", "scale", "cfg", (1.5, 2.5, 4.0, 6.0)),
    Row("NASA", "alpha", "nasa", (0.25, 0.5, 0.75, 1.0)),
    Row("projected\nNASA", "alpha", "projected", (0.5, 1.0, 1.5, 2.5)),
    Row("NAG", "scale", "nag", (2.0, 4.0, 8.0, 16.0)),
    Row("VSF", "alpha", "vsf", (0.25, 0.5, 1.0, 2.0)),
)


def write(model: Path, path: Path, steps: int = 1, seed: int = 0, pair: int = 0) -> None:
    """Draw it as a PNG; see `picture`."""
    drawn = picture(model, steps, seed, pair)
    path.parent.mkdir(parents=True, exist_ok=True)
    # no name of a version: the same numbers give the same file
    drawn.savefig(path, dpi=110, metadata={"Software": None})


def picture(model: Path, steps: int = 1, seed: int = 0, pair: int = 0) -> Figure:
    """The picture for one of the first list of `prompts`, by number.

    Raises:
        ValueError: There is no such pair, or steps below 1.
    """
    steps, seed, pair = plain(steps), plain(seed), plain(pair)
    if steps < 1:
        raise ValueError(f"sweep.picture: steps must be at least 1, got {steps}")
    student = load(model)
    world = world_of(student)
    pairs = pairs_of(world, "first")
    if not 0 <= pair < len(pairs):
        raise ValueError(f"sweep.picture: pair must be from 0 to {len(pairs) - 1}, got {pair}")
    prompt, negative = pairs[pair]
    noise = torch.randn(IMAGES, *student.latent_shape, generator=generator(seed, pair))

    def drawn(method: Method) -> Tensor:
        return draw(student, prompt, negative, method, steps, noise, seed)

    def cell(axes, images: Tensor, title: str) -> None:
        good = Counts.of(images, prompt, negative).good
        axes.imshow(tile(images[shown], prompt, negative).numpy(), interpolation="nearest")
        axes.set_title(f"{title}{good} of {IMAGES} as asked", fontsize=8, pad=3)

    stock = drawn(NONE)
    there = world.judge(stock).shows(negative)
    # where fewer show it, others follow
    shown = torch.argsort((~there).int(), stable=True)[: math.prod(SHOWN)]

    columns = max(len(row.strengths) for row in ROWS)
    figure = Figure(figsize=(1.1 + 2.2 * columns, 0.35 + 1.42 * (len(ROWS) + 1)))
    grid = figure.subplots(
        len(ROWS) + 1, columns,
        gridspec_kw={"left": 0.115, "right": 0.995, "top": 0.965, "bottom": 0.01,
                     "hspace": 0.24, "wspace": 0.05},
    )  # fmt: skip
    for axes in grid.flat:
        axes.set_axis_off()
    name(grid[0, 0], "no negative\nprompt")
    cell(grid[0, 0], stock, "")
    explain(grid[0, 1], prompt, negative, steps)
    for line, row in zip(grid[1:], ROWS, strict=True):
        name(line[0], row.label)
        for axes, strength in zip(line, row.strengths, strict=False):
            title = f"{row.strength} {strength:g}:  "
            cell(axes, drawn(Method(row.method, strength)), title)
    return figure


def name(axes, label: str) -> None:
    """The method's, to the left of its first cell."""
    axes.text(
        -0.06, 0.5, label, transform=axes.transAxes, ha="right", va="center", fontsize=9,
        fontweight="bold",
    )  # fmt: skip


def explain(axes, prompt: str, negative: str, steps: int) -> None:
    """What the picture shows, in the free cells of the first row."""
    drawn = "one step" if steps == 1 else f"{steps} steps"
    axes.text(
        0.08, 1.0, f'"{prompt}", negative prompt "{negative}", in {drawn}.\n'
        f"Counted: 100 images. Shown: eight that have {negative} without a negative prompt.",
        transform=axes.transAxes, ha="left", va="top", fontsize=9,
    )  # fmt: skip
    meaning = {
        AS_ASKED: f"as asked: without {negative}, and an image of the small world",
        STILL_THERE: f"{negative} is still there",
        BROKEN: f"without {negative}, but no image of the small world",
    }
    axes.legend(
        handles=[Patch(color=colour, label=text) for colour, text in meaning.items()],
        loc="upper left", bbox_to_anchor=(0.05, 0.66), frameon=False, fontsize=8.5,
        handlelength=1, borderpad=0,
    )  # fmt: skip


def tile(images: Tensor, prompt: str, negative: str) -> Tensor:
    """Images side by side in their frames: `[height, width, 3]` in [0, 1]."""
    rows, columns = SHOWN
    images = images.cpu()
    verdict = of_images(images).judge(images)
    shows = verdict.shows(negative)
    good = ~shows & verdict.follows(prompt) & verdict.valid.cpu()
    framed = []
    for image, is_good, is_there in zip(images / 2 + 0.5, good, shows, strict=True):
        colour = AS_ASKED if is_good else STILL_THERE if is_there else BROKEN
        times = ENLARGED // image.shape[-1]
        large = image.repeat_interleave(times, 1).repeat_interleave(times, 2)
        framed.append(frame(large, colour))
    lines = [torch.cat(framed[i * columns : (i + 1) * columns], dim=2) for i in range(rows)]
    return torch.cat(lines, dim=1).permute(1, 2, 0).clamp(0, 1)


def frame(image: Tensor, colour: str) -> Tensor:
    """`[3, height, width]` in a coloured frame, and that in a white one."""
    rgb = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    for width, paint in ((2 * FRAME, rgb), (FRAME, torch.ones(3))):
        canvas = paint[:, None, None].repeat(1, *(side + 2 * width for side in image.shape[1:]))
        canvas[:, width:-width, width:-width] = image
        image = canvas
    return image
