"""Which image a student's draw settles on, and what keeps the draws of a caption apart."""

import torch
from nasa_distill.world import settle
from nasa_distill.world.kinds import LARGE


def test_a_draw_settles_on_the_likeliest_image():
    """Of those of which the caption is true: by the draw where the latents are noise, else by both,
    each with its own precision.
    """
    random_ = torch.Generator().manual_seed(0)
    known = torch.randn(5, 2, 4, 4, generator=random_)
    rates = torch.rand(60, 5, generator=random_)
    rates[::3, 1] = 0
    x_t, x0 = torch.randn(2, 60, 2, 4, 4, generator=random_)
    x0 = 0.3 * x0 + 0.5 * (known[0] + known[1])
    for signal, noise in ((0.01, 1.0), (0.7, 0.7)):
        alpha, sigma = torch.full((60, 1, 1, 1), signal), torch.full((60, 1, 1, 1), noise)
        found = settle.likeliest(x_t, x0, alpha, sigma, known, rates)
        by_latents = (x_t[:, None] - signal * known).square().sum((2, 3, 4)) / noise**2
        by_draw = (x0[:, None] - known).square().sum((2, 3, 4))
        expected = (rates.log() - by_latents / 2 - settle.TAIL * by_draw.log()).argmax(1)
        assert torch.equal(found, expected)
        assert (rates[torch.arange(60), found] > 0).all() and len(set(found.tolist())) > 1


def test_what_is_chosen_too_often_becomes_dear():
    """Draws that lie nearest to one image alone end with shares as the world's, and so do those of
    each caption where one caption's draws lie at one image and the other's at another.
    """
    random_ = torch.Generator().manual_seed(0)
    values = settle.values_of(LARGE)
    assert torch.equal(values.sum(1).unique(), torch.tensor([8.0, 10.0]))  # 2 more of a pair
    few = torch.randint(len(values), (12,), generator=random_)
    values, known = values[few], torch.randn(12, 2, 4, 4, generator=random_)
    rates = (0.2 + torch.rand(12, generator=random_)).expand(64, 12)
    # two captions that mention different things; of the first set both are the same
    halves = settle.features_of(["a red shape", "a blurry photo"], LARGE).repeat_interleave(32, 0)
    assert halves.norm(dim=1).allclose(torch.ones(64))
    due = (rates[:1] / rates[0].sum() @ values)[0]
    for features, nearest in ((halves[:1].expand(64, -1), (0, 0)), (halves, (0, 1))):
        prices, chosen = torch.zeros(features.shape[1], values.shape[1]), []
        at = known[list(nearest)].repeat_interleave(32, 0)
        for _ in range(500):
            x0 = at + 0.3 * torch.randn(64, 2, 4, 4, generator=random_)
            one = torch.ones(64, 1, 1, 1)
            # latents that say nothing
            given = (x0, x0, 0 * one, one, known, rates)
            found = settle.likeliest(*given, features @ prices @ values.T)
            if not chosen:
                assert torch.equal(found.view(2, 32), torch.tensor(nearest)[:, None].expand(2, 32))
            settle.raise_prices(prices, features, values, found, rates)
            chosen.append(found.view(2, 32))
        last = torch.stack(chosen[-200:])
        for half in (0, 1):
            shares = values[last[:, half].flatten()].mean(0)
            torch.testing.assert_close(shares, due, atol=0.04, rtol=0)
