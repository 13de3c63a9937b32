"""`bench compare A.csv B.csv`: what became slower, larger or lost between two result files.

Slower means beyond spread: the faster four fifths of B lie above the faster four fifths of A, and
the medians differ by more than the tolerance. FLOPs, launches and peak memory have no spread.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.table import Table

from bench.row import Row, latest

NOTHING_WORSE, WORSE, INCOMPARABLE = 0, 1, 2


@dataclass(frozen=True)
class Change:
    row: Row  # of B
    what: str
    before: float
    after: float

    @property
    def ratio(self) -> float:
        return self.after / self.before if self.before else float("inf")

    @property
    def is_worse(self) -> bool:
        return self.after > self.before


def changes(before: Iterable[Row], after: Iterable[Row], tolerance: float = 0.03) -> list[Change]:
    """What differs between the newest rows of the same key, in either direction; worst first."""
    old = latest(before)
    found = []
    for key, b in latest(after).items():
        a = old.get(key)
        if a is not None:
            found += _time_change(a, b, tolerance) + _count_changes(a, b)
    return sorted(found, key=lambda change: -change.ratio)


def common(before: Iterable[Row], after: Iterable[Row]) -> int:
    return len(latest(before).keys() & latest(after).keys())


def lost(before: Iterable[Row], after: Iterable[Row]) -> list[Row]:
    """Rows of A that B does not have: not measured, or no longer right."""
    new = latest(after)
    return [row for key, row in latest(before).items() if key not in new]


def _time_change(a: Row, b: Row, tolerance: float) -> list[Change]:
    if a.p50_us is None or b.p50_us is None:
        return []
    assert a.p20_us and a.p80_us and b.p20_us and b.p80_us
    slower = b.p20_us > a.p80_us and b.p50_us > a.p50_us * (1 + tolerance)
    faster = a.p20_us > b.p80_us and a.p50_us > b.p50_us * (1 + tolerance)
    return [Change(b, "us", a.p50_us, b.p50_us)] if slower or faster else []


def _count_changes(a: Row, b: Row) -> list[Change]:
    """`flops` of a timed row is what the case needs, not what was done: the counter's only."""
    names = ["launches", "peak_bytes"] + (["flops"] if b.bench == "flops" else [])
    pairs = [(name, getattr(a, name), getattr(b, name)) for name in names]
    return [
        Change(b, name, x, y) for name, x, y in pairs if x is not None and y is not None and x != y
    ]


def table(found: list[Change]) -> Table:
    result = Table(title="changed beyond spread", title_justify="left")
    for i, column in enumerate(("", "what", "case", "provider", "before", "after", "ratio")):
        result.add_column(column, justify="right" if i > 3 else "left", no_wrap=True)
    for change in found:
        r = change.row
        case = " ".join(x for x in (r.bench, r.case, r.dtype, r.direction, r.timing) if x)
        result.add_row(
            "[red]worse[/]" if change.is_worse else "[green]better[/]", change.what, case,
            r.provider, f"{change.before:.4g}", f"{change.after:.4g}", f"{change.ratio:.2f}",
        )  # fmt: skip
    return result


def verdict(before: list[Row], after: list[Row], found: list[Change]) -> tuple[int, str]:
    """The exit code, and one sentence that says why."""
    shared = common(before, after)
    if not shared:
        devices = [", ".join(sorted({row.device for row in rows})) for rows in (before, after)]
        return INCOMPARABLE, (
            f"no row of A ({devices[0]}) and of B ({devices[1]}) measures the same thing: nothing "
            "was compared"
        )
    worse = sum(change.is_worse for change in found)
    gone = len(lost(before, after))
    text = (
        f"{shared} rows compared: {worse} worse, {len(found) - worse} better, "
        f"{shared - len({c.row.key for c in found})} unchanged; {gone} only in A"
    )
    return (WORSE if worse else NOTHING_WORSE), text
