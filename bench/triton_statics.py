"""What can be counted in the compiled Triton kernels where there is no GPU: `bench/statics.py` says
what for. `tools/triton_aot.py` compiles them, in a process of its own, as their launchers would.

The path of a plain call is counted in these pieces:

    forward, prompts on chip    one tile of queries, both prompts
    forward, streamed           one whole block of keys of one prompt
    dQ, dZ                      the whole program, one tile of queries; a loop over keys once
    dK, dV                      one tile of queries under the keys of one prompt
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from typing import NamedTuple

from bench import machine_code, statics
from bench.machine import ROOT
from bench.statics import BATCHES, GPUS, GROUP_ROWS, SHAPES, Gpu, Row
from nasa_kernels.testing import Shape, triton_grid

PAGE = ROOT / "docs" / "kernels" / "statics-triton.md"
ROWS = ROOT / "docs" / "kernels" / "statics-triton.json"
# head_dim and keys of each prompt, of all SHAPES
SIZES = tuple(sorted({(shape.d, shape.n_pos) for shape in SHAPES}))
# the GPUs of the page
ARCHES = {"A100": 80, "RTX 4090": 89, "H100": 90, "B200": 100, "RTX 5090": 120}
PRODUCTS = (*machine_code.PRODUCTS, "UTCHMMA")


class Compiled(NamedTuple):
    """A line of `tools/triton_aot.py ARCH counts`."""

    kernel: str  # forward, queries, keys or row-gradients
    rule: str
    d: int
    n: int  # keys of each prompt
    registers: int
    shared: int
    warps: int
    rows: int  # queries of a tile
    keys: int  # of a block, where they are streamed
    counts: dict[str, dict[str, int]]  # opcodes: of the program, and on the way around each loop

    @property
    def loops(self) -> list[Counter]:
        """The innermost loops with products, those with fewer instructions first."""
        found = [Counter(c) for name, c in self.counts.items() if name != "program"]
        return sorted(found, key=Counter.total)


def count(sass: str) -> dict[str, dict[str, int]]:
    """Opcodes of a kernel: of the whole program, and of the plain way around each innermost loop
    that has products. HGMMA says whether B is read as [k, n].
    """
    (code,) = machine_code.parse(sass).values()
    blocks = machine_code.blocks_of(code)
    counts = {"program": _opcodes(i for i in code if i.base != "NOP")}
    loops = [
        loop for loop in machine_code.loops_of(blocks)
        if any(blocks[b].has(PRODUCTS) for b in loop.body)
    ]  # fmt: skip
    inner = [a for a in loops if not any(b.body < a.body for b in loops)]
    for loop in inner:
        path = machine_code.plain_path(blocks, loop)
        counts[f"loop {loop.head:x}"] = _opcodes(i for b in path for i in blocks[b].code)
    return {name: dict(c) for name, c in counts.items()}


def _opcodes(code) -> Counter:
    return Counter(i.opcode + (".tnspB" if "tnspB" in i.arguments else "") for i in code)


def compiled_for(arch: int, sizes: tuple[tuple[int, int], ...] = SIZES) -> list[Compiled]:
    """The kernels of some sizes. Triton decides at import if it compiles, hence the process."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    environment |= {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    names = [f"{d},{n}" for d, n in sizes]
    done = subprocess.run(
        [sys.executable, ROOT / "tools/triton_aot.py", str(arch), "counts", *names],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise OSError(f"statics: the Triton kernels do not compile:\n{done.stderr[-2000:]}")
    lines = (line for line in done.stdout.splitlines() if line.startswith("{"))
    return [Compiled(**json.loads(line)) for line in lines]


# ---- rows ----------------------------------------------------------------------------------------


def path_of(kernel: Compiled) -> tuple[Counter, float, str]:
    """Opcodes on the plain path, how often a scheduler walks it for a unit, and the unit."""
    loops = kernel.loops
    turns = kernel.warps / 4 * GROUP_ROWS / kernel.rows
    both = f"{GROUP_ROWS} rows x {kernel.n}+{kernel.n} keys"
    if kernel.kernel == "keys":
        return loops[-1], turns, f"{GROUP_ROWS} rows x {min(kernel.n, kernel.keys)} keys"
    if kernel.kernel == "forward" and len(loops) == 1:
        return loops[0], turns, both
    if kernel.kernel == "forward":
        # the loops over whole blocks of two prompts, and their last blocks, which are longer
        block = f"{GROUP_ROWS} rows x {GROUP_ROWS} keys of one prompt"
        return loops[len(loops) // 2 - 1], turns * GROUP_ROWS / kernel.keys, block
    if loops:
        both = f"{GROUP_ROWS} rows, each loop once for {kernel.keys} keys"
    return Counter(kernel.counts["program"]), turns, both


def rows_of(gpu: Gpu, kernels: list[Compiled]) -> list[Row]:
    return [
        _row(gpu, shape, kernel)
        for shape in SHAPES
        for kernel in kernels
        if (kernel.d, kernel.n) == (shape.d, shape.n_pos)
    ]


def _row(gpu: Gpu, shape: Shape, kernel: Compiled) -> Row:
    path, turns, unit = path_of(kernel)
    resident_keys = len(kernel.loops) == 1 and kernel.kernel == "forward"
    name = {"queries": "dQ", "keys": "dK dV", "row-gradients": "dZ"}.get(kernel.kernel, "forward")
    name += " projected" if kernel.rule == "projected" and name == "forward" else ""
    # no bytes of memory are counted for a block of keys
    how = statics.Plan(name if resident_keys else "long", (), 0, 0, 0, 0, False)
    pipes = statics.cycles(gpu, how, shape.d, path, turns)
    multiprocessor = triton_grid.Gpu(
        gpu.sms, 65536, gpu.shared_per_sm, 2048 if gpu.major != 12 else 1536
    )
    resident = triton_grid.resident_programs(
        multiprocessor, kernel.registers, kernel.shared, kernel.warps
    )
    tiles = shape.h * -(-shape.l // kernel.rows)
    efficiency = {}
    for b in BATCHES if kernel.kernel == "forward" else ():
        slots = gpu.sms if resident_keys else gpu.sms * resident
        efficiency[str(b)] = round(statics.grid_efficiency(b * tiles, slots), 3)
    bound = max(pipes, key=pipes.__getitem__)
    return Row("model", gpu.name, f"sm_{ARCHES[gpu.name]}", str(shape), name, kernel.registers,
               kernel.shared, resident, efficiency, unit, pipes, bound, None,
               tiles=tiles)  # fmt: skip


INTRODUCTION = """# The Triton kernels by what can be counted

Made by `python -m bench statics --write`, without a GPU, from what Triton {version} compiles.
**Every row is a model**: counts along the path of a plain call (bf16, both prompts, no mask), and
data sheets. No time on this page was measured. Columns are those of
[the CUDA C++ kernels](statics.md); a block is what Triton calls a program.

* **forward** with prompts on chip: one tile of queries, both prompts. Streamed: a whole block of
  keys of one prompt.
* **dQ**, and **dZ** of the projected rule: a whole program, its set-up included. **dK dV**: one
  tile of queries under the keys of one prompt.
* **grid** is the work over what all SMs could do while the one with the most tiles works, if
  programs start one on each SM, then a second; of streamed keys, over what all programs could do.
"""


def page(rows: list[Row], version: str) -> str:
    table = statics.page(rows)
    return INTRODUCTION.format(version=version) + table[table.index("\n## ") :]


def run(write: bool) -> int:
    import triton

    by_arch = {arch: compiled_for(arch) for arch in ARCHES.values()}
    gpus = [gpu for gpu in GPUS if gpu.name in ARCHES]
    rows = [row for gpu in gpus for row in rows_of(gpu, by_arch[ARCHES[gpu.name]])]
    text = page(rows, triton.__version__)
    if not write:
        print(text)
        return 0
    lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
    ROWS.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    PAGE.write_text(text, encoding="utf-8")
    print(f"{len(rows)} rows in {PAGE} and {ROWS}")
    return 0


def recorded() -> list[Row]:
    """The rows that the page was made of."""
    return [Row(**row) for row in json.loads(ROWS.read_text(encoding="utf-8"))]
