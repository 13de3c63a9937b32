"""What the launchers promise the compiler, and how they share out the work."""

from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from support.cases import DEVICE

from nasa_kernels._joint import shared
from nasa_kernels._triton import (
    backward,
    configs,
    forward,
    grid,
    joint,
    joint_backward,
    nag,
    projected_backward,
)
from nasa_kernels._triton.configs import forward_config, resident_bytes, resident_cut
from nasa_kernels._triton.launch import alignment
from nasa_kernels._triton.tiles import cut, share_of_tiles
from nasa_kernels.reference import CROSS_RULES, RULES


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
    assert resident_cut(0, 64, q) is None
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
        config = forward_config(d, torch.bfloat16, widths, q.device)
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
        assert forward_config(72, torch.bfloat16, widths, q.device).num_stages == stages


@pytest.mark.parametrize(
    ("arch", "d", "cuts", "has_more", "expected"),
    [
        (90, 40, ((64, 16), (64, 16)), False, 168),
        (90, 40, ((64, 16), None), False, 168),  # a void prompt
        (90, 40, ((64, 16), (64, 16)), True, None),  # masks take more
        (90, 40, ((128,), (64, 16)), False, None),  # so do more keys
        (90, 40, ((), (64, 16)), False, None),  # and streamed ones
        (90, 64, ((64, 16), (64, 16)), False, None),  # 167 by the compiler's choice
        (80, 40, ((64, 16), (64, 16)), False, None),
    ],
)
def test_registers_are_held_where_a_third_program_fits(
    monkeypatch, arch, d, cuts, has_more, expected
):
    monkeypatch.setattr(configs, "architecture", lambda device: arch)
    monkeypatch.setattr(configs, "SPILLS_AT_168", False)
    assert configs.most_registers(d, cuts, has_more, torch.device("cpu")) == expected


def test_registers_are_not_held_where_triton_would_spill(monkeypatch):
    monkeypatch.setattr(configs, "architecture", lambda device: 90)
    monkeypatch.setattr(configs, "SPILLS_AT_168", True)
    cuts = ((64, 16), (64, 16))
    assert configs.most_registers(40, cuts, False, torch.device("cpu")) is None


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

    for module in (forward, backward, projected_backward, joint, joint_backward, nag):
        for name in vars(module):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Recorder(f"{module.__name__}.{name}"))
    return found


def launch_all(b: int, l: int, n: int = 1) -> None:
    q, k = (torch.zeros(b, rows, 1, 8, dtype=torch.bfloat16) for rows in (l, n))
    rest = (None, None, None, 0.5, 1.0)
    for rule in map(RULES.index, CROSS_RULES):
        forward.forward(q, k, k, k, k, *rest, rule)
        backward.backward(q, q, k, k, k, k, *rest, rule, [True] * 6)
    arguments = (q, *(k,) * 6, *rest, 0, 0, 0)
    _, *kept = joint.attention(*arguments)
    joint.pair(q, *(k,) * 6, None, None, 1.0, 0, 0)
    joint_backward.backward(q, *kept, *arguments, [True] * 8)
    nag.blend(q, q, q, None, 0.5, 2.0, 2.5, 1)


@pytest.mark.parametrize(("b", "l"), [(70_000, 1), (1, 70_000 * 64)], ids=["heads", "queries"])
def test_no_grid_is_larger_than_a_gpu_takes(launches, b, l):
    """b h is large in the temporal attention of video models, l in their spatial one."""
    launch_all(b, l)
    assert {launch.kernel.rsplit(".", 2)[-2] for launch in launches} == {
        "forward", "backward", "projected_backward", "joint", "joint_backward", "nag",
    }  # fmt: skip
    for launch in launches:
        assert launch.grid[0] < 2**31, launch
        assert all(size <= 65_535 for size in launch.grid[1:]), launch


def test_every_launch_says_that_products_and_sums_are_fused(launches):
    """Triton's default is not the same in all versions, and bits would follow it."""
    launch_all(2, 3)
    # forward; dQ, dK and dV twice; the same and dZ; joint and its pair; statistics, dQ, three
    # segments; NAG
    assert len(launches) == 1 + 3 + 1 + 4 + 2 + 5 + 1
    assert all(launch.options["enable_fp_fusion"] is True for launch in launches)


# ---- programs that walk over tiles ---------------------------------------------------------------


@triton.jit
def range_kernel(FIRST, LAST, total, per_multiprocessor):
    first, last = share_of_tiles(total.to(tl.int64), per_multiprocessor)
    tl.store(FIRST + tl.program_id(0), first)
    tl.store(LAST + tl.program_id(0), last)


@pytest.mark.parametrize("resident", [1, 2, 3])
@pytest.mark.parametrize("multiprocessors", [1, 5, 108, 132])
def test_every_tile_has_one_program_and_no_multiprocessor_has_two_more(multiprocessors, resident):
    """If programs start one on each multiprocessor, then a second."""
    for tiles in (1, 7, multiprocessors * resident, 640):
        how = grid.grid_for(tiles, multiprocessors, resident)
        first, last = torch.zeros(2, how.programs, dtype=torch.int64, device=DEVICE)
        range_kernel[(how.programs,)](first, last, tiles, how.per_multiprocessor)
        done = sorted(t for a, b in zip(first, last, strict=True) for t in range(a, b))
        assert done == list(range(tiles))
        busy = [0] * multiprocessors
        for program, count in enumerate((last - first).tolist()):
            busy[program % multiprocessors] += count
        assert max(busy) == -(-tiles // multiprocessors)


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "expected"),
    [
        (168, 65536, 4, 3),  # H100, SDXL: three by registers and by memory
        (176, 65536, 4, 2),  # 11 warps of each quarter's registers are 2 programs of 4, not 3
        (32, 65536, 4, 3),  # memory
        (32, 75776, 4, 3),
        (32, 77312, 4, 2),  # three would fit if they did not reserve 1 KiB each
        (255, 98304, 8, 1),
        (64, 1024, 4, 8),
        (16, 1024, 4, 16),  # threads
    ],
)
def test_programs_of_a_multiprocessor(registers, shared, warps, expected):
    hopper = grid.Gpu(132, 65536, 228 * 1024, 2048)
    assert grid.resident_programs(hopper, registers, shared, warps) == expected


@pytest.mark.parametrize("rule", CROSS_RULES)
def test_bits_do_not_depend_on_who_computes_a_tile(monkeypatch, rule):
    """Five tiles of four heads, in ranges that end within a head, at its end, and beyond it."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, k_neg, v_neg = (
        torch.randn(2, n, 2, 24, generator=generator).to(DEVICE, torch.float16)
        for n in (300, 9, 9, 5, 5)
    )

    def run(how: grid.Grid):
        monkeypatch.setattr(forward, "grid_of", lambda *args: how)
        rest = (None, None, None, 0.7, 0.2, RULES.index(rule))
        return forward.forward(q, k, v, k_neg, v_neg, *rest)

    expected = run(grid.Grid(20, 1))
    for how in (grid.Grid(1, 1), grid.Grid(3, 3), grid.Grid(6, 2), grid.Grid(4, 1)):
        assert torch.equal(run(how), expected)


# ---- void prompts --------------------------------------------------------------------------------


def test_a_prompt_that_no_query_looks_at_is_void(launches, monkeypatch):
    """Nothing is computed for it, and nothing about the other one changes."""
    q, k, none = (torch.zeros(1, n, 1, 64, dtype=torch.bfloat16) for n in (64, 77, 0))

    def cuts(call) -> tuple:
        launches.clear()
        call()
        return tuple(launches[0].options[name] for name in ("POS_CUT", "NEG_CUT"))

    zero = torch.zeros(1, 64, 1)
    widths = (64, 16)
    for rule in map(RULES.index, CROSS_RULES):

        def attend(k_pos, k_neg, alpha, alpha_map=None, rule=rule):
            rest = (None, None, alpha_map, alpha, 1.0, rule)
            return cuts(lambda: forward.forward(q, k_pos, k_pos, k_neg, k_neg, *rest))

        assert attend(k, k, 0.5) == (widths, widths)
        assert attend(k, k, 0.0) == attend(k, none, 0.5) == (widths, None)
        assert attend(none, k, 0.5) == (None, widths)
        # what a tensor holds is not known here
        assert attend(k, k, 0.0, zero) == (widths, widths)

    def joint_of(rule: str, text_neg: int, alpha: float) -> tuple:
        rest = (None, None, None, alpha, 1.0, RULES.index(rule), 0, text_neg)
        return cuts(lambda: joint.attention(q, k, k, k, k, k, k, *rest))

    # all keys are streamed beside those of a small image, and none beside another launch's
    for one_launch, held in ((shared._one_launch, ()), (0, widths)):
        monkeypatch.setattr(shared, "_one_launch", one_launch)
        assert joint_of("nasa", 0, 0.0) == joint_of("nasa-cross", 0, 0.0) == (held, None)
        # its own queries read it, and so does the softmax of this rule
        assert joint_of("nasa", 8, 0.0) == joint_of("vsf", 0, 0.0) == (held, held)


def test_the_gradient_of_a_void_prompt_is_zero_without_a_launch(launches):
    q, k = (torch.zeros(1, n, 1, 64, dtype=torch.bfloat16) for n in (64, 77))
    *_, dk_neg, dv_neg, _ = backward.backward(
        q, q, k, k, k, k, None, None, None, 0.0, 1.0, 0, [True] * 5 + [False]
    )
    assert dk_neg.shape == dv_neg.shape == k.shape
    assert dk_neg.count_nonzero() == dv_neg.count_nonzero() == 0
    assert [launch.kernel.rsplit(".", 1)[1] for launch in launches] == [
        "query_kernel", "key_kernel",
    ]  # fmt: skip
