"""What can be counted in the compiled CUDA C++ kernels where there is no GPU.

Of each kernel that a model's call leads to: registers, shared memory, blocks per SM, how evenly the
grid loads the GPU, and what each pipe has to do for 64 query rows along the path of a plain call.
Everything here is a **model**: no time in it was measured, and no row of it stands in a table with
rows that were.

The tallest pipe bounds a kernel only if everything else hides under it. Trust ratios, not digits.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from bench import machine_code
from bench.machine import ROOT
from nasa_kernels.testing import MODEL_SHAPES, Shape

PAGE = ROOT / "docs" / "kernels" / "statics.md"
ROWS = ROOT / "docs" / "kernels" / "statics.json"
YARDSTICK = ROOT / "docs" / "kernels" / "yardstick.json"  # by tools/yardstick.py
BATCHES = (1, 4, 16)
GROUP_ROWS = 64  # the unit of all counts
CLIP_KEYS, BLOCK_KEYS = 80, 128
BACKWARD_DIMS = (40, 64, 80, 128, 160)


class Gpu(NamedTuple):
    """From data sheets. Cycles are those of one SM."""

    name: str
    arch: str  # the machine code it runs
    major: int
    sms: int
    shared_per_block: int
    shared_per_sm: int
    mma: float | None  # fp32 multiply-adds of fp16 numbers per cycle: mma.sync; None: unknown
    wgmma: float | None
    bytes_per_cycle: float  # of memory
    ghz: float


GPUS = (
    Gpu("A100", "sm_80", 8, 108, 166912, 167936, 1024, None, 10.2, 1.41),
    Gpu("RTX 4090", "sm_80", 8, 128, 101376, 102400, 256, None, 3.1, 2.52),
    Gpu("H100", "sm_90a", 9, 132, 232448, 233472, 1270, 2048, 14.5, 1.755),
    Gpu("B200", "sm_100", 10, 148, 232448, 233472, None, None, 29.3, 1.85),
    Gpu("RTX 5090", "sm_120", 12, 170, 101376, 102400, 256, None, 4.4, 2.41),
)

# One layer each, and the batches at which the grid is looked at; the second launch of a joint
# attention has the text keys alone.
SHAPES = (
    *MODEL_SHAPES,
    Shape("wan-14b", 1, 75600, 40, 128, 512, 512),
    Shape("flux-text", 1, 4608, 24, 128, 512, 512),
    Shape("sd3-text", 1, 4429, 24, 64, 333, 333),
)
# The layers whose grids are looked at, with the batches: the work of a launch is to be so much of
# what the GPU could do while its fullest SM works.
GRIDS = {
    "sd15-64": (1, 4, 16), "sd15-16": (16,), "sdxl-64": (1, 4, 16), "sdxl-32": (4, 16),
    "pixart-1024": (1, 4, 16), "wan-1.3b": (1, 4), "wan-14b": (1,), "flux-text": (1, 4),
    "sd3-text": (1, 4),
}  # fmt: skip


def wanted(b: int) -> float:
    return 0.85 if b == 1 else 0.95


# ---- what a launcher launches --------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A launch of csrc, as tests hold it to what the launchers write down."""

    kernel: str
    sizes: tuple[int | bool, ...]  # the template's arguments after the type
    threads: int
    shared: int
    rows: int  # of a tile
    keys: int  # of a tile of K and V
    persistent: bool  # whether the blocks share the tiles of all heads

    @property
    def mangled(self) -> re.Pattern[str]:
        """Of the bf16 kernel."""
        sizes = "".join(f"Lb{s:d}E" if isinstance(s, bool) else f"Li{s}E" for s in self.sizes)
        return re.compile(rf"{self.kernel}_kernelI13__nv_bfloat16{sizes}E")

    def __str__(self) -> str:
        sizes = ", ".join(str(s).lower() for s in self.sizes)
        return f"{self.kernel}<{sizes}>"


def plan(gpu: Gpu, shape: Shape) -> Plan:
    """Of a plain call with both prompts, as csrc/choose.cpp and csrc/layouts.h have it."""
    longest = max(shape.n_pos, shape.n_neg)
    keys = CLIP_KEYS if longest <= CLIP_KEYS else BLOCK_KEYS
    if gpu.major == 9 and shape.d in (40, 64, 72, 80, 128, 160):
        return _plan_sm90(shape.d, keys, longest)
    d = padded(shape.d)

    def tile(rows: int, d: int) -> int:
        return rows * 2 * (d + 8)

    rows = 32 if (d <= 128 if keys == CLIP_KEYS else d == 80) else 16
    parked = 4 * 512 if rows == 32 and keys == BLOCK_KEYS else 0
    shared = 4 * tile(keys, d) + 8 * (tile(rows, d) + parked)
    exists = d <= 160 if keys == CLIP_KEYS else d in (64, 80, 128)
    if longest <= BLOCK_KEYS and exists and shared <= gpu.shared_per_block:
        return Plan("forward_short", (d, keys, True), 256, shared, rows, keys, True)
    return streamed_plan("forward_long", d)


def streamed_plan(kernel: str, d: int) -> Plan:
    """Of a padded d: a block for each tile, whose keys pass by in halves of a block."""
    rows = 128 // warps_to_a_row(d)
    shared = 2 * (d + 8) * (3 * BLOCK_KEYS // 2 + rows) + 4 * BLOCK_KEYS
    return Plan(kernel, (d,), 256, shared, rows, BLOCK_KEYS, False)


def padded(d: int) -> int:
    return next(size for size in (32, 48, 64, 80, 96, 128, 160, 192, 256) if d <= size)


def backward_plans(d: int) -> tuple[Plan, Plan]:
    """Of dQ, and of dK and dV, on every GPU: csrc/layouts.h."""
    d = padded(d)

    def tiles(rows: int) -> int:
        return 2 * rows * 2 * (d + 8)

    keys = 64 if d in (96, 128) else CLIP_KEYS
    stage = tiles(GROUP_ROWS) + 3 * GROUP_ROWS * 4
    of_queries = tiles(GROUP_ROWS) + tiles(CLIP_KEYS) + 4 * CLIP_KEYS
    of_keys = tiles(keys) + (2 if d <= 80 else 1) * stage
    return (
        Plan("backward_queries", (d,), 128, of_queries, GROUP_ROWS, CLIP_KEYS, False),
        Plan("backward_keys", (d,), 2 * keys, of_keys, GROUP_ROWS, keys, False),
    )


def warps_to_a_row(d: int) -> int:
    """Of forward_long: each makes some of the columns, and all scores of its rows."""
    return 1 if d <= 128 else 2 if d <= 192 else 4


def _plan_sm90(d: int, keys: int, longest: int) -> Plan:
    atoms = -(-d // 64)
    rows, barriers = 2 * atoms * 64 * 128, 3
    if longest <= (BLOCK_KEYS if d in (64, 72, 128) else CLIP_KEYS):
        groups = 3 if d <= 80 and keys == CLIP_KEYS else 2
        shared = 4 * atoms * keys * 128 + groups * rows + 8 * keys + 8 * (2 + groups * barriers)
        sizes = (d, keys, 2, True)
        return Plan("forward_sm90_short", sizes, groups * 128, shared, 64, keys, True)
    keys, slots = (BLOCK_KEYS if d <= 128 else CLIP_KEYS), (8 if d <= 64 else 4 if d <= 80 else 3)
    parked = 0 if d <= 80 else 16 if d <= 128 else 8
    shared = slots * atoms * keys * 128 + 2 * rows + 256 * parked * 16
    shared += slots * keys * 4 + 8 * (3 * slots + 2 * barriers)
    return Plan("forward_sm90_long", (d, True), 384, shared, 128, keys, True)


def blocks_per_sm(gpu: Gpu, plan: Plan, registers: int) -> int:
    """Each block reserves 1 KiB beside its own; registers come in units of 8 for a thread."""
    of_shared = gpu.shared_per_sm // (plan.shared + 1024)
    of_registers = 65536 // (-(-registers // 8) * 8 * plan.threads)
    return min(of_shared, of_registers, 2048 // plan.threads)


def grid_efficiency(tiles: int, slots: int) -> float:
    """The work over what the slots could do while the longest block runs."""
    return tiles / (slots * -(-tiles // slots))


# ---- what the pipes have to do -------------------------------------------------------------------


def cycles(gpu: Gpu, plan: Plan, d: int, path: Counter, turns: float) -> dict[str, float]:
    """Cycles of an SM for 64 query rows, by pipe; `turns` warps of a scheduler walk the path."""
    warps = 4 * turns
    found = {"issue": path.total() * turns, "exponential": 0.0, "tensor": 0.0, "shared": 0.0}
    for opcode, n in path.items():
        base = opcode.split(".")[0]
        if base == "MUFU":
            found["exponential"] += n * warps * 32 / 16
        elif base == "HMMA" and gpu.mma:
            found["tensor"] += n * warps * 16 * 8 * 16 / gpu.mma
        elif base == "HGMMA" and gpu.wgmma:
            # once for the four warps
            width = int(opcode.split(".")[1].split("x")[1])
            found["tensor"] += n * turns * 64 * width * 16 / gpu.wgmma
            # 16 rows of B from shared memory, and 64 of A where no register has it
            rows = width if "tnspB" in opcode else width + 64
            found["shared"] += n * turns * rows * 32 / 128
        elif base in ("LDS", "STS", "LDSM", "STSM"):
            wide = re.search(r"\.(64|128)\b", opcode)
            words = (
                int(opcode[-1]) if base in ("LDSM", "STSM") else int(wide[1]) // 32 if wide else 1
            )
            found["shared"] += n * warps * words
    if plan.kernel.startswith("forward_sm90_short"):
        # TMA writes Q and reads O
        found["shared"] += 2 * GROUP_ROWS * -(-d // 64)
    if not (plan.kernel.endswith("long") or plan.kernel == "forward_image"):
        found["memory"] = GROUP_ROWS * 4 * d / gpu.bytes_per_cycle
    return {pipe: round(clk, 1) for pipe, clk in found.items()}


def path_counts(
    plan: Plan, code: list[machine_code.Instruction], projected: bool = False
) -> tuple[Counter, float]:
    """Opcodes along the plain path, and how often a scheduler walks it for 64 rows.

    projected: That of rule "projected" instead, in a kernel that keeps its prompts on chip.
    """
    blocks = machine_code.blocks_of(code)
    if not projected:
        blocks = machine_code.without_projection(blocks)
    if plan.kernel.endswith("long") or plan.kernel == "forward_image":
        # a tile of keys of one prompt: the longer of the loops for the two prompts
        loops = machine_code.product_loops(blocks)
        if "sm90" not in plan.kernel:
            loop, path = machine_code.tile_path(blocks)
            # two tiles of K and two of V, each by loops of their own
            d = plan.sizes[0]
            scores = d // 16 * plan.keys // 16
            copies = -(-plan.keys // 2 * d // 8 // plan.threads)
            counts = machine_code.count(blocks, path, loop, scores, copies=copies)
            return _name(blocks, path, counts), float(warps_to_a_row(plan.sizes[0]))
        paths = [(loop, machine_code.plain_path(blocks, loop)) for loop in loops]
        both = [_name(blocks, path, machine_code.count(blocks, path, loop)) for loop, path in paths]
        return max(both, key=Counter.total), 1.0
    loop, path = machine_code.tile_path(blocks)
    parts = plan.rows // 16
    scores = parts * plan.sizes[0] // 16 * plan.keys // 16 * 2
    # of TMA one instruction brings a box
    copies = 0 if "sm90" in plan.kernel else plan.rows * plan.sizes[0] // 8 // 32
    counts = machine_code.count(blocks, path, loop, scores, 2 * scores, copies)
    # a warp has 16 rows of a tile of 64, or all rows of its own
    turns = 1.0 if plan.rows == GROUP_ROWS else GROUP_ROWS / plan.rows / 4
    return _name(blocks, path, counts), turns


def keys_counts(plan: Plan, code: list[machine_code.Instruction]) -> tuple[Counter, float]:
    """The same of backward_keys, for a tile of rows and the keys of a block."""
    blocks = machine_code.blocks_of(code)
    loops = machine_code.loops_of(blocks)
    around = [x for x in loops if any(blocks[b].has(machine_code.PRODUCTS) for b in x.body)]
    loop = max(around, key=lambda x: len(x.body))
    path = machine_code.plain_path(blocks, loop, tiles=-1)
    d = plan.sizes[0]
    columns = d if d <= 128 else d // 2 if d <= 192 else d // 4

    def turns(opcodes: Counter) -> int:
        read_transposed = sum(n for opcode, n in opcodes.items() if ".MT88" in opcode)
        products = sum(n for opcode, n in opcodes.items() if opcode.startswith("HMMA"))
        copies = sum(n for opcode, n in opcodes.items() if opcode.startswith("LDGSTS"))
        if read_transposed:
            # dV and dK, 16 rows and two column tiles for each
            return 2 * plan.rows // 16 * columns // 16 // read_transposed
        if products:
            # a product of one of S and dP
            return plan.rows // 8 * d // 16 // products
        return -(-(plan.rows * d // 8) // plan.threads // copies) if copies else 1

    return machine_code.count_turns(blocks, path, loop, turns), plan.threads / 128


def _name(blocks, path, counts: Counter) -> Counter:
    """HGMMA tells in its arguments that B is read as [k, n], and A from registers."""
    from_registers = sum(
        i.base == "HGMMA" and "tnspB" in i.arguments for b in path for i in blocks[b].code
    )
    named: Counter = Counter()
    for opcode, n in counts.items():
        named[opcode] += n
    if from_registers:
        for block in path:
            for i in blocks[block].code:
                if i.base == "HGMMA" and "tnspB" in i.arguments:
                    named[i.opcode] -= 1
                    named[f"{i.opcode}.tnspB"] += 1
    return +named


# ---- rows ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One model's layer on one GPU. Never a measurement."""

    kind: str  # "model"
    gpu: str
    arch: str
    shape: str
    kernel: str
    registers: int
    shared: int
    blocks_per_sm: int
    grid: dict[str, float]  # efficiency, by batch
    unit: str
    cycles: dict[str, float]
    bound: str
    share_of_floor: float | None  # predicted, at batch 4
    projected_issue: float | None = None  # under rule "projected", where prompts stay on chip
    tiles: int | None = None  # of all heads, at batch 1


def rows_of(
    library: Path, gpus: tuple[Gpu, ...] = GPUS, shapes: tuple[Shape, ...] = SHAPES
) -> list[Row]:
    known = machine_code.registers(library)
    found = []
    for arch in dict.fromkeys(gpu.arch for gpu in gpus):
        mine = [gpu for gpu in gpus if gpu.arch == arch]
        plans = {plan(gpu, shape) for gpu in mine for shape in shapes}
        names = {p: mangled(known, arch, p) for p in plans}
        code = machine_code.disassemble(library, arch, list(names.values()))
        counts = {p: path_counts(p, code[name]) for p, name in names.items()}
        projected = {p: path_counts(p, code[name], True) for p, name in names.items()
                     if p.kernel.endswith("short") and _projects(p)}  # fmt: skip
        for gpu in mine:
            for shape in shapes:
                how = plan(gpu, shape)
                row = _row(gpu, shape, known[arch, names[how]], *counts[how])
                if how in projected:
                    path, turns = projected[how]
                    row = replace(row, projected_issue=round(path.total() * turns, 1))
                found.append(row)
    return found


def backward_rows(library: Path, gpus: tuple[Gpu, ...] = GPUS) -> list[Row]:
    """Of dQ what resides alone: its walks over the keys are counted nowhere."""
    known = machine_code.registers(library)
    found = []
    for arch in dict.fromkeys(gpu.arch for gpu in gpus):
        names = {p: mangled(known, arch, p) for d in BACKWARD_DIMS for p in backward_plans(d)}
        of_keys = [name for p, name in names.items() if p.kernel == "backward_keys"]
        code = machine_code.disassemble(library, arch, of_keys)
        for gpu, d in itertools.product((gpu for gpu in gpus if gpu.arch == arch), BACKWARD_DIMS):
            for how in backward_plans(d):
                registers, pipes = known[arch, names[how]], {}
                if how.kernel == "backward_keys":
                    pipes = cycles(gpu, how, d, *keys_counts(how, code[names[how]]))
                bound = max(pipes, key=pipes.__getitem__, default="-")
                resident = blocks_per_sm(gpu, how, registers)
                unit = f"{how.rows} rows x {how.keys} keys"
                found.append(Row("model", gpu.name, arch, f"backward, d{d}", str(how), registers,
                                 how.shared, resident, {}, unit, pipes, bound, None))  # fmt: skip
    return found


def _projects(plan: Plan) -> bool:
    """Whether rule "projected" is not the streamed kernel's."""
    return plan.kernel != "forward_short" or plan.sizes[0] <= 128


def mangled(known: dict[tuple[str, str], int], arch: str, plan: Plan) -> str:
    names = [name for a, name in known if a == arch and plan.mangled.search(name)]
    if len(names) != 1:
        raise ValueError(f"{plan}: {len(names)} kernels of that name for {arch} in the library")
    return names[0]


def _row(gpu: Gpu, shape: Shape, registers: int, counts: Counter, turns: float) -> Row:
    how = plan(gpu, shape)
    pipes = cycles(gpu, how, shape.d, counts, turns)
    resident = blocks_per_sm(gpu, how, registers)
    tiles = shape.h * -(-shape.l // how.rows)
    grid = {}
    if how.persistent:
        grid = {str(b): round(grid_efficiency(b * tiles, gpu.sms * resident), 3) for b in BATCHES}
    bound = max(pipes, key=pipes.__getitem__)
    unit = f"64 rows x {shape.n_pos}+{shape.n_neg} keys"
    share = None
    if how.kernel.endswith("short"):
        floor = max(pipes["memory"], _useful_products(gpu, shape))
        share = round(floor / pipes[bound] * grid["4"], 2)
    else:
        unit = f"64 rows x {how.keys} keys of one prompt"
        if "sm90" in how.kernel:
            blocks = sum(-(-n // how.keys) for n in (shape.n_pos, shape.n_neg))
            useful = _useful_products(gpu, shape) / blocks
            share = round(useful / pipes[bound] * grid["4"], 2)
    return Row("model", gpu.name, gpu.arch, str(shape), str(how), registers, how.shared, resident,
               grid, unit, pipes, bound, share, tiles=tiles)  # fmt: skip


def _useful_products(gpu: Gpu, shape: Shape) -> float:
    """Cycles of the fastest matrix instructions for 64 rows, nothing padded."""
    rate = gpu.wgmma or gpu.mma
    keys = shape.n_pos + shape.n_neg
    return 2 * GROUP_ROWS * keys * shape.d / rate if rate else 0.0


def predicted_us(gpu: Gpu, row: Row, shape: Shape) -> float:
    """Of a launch without its start: the tallest pipe, on the SM that has most to do."""
    how = plan(gpu, shape)
    parts = 1
    if how.kernel.endswith("long"):
        parts = sum(-(-n // how.keys) for n in (shape.n_pos, shape.n_neg))
    tiles = shape.b * shape.h * -(-shape.l // how.rows)
    # tiles that an SM gets when they are spread as evenly as tiles can be
    slots = gpu.sms * row.blocks_per_sm
    tiles_of_sm = row.blocks_per_sm * -(-tiles // slots)
    return tiles_of_sm * how.rows / GROUP_ROWS * parts * row.cycles[row.bound] / gpu.ghz / 1e3


# ---- page ----------------------------------------------------------------------------------------

INTRODUCTION = """# The kernels by what can be counted

Made by `python -m bench statics --write` from the machine code of the built extension. **Every row
is a model**: counts along the path of a plain call (bf16, both prompts, no mask, no shared keys),
and data sheets. No time on this page was measured, and measured rows stand elsewhere
(`bench/results`).

* **issue** is the instructions that one scheduler of an SM issues, **exponential**, **tensor**,
  **shared** and **memory** are the cycles that these pipes are busy, all of them for 64 query rows
  and the keys named. The largest of them bounds the kernel if all else hides under it. Without a
  number for `mma.sync` on a GPU there is none under tensor.
* **projected** is what a scheduler issues under rule "projected", where the prompts stay on chip;
  the other pipes have the same to do. Where K and V pass by, only the last step has more to do.
* **grid** is the work over what all slots (SMs x blocks per SM) could do while the longest block
  runs, in tiles, at batch 1, 4 and 16. `forward_long` launches a block for each tile instead.
* **of floor** is the useful products and bytes at the rates of the data sheet over the largest
  pipe, times the grid at batch 4: what is left if everything overlaps.
* **backward** rows have `backward_queries`, which makes dQ, and `backward_keys`, which makes dK and
  dV: the counts are those of a tile of query rows under the keys of a block.
* **nag** rows have `nag_blend`, the last launch of normalised attention guidance, which makes O of
  Z+ and Z-: a row over all heads is a warp's, at most 1280 channels wide.
* **small image** rows have `forward_image`, which attends to the image's keys of a joint attention
  as well: the counts are those of a block of keys, of whichever segment.
* **yardstick** rows are a public kernel, counted in the same way: the loop over keys of
  FlashAttention-2's forward, from the source that PyPI has, by the same nvcc
  (`tools/yardstick.py`). It attends to one prompt, as a turn of `forward_long` does.
"""


GRIDS_TEXT = """## Grids that whole tiles do not fill

Of the layers at batch 1, 4 and 16 these do less than 0.85 (batch 1) or 0.95 of what the GPU could
while its fullest SM works. **most** is what whole tiles allow, however they are spread. Smaller
tiles would do better here and cost more everywhere: a product has 16 rows a warp, or 64 on Hopper,
and a tile of half the rows would read K and V from shared memory twice as often. Triton's kernels
of streamed keys have a program for each tile instead of a share of them: a GPU works them off in
rounds of all programs that it holds.

"""


def yardsticks() -> list[Row]:
    return [Row(**row) for row in json.loads(YARDSTICK.read_text(encoding="utf-8"))]


def page(rows: list[Row]) -> str:
    out = [INTRODUCTION]
    rows = [*rows, *yardsticks()]
    for gpu in dict.fromkeys(row.gpu for row in rows):
        mine = [row for row in rows if row.gpu == gpu]
        out.append(f"## {gpu} ({mine[0].arch})\n")
        out.append(
            "| | shape | kernel | registers | shared | blocks per SM | grid 1 / 4 / 16 | unit "
            "| issue | projected | exponential | tensor | shared | memory | bound | of floor |"
        )
        out.append("|---" * 16 + "|")
        for row in mine:
            grid = " / ".join(f"{row.grid[str(b)]:.2f}" for b in BATCHES) if row.grid else "-"
            pipes = [row.cycles.get("issue"), row.projected_issue]
            pipes += [row.cycles.get(n) for n in ("exponential", "tensor", "shared", "memory")]
            cells = [
                row.kind, row.shape, f"`{row.kernel}`", row.registers, row.shared,
                row.blocks_per_sm, grid, row.unit, *(f"{x:.0f}" if x else "-" for x in pipes),
                row.bound, "-" if row.share_of_floor is None else f"{row.share_of_floor:.2f}",
            ]  # fmt: skip
            out.append("| " + " | ".join(str(cell) for cell in cells) + " |")
        out.append("")
    return "\n".join([*out, grids(rows)])


class Uneven(NamedTuple):
    gpu: Gpu
    layer: str
    b: int
    tiles: int
    grid: float

    @property
    def most(self) -> float:
        """The efficiency of whole tiles that are spread as evenly as can be."""
        return grid_efficiency(self.tiles, self.gpu.sms)


def uneven(rows: list[Row]) -> list[Uneven]:
    """The launches of GRIDS that do less than is wanted."""
    gpus = {gpu.name: gpu for gpu in GPUS}
    return [
        Uneven(gpus[row.gpu], name, b, b * row.tiles, row.grid[str(b)])
        for row in rows
        for name, batches in GRIDS.items()
        for b in batches
        if row.shape.startswith(f"{name}-b") and row.kernel.startswith("forward")
        and "projected" not in row.kernel and row.tiles and row.grid
        and row.grid[str(b)] < wanted(b)
    ]  # fmt: skip


def grids(rows: list[Row]) -> str:
    """The section of a page that says which launches these are."""
    lines = [
        f"| {x.gpu.name} | {x.gpu.sms} | {x.layer} | {x.b} | {x.tiles} | {x.tiles / x.gpu.sms:.2f} "
        f"| {x.grid:.3f} | {x.most:.3f} |"
        for x in uneven(rows)
    ]
    head = "| GPU | SMs | layer | batch | tiles | for each SM | grid | most |"
    return GRIDS_TEXT + "\n".join([head, "|---" * 8 + "|", *lines]) + "\n"


def recorded() -> list[Row]:
    """The rows that the page was made of."""
    return [Row(**row) for row in json.loads(ROWS.read_text(encoding="utf-8"))]
