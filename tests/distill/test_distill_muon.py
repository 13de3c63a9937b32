"""Muon: its step against one by singular values, and which parameters it is for."""

import pytest
import torch
from nasa_distill.train import muon
from nasa_distill.world import model


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (4, 4), (6, 3, 3, 3), (1, 8)])
def test_a_step_has_the_directions_of_the_momentum(shape):
    """Two steps by hand; `U V^T` from a decomposition, but for the quintic's singular values."""
    random_ = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(shape, generator=random_) for _ in range(3))
    parameter = start.clone().requires_grad_()
    optimiser = muon.Muon([parameter], lr=0.1)
    expected, mean = start.double(), torch.zeros(shape, dtype=torch.float64)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimiser.step()
        mean = 0.95 * mean + 0.05 * gradient.double()
        moved = (0.05 * gradient.double() + 0.95 * mean).flatten(1)
        u, s, v = torch.linalg.svd(moved, full_matrices=False)
        s = s / s.norm()
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        scale = max(1, moved.shape[0] / moved.shape[1]) ** 0.5
        expected = expected - 0.1 * scale * ((u * s) @ v).view(shape)
    torch.testing.assert_close(parameter.detach().double(), expected, atol=1e-3, rtol=1e-3)


def test_singular_values_come_near_one():
    random_ = torch.Generator().manual_seed(1)
    for rows, columns in ((40, 70), (70, 40), (64, 64)):
        matrix = torch.randn(rows, columns, generator=random_)
        found = torch.linalg.svdvals(muon.orthogonal(matrix))
        # the least of a square one are too small for five iterations
        assert found.max() < 1.25 and found.sort().values[len(found) // 10] > 0.6
    assert torch.equal(muon.orthogonal(torch.zeros(3, 3)), torch.zeros(3, 3))


def test_it_is_for_the_matrices_between_first_and_last_layer():
    unet = model.make_unet((16, 32))
    inner, others = muon.split(unet)
    names = {id(parameter): name for name, parameter in unet.named_parameters()}
    assert len(inner) + len(others) == len(names)
    assert all(parameter.dim() >= 2 for parameter in inner)
    assert {names[id(p)] for p in others if p.dim() >= 2} == {"conv_in.weight", "conv_out.weight"}


def test_what_has_no_gradient_stays():
    parameter = torch.ones(2, 2, requires_grad=True)
    muon.Muon([parameter], lr=0.1).step()
    assert torch.equal(parameter, torch.ones(2, 2))
