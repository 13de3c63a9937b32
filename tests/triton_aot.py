"""Compile every configuration of the Triton kernels without a GPU, and print what came out.

    python tests/triton_aot.py 90        one JSON line per kernel, for sm_90

The launchers themselves run, on small CPU tensors of each model's sizes, with kernels that compile
for a given GPU instead of launching. So what is measured here is what a GPU would be given.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from nasa_kernels._triton import backward, configs, forward, joint, joint_backward
from nasa_kernels.testing import MODEL_SHAPES

MODELS = ("sd15-64", "sd15-32", "sd15-16", "sdxl-64", "pixart-1024", "sana-1.6b", "wan-1.3b")
# head_dim and keys of the image and of each text
JOINT_MODELS = {"flux": (128, 4096, 512), "sd3": (64, 4096, 333)}
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class NoGpu:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device=None) -> int:
        return 0


class CompileOnly:
    """Stands for a kernel: `kernel[grid](...)` compiles it and keeps the result."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.compiled = None

    def __getitem__(self, grid):
        def compile_it(*args, **options):
            self.compiled = self.kernel.warmup(*args, grid=grid, **options)

        return compile_it


def statistics(compiled) -> dict:
    """Registers and stack from the binary, instructions from its disassembly."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = run("cuobjdump", "-res-usage", file.name)
        sass = run("nvdisasm", "-c", file.name)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    count = {
        op.lower(): len(re.findall(rf"\b{re.escape(op)}\b", sass))
        for op in ("HGMMA", "HMMA", "UTCHMMA", "MUFU.EX2", "LDL", "STL")
    }
    return {
        "registers": int(registers),
        "stack": int(stack),
        "shared": compiled.metadata.shared,
        **count,
    }


def run(tool: str, *args: str) -> str:
    return subprocess.run([TOOLS / tool, *args], capture_output=True, text=True, check=True).stdout


def main(arch: int) -> None:
    driver.set_active(NoGpu(arch))
    for module in (forward, backward, configs):
        for name, value in (("architecture", arch), ("shared_memory", SHARED_MEMORY[arch])):
            if hasattr(module, name):
                setattr(module, name, lambda device, value=value: value)
    kernels = {
        "forward": (forward, "forward_kernel"),
        "queries": (backward, "query_kernel"),
        "keys": (backward, "key_kernel"),
        "joint": (joint, "joint_kernel"),
        "joint-statistics": (joint_backward, "statistics_kernel"),
        "joint-queries": (joint_backward, "query_kernel"),
    }
    compilers = {}
    for name, (module, kernel) in kernels.items():
        compilers[name] = CompileOnly(getattr(module, kernel))
        setattr(module, kernel, compilers[name])

    def report(model: str) -> None:
        for name, kernel in compilers.items():
            if kernel.compiled is not None:
                row = {"kernel": name, "model": model, "triton": triton.__version__}
                print(json.dumps(row | statistics(kernel.compiled)), flush=True)
                kernel.compiled = None

    def empty(b, n, h, d):
        return torch.empty(b, n, h, d, dtype=torch.bfloat16)

    for shape in MODEL_SHAPES:
        if shape.name in MODELS:
            q, k = (empty(16, n, shape.h, shape.d) for n in (64, shape.n_pos))
            rest = (None, None, None, 0.5, shape.d**-0.5)
            forward.forward(q, k, k, k, k, *rest)
            backward.backward(q, q, k, k, k, k, *rest, [True] * 6)
            report(shape.name)
    for model, (d, image, text) in JOINT_MODELS.items():
        q, k, prompt = (empty(1, n, 24, d) for n in (64, image, text))
        arguments = (q, k, k, *(prompt,) * 4, None, None, None, 0.5, d**-0.5, 0, 32, 32)
        _, *kept = joint.attention(*arguments)
        joint_backward.backward(q, *kept, *arguments, [True] * 8)
        report(model)


if __name__ == "__main__":
    main(int(sys.argv[1]))
