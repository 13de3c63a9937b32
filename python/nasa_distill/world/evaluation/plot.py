"""Lines with their uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from nasa_distill.intervals import Share

# distinguishable without colour vision, the first the strongest
INKS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#666666")


class Line(NamedTuple):
    label: str
    xs: Sequence[float]
    shares: Sequence[Share]


def draw(title: str, axis: str, ticks: Sequence[float], lines: Sequence[Line], path: Path) -> None:
    """Shares over `xs`, the axis from tick to tick, with 95 % intervals, as a PNG."""
    figure = Figure(figsize=(7.6, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(color=INKS)
    for line in lines:
        values = [share.value for share in line.shares]
        below = [max(0.0, share.value - share.interval[0]) for share in line.shares]
        above = [max(0.0, share.interval[1] - share.value) for share in line.shares]
        axes.errorbar(line.xs, values, (below, above), label=line.label, marker="o", markersize=4)
    axes.set_title(title, fontsize="medium")
    axes.set(xlabel=axis, ylim=(-0.02, 1.02))
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(axis="y", color="#dddddd")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=120)
