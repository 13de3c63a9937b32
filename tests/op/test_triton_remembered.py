"""Launches that are remembered: what comes again is neither planned nor bound, all else is."""

from types import SimpleNamespace

import pytest
import torch
from triton import knobs

from nasa_kernels._triton import launch as launching


class Compiled:
    """What Triton gives back for a launch that it compiled; launches of it are written down."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, made: list):
        self.made = made
        self.told = 0

    def __getitem__(self, grid):
        def tell_hooks(*args):
            self.told += 1
            self.made.append((grid, args))

        return tell_hooks

    def run(self, x, y, z, stream, function, metadata, told, enter, leave, *args):
        assert (stream, function, metadata) == (7, "function", "metadata")
        assert told is enter is leave is None
        self.made.append(((x, y, z), args))


class Driver:
    def get_current_device(self):
        return 3

    def get_current_stream(self, device):
        assert device == 3
        return 7


class Kernel:
    arg_names = ("X", "stride", "factor", "WIDE", "CUT")

    def __init__(self):
        self.bound, self.made = 0, []

    def __getitem__(self, grid):
        def bind(*args, **options):
            self.bound += 1
            self.made.append((grid, args))
            self.compiled = Compiled(self.made)
            return self.compiled

        return bind


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(launching, "CompiledKernel", Compiled)
    monkeypatch.setattr(launching, "_ready", {})
    monkeypatch.setattr(launching, "driver", SimpleNamespace(active=Driver()))
    return Kernel()


def launch_on(kernel, x, setting=0, factor=0.5):
    def plan(x, setting):
        # the constants in another order than the kernel's
        constants = {"CUT": (64, 16), "WIDE": x.shape[0] + setting}
        return launching.Launch(kernel, (x.shape[0],), (x.stride(0),), constants, {"num_warps": 4})

    # one plan for all of a test
    plan = kernel.__dict__.setdefault("plan", plan)
    launching.launch(plan, (x,), (setting,), (x,), (factor,))


def test_a_launch_that_comes_again_is_neither_planned_nor_bound(kernel):
    x, y = (torch.zeros(4, 8, dtype=torch.bfloat16) for _ in range(2))
    launch_on(kernel, x)
    launch_on(kernel, y, factor=0.25)
    assert kernel.bound == 1
    assert kernel.made[0] == ((4,), (x, 8, 0.5))
    grid, (where, *rest) = kernel.made[1]
    # other pointers and numbers, and every parameter in the kernel's order
    assert where is y and grid == (4, 1, 1) and rest == [8, 0.25, 4, (64, 16)]


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_are_told_of_remembered_launches(kernel, monkeypatch, name):
    """Those of a profiler, which adds itself after the first launch, and goes again."""
    x = torch.zeros(4, 8)
    launch_on(kernel, x)
    launch_on(kernel, x)
    assert kernel.compiled.told == 0
    monkeypatch.setattr(knobs.runtime, name, knobs.HookChain())
    hooks = getattr(knobs.runtime, name)
    hooks.add(print)
    launch_on(kernel, x)
    assert kernel.compiled.told == 1
    hooks.remove(print)
    launch_on(kernel, x)
    assert kernel.compiled.told == 1
    monkeypatch.setattr(knobs.runtime, name, print)
    launch_on(kernel, x)
    assert kernel.compiled.told == 2
    assert kernel.bound == 1 and len(kernel.made) == 5
    assert all(made == ((4, 1, 1), (x, 8, 0.5, 4, (64, 16))) for made in kernel.made[1:])


def test_a_tensor_of_another_device_is_refused_where_a_launch_is_planned(kernel):
    """Its address would be read on the first one's."""

    def plan(x, y):
        raise AssertionError("planned")

    x, y = torch.zeros(4, 8), torch.zeros(4, 8, device="meta")
    for _ in range(2):
        with pytest.raises(ValueError, match="a tensor is on meta, the first on cpu"):
            launching.launch(plan, (x, y), (), (x, y), ())
    assert kernel.bound == 0


@pytest.mark.parametrize("change", ["shape", "stride", "dtype", "alignment", "setting"])
def test_what_a_plan_may_look_at_is_another_launch(kernel, change):
    buffer = torch.zeros(64, dtype=torch.bfloat16)
    x, setting = buffer[:32].view(4, 8), 0
    launch_on(kernel, x)
    if change == "setting":
        setting = 1
    else:
        x = {
            "shape": buffer[:24].view(3, 8),
            "stride": buffer.view(4, 16)[:, :8],
            "dtype": buffer[:32].half().view(4, 8),
            "alignment": buffer[1:33].view(4, 8),
        }[change]
    launch_on(kernel, x, setting)
    assert kernel.bound == 2
    launch_on(kernel, x, setting)
    assert kernel.bound == 2


def test_remembered_launches_are_not_without_end(kernel, monkeypatch):
    monkeypatch.setattr(launching, "_MOST", 3)
    for n in range(1, 6):
        launch_on(kernel, torch.zeros(n, 8))
    assert len(launching._ready) <= 3


def test_nothing_is_launched_on_nothing(kernel):
    launch_on(kernel, torch.zeros(0, 8))
    assert kernel.made == []
