"""Compile every configuration of the Triton kernels without a GPU, and print what came out.

    python tools/triton_aot.py 90           one JSON line per kernel of the models, for sm_90
    python tools/triton_aot.py 89 memory    shared memory alone, of every head_dim as well

The launchers themselves run, on small CPU tensors of each model's sizes, with kernels that compile
for a given GPU instead of launching. So what is measured here is what a GPU would be given.
"""

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.driver import driver

from nasa_kernels._triton import backward, configs, forward, joint, joint_backward
from nasa_kernels.testing import MODEL_SHAPES

MODELS = ("sd15-64", "sd15-32", "sd15-16", "sdxl-64", "pixart-1024", "sana-1.6b", "wan-1.3b")
# head_dim and keys of the image and of each text
JOINT_MODELS = {"flux": (128, 4096, 512), "sd3": (64, 4096, 333)}
# bytes that a block may have
SHARED_MEMORY = {
    80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024,
}  # fmt: skip
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


def compile_for(arch: int) -> dict[str, CompileOnly]:
    """Let the launchers see a GPU of this kind, and compile where they would launch."""
    driver.set_active(NoGpu(arch))
    for module in (forward, backward, joint, configs):
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
    return compilers


def empty(b: int, n: int, h: int, d: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(b, n, h, d, dtype=dtype)


def cross_attention(
    b: int, h: int, d: int, n_pos: int, n_neg: int, *,
    dtype: torch.dtype = torch.bfloat16, has_backward: bool = True,
) -> None:  # fmt: skip
    q, k_pos, k_neg = (empty(b, n, h, d, dtype) for n in (64, n_pos, n_neg))
    rest = (None, None, None, 0.5, d**-0.5)
    forward.forward(q, k_pos, k_pos, k_neg, k_neg, *rest)
    if has_backward:
        backward.backward(q, q, k_pos, k_pos, k_neg, k_neg, *rest, [True] * 6)


def joint_attention(d: int, image: int, text: int) -> None:
    q, k, prompt = (empty(1, n, 24, d) for n in (64, image, text))
    arguments = (q, k, k, *(prompt,) * 4, None, None, None, 0.5, d**-0.5, 0, 32, 32)
    _, *kept = joint.attention(*arguments)
    joint_backward.backward(q, *kept, *arguments, [True] * 8)


def of_the_models(arch: int) -> None:
    compilers = compile_for(arch)

    def report(model: str) -> None:
        for name, kernel in compilers.items():
            if kernel.compiled is not None:
                row = {"kernel": name, "model": model, "triton": triton.__version__}
                print(json.dumps(row | statistics(kernel.compiled)), flush=True)
                kernel.compiled = None

    for shape in MODEL_SHAPES:
        if shape.name in MODELS:
            cross_attention(16, shape.h, shape.d, shape.n_pos, shape.n_neg)
            report(shape.name)
    for model, (d, image, text) in JOINT_MODELS.items():
        joint_attention(d, image, text)
        report(model)


def memory_of_all(arch: int) -> None:
    """Shared memory alone, which is known before LLVM makes anything of a kernel."""
    make_llir = CUDABackend.make_llir

    class KnownNow(Exception):
        pass

    def stop():
        raise KnownNow

    def until_llvm(self, source, metadata, *rest):
        with mock.patch.object(nvidia.llvm, "init_targets", stop), contextlib.suppress(KnownNow):
            make_llir(self, source, metadata, *rest)
        metadata |= {"shared": source.get_int_attr("ttg.shared"), "name": "none"}
        return ""

    CUDABackend.make_llir = until_llvm
    CUDABackend.make_ptx = lambda *rest: ""
    CUDABackend.make_cubin = lambda *rest: b""
    compilers = compile_for(arch)

    def report(case: str) -> None:
        for name, kernel in compilers.items():
            if kernel.compiled is not None:
                row = {"kernel": name, "case": case, "shared": kernel.compiled.metadata.shared}
                print(json.dumps(row), flush=True)
                kernel.compiled = None

    def longest_resident(d: int) -> int:
        q = empty(1, 1, 1, d)
        return max((n for n in range(1, 129) if configs.resident_cut(n, d, q)), default=0)

    models = {(shape.d, shape.n_pos, shape.n_neg) for shape in MODEL_SHAPES}
    # the most that stays on chip of both prompts, of one, and of neither
    edges = {(d, n, n) for d in range(16, 257, 16) for n in [longest_resident(d)] if n}
    edges |= {(64, 128, 512), (128, 512, 64), (256, 128, 512), (256, 512, 512)}
    # the text of CLIP where a head_dim fills its blocks
    edges |= {(128, 77, 77), (120, 77, 77), (113, 66, 80), (128, 65, 65)}
    for d, n_pos, n_neg in sorted(models | edges):
        # dK and dV do not depend on what stays on chip, and dQ keeps less of it there
        has_backward = (d, n_pos, n_neg) in models or d in (64, 128, 256)
        cross_attention(16, 8, d, n_pos, n_neg, has_backward=has_backward)
        report(f"d{d}-n{n_pos}+{n_neg}")
    cross_attention(1, 8, 256, 77, 512, dtype=torch.float32)
    report("d256-n77+512-fp32")
    for model, (d, image, text) in JOINT_MODELS.items():
        joint_attention(d, image, text)
        report(model)


if __name__ == "__main__":
    architecture = int(sys.argv[1])
    memory_of_all(architecture) if sys.argv[2:] == ["memory"] else of_the_models(architecture)
