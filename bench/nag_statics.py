"""What can be counted in `nag_blend`, the end of normalised attention guidance: `bench/statics.py`
says what for. It makes O of Z+ and Z-, a row over all heads at a time, and has no products.
"""

from __future__ import annotations

from pathlib import Path

from bench import machine_code
from bench.statics import GPUS, GROUP_ROWS, Gpu, Plan, Row, blocks_per_sm, cycles, mangled

# h d of layers whose rows a warp keeps: wider ones are two warps' to eight's, whose path has more
CHANNELS = (320, 640, 1152, 1280)
PLAN = Plan("nag_blend", (True,), 256, 8 * 8, 8, 0, False)
# loads of Z+ and Z- before the norms, for a lane's channels: 2 kHeld of csrc/nag_blend.cu
LOADS = 10


def rows_of(library: Path, gpus: tuple[Gpu, ...] = GPUS) -> list[Row]:
    known = machine_code.registers(library)
    found = []
    for arch in dict.fromkeys(gpu.arch for gpu in gpus):
        name = mangled(known, arch, PLAN)
        (code,) = machine_code.disassemble(library, arch, [name]).values()
        path = machine_code.straight_counts(machine_code.blocks_of(code), LOADS)
        for gpu in (gpu for gpu in gpus if gpu.arch == arch):
            resident = blocks_per_sm(gpu, PLAN, known[arch, name])
            for channels in CHANNELS:
                pipes = cycles(gpu, PLAN, channels, path, GROUP_ROWS / 4)
                # Z+ and Z- are read, O is written
                pipes["memory"] = round(GROUP_ROWS * 3 * 2 * channels / gpu.bytes_per_cycle, 1)
                bound = max(pipes, key=pipes.__getitem__)
                found.append(
                    Row(
                        "model", gpu.name, arch, f"nag, {channels} channels", str(PLAN),
                        known[arch, name], PLAN.shared, resident, {},
                        f"{GROUP_ROWS} rows x {channels} channels", pipes, bound,
                        round(pipes["memory"] / pipes[bound], 2),
                    )
                )  # fmt: skip
    return found
