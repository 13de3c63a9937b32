"""A PTX interpreter in numpy: runs the text that nvcc and Triton compile, without a GPU.

    kernel = ptx.load(text, "forward")
    memory = ptx.Memory()
    q, o = memory.upload(q_tensor), memory.upload(o_tensor)
    report = kernel.launch(grid=(4, 2), block=128, args=[q, o, 77], memory=memory, shared_bytes=n)
    o_tensor = memory.download(o, like=o_tensor)

`parser` reads the text, `machine` schedules threads, and one file per class of instructions says
what they do. What the hardware leaves open is decided against the kernel: asynchronous copies
arrive at the last moment allowed, and until then there is poison, as in every register and every
byte of shared memory that nobody wrote.

Always errors: accesses outside of a tensor or of shared memory, misaligned ones, deadlocks,
mbarriers with the wrong counts, registers touched while a wgmma owns them, a missing wgmma.fence.
With check_races also: shared memory accesses that no barrier orders, reads of bytes in flight or
never written, shared memory overwritten under a wgmma or a bulk store, missing proxy fences.

Not modelled: time; clusters; order between the lanes of one warp (a missing bar.warp.sync); races
in global memory; the rounding of the tensor core's sums and of the approximate units, which are
exact here up to fp32; fp8 and integer matrices; what ptxas makes of the text.
"""

from .errors import (
    BarrierMisuse,
    Deadlock,
    Fault,
    Hazard,
    Misaligned,
    OutOfBounds,
    Unsupported,
)
from .launch import LoadedKernel, Report, load
from .memory import Memory
from .snippet import evaluate, module, program
from .tensor_map import tensor_map
from .triton_kernels import compile_triton, run_triton, triton_on_cpu

__all__ = [
    "BarrierMisuse", "Deadlock", "Fault", "Hazard", "LoadedKernel", "Memory",
    "Misaligned", "OutOfBounds", "Report", "Unsupported", "compile_triton", "evaluate", "load",
    "module", "program", "run_triton", "tensor_map", "triton_on_cpu",
]  # fmt: skip
