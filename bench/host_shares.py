"""Rows of `bench host` in calls of the unit, and what of them is ours.

The first launch of joint attention is PyTorch's own attention over the image, if that is not small.
On CPU tensors it computes, which on a GPU costs the host nothing, and its checks and allocations
are not ours either: the row `image` is that call alone, of the same run, and what a joint attention
takes beside it is ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from bench.row import Row

IMAGE = "image"
# the calls that make that one
AROUND_IMAGE = ("shared", "joint", "joint-nag")


class Share(NamedTuple):
    """Medians, and their p20 and p80, in calls of the unit."""

    row: Row
    low: float
    all: float
    high: float
    ours: float | None  # None: PyTorch's, or not known of these rows


def shares(rows: Iterable[Row]) -> list[Share]:
    timed = [r for r in rows if r.bench == "host" and r.p50_us and r.baseline_us]
    image = {r.provider: _in_units(r)[1] for r in timed if r.case == IMAGE}
    found = []
    for r in timed:
        low, middle, high = _in_units(r)
        ours: float | None = middle
        if r.case == IMAGE:
            ours = None
        elif r.case in AROUND_IMAGE:
            ours = middle - image[r.provider] if r.provider in image else None
        found.append(Share(r, low, middle, high, ours))
    return found


def _in_units(row: Row) -> tuple[float, float, float]:
    unit = row.baseline_us or 0.0
    return (row.p20_us or 0.0) / unit, (row.p50_us or 0.0) / unit, (row.p80_us or 0.0) / unit
