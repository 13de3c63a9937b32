"""Counts a public kernel as ours are counted: FlashAttention-2's forward, compiled for sm_80.

    pip download --no-deps --no-build-isolation --no-binary :all: flash-attn==2.8.3
    tar xzf flash_attn-2.8.3.tar.gz
    python tools/yardstick.py flash_attn-2.8.3

Writes docs/kernels/yardstick.json, of which `python -m bench statics --write` takes its rows. What
is counted is the loop over keys of one prompt, without masks and with full tiles: its counterpart
is our streamed kernel. Nothing of the other project is kept but these numbers.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench import machine_code, statics  # noqa: E402

# head_dim, rows and keys of a tile, warps: as its launcher takes them on an A100
TILES = ((64, 128, 128, 4), (128, 128, 64, 4))
SOURCE = """
#include "namespace_config.h"
#include "flash.h"
#include "flash_fwd_kernel.h"
using namespace FLASH_NAMESPACE;
template <int d, int rows, int keys, int warps>
__global__ void yardstick(const __grid_constant__ Flash_fwd_params params) {
    using Traits = Flash_fwd_kernel_traits<d, rows, keys, warps, false, false, cutlass::bfloat16_t>;
    compute_attn<Traits, false, false, false, false, true, true, false, false>(params);
}
"""


def compile_kernels(folder: Path, out: Path) -> None:
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise OSError("yardstick: its sources include headers of torch, which is not installed")
    headers = Path(spec.submodule_search_locations[0]) / "include"
    source = out.with_suffix(".cu")
    instances = "".join(
        f"template __global__ void yardstick<{', '.join(map(str, tile))}>(const __grid_constant__ "
        "Flash_fwd_params);\n"
        for tile in TILES
    )
    source.write_text(SOURCE + instances, encoding="utf-8")
    includes = [folder / "csrc/flash_attn/src", folder / "csrc/cutlass/include", headers,
                headers / "torch/csrc/api/include"]  # fmt: skip
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    command = [nvcc, "-std=c++17", "-O3", "-arch=sm_80", "-cubin", "--expt-relaxed-constexpr",
               "--expt-extended-lambda", "--use_fast_math", "-w", "-o", str(out), str(source),
               *(f"-I{path}" for path in includes)]  # fmt: skip
    subprocess.run(command, check=True)


def rows_of(cubin: Path, origin: str) -> list[statics.Row]:
    gpu = next(g for g in statics.GPUS if g.arch == "sm_80")
    text = machine_code.cuobjdump(cubin, "-res-usage")
    known = dict(re.findall(r"Function (\S+):\s+REG:(\d+)", text))
    code = machine_code.parse(machine_code.cuobjdump(cubin, "-sass"))
    found = []
    for d, rows, keys, warps in TILES:
        (name,) = (n for n in code if f"Li{d}ELi{rows}ELi{keys}ELi{warps}E" in n)
        blocks = machine_code.blocks_of(code[name])
        # of a block of keys every warp makes the products of its rows
        products = rows // warps // 16 * (keys // 8) * (d // 16) * 2
        for loop in machine_code.loops_of(blocks):
            path = machine_code.plain_path(blocks, loop)
            counts = machine_code.count(blocks, path, loop)
            if sum(n for op, n in counts.items() if op.startswith("HMMA")) == products:
                break
        else:
            raise ValueError(f"{name}: no loop with {products} products")
        shared = 2 * d * (rows + 2 * keys)
        plan = statics.Plan("streamed_long", (), 32 * warps,
                            shared, rows, keys, False)  # fmt: skip
        # for 64 rows and 128 keys, as of our streamed kernel
        turns = 64 / rows * warps / 4 * 128 / keys
        cycles = statics.cycles(gpu, plan, d, counts, turns)
        kernel = f"{origin}<{d}, {rows}, {keys}, {warps}>"
        registers = int(known[name])
        resident = statics.blocks_per_sm(gpu, plan, registers)
        bound = max(cycles, key=cycles.__getitem__)
        unit = "64 rows x 128 keys of one prompt"
        found.append(statics.Row("model", gpu.name, gpu.arch, f"yardstick, d{d}", kernel, registers,
                                 shared, resident, {}, unit, cycles, bound, None))  # fmt: skip
    return found


def main(folder: Path) -> int:
    version = re.search(r"\nVersion: (\S+)", (folder / "PKG-INFO").read_text(encoding="utf-8"))[1]
    with tempfile.TemporaryDirectory() as scratch:
        cubin = Path(scratch) / "yardstick.cubin"
        compile_kernels(folder, cubin)
        rows = rows_of(cubin, f"flash-attn {version}")
    lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
    statics.YARDSTICK.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    for row in rows:
        print(row)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
