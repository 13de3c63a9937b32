"""Reads the machine code of a built `_C.so`: registers, stack, spills and instructions per kernel.

    python tools/sass.py nasa_kernels/_C.so     prints the table, fails where a gate does

Needs cuobjdump and nvdisasm: from the CUDA toolkit, the Triton package, or
`pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`.
"""

import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench.machine_code import cuobjdump  # noqa: E402

# what a spill or a local array compiles to
LOCAL = ("LDL", "STL")
# one register goes to the stack and comes back, once: a head_dim and a length that no model has
ONE_WORD = {("sm_100", f"forward_short_kernel<{dtype}, 128, 80>") for dtype in ("bf16", "fp16")}
# what the kernels exist for, by a part of their name
NEEDED = {
    "forward_sm90_short_kernel": ("HGMMA", "UTMALDG", "UTMASTG", "SYNCS"),
    "forward_sm90_long_kernel": ("HGMMA", "UTMALDG", "UTMASTG", "SYNCS", "USETMAXREG"),
    "forward_short_kernel": ("HMMA", "LDSM", "LDGSTS"),
    "forward_long_kernel": ("HMMA", "LDSM", "LDGSTS"),
    "forward_image_kernel": ("HMMA", "LDSM", "LDGSTS"),
    "backward_queries_kernel": ("HMMA", "LDSM", "LDGSTS"),
    "backward_keys_kernel": ("HMMA", "LDSM", "LDGSTS"),
    "sum_splits_kernel": ("LDG", "STG"),
    "nag_blend_kernel": ("LDG", "STG", "SHFL"),
}


@dataclass
class Kernel:
    arch: str
    name: str
    registers: int
    stack: int
    local: int
    opcodes: Counter = field(default_factory=Counter)

    def __str__(self) -> str:
        spills = sum(self.opcodes[code] for code in LOCAL)
        return (
            f"{self.arch:8} {short_name(self.name):46} registers {self.registers:3} "
            f"stack {self.stack} LDL/STL {spills if self.opcodes else '-'} "
            f"HMMA {self.opcodes['HMMA']} HGMMA {self.opcodes['HGMMA']}"
        )


def short_name(mangled: str) -> str:
    """forward_short_kernel<bf16, 64, 80>"""
    kernel = re.search(r"([a-z][a-z0-9_]*_kernel)I", mangled)
    if kernel is None:
        return mangled
    dtype = "fp16" if "I6__half" in mangled else "bf16"
    sizes = re.findall(r"Li(\d+)E", mangled)
    name = re.sub(r"^\d+", "", kernel[1])
    name = next((known for known in NEEDED if name.endswith(known)), name)
    return f"{name}<{', '.join([dtype, *sizes])}>"


def listed_architectures() -> tuple[set[str], set[str]]:
    """What cmake/cuda.cmake lists: machine code for these, PTX for those."""
    text = (ROOT / "cmake/cuda.cmake").read_text(encoding="utf-8")
    archs = re.search(r'set\(NASA_CUDA_ARCHS "([^"]+)"', text)[1].split(";")
    names = {arch: "sm_" + arch.removesuffix("+PTX").replace(".", "") for arch in archs}
    return set(names.values()), {name for arch, name in names.items() if arch.endswith("+PTX")}


def architectures(library: Path) -> tuple[set[str], set[str]]:
    """What `library` contains: machine code for these, PTX for those."""
    code = set(re.findall(r"\.(sm_\w+)\.cubin", cuobjdump(library, "-lelf")))
    return code, set(re.findall(r"\.(sm_\w+)\.ptx", cuobjdump(library, "-lptx")))


def kernels(library: Path) -> list[Kernel]:
    """Every kernel of every architecture, without its opcodes."""
    found, arch, name = [], "", ""
    for line in cuobjdump(library, "-res-usage").splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function (\S+):", line):
            name = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", line):
            found.append(Kernel(arch, name, *map(int, match.groups())))
    return found


def opcodes(library: Path, arch: str) -> dict[str, Counter]:
    """Opcodes of each kernel of one architecture."""
    counts: dict[str, Counter] = {}
    current: Counter = Counter()
    for line in cuobjdump(library, "-sass", "-arch", arch).splitlines():
        if match := re.search(r"Function : (\S+)", line):
            current = counts.setdefault(match[1], Counter())
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", line):
            current[match[1]] += 1
    return counts


def failures(kernel: Kernel) -> list[str]:
    """What the gate has against a kernel."""
    name = short_name(kernel.name)
    found: list[str] = []
    if (
        (kernel.arch, name) in ONE_WORD
        and kernel.stack <= 8
        and all(kernel.opcodes[code] <= 1 for code in LOCAL)
    ):
        return found
    if kernel.stack or kernel.local:
        found.append(f"{kernel.arch} {name}: stack {kernel.stack}, local {kernel.local} bytes")
    if kernel.opcodes:
        found += [
            f"{kernel.arch} {name}: {kernel.opcodes[code]} {code}"
            for code in LOCAL
            if kernel.opcodes[code]
        ]
        needed = next((codes for part, codes in NEEDED.items() if part in kernel.name), ())
        found += [f"{kernel.arch} {name}: no {code}" for code in needed if not kernel.opcodes[code]]
        # ptxas says so, too, but only as information: a wait for each product
        fences, products = kernel.opcodes["WARPGROUP"], kernel.opcodes["HGMMA"]
        if 2 * fences > products > 0:
            found.append(f"{kernel.arch} {name}: serialised, {fences} WARPGROUP, {products} HGMMA")
    return found


def main(library: Path) -> int:
    listed, present = listed_architectures(), architectures(library)
    wrong = []
    for kind, want, have in zip(("machine code", "PTX"), listed, present, strict=True):
        wrong += [f"no {kind} for {arch}" for arch in sorted(want - have)]
    counts = {arch: opcodes(library, arch) for arch in sorted(present[0])}
    for kernel in kernels(library):
        kernel.opcodes = counts[kernel.arch].get(kernel.name, Counter())
        wrong += failures(kernel)
        print(kernel)
    for line in wrong:
        print("FAIL", line)
    print(f"{library}: {', '.join(sorted(present[0]))}; {len(wrong)} failures")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
