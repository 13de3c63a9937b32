"""What the launchers promise the compiler, and how they share out the work."""

import pytest
import torch

from nasa_kernels._triton.configs import forward_config, programs_per_head, resident_cut
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


def test_programs_share_the_tiles_of_a_head():
    config = forward_config(64, torch.bfloat16, resident=True)
    device = torch.device("cpu")
    assert programs_per_head(4096, 10, config, device, persistent=False) == 64
    assert programs_per_head(4096, 1, config, device, persistent=True) == config.occupancy
    assert programs_per_head(1, 10, config, device, persistent=True) == 1
