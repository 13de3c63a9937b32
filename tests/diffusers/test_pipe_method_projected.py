"""Projected NASA on the families with cross-attention, against its formula step by step.

The families with joint attention have it beside the other rules, in test_pipe_joint.py.
"""

from types import SimpleNamespace

import pytest
import torch
from drawing import assert_same_image, draw, negative_embeds, relative_error
from joint_cases import CASES, random
from nasa_diffusers import NASA, ProjectedNASA, enable_nasa, nasa, testing
from nasa_diffusers.alpha import LayerAlpha
from nasa_diffusers.methods import projected
from nasa_diffusers.prompts import KeysValues, Signed
from oracle import Algorithm1, installed, plain_projected
from test_pipe_methods import FAMILIES, everywhere, negative, prompts
from test_pipe_methods import projected as as_layers_see_it


class PlainProjected(Algorithm1):
    """Algorithm 1, and then only what is not along Z+, at the length of Z+."""

    def combine(self, attn, q, text, text_mask):
        z_pos = self.attend(attn, q, text, text_mask)
        less = super().combine(attn, q, text, text_mask).unflatten(2, (attn.heads, -1))
        o = plain_projected(z_pos, z_pos - less.transpose(1, 2))
        return torch.where(z_pos == less.transpose(1, 2), z_pos, o).transpose(1, 2).flatten(2)


@pytest.fixture
def sd():
    return testing.stable_diffusion()


def blended(z_pos, *negatives):
    """The method on one query and prompts of one token, whose attention is that token's value."""
    signed = []
    for z_neg, alpha in negatives:
        rows = torch.as_tensor(alpha).float().expand(len(z_pos), 1, 1)
        signed.append(Signed(KeysValues(torch.ones_like(z_neg), z_neg), LayerAlpha(rows)))
    pos = KeysValues(torch.ones_like(z_pos), z_pos)
    return ProjectedNASA().cross(torch.ones_like(z_pos), pos, signed, None)


# ---- what is computed ----------------------------------------------------------------------------


@pytest.mark.parametrize("is_masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_its_formula(family, is_masked):
    pipe, text = FAMILIES[family](), negative(family)
    mask = torch.tensor([[1] * 6 + [0] * 3]).bool() if is_masked else None
    options = {"negative_prompt_embeds": text, "negative_prompt_attention_mask": mask}
    with nasa(pipe, method=ProjectedNASA(1.5), **options) as handle:
        ours = draw(pipe, steps=4, **prompts(family))
        assert handle.report().method == "ProjectedNASA"
    with everywhere(pipe, lambda m: PlainProjected([(as_layers_see_it(m, text), mask, 1.5)])):
        assert_same_image(ours, draw(pipe, steps=4, **prompts(family)))
    with everywhere(pipe, lambda m: Algorithm1([(as_layers_see_it(m, text), mask, 1.5)])):
        assert relative_error(ours, draw(pipe, steps=4, **prompts(family))) > 1e-3


def test_several_prompts_are_projected_as_one(sd):
    """And the length is kept once: the formula of their sum, whatever their order."""
    pairs = [("blurry", 1.3), ("red", -0.8)]
    with nasa(sd, pairs, ProjectedNASA()):
        ours = draw(sd)
    with nasa(sd, pairs[::-1], ProjectedNASA()):
        assert_same_image(draw(sd), ours)
    negatives = [(negative_embeds(sd, prompt), None, alpha) for prompt, alpha in pairs]
    with everywhere(sd, lambda m: PlainProjected(negatives)):
        assert_same_image(ours, draw(sd))


def test_one_prompt_twice_is_that_prompt_once(sd):
    with nasa(sd, [("blurry", 0.5), ("blurry", 1.0)], ProjectedNASA()):
        ours = draw(sd)
    with nasa(sd, "blurry", ProjectedNASA(1.5)):
        assert_same_image(ours, draw(sd))


@pytest.mark.parametrize("alpha", [0.5, 3.0, 100.0])
def test_equal_prompts_change_nothing(sd, alpha):
    """Where NASA shortens Z+, or takes it away."""
    stock = draw(sd, "blurry")
    with nasa(sd, "blurry", ProjectedNASA(alpha)) as handle:
        assert_same_image(draw(sd, "blurry"), stock)
        handle.method = NASA(1.0)
        assert relative_error(draw(sd, "blurry"), stock) > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_equal_prompts_change_nothing_in_joint_attention(name):
    """What both take from the image goes too. Both prompts stay equal from block to block."""
    case = CASES[name]()
    text = case.inputs["encoder_hidden_states"][:1]
    same = {"encoder_hidden_states": text.expand(2, -1, -1)}
    options = {"method": ProjectedNASA(3.0), "negative_prompt_embeds": text, "cfg": False}
    with torch.no_grad():
        stock = case(**same)
        with nasa(case.pipe, **options):
            assert_same_image(case(**same), stock)


def test_only_conditional_rows(sd):
    text = negative_embeds(sd)
    with nasa(sd, "blurry", ProjectedNASA(1.5)):
        ours = draw(sd, guidance=5.0)
    alpha = torch.tensor([0.0, 1.5]).view(2, 1, 1, 1)
    with everywhere(sd, lambda m: PlainProjected([(text, None, alpha)])):
        assert_same_image(ours, draw(sd, guidance=5.0))


def test_alpha_and_prompt_per_image(sd):
    both, stock = ["a cat", "a dog"], draw(sd, ["a cat", "a dog"])
    with nasa(sd, ["blurry", "red"], ProjectedNASA([0.0, 1.5])):
        ours = draw(sd, both)
    assert_same_image(ours[0], stock[0])
    text = torch.cat([negative_embeds(sd, prompt) for prompt in ("blurry", "red")])
    alpha = torch.tensor([0.0, 1.5]).view(2, 1, 1, 1)
    with everywhere(sd, lambda m: PlainProjected([(text, None, alpha)])):
        assert_same_image(ours, draw(sd, both))


def test_a_map_over_the_image(sd):
    region = torch.zeros(16, 16)
    region[:, :8] = 2.0
    text = negative_embeds(sd)

    def at(queries):
        size = int(queries**0.5)
        pooled = torch.nn.functional.adaptive_avg_pool2d(region[None, None], size)
        return pooled.view(1, 1, queries, 1)

    with nasa(sd, "blurry", ProjectedNASA(region)):
        ours = draw(sd)
    with everywhere(sd, lambda m: PlainProjected([(text, None, at)])):
        assert_same_image(ours, draw(sd))


def test_windows_and_layers(sd):
    stock, text = draw(sd, steps=3), negative_embeds(sd)
    with nasa(sd, "blurry", ProjectedNASA(2.0), start=1) as handle:
        late = draw(sd, steps=3)
        assert relative_error(late, stock) > 1e-4
        handle.alpha = 0
        assert torch.equal(draw(sd, steps=3), stock)
    with nasa(sd, "blurry", ProjectedNASA(2.0)):
        assert relative_error(late, draw(sd, steps=3)) > 1e-4
    with nasa(sd, "blurry", ProjectedNASA(2.0), layers="up_blocks.*"):
        ours = draw(sd, steps=3)
    plain = PlainProjected([(text, None, 2.0)])
    with installed(sd.unet, plain, lambda name: name.startswith("up_blocks.")):
        assert_same_image(ours, draw(sd, steps=3))


def test_it_is_no_longer_than_what_it_guides(sd):
    """Layer for layer and head for head, where NASA at this alpha doubles the length."""
    z_pos, z_neg = random(2, 1, 3, 8, seed=0), random(2, 1, 3, 8, seed=1)
    o = blended(z_pos, (z_neg, 50.0))
    torch.testing.assert_close(o.norm(dim=-1), z_pos.norm(dim=-1))
    # at last it looks straight away from what the negative has
    assert relative_error(o, plain_projected(z_pos, 1e6 * z_neg)) < 0.1


def test_an_empty_row_stays_empty():
    z_pos = torch.zeros(1, 1, 2, 4, requires_grad=True)
    z_neg = torch.ones(1, 1, 2, 4, requires_grad=True)
    for negatives in ([(z_neg, 1.0)], [(z_neg, 1.0), (2 * z_neg, 1.0)]):
        o = blended(z_pos, *negatives)
        assert torch.equal(o, torch.zeros_like(o))
        o.sum().backward()
    assert z_pos.grad.isfinite().all() and z_neg.grad.isfinite().all()


def test_what_alpha_0_hides_may_be_broken(sd):
    z_pos, z_neg = random(2, 1, 1, 4), torch.full((2, 1, 1, 4), float("nan"))
    alpha = torch.tensor([0.0, 1.0]).view(2, 1, 1)
    for negatives in ([(z_neg, alpha)], [(z_neg, alpha), (z_pos + 1, alpha)]):
        o = blended(z_pos, *negatives)
        assert torch.equal(o[0], z_pos[0]) and o[1].isnan().all()
    # the stock code runs
    stock = draw(sd)
    handle = enable_nasa(sd, "blurry", ProjectedNASA(0.0))
    assert torch.equal(draw(sd), stock)
    handle.alpha = 5.0
    assert relative_error(draw(sd), stock) > 1e-3


def test_the_defaults_are_those_that_were_measured():
    family = SimpleNamespace(is_joint=False)
    assert ProjectedNASA().default_alpha(family, None) == projected.CROSS_ALPHA
    family.is_joint = True
    assert ProjectedNASA().default_alpha(family, None) == projected.JOINT_ALPHA
    assert ProjectedNASA().default_alpha(family, None, has_own_alphas=True) == 1.0


def test_the_gradient_of_alpha(sd):
    """Of a learned strength, against that of the formula."""
    alphas = [torch.tensor(1.5, requires_grad=True) for _ in range(2)]
    sample = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    text, negative_text = negative_embeds(sd, "a cat"), negative_embeds(sd)
    with nasa(sd, "blurry", ProjectedNASA(alphas[0]), cfg=False):
        sd.unet(sample, 500, text).sample.square().mean().backward()
    plain = PlainProjected([(negative_text, None, alphas[1])])
    with everywhere(sd, lambda m: plain):
        sd.unet(sample, 500, text).sample.square().mean().backward()
    ours, expected = (alpha.grad for alpha in alphas)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-7)
    assert ours.abs() > 1e-6
