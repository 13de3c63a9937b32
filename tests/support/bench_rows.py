"""Rows for tests that read or draw result files; their numbers are made up."""

from bench.machine import Machine
from bench.row import Row

MACHINE = Machine(
    "2020-01-01T00:00:00", "0" * 12, "Test device", "1.0", "13.0", None, "2", "3", "0"
)


def row(provider="nasa-triton", us=10.0, spread=0.1, **columns) -> Row:
    given = {
        "bench": "op", "case": "case-a", "dtype": "bfloat16", "direction": "forward",
        "timing": "cold", "p20_us": us * (1 - spread), "p50_us": us, "p80_us": us * (1 + spread),
        "samples": 30, "bytes": 4_000_000, "flops": 2_000_000_000,
    }  # fmt: skip
    return Row(**{**vars(MACHINE), **given, "provider": provider, **columns})
