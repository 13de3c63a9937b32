"""`bench plot`: pictures of a result file, as PNG and SVG.

roofline   TFLOP/s of the operation over FLOPs per byte, under the roof measured on the device
speedup    times as fast as Algorithm 1, per case
overhead   what a negative prompt adds to a denoiser call, in FLOPs and in time, per method
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bench.op import is_whole_layer
from bench.providers import BASELINE
from bench.roofline import rates_of
from bench.row import Row, in_threads, latest, with_most_threads

# one hue per provider in every picture, ours the strongest; distinguishable without colour vision
COLOURS = {
    "nasa-triton": "#0072b2",
    "nasa-cuda": "#009e73",
    "nasa-cpu": "#0072b2",
    "nasa": "#0072b2",
    "nasa-later": "#0072b2",
    "nasa-first": "#56b4e9",
    "projected": "#009e73",
    "algorithm-1": "#d55e00",
    "algorithm-1-compiled": "#e69f00",
    "stacked": "#cc79a7",
    "stock": "#999999",
    "nag": "#e69f00",
    "nag-ours": "#f0c674",
    "cfg": "#666666",
}
OTHER = "#bbbbbb"
LABELS = {
    "stock": "stock, no negative prompt",
    "nasa-cpu": "NASA, CPU",
    "nasa-cpu-without-kernels": "NASA, CPU, without kernels",
    "nasa-triton": "NASA, Triton",
    "nasa-cuda": "NASA, CUDA C++",
    "stacked": "both prompts stacked",
    "nasa-first": "NASA, first call",
    "nasa-later": "NASA, later calls",
    "nasa": "NASA",
    "projected": "projected NASA",
    "algorithm-1": "Algorithm 1",
    "nag": "NAG, as published",
    "nag-ours": "NAG on our kernels",
    "cfg": "classifier-free guidance",
}
FIGURES: dict[str, Callable[[list[Row]], Figure | None]] = {}


def figure(function: Callable[[list[Row]], Figure | None]) -> Callable:
    FIGURES[function.__name__] = function
    return function


def run(rows: Iterable[Row], folder: Path, prefix: str = "") -> list[Path]:
    """Draw every picture that the rows have something for."""
    newest = with_most_threads(latest(rows).values())
    written = []
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        drawn = draw(newest)
        if drawn is None:
            continue
        for suffix in ("png", "svg"):
            path = folder / f"{prefix}{name}.{suffix}"
            # no date and no random ids: the same rows give the same file
            metadata = {"Date": None} if suffix == "svg" else {}
            with plt.rc_context({"svg.hashsalt": name}):
                drawn.savefig(path, dpi=150, bbox_inches="tight", metadata=metadata)
            written.append(path)
        plt.close(drawn)
    return written


def _plain_numbers(*axes) -> None:
    """1 2 5 10, not powers."""
    for axis in axes:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.set_minor_formatter(NullFormatter())


def _from_the_top(axes, cases: int) -> None:
    """The first case above, and no more room at the ends than between two."""
    axes.set_ylim(cases - 0.4, -0.6)


def _colour(provider: str) -> str:
    return COLOURS.get(provider, OTHER)


def _devices(rows: Iterable[Row]) -> str:
    found = sorted({_device(r) for r in rows})
    return ", ".join(found)


def _device(row: Row) -> str:
    return row.device + in_threads(row.threads)


@figure
def roofline(rows: list[Row]) -> Figure | None:
    """Cold forward calls in the dtype that has most of them."""
    timed = [r for r in rows if r.bench == "op" and r.timing == "cold" and r.tflop_s and r.bytes]
    timed = [r for r in timed if r.direction == "forward"]
    rates = rates_of(rows)
    dtypes = [r.dtype for r in timed]
    dtype = max(sorted(set(dtypes)), key=dtypes.count, default="")
    matrix = rates.matrix.get(dtype)
    if not timed or not rates.copy or not matrix:
        return None
    timed = [r for r in timed if r.dtype == dtype]
    drawn, axes = plt.subplots(figsize=(8, 5))
    intensities = [r.flops / r.bytes for r in timed if r.flops and r.bytes]
    # where the memory's roof meets the arithmetic's
    ridge = matrix / rates.copy
    low, high = min(*intensities, ridge) / 2, max(*intensities, ridge) * 2
    roof = [low, ridge, high]
    axes.plot(roof, [min(rates.copy * x, matrix) / 1e12 for x in roof], color="black", lw=1.2)
    for provider in dict.fromkeys(r.provider for r in timed):
        of = [r for r in timed if r.provider == provider]
        axes.scatter(
            [r.flops / r.bytes for r in of],  # type: ignore[operator]
            [r.tflop_s or 0 for r in of], s=22, color=_colour(provider), label=provider,
            edgecolors="white", linewidths=0.5, zorder=3,
        )  # fmt: skip
    axes.set(
        xscale="log", yscale="log", xlabel="FLOPs per compulsory byte", ylabel="TFLOP/s",
        title=f"Forward, cold, {dtype}, under measured roofs: copy {rates.copy / 1e12:.3g} TB/s, "
        f"matrix {matrix / 1e12:.3g} TFLOP/s\n{_devices(timed)}",
    )  # fmt: skip
    axes.title.set_fontsize(10)
    _plain_numbers(axes.xaxis, axes.yaxis)
    axes.grid(True, which="major", color="#dddddd", lw=0.6)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    return drawn


@figure
def speedup(rows: list[Row]) -> Figure | None:
    """A bar per provider and case, the baseline at 1."""
    timed = [
        r
        for r in rows
        if r.bench == "op" and r.timing == "cold" and r.direction == "forward"
        and is_whole_layer(r.case)
        and r.baseline == BASELINE and r.speedup and r.provider != BASELINE
    ]  # fmt: skip
    if not timed:
        return None
    cases = list(dict.fromkeys((r.case, r.dtype) for r in timed))
    providers = list(dict.fromkeys(r.provider for r in timed))
    by = {(r.case, r.dtype, r.provider): r for r in timed}
    drawn, axes = plt.subplots(figsize=(8, 0.7 + 0.1 * len(cases) * (len(providers) + 1.2)))
    height = 0.8 / len(providers)
    for i, provider in enumerate(providers):
        keys = [(*case, provider) for case in cases]
        shown = [(j, by[key]) for j, key in enumerate(keys) if key in by]
        axes.barh(
            [j + (i + 0.5) * height - 0.4 for j, _ in shown],
            [r.speedup or 0 for _, r in shown], height * 0.92,
            color=_colour(provider), label=LABELS.get(provider, provider),
        )  # fmt: skip
    axes.axvline(1, color="black", lw=1)
    axes.set_yticks(range(len(cases)), [f"{case} {dtype}" for case, dtype in cases], fontsize=8)
    _from_the_top(axes, len(cases))
    axes.set(
        xlabel="times as fast as Algorithm 1 (two attention calls, a product, a difference)",
        title=f"Forward, cold\n{_devices(timed)}",
    )  # fmt: skip
    axes.grid(True, axis="x", color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    return drawn


@figure
def overhead(rows: list[Row]) -> Figure | None:
    """Percent over the stock call, counted on top, measured below where there are such rows."""
    panels = []
    counted = [r for r in rows if r.bench == "flops" and r.provider != "encode"]
    if counted:
        panels.append(("FLOPs, counted", counted, lambda r: r.flops))
    timed = [r for r in rows if r.bench == "model" and r.timing in ("graph", "eager")]
    for timing in dict.fromkeys(r.timing for r in timed):
        of = [r for r in timed if r.timing == timing]
        panels.append((f"time, {timing}, {_devices(of)}", of, lambda r: r.p50_us))
    if not panels:
        return None
    sizes = [len(set(map(_call, of))) for _, of, _ in panels]
    drawn, all_axes = plt.subplots(
        len(panels), 1, figsize=(8, 1.2 + 0.5 * sum(sizes)), squeeze=False,
        gridspec_kw={"height_ratios": sizes},
    )  # fmt: skip
    for axes, (title, of, value) in zip(all_axes[:, 0], panels, strict=True):
        _overhead_panel(axes, title, of, value)
    drawn.tight_layout()
    return drawn


def _call(row: Row) -> str:
    """A denoiser call: of a counted one the dtype does not matter."""
    return row.case if row.bench == "flops" else f"{row.case} {row.dtype}"


def _overhead_panel(axes, title: str, rows: list[Row], value: Callable) -> None:
    stock = {_call(r): value(r) for r in rows if r.provider == "stock"}
    cases = [case for case in dict.fromkeys(map(_call, rows)) if case in stock]
    methods = [m for m in dict.fromkeys(r.provider for r in rows) if m != "stock"]
    by = {
        (_call(r), r.provider): 100 * (value(r) / stock[_call(r)] - 1)
        for r in rows
        if _call(r) in stock
    }
    height = 0.84 / max(len(methods), 1)
    for i, method in enumerate(methods):
        shown = [(j, by[case, method]) for j, case in enumerate(cases) if (case, method) in by]
        at = [j + (i + 0.5) * height - 0.42 for j, _ in shown]
        axes.barh(
            at, [y for _, y in shown], height * 0.9, color=_colour(method),
            label=LABELS.get(method, method),
        )  # fmt: skip
        for y, (_, added) in zip(at, shown, strict=True):
            axes.annotate(
                f"{added:+.2f}", (max(added, 0), y), xytext=(2, 0), textcoords="offset points",
                va="center", fontsize=6,
            )  # fmt: skip
    axes.axvline(0, color="black", lw=1)
    axes.set_yticks(range(len(cases)), cases, fontsize=8)
    _from_the_top(axes, len(cases))
    # methods lie between one and a hundred percent
    axes.set_xscale("symlog", linthresh=1)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:+g}" if x else "0"))
    added = list(by.values())
    # room for the numbers behind the bars: most of a decade
    axes.set_xlim(min(*added, 0) * 1.3 - 0.1, max(*added, 1) * 8)
    axes.set(xlabel="percent over the stock call", title=title)
    axes.grid(True, axis="x", color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
