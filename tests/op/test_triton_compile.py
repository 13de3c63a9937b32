"""Every configuration of the Triton kernels, compiled for every generation of GPUs.

With the installed Triton, and for Hopper with the oldest supported one where `make test` put it.
Ceilings are what the installed one reaches today, rounded up: a kernel that starts to spill, or to
pad, fails. The oldest spills more, and has none.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.cases import ALL

ROOT = Path(__file__).parents[2]
# a directory with the oldest supported Triton, made by `make test`
OLDEST = os.environ.get("NASA_TEST_OLDEST")
VERSIONS = {"installed": None, "oldest": OLDEST} if OLDEST else {"installed": None}

# bytes of stack, spills included. The kernels of 77 keys at d 40 and 64 spill nothing (below). Both
# accumulators of the projected rule at d 160 do, and so do the three of its gradient.
STACK = {80: 128, 90: 128, 100: 288}
STACK_OF_BOTH = {80: 320, 90: 512, 100: 512}
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_CORE = {80: "hmma", 90: "hgmma", 100: "utchmma"}


# but on Hopper with the installed Triton: short, longer and streamed prompts, one head_dim and two
# accumulators, joint attention. The other models in `make test-all`.
FEW = ("sd15-64", "sdxl-64", "sd15-16", "pixart-1024", "wan-1.3b", "flux")


def rows(version: str, arch: int, *mode: str) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = [str(ROOT), environment.get("PYTHONPATH", "")]
    if VERSIONS[version]:
        path.insert(0, VERSIONS[version])
    environment |= {"PYTHONPATH": os.pathsep.join(p for p in path if p), "PYTHONWARNINGS": "ignore"}
    result = subprocess.run(
        [sys.executable, ROOT / "tools/triton_aot.py", str(arch), *mode],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


# the oldest Triton for one generation: that it compiles every kernel, and to tensor cores
CASES = [("installed", 80), ("installed", 90), ("installed", 100), ("oldest", 90)]


@pytest.mark.parametrize(
    ("version", "arch"),
    [case for case in CASES if case[0] in VERSIONS],
    ids=lambda x: x if isinstance(x, str) else f"sm_{x}",
)
def test_registers_memory_and_instructions(version, arch):
    few = () if ALL or (version, arch) == ("installed", 90) else FEW
    table = rows(version, arch, "models", *few)
    # of cross-attention three kernels, two more of the projected rule, and once its dQ, dK and dV;
    # of joint attention four, and one more; one beside a small image
    assert len(table) == (5 * 5 + 2 + 5 if few else 7 * 5 + 2 + 2 * 5 + 1)
    expected = "3.6.0" if version == "oldest" else importlib.metadata.version("triton")
    for row in table:
        where = f"{row} for sm_{arch}"
        assert row["triton"] == expected, where
        assert row["shared"] <= SHARED[arch], where
        # Triton 3.6 once compiled a kernel to nothing, without an error
        assert row["mufu.ex2"] > 0, where
        if row["kernel"].startswith(("forward", "joint")):
            assert row[TENSOR_CORE[arch]] > 0, where
        of_77_keys = row["kernel"] == "forward" and row["model"] in ("sd15-64", "sdxl-64")
        if of_77_keys and arch < 100:
            # 64 rows of 77 + 77 keys are 80 + 80 exponentials for 128 threads: no padding to 128
            assert row["mufu.ex2"] == 80, where
            assert row["stack"] == row["ldl"] == row["stl"] == 0, where
        if version == "oldest":
            continue
        both = row["rule"] == "projected" and row["model"] not in ("sd15-64", "sdxl-64")
        assert row["stack"] <= (STACK_OF_BOTH if both else STACK)[arch], where
        if row["kernel"] in ("joint-statistics", "joint-queries"):
            assert row["stack"] == row["ldl"] == row["stl"] == 0, where
        # beside a small image O_s waits on the stack while the prompts are attended to
        if row["kernel"] == "joint" and arch == 90 and row["model"] != "flux-256px":
            # a word, outside of the loops
            assert row["stack"] <= 16 and max(row["ldl"], row["stl"]) <= 2, where
        if of_77_keys and arch == 90:
            # of 128 threads, and 65,536 registers of a multiprocessor: three programs; two of the
            # projected rule at d 40
            three = row["model"] == "sdxl-64" or row["rule"] != "projected"
            assert row["registers"] <= (168 if three else 184), where


# Triton's passes ask for the first digits of 8.6 and 8.9 alone, and so do we
@pytest.mark.parametrize("arch", [86, 89, 120] if ALL else [89, 120], ids=lambda arch: f"sm_{arch}")
def test_every_head_dim_fits_a_block_of_99_kib(arch):
    """Consumer GPUs: a kernel that needs more raises `OutOfResources` at its first call."""
    table = rows("installed", arch, "memory")
    for kernel in (
        "forward",
        "queries",
        "keys",
        "row-gradients",
        "joint",
        "joint-statistics",
        "joint-queries",
    ):
        assert any(row["kernel"] == kernel for row in table), kernel
    for row in table:
        assert 0 < row["shared"] <= 99 * 1024, row
