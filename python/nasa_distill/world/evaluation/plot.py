"""Lines with their uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from nasa_distill.intervals import Share

# distinguishable without colour vision, the first the strongest
INKS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#666666", "#56b4e9", "#882255")
MARKERS = "osD^vPX*"


class Line(NamedTuple):
    label: str
    xs: Sequence[float]
    shares: Sequence[Share]


class Curve(NamedTuple):
    """A method by rising strength."""

    label: str
    xs: Sequence[Share]
    ys: Sequence[Share]
    strong: bool = False


class Panel(NamedTuple):
    title: str
    curves: Sequence[Curve]
    start: tuple[Share, Share]  # without any method


def frontier(title: str, axes_said: tuple[str, str], panels: Sequence[Panel]) -> Figure:
    """Panels side by side, every curve from a common start; equal labels have equal colours."""
    labels = list(dict.fromkeys(curve.label for panel in panels for curve in panel.curves))
    figure = Figure(figsize=(1.6 + 3.5 * len(panels), 4.4), layout="constrained")
    grid: Any = figure.subplots(1, len(panels), squeeze=False)[0]
    drawn: dict[str, Any] = {}
    for axes, panel in zip(grid, panels, strict=True):
        x0, y0 = (share.value for share in panel.start)
        for curve in panel.curves:
            number = labels.index(curve.label)
            (drawn[curve.label],) = axes.plot(
                [x0, *(share.value for share in curve.xs)],
                [y0, *(share.value for share in curve.ys)],
                color=INKS[number % len(INKS)], marker=MARKERS[number % len(MARKERS)],
                markersize=6 if curve.strong else 4, linewidth=2.6 if curve.strong else 1.2,
                zorder=3 if curve.strong else 2,
            )  # fmt: skip
        drawn["no negative prompt"] = axes.scatter([x0], [y0], color="black", s=45, zorder=4)
        axes.set_title(panel.title, fontsize="medium")
        axes.set(xlabel=axes_said[0], xlim=(0.38, 1.01), ylim=(-0.02, 1.02))
        axes.set_xticks([0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
        axes.set_yticks([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(color="#e5e5e5")
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].set_ylabel(axes_said[1])
    figure.suptitle(title, fontsize="medium")
    _legend_below(figure, drawn)
    return figure


def _legend_below(figure: Figure, drawn: dict[str, Any]) -> None:
    """By label, in as many columns as the figure is wide."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    for columns in (3, 2, 1):
        legend = figure.legend(
            drawn.values(),
            drawn,
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            fontsize=8.5,
        )
        if legend.get_window_extent(renderer).width <= figure.bbox.width or columns == 1:
            return
        legend.remove()


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
