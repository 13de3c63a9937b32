"""What the launchers promise the compiler, and how they share out the work."""

from typing import NamedTuple

import pytest
import torch

from nasa_kernels._triton import backward, configs, forward, joint, joint_backward, nag
from nasa_kernels._triton import launch as launching
from nasa_kernels._triton.configs import (
    forward_config,
    programs_per_head,
    resident_bytes,
    resident_cut,
)
from nasa_kernels._triton.launch import alignment
from nasa_kernels._triton.tiles import cut


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_alignment_is_promised_only_where_every_row_has_it(dtype):
    width = 16 // dtype.itemsize
    q = torch.zeros(2, 6, 3, 40, dtype=dtype)
    assert alignment(q, q) == width
    assert alignment(q, q[:, ::2]) == width
    assert alignment(q, torch.zeros(2, 6, 3, 41, dtype=dtype)[..., :40]) == 1
    assert alignment(q, q.flatten()[1 : 1 + 2 * 5 * 3 * 40].view(2, 5, 3, 40)) == 1


@pytest.mark.parametrize("widest", [64, 128, 256])
def test_cut_covers_with_falling_powers_of_two(widest):
    for size in range(1, 257):
        widths = cut(size, widest)
        assert all(width & (width - 1) == 0 and width >= 16 for width in widths)
        # only the last width can be ragged
        assert sum(widths[:-1]) < size <= sum(widths)
        # at most a third is padding, and a multiple of 16 that is one or two powers has none
        assert sum(widths) <= max(16, 4 / 3 * (size + 15))
    assert cut(77) == (64, 16)
    assert cut(40) == (32, 16)


def test_residency_does_not_depend_on_the_other_prompt():
    """Or the bits of Z+ would."""
    q = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16)
    assert resident_cut(77, 64, q) == (64, 16)
    assert resident_cut(0, 64, q) == (16,)
    assert resident_cut(129, 64, q) == ()
    assert resident_cut(77, 64, q.float()) == ()
    assert resident_cut(77, 256, q) == ()


@pytest.mark.parametrize("kib", [99, 163, 227])
@pytest.mark.parametrize("d", [40, 64, 72, 80, 96, 112, 113, 120, 128, 160, 256])
def test_what_stays_on_chip_fits_with_the_queries(d, kib, monkeypatch):
    limit = kib * 1024
    monkeypatch.setattr(configs, "shared_memory", lambda device: limit)
    q, padded = torch.zeros(1, 1, 1, d, dtype=torch.bfloat16), sum(cut(d, 64 if d > 128 else 128))
    for n in range(1, 130):
        widths = resident_cut(n, d, q, widest=256)
        if not widths:
            continue
        config = forward_config(d, torch.bfloat16, widths, limit)
        # K and V of two prompts of this length, and each stage's tile of Q, 2 bytes an element
        held = 2 * padded * (2 * 2 * sum(widths) + config.num_stages * config.BLOCK_L)
        assert held < limit
        assert held < resident_bytes(d, widths, torch.bfloat16, config.num_stages) <= limit


def test_a_second_tile_of_queries_gives_way_to_the_prompts(monkeypatch):
    """PixArt's 120 + 120 keys of d 72 stay on chip where there are 99 KiB, with one tile of Q."""
    q = torch.zeros(1, 1, 1, 72, dtype=torch.bfloat16)
    for kib, stages in ((99, 1), (163, 2)):
        monkeypatch.setattr(configs, "shared_memory", lambda device, kib=kib: kib * 1024)
        widths = resident_cut(120, 72, q)
        assert sum(widths) == 128
        assert forward_config(72, torch.bfloat16, widths, kib * 1024).num_stages == stages


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, ...]
    options: dict


@pytest.fixture
def launches(monkeypatch) -> list[Launch]:
    """Every launch of a Triton kernel is written down instead of made."""
    found: list[Launch] = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **options: found.append(Launch(self.name, grid, options))

    for module in (forward, backward, joint, joint_backward, nag):
        for name in vars(module):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Recorder(f"{module.__name__}.{name}"))
    return found


def launch_all(b: int, l: int, n: int = 1) -> None:
    q, k = (torch.zeros(b, rows, 1, 8, dtype=torch.bfloat16) for rows in (l, n))
    rest = (None, None, None, 0.5, 1.0)
    forward.forward(q, k, k, k, k, *rest)
    backward.backward(q, q, k, k, k, k, *rest, [True] * 6)
    arguments = (q, *(k,) * 6, *rest, 0, 0, 0)
    _, *kept = joint.attention(*arguments)
    joint.pair(q, *(k,) * 6, None, None, 1.0, 0, 0)
    joint_backward.backward(q, *kept, *arguments, [True] * 8)
    nag.blend(q, q, None, 0.5, 2.0, 2.5)


@pytest.mark.parametrize(("b", "l"), [(70_000, 1), (1, 70_000 * 64)], ids=["heads", "queries"])
def test_no_grid_is_larger_than_a_gpu_takes(launches, b, l):
    """b h is large in the temporal attention of video models, l in their spatial one."""
    launch_all(b, l)
    assert {launch.kernel.rsplit(".", 2)[-2] for launch in launches} == {
        "forward", "backward", "joint", "joint_backward", "nag",
    }  # fmt: skip
    for launch in launches:
        assert launch.grid[0] < 2**31, launch
        assert all(size <= 65_535 for size in launch.grid[1:]), launch


def test_every_launch_says_that_products_and_sums_are_fused(launches):
    """Triton's default is not the same in all versions, and bits would follow it."""
    launch_all(2, 3)
    # forward; dQ, dK and dV twice; joint and its pair; statistics, dQ, three segments; NAG
    assert len(launches) == 1 + 3 + 2 + 5 + 1
    assert all(launch.options["enable_fp_fusion"] is True for launch in launches)


def test_programs_share_the_tiles_of_a_head():
    config = forward_config(64, torch.bfloat16, (64, 16), limit=227 * 1024)
    device = torch.device("cpu")
    assert programs_per_head(4096, 10, config, device, persistent=False) == 64
    assert programs_per_head(4096, 1, config, device, persistent=True) == config.occupancy
    assert programs_per_head(1, 10, config, device, persistent=True) == 1


# ---- launches that are remembered ----------------------------------------------------------------


class Compiled:
    """What Triton gives back for a launch that it compiled; launches of it are written down."""

    def __init__(self, made: list):
        self.made = made

    def __getitem__(self, grid):
        return lambda *args: self.made.append((grid, args))


class Kernel:
    arg_names = ("X", "stride", "factor", "WIDE", "CUT")

    def __init__(self):
        self.bound, self.made = 0, []

    def __getitem__(self, grid):
        def bind(*args, **options):
            self.bound += 1
            self.made.append((grid, args))
            return Compiled(self.made)

        return bind


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(launching, "CompiledKernel", Compiled)
    monkeypatch.setattr(launching, "_ready", {})
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
