"""Compile every configuration of the Triton kernels without a GPU, and print what came out.

    python tools/triton_aot.py 90           one JSON line per kernel of the models, for sm_90
    python tools/triton_aot.py 90 models sdxl-64 flux ...                    of these alone
    python tools/triton_aot.py 89 memory    shared memory alone, of every head_dim as well
    python tools/triton_aot.py 90 counts 64,77 ...
                                            for `python -m bench statics`: what is on a tile's way,
                                            by head_dim and keys

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

from nasa_kernels._triton import (
    backward,
    configs,
    forward,
    joint,
    joint_backward,
    projected_backward,
)
from nasa_kernels.reference import RULES
from nasa_kernels.testing import MODEL_SHAPES

MODELS = ("sd15-64", "sd15-32", "sd15-16", "sdxl-64", "pixart-1024", "sana-1.6b", "wan-1.3b")
# head_dim and keys of the image and of each text
JOINT_MODELS = {"flux": (128, 4096, 512), "sd3": (64, 4096, 333)}
# whose image the same launch attends to
SMALL_IMAGES = {"flux-256px": (128, 256, 512)}
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
        self.options: dict = {}

    def __getitem__(self, grid):
        def compile_it(*args, **options):
            self.compiled = self.kernel.warmup(*args, grid=grid, **options)
            self.options = options

        return compile_it


def statistics(compiled) -> dict:
    """Registers, bytes, and instructions of the whole kernel."""
    sass, usage = disassemble(compiled)
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


def disassemble(compiled) -> tuple[str, str]:
    """Machine code and resources, as cuobjdump prints them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return run("cuobjdump", "-sass", file.name), run("cuobjdump", "-res-usage", file.name)


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
        "row-gradients": (projected_backward, "row_gradients_kernel"),
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
    dtype: torch.dtype = torch.bfloat16, has_backward: bool = True, rule: str = "nasa",
) -> None:  # fmt: skip
    q, k_pos, k_neg = (empty(b, n, h, d, dtype) for n in (64, n_pos, n_neg))
    inputs = (q, k_pos, k_pos, k_neg, k_neg, None, None, None, 0.5, d**-0.5)
    forward.forward(*inputs, RULES.index(rule))
    if has_backward:
        # dK and dV of one prompt: those of the other differ in a sign
        needs = [True, False, False, True, True, True]
        backward.backward(q, *inputs, RULES.index(rule), needs)


def row_gradients(b: int, h: int, d: int, n_pos: int, n_neg: int) -> None:
    q, k_pos, k_neg = (empty(b, n, h, d) for n in (64, n_pos, n_neg))
    cuts = (configs.resident_cut(n, d, q) for n in (n_pos, n_neg))
    projected_backward.row_gradients(
        q, q, k_pos, k_pos, k_neg, k_neg, None, None, None, 0.5, d**-0.5, *cuts, False
    )


def joint_attention(d: int, image: int, text: int, rule: str = "nasa-cross") -> None:
    q, k, prompt = (empty(1, n, 24, d) for n in (64, image, text))
    arguments = (
        q, k, k, *(prompt,) * 4, None, None, None, 0.5, d**-0.5, RULES.index(rule), 32, 32
    )  # fmt: skip
    _, *kept = joint.attention(*arguments)
    if rule != "projected":
        needs = [True, True, True, False, False, False, False, True]
        joint_backward.backward(q, *kept, *arguments, needs)


def small_image(d: int, image: int, text: int) -> None:
    """Of the backward pass nothing is new."""
    q, k, prompt = (empty(1, n, 24, d) for n in (64, image, text))
    rest = (None, None, None, 0.5, d**-0.5, RULES.index("nasa-cross"), 32, 32)
    joint.forward(q, k, k, *(prompt,) * 4, *rest)


def report(compilers: dict[str, CompileOnly], facts) -> None:
    """A line for each kernel that was compiled since the last report."""
    for name, kernel in compilers.items():
        if kernel.compiled is not None:
            print(json.dumps({"kernel": name} | facts(kernel)), flush=True)
            kernel.compiled = None


def of_the_models(arch: int, *models: str) -> None:
    models = models or (*MODELS, *JOINT_MODELS, *SMALL_IMAGES)
    compilers = compile_for(arch)

    def report_model(model: str, rule: str) -> None:
        about = {"model": model, "rule": rule, "triton": triton.__version__}
        report(compilers, lambda kernel: about | statistics(kernel.compiled))

    for shape in MODEL_SHAPES:
        if shape.name not in models:
            continue
        sizes = (16, shape.h, shape.d, shape.n_pos, shape.n_neg)
        cross_attention(*sizes)
        report_model(shape.name, "nasa")
        # of the backward pass one kernel is new; in dQ each prompt has its own dO
        cross_attention(*sizes, rule="projected", has_backward=shape.name == "sdxl-64")
        row_gradients(*sizes)
        report_model(shape.name, "projected")
    for model in (name for name in JOINT_MODELS if name in models):
        for rule in ("nasa-cross", "projected"):
            joint_attention(*JOINT_MODELS[model], rule=rule)
            report_model(model, rule)
    for model in (name for name in SMALL_IMAGES if name in models):
        small_image(*SMALL_IMAGES[model])
        report_model(model, "nasa-cross")


def memory_of_all(arch: int) -> None:
    """Shared memory alone, which is known before a kernel is translated for LLVM."""
    make_llir = CUDABackend.make_llir

    class KnownNow(Exception):
        pass

    def until_llvm(self, source, metadata, *rest):
        def stop(passes, *options):
            passes.run(source, "make_llir")
            raise KnownNow

        # what follows would take as long as all that comes before it
        translation = mock.patch.object(nvidia.nvidia.passes.ttgpuir, "add_to_llvmir", stop)
        with translation, contextlib.suppress(KnownNow):
            make_llir(self, source, metadata, *rest)
        metadata |= {"shared": source.get_int_attr("ttg.shared"), "name": "none"}
        return ""

    CUDABackend.make_llir = until_llvm
    CUDABackend.make_ptx = lambda *rest: ""
    CUDABackend.make_cubin = lambda *rest: b""
    compilers = compile_for(arch)

    def report_case(case: str) -> None:
        report(
            compilers,
            lambda kernel: {"case": case, "shared": kernel.compiled.metadata.shared},
        )

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
        if has_backward:
            row_gradients(16, 8, d, n_pos, n_neg)
        report_case(f"d{d}-n{n_pos}+{n_neg}")
    cross_attention(1, 8, 256, 77, 512, dtype=torch.float32)
    report_case("d256-n77+512-fp32")
    for model, (d, image, text) in JOINT_MODELS.items():
        joint_attention(d, image, text)
        report_case(model)
    for model, sizes in SMALL_IMAGES.items():
        small_image(*sizes)
        report_case(model)


def counts_of(arch: int, *sizes: str) -> None:
    """What the tables of `bench/triton_statics.py` are made of."""
    from bench import triton_statics

    compilers = compile_for(arch)

    def report_counts(d: int, n: int, rule: str) -> None:
        report(compilers, lambda kernel: {"rule": rule, "d": d, "n": n} | counts(kernel))

    def counts(kernel: CompileOnly) -> dict:
        sass, usage = disassemble(kernel.compiled)
        return {
            "registers": int(re.search(r"REG:(\d+)", usage)[1]),
            "shared": kernel.compiled.metadata.shared, "warps": kernel.options["num_warps"],
            "rows": kernel.options["BLOCK_L"],
            "keys": kernel.options.get("BLOCK_N", kernel.options.get("KEYS")),
            "counts": triton_statics.count(sass),
        }  # fmt: skip

    for d, n in (map(int, size.split(",")) for size in sizes):
        cross_attention(16, 8, d, n, n)
        report_counts(d, n, "nasa")
        cross_attention(16, 8, d, n, n, rule="projected", has_backward=False)
        row_gradients(16, 8, d, n, n)
        report_counts(d, n, "projected")


if __name__ == "__main__":
    modes = {"models": of_the_models, "memory": memory_of_all, "counts": counts_of}
    architecture, mode, *arguments = (
        (*sys.argv[1:], "models") if len(sys.argv) == 2 else sys.argv[1:]
    )
    modes[mode](int(architecture), *arguments)
