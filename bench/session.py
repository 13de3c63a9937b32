"""One run of a command: where its rows go, how long it may take, what it left out."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench import row as rows_of
from bench.machine import Machine
from bench.roofline import Rates
from bench.row import Row

WIDTH = 176


@dataclass
class Session:
    machine: Machine
    device: torch.device
    out: Path
    console: Console
    minutes: float | None = None
    clock: Callable[[], float] = time.monotonic
    rates: Rates = field(default_factory=Rates)
    left_out: dict[str, str] = field(default_factory=dict)  # case and provider, reason
    seconds: float = 1.0  # of sampling, for each call; whole models get three times that

    def __post_init__(self):
        self.started = self.clock()

    @property
    def is_over(self) -> bool:
        """Whether the minutes given are used up; a case begun is still finished."""
        return self.minutes is not None and self.clock() - self.started > 60 * self.minutes

    def within(self, minutes: float) -> Session:
        """The same session for one of several commands, with minutes of its own."""
        return replace(self, minutes=minutes)

    def write(self, rows: list[Row], *, counted: bool = False) -> None:
        (rows_of.replace if counted else rows_of.append)(self.out, rows)

    def row(self, **columns: Any) -> Row:
        return Row(**vars(self.machine), **columns)

    def leave_out(self, what: str, reason: str) -> None:
        self.left_out[what] = " ".join(str(reason).split())[:200]

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def report_left_out(self) -> None:
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            by_reason.setdefault(reason, []).append(name)
        for reason, what in by_reason.items():
            names = ", ".join(what[:1]) + (f" and {len(what) - 1} more" if len(what) > 1 else "")
            self.say(f"left out: {names}: {reason}")
        self.left_out.clear()


def console(file=None) -> Console:
    """Wide enough for the tables also where the output is no terminal."""
    target = file or sys.stdout
    return Console(file=target, width=None if target.isatty() else WIDTH)


def time_table(title: str, rows: list[Row]) -> Table:
    """The rows of one case, or of several."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    columns = (
        "case", "provider", "timing", "us", "p20-p80", "x base", "% floor", "of", "TB/s",
        "TFLOP/s", "launches", "peak MiB", "L2 error",
    )  # fmt: skip
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < 3 else "right", no_wrap=True)
    for r in rows:
        spread = "" if r.p20_us is None else f"{number(r.p20_us)}-{number(r.p80_us)}"
        table.add_row(
            " ".join(x for x in (r.case, r.dtype, r.direction) if x), r.provider, r.timing,
            number(r.p50_us), spread, number(r.speedup, 2), percent(r.floor_percent), r.floor_of,
            number(r.tb_s, 3), number(r.tflop_s), "" if r.launches is None else str(r.launches),
            number(None if r.peak_bytes is None else r.peak_bytes / 2**20),
            "" if r.l2_error is None else f"{r.l2_error:.1e}",
        )  # fmt: skip
    return table


def number(x: float | None, places: int | None = None) -> str:
    """Three digits or so; nothing where there is no number."""
    if x is None:
        return ""
    if places is not None:
        return f"{x:.{places}f}"
    return f"{x:.2f}" if abs(x) < 10 else f"{x:.1f}" if abs(x) < 100 else f"{x:.0f}"


def percent(x: float | None) -> str:
    return "" if x is None else f"{x:.0f}%" if x >= 1 else f"{x:.2g}%"
