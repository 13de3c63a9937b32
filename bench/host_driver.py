"""A driver for Triton that launches nothing: kernels compile, and launches end before the GPU's own
driver, whose work, a few microseconds, comes on top everywhere.
"""

from __future__ import annotations

from typing import Any

import triton.backends.nvidia.driver as nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver


def use(capability: int = 90) -> Driver:
    """Triton's driver from now on, in this process; for kernels that no one compiled yet."""
    fake = Driver(capability)
    driver.set_active(fake)
    return fake


class Driver:
    def __init__(self, capability: int):
        self.capability = capability
        self.launches: list[tuple] | None = None
        self.utils = _Utils(self)
        # 3.6 compiles a launcher in C for every kernel, against the driver's library
        has_one_launcher = hasattr(nvidia, "annotate_arguments")
        if has_one_launcher:
            # made by the driver's library
            for name, value in {"ARG_KERNEL": 0, "ARG_CONSTEXPR": 1, "ARG_TUPLE": 2}.items():
                setattr(nvidia, name, value)
            nvidia.PyKernelArg = lambda **fields: tuple(fields.values())
        self.launcher_cls: Any = nvidia.CudaLauncher if has_one_launcher else self._launcher

    def _launcher(self, source, metadata):
        def run(grid_x, grid_y, grid_z, stream, function, packed, data, enter, leave, *arguments):
            self.utils.launch(grid_x, grid_y, grid_z, arguments)

        return run

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def allocate_default_profile_scratch(self, *arguments) -> None:
        return None


class _Utils:
    def __init__(self, driver: Driver):
        self.driver = driver

    def load_binary(self, name, kernel, shared, device) -> tuple[int, ...]:
        # module, function, registers, spills, threads
        return 1, 2, 128, 0, 1024

    def get_device_properties(self, device) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def build_signature_metadata(self, *arguments) -> bytes:
        return b""

    def launch(self, grid_x, grid_y, grid_z, *arguments) -> None:
        if self.driver.launches is not None:
            self.driver.launches.append(((grid_x, grid_y, grid_z), arguments[-1]))
