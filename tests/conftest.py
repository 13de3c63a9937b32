"""Where there is no GPU, Triton kernels run in Triton's interpreter, on the CPU.

Tests that compile them instead (`test_ptx_*`) run in a process of their own, with
TRITON_INTERPRET=0: Triton reads the variable once.
"""

import os

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
# they compile for half a minute
LONGEST = ("test_triton_compile", "test_cpu_check", "test_cuda_calls", "test_cuda_backward")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_configure(config):
    from support.failures import print_at_once

    print_at_once(config)
    if INTERPRETED:
        from support.interpreter import repair_bf16

        repair_bf16()


def pytest_collection_modifyitems(config, items):
    # the longest ones first: at the end one process would run them while the others wait
    items.sort(key=lambda item: item.path.stem not in LONGEST)
    if GPU:
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU: run `make gpu` on one"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A test of every back end skips fp32 on `cuda`, which has none; other refusals are errors."""
    try:
        return (yield)
    except ValueError as error:
        from support.cases import refuses_dtype

        backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
        if not refuses_dtype(backend, error):
            raise
        pytest.skip(str(error))


def pytest_terminal_summary(terminalreporter):
    if not GPU:
        skipped = terminalreporter.stats.get("skipped", [])
        # a module that is skipped whole has no keywords
        skipped = [r for r in skipped if "gpu" in getattr(r, "keywords", ())]
        terminalreporter.write_line(f"{len(skipped)} tests need a GPU and did not run here.")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """`torch.empty` returns NaN, so an element that a kernel forgets to write cannot look right."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
