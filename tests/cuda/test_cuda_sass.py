"""The machine code of the built extension: no spill, no stack, the instructions it is built for.

Looks at `nasa_kernels/_C.so`, or the file in $NASA_CUDA_LIBRARY.
"""

import os
from pathlib import Path

import pytest
import sass

from bench.machine_code import tools
from nasa_kernels._cuda import extension

LIBRARY = Path(os.environ.get("NASA_CUDA_LIBRARY", extension.LIBRARY))
pytestmark = [
    pytest.mark.skipif(not LIBRARY.is_file(), reason=f"no {LIBRARY.name}: built without CUDA C++"),
    pytest.mark.skipif(tools() is None, reason="no cuobjdump and nvdisasm"),
]
# the names in the sources for Hopper alone, and in the generic ones
HOPPER = {name for name in sass.NEEDED if "sm90" in name}
GENERIC = set(sass.NEEDED) - HOPPER


@pytest.fixture(scope="module")
def kernels() -> list[sass.Kernel]:
    return sass.kernels(LIBRARY)


def test_every_listed_architecture_has_device_code():
    code, ptx = sass.architectures(LIBRARY)
    listed_code, listed_ptx = sass.listed_architectures()
    assert code == listed_code
    assert ptx == listed_ptx


def test_every_architecture_has_every_kernel(kernels):
    for arch in sass.listed_architectures()[0]:
        names = [k.name for k in kernels if k.arch == arch]
        wanted = GENERIC | (HOPPER if arch == "sm_90a" else set())
        missing = {part for part in wanted if not any(part in name for name in names)}
        assert not missing, f"{arch}: {missing}"


def test_no_kernel_has_a_stack(kernels):
    """Spills, and arrays indexed at run time, of which ptxas does not warn."""
    assert not [failure for kernel in kernels for failure in sass.failures(kernel)]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_machine_code_has_no_local_access_and_the_right_instructions(kernels, arch):
    counts = sass.opcodes(LIBRARY, arch)
    mine = [kernel for kernel in kernels if kernel.arch == arch]
    assert mine and {kernel.name for kernel in mine} == set(counts)
    for kernel in mine:
        kernel.opcodes = counts[kernel.name]
    assert not [failure for kernel in mine for failure in sass.failures(kernel)]


def test_a_block_fits_the_registers(kernels):
    """65536 registers per SM: with 384 threads a kernel may start with 168, with 128 all 255."""
    for kernel in kernels:
        three_groups = "forward_sm90_long" in kernel.name or (
            "sm90" in kernel.name and "Li80ELi80E" in kernel.name
        )
        limit = 168 if three_groups else 255
        if "nag_blend" in kernel.name:
            # it waits for memory: 24 warps on an SM, of three blocks
            limit = 80
        assert kernel.registers <= limit, str(kernel)


def test_the_gate_sees_a_spill_and_a_missing_instruction():
    spill = sass.Kernel("sm_80", "forward_long_kernelI6__halfLi64EE", 255, 16, 0)
    assert sass.failures(spill)
    name = "forward_sm90_short_kernelI6__halfLi64ELi80ELi2ELb1EE"
    slow = sass.Kernel("sm_90a", name, 144, 0, 0, sass.Counter(HMMA=80, UTMALDG=3))
    assert {failure.split(": ")[1] for failure in sass.failures(slow)} >= {"no HGMMA"}
    serial = sass.Kernel("sm_90a", name, 144, 0, 0, sass.Counter(HGMMA=18, WARPGROUP=36))
    assert any("serialised" in failure for failure in sass.failures(serial))
    local = sass.Kernel("sm_90a", name, 144, 0, 0, sass.Counter(LDL=1))
    assert any("LDL" in failure for failure in sass.failures(local))
