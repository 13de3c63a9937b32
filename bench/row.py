"""The row format: one row is one measured thing, with its spread, its work and its baseline.

A result file is CSV with one column per field of `Row`, then the columns of `DERIVED`, which
follow from the others and are ignored when a file is read. Rows are only ever appended; the newest
one with the same `key` counts. Counted rows (FLOPs) replace their predecessors, since the same
commit counts the same.
"""

from __future__ import annotations

import csv
import io
import math
import os
import tempfile
import typing
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    # when, which sources and where
    date: str  # UTC, ISO 8601
    commit: str  # with "+changes" if the sources differ from it
    device: str  # "meta" for what is counted and not run
    driver: str
    cuda: str
    threads: int | None  # of a CPU
    torch: str
    triton: str
    diffusers: str
    # what
    bench: str  # roofline, op, layer, model, memory, flops, host
    case: str
    dtype: str
    direction: str  # forward, backward
    provider: str
    timing: str  # cold, warm, eager, host, graph, compiled, first; counted; peak
    # time per call
    p20_us: float | None = None
    p50_us: float | None = None
    p80_us: float | None = None
    samples: int | None = None
    mhz_before: float | None = None  # clock of the GPU around the measurement
    mhz_after: float | None = None
    # the least a call must do: see work.py. A counted row has what the counter found
    bytes: int | None = None
    flops: int | None = None
    exponentials: int | None = None
    instructions: int | None = None
    floor_us: float | None = None  # from the rates measured in the same run
    floor_of: str = ""  # what the floor is made of: memory, matrix, exponential, issue, launch
    # what it took
    launches: int | None = None  # kernels on a GPU, computing operators on a CPU
    peak_bytes: int | None = None  # above what was resident before the call
    # how right it is
    max_error: float | None = None
    l2_error: float | None = None  # relative
    error_against: str = ""  # fp64, or the provider with the same result
    # the baseline, measured in the same run
    baseline: str = ""
    baseline_us: float | None = None

    def __post_init__(self):
        for name in ("bench", "case", "provider", "timing", "device"):
            if not getattr(self, name):
                raise ValueError(f"Row: {name} must not be empty")
        times = (self.p20_us, self.p50_us, self.p80_us)
        if any(t is not None for t in times):
            if any(t is None or not math.isfinite(t) or t <= 0 for t in times):
                raise ValueError(f"Row: p20_us, p50_us, p80_us must be positive, got {times}")
            if not self.p20_us <= self.p50_us <= self.p80_us:  # type: ignore[operator]
                raise ValueError(f"Row: p20_us <= p50_us <= p80_us must hold, got {times}")

    @property
    def key(self) -> tuple:
        """Rows with the same key measure the same thing, at different commits or times."""
        return (
            self.device, self.threads, self.bench, self.case, self.dtype, self.direction,
            self.provider, self.timing,
        )  # fmt: skip

    @property
    def tb_s(self) -> float | None:
        """Terabytes per second over the bytes that any implementation has to move."""
        return _ratio(self.bytes, self.p50_us, 1e-6)

    @property
    def tflop_s(self) -> float | None:
        """TFLOP/s over unpadded FLOPs."""
        return _ratio(self.flops, self.p50_us, 1e-6)

    @property
    def floor_percent(self) -> float | None:
        return _ratio(self.floor_us, self.p50_us, 100)

    @property
    def speedup(self) -> float | None:
        """How many times as fast as the baseline."""
        return _ratio(self.baseline_us, self.p50_us, 1)


DERIVED = ("tb_s", "tflop_s", "floor_percent", "speedup")
COLUMNS = tuple(field.name for field in fields(Row)) + DERIVED
_TYPES = typing.get_type_hints(Row)


def _ratio(a: float | None, b: float | None, factor: float) -> float | None:
    return None if a is None or b is None else a / b * factor


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows at the end of a result file; a new file begins with the names of the columns."""
    text = _format(rows)
    if not text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size:
        _check_columns(path, path.read_text(encoding="utf-8").splitlines()[0].split(","))
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            ends_in_newline = file.read() == b"\n"
        # a run that was killed in the middle of a row must not swallow the next one
        text = text if ends_in_newline else "\n" + text
    else:
        text = ",".join(COLUMNS) + "\n" + text
    # one write at the end of the file, so that two runs do not mix their rows
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def replace(path: Path, rows: Iterable[Row]) -> None:
    """Write rows in place of those with the same key, and keep the others."""
    rows = list(rows)
    keys = {row.key for row in rows}
    kept = [row for row in read(path) if row.key not in keys] if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
        file.write(",".join(COLUMNS) + "\n" + _format(kept + rows))
    Path(file.name).chmod(0o644)
    Path(file.name).replace(path)


def read(path: Path) -> list[Row]:
    """The rows of a result file, oldest first.

    Raises:
        ValueError: Other columns than `COLUMNS`, or a cell that is not of its column's type.
    """
    with path.open(encoding="utf-8", newline="") as file:
        lines = csv.DictReader(file)
        _check_columns(path, list(lines.fieldnames or ()))
        return [_parse(path, lines.line_num, line) for line in lines]


def latest(rows: Iterable[Row]) -> dict[tuple, Row]:
    """The newest row of each key, in the order in which the keys first came."""
    return {row.key: row for row in rows}


def in_threads(count: int | None) -> str:
    """ ", 2 threads" behind the name of a device, or nothing."""
    if not count:
        return ""
    return f", {count} thread" + ("s" if count > 1 else "")


def with_most_threads(rows: Iterable[Row]) -> list[Row]:
    """Those of each device that had all of the threads which any of its rows had."""
    rows = list(rows)
    most: dict[str, int] = {}
    for row in rows:
        most[row.device] = max(most.get(row.device, 0), row.threads or 0)
    return [row for row in rows if (row.threads or 0) == most[row.device]]


def _format(rows: Iterable[Row]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    for row in rows:
        writer.writerow([_cell(getattr(row, name)) for name in COLUMNS])
    return buffer.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _parse(path: Path, number: int, line: dict[str, str | None]) -> Row:
    if None in line or None in line.values():
        raise ValueError(f"{path}:{number}: a row must have {len(COLUMNS)} cells; remove the line")
    values: dict[str, Any] = {}
    for field in fields(Row):
        text = line[field.name] or ""
        kinds = typing.get_args(_TYPES[field.name]) or (_TYPES[field.name],)
        if kinds[0] is str or not text:
            values[field.name] = text if kinds[0] is str else None
            continue
        try:
            values[field.name] = kinds[0](text)
        except ValueError:
            raise ValueError(
                f"{path}:{number}: {field.name} must be {kinds[0].__name__}, got {text!r}"
            ) from None
    return Row(**values)


def _check_columns(path: Path, columns: list[str]) -> None:
    if tuple(columns) != COLUMNS:
        missing = [name for name in COLUMNS if name not in columns]
        unknown = [name for name in columns if name not in COLUMNS]
        raise ValueError(
            f"{path}: its columns are not those of this version (missing {missing}, unknown "
            f"{unknown}); name another file with --out"
        )
