"""What can be counted in `forward_image`, which attends to a small image and to both prompts:
`bench/statics.py` says what for. Its loop over keys is that of `forward_long`.
"""

from __future__ import annotations

from pathlib import Path

from bench import machine_code
from bench.statics import (
    GPUS,
    GROUP_ROWS,
    Gpu,
    Row,
    blocks_per_sm,
    cycles,
    mangled,
    path_counts,
    streamed_plan,
)

# of SD3 and of FLUX, Qwen-Image and the others
DIMS = (64, 128)


def rows_of(library: Path, gpus: tuple[Gpu, ...] = GPUS) -> list[Row]:
    known = machine_code.registers(library)
    found = []
    for arch in dict.fromkeys(gpu.arch for gpu in gpus):
        plans = {d: streamed_plan("forward_image", d) for d in DIMS}
        names = {d: mangled(known, arch, how) for d, how in plans.items()}
        code = machine_code.disassemble(library, arch, list(names.values()))
        for gpu in (gpu for gpu in gpus if gpu.arch == arch):
            for d, how in plans.items():
                registers = known[arch, names[d]]
                pipes = cycles(gpu, how, d, *path_counts(how, code[names[d]]))
                found.append(
                    Row(
                        "model", gpu.name, arch, f"small image, d{d}", str(how), registers,
                        how.shared, blocks_per_sm(gpu, how, registers), {},
                        f"{GROUP_ROWS} rows x {how.keys} keys", pipes,
                        max(pipes, key=pipes.__getitem__), None,
                    )
                )  # fmt: skip
    return found
