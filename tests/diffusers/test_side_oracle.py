"""Families with a side stream: a call computes what the stock blocks compute on the parts."""

import pytest
import torch
from flux_like_cases import CASES as FLUX_LIKE
from hunyuan_cases import CASES as HUNYUAN
from joint_cases import STRONG, by_rule
from nasa_diffusers import NAG, NASA, ProjectedNASA, nasa
from one_sequence_cases import CASES as ONE_SEQUENCE
from side_cases import CASES
from streams import Nag
from torch._dynamo.utils import counters

CASES = CASES | FLUX_LIKE | ONE_SEQUENCE | HUNYUAN
RULES = ("nasa-cross", "nasa-text", "nasa", "vsf")
TOLERANCE = {"rtol": 5e-4, "atol": 5e-5}
# of each kind of block one
COMPILED = ("z-image", "klein", "ltx2.3", "chroma", "ovis", "hunyuan-video", "hunyuan-dit")
COMPILED = [name for name in COMPILED if name in CASES]


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return CASES[request.param]()


def over_tokens(case, alpha):
    """Alpha of the image tokens that are made, as the oracle takes it; of others it is 0."""
    if case.targets is None:
        return alpha
    values = torch.zeros(1, case.image_tokens, 1, 1)
    values[:, case.leading : case.leading + case.targets] = alpha
    return values


def guided(case, negative, method, mask=None, **options):
    return nasa(
        case.pipe, None, method, cfg=False, negative_prompt_embeds=negative,
        negative_prompt_attention_mask=mask, **options,
    )  # fmt: skip


@torch.no_grad()
def test_the_oracle_without_negatives_is_stock(case):
    torch.testing.assert_close(case.expected(case.rules[0], []), case())


@torch.no_grad()
@pytest.mark.parametrize("rule", RULES)
def test_a_call_is_the_parts(case, rule):
    if rule not in case.rules:
        pytest.skip("not a rule of cross-attention")
    for tokens in (3, 12):
        negative = case.text_of(tokens, seed=4)
        with guided(case, negative, by_rule(rule, 0.4)):
            if rule == "vsf" and case.targets is not None:
                with pytest.raises(ValueError, match="reference images .* cannot be left out"):
                    case()
                return
            actual = case()
        expected = case.expected(rule, [(negative, over_tokens(case, 0.4), None)])
        assert (expected - case()).abs().max() > 1e-3
        torch.testing.assert_close(actual, expected, **TOLERANCE)


@torch.no_grad()
def test_nag(case):
    negative = case.text_of(9, seed=4)
    rule = Nag(STRONG.scale, STRONG.tau)
    expected = case.expected(rule, [(negative, over_tokens(case, STRONG.alpha), None)])
    with guided(case, negative, STRONG):
        torch.testing.assert_close(case(), expected, **TOLERANCE)


@torch.no_grad()
def test_idle_hooks_and_alpha_0_are_stock_bit_for_bit(case):
    stock = case()
    with guided(case, case.text_of(9, seed=4), NASA(0.0)) as handle:
        assert torch.equal(case(), stock)
        handle.alpha = 1e-30
        torch.testing.assert_close(case(), stock, rtol=1e-4, atol=1e-5)
        handle.alpha = 0.5
        assert not torch.equal(case(), stock)
    assert torch.equal(case(), stock)


@torch.no_grad()
def test_a_map_over_the_image(case):
    """Right half: of the image that is made, and neither of references nor of padding."""
    frames, height, width = case.grid
    region = torch.zeros(height, width)
    region[:, width // 2 :] = 0.4
    negative = case.text_of(9, seed=4)
    sound = {"layers": "*.attn2"} if case.cls.startswith("LTX2") else {}
    with guided(case, negative, NASA(region), **sound):
        actual = case()
    if sound:
        # the oracle takes one alpha for all layers: here the map must matter, and where it cannot
        # be read is an error
        with guided(case, negative, NASA(0.4), **sound):
            assert not torch.equal(actual, case())
        with guided(case, negative, NASA(region)), pytest.raises(ValueError, match="hears"):
            case()
        assert not torch.equal(actual, case())
        return
    values = torch.zeros(1, case.image_tokens, 1, 1)
    own = region.flatten().repeat(frames)[:, None, None]
    values[:, case.leading : case.leading + own.shape[0]] = own
    expected = case.expected(case.rules[0], [(negative, values, None)])
    torch.testing.assert_close(actual, expected, **TOLERANCE)


@torch.no_grad()
def test_layers_that_are_left_out_carry_the_negative(case):
    names = [name for name, _ in nasa_layers(case)]
    negative = case.text_of(9, seed=4)
    outputs = [case()]
    for layers in (None, names[0], names[-1]):
        with guided(case, negative, NASA(0.5), layers=layers) as handle:
            outputs.append(case())
            assert handle.report().layers_guided == (1 if layers else len(names))
    for i, output in enumerate(outputs):
        assert all(not torch.equal(output, other) for other in outputs[:i])


@torch.no_grad()
def test_the_projected_rule_takes_nothing_that_the_prompt_has(case):
    """Equal prompts change nothing at any alpha, whatever they are masked by."""
    if getattr(case, "beside", 0):
        pytest.skip("an image stands before the text of the prompt")
    own, mask = case.own_text()
    with guided(case, own, ProjectedNASA(1.5), mask):
        torch.testing.assert_close(case(), case(), rtol=0, atol=0)
        same = case()
    torch.testing.assert_close(same, case(), rtol=1e-3, atol=2e-4)
    with guided(case, case.text_of(9, seed=4), ProjectedNASA(1.5)):
        assert not torch.allclose(case(), same, rtol=1e-3, atol=2e-4)


def nasa_layers(case):
    from nasa_diffusers.families import family_of

    return list(family_of(case.model).layers(case.model))


@torch.no_grad()
@pytest.mark.parametrize("name", COMPILED)
def test_one_graph(name):
    """Time, alpha and another prompt of the same length are data."""
    torch._dynamo.reset()
    counters.clear()
    case = CASES[name](**CASES[name].one_block)
    time = "t" if "t" in case.inputs else "timestep"
    with guided(case, case.text_of(9, seed=4), NASA(0.5)) as handle:
        expected = [case(**{time: case.inputs[time] * x}) for x in (1, 0.7, 0.3)]
        case.model.compile(fullgraph=True, backend="eager")
        for x, eager in zip((1, 0.7, 0.3), expected, strict=True):
            torch.testing.assert_close(case(**{time: case.inputs[time] * x}), eager)
        handle.alpha = 0.2
        case()
        handle.set_negative_prompt(negative_prompt_embeds=case.text_of(9, seed=5))
        case()
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


@torch.no_grad()
def test_one_alpha_per_image_and_a_masked_negative(case):
    """Both images with all tokens, and with some: masks of the second one."""
    if not case.has_mask:
        pytest.skip("has no mask")
    negative = case.text_of(9, seed=4)
    mask = torch.arange(9) < 5
    rule = case.rules[0]
    alpha = torch.tensor([0.5, 0.0]).view(2, 1, 1, 1)
    if case.targets is not None:
        alpha = alpha * over_tokens(case, 1.0)
    mask = case.mask_of(mask[None].expand(2, -1))
    expected = case.expected(rule, [(negative, alpha, mask)])
    mask = [x[:1] for x in mask] if isinstance(mask, tuple) else mask[:1]
    with guided(case, negative, NASA([0.5, 0.0], rule), mask=mask):
        torch.testing.assert_close(case(), expected, **TOLERANCE)


@torch.no_grad()
def test_a_replaced_forward_is_an_error(case):
    """Of an attention whose hook is no longer reached; the next call is right again without it."""
    name, attn = nasa_layers(case)[0]
    negative = case.text_of(9, seed=4)
    with guided(case, negative, NASA(0.5)):
        expected, ours = case(), attn.forward
        attn.forward = type(attn).forward.__get__(attn)
        # ours, or of the layer that gets tokens it has no positions for: never an image
        with pytest.raises((RuntimeError, ValueError)):
            case()
        attn.forward = ours
        assert torch.equal(case(), expected)


def test_gradients_reach_the_prompt_and_alpha(case):
    """And checkpointing, in which blocks run again without the negative prompt, is refused."""
    negative = case.text_of(9, seed=4)
    alpha = torch.tensor(0.5, requires_grad=True)
    with guided(case, negative, NASA(alpha)):
        case().square().mean().backward()
    assert alpha.grad is not None and alpha.grad.abs() > 0
    if not case.model._supports_gradient_checkpointing:
        return
    case.model.enable_gradient_checkpointing()
    with guided(case, negative, NASA(0.5)), pytest.raises(RuntimeError, match="checkpointing"):
        case()
    case.model.disable_gradient_checkpointing()


@torch.no_grad()
def test_what_does_not_fit_is_an_error(case):
    wrong = case.too_narrow(case.text_of(9, seed=4))
    with guided(case, wrong, NAG()), pytest.raises(ValueError, match="channels.*encode both with"):
        case()
    if case.cls.startswith("LTX2"):
        with pytest.raises(ValueError, match="two texts, for video and for sound"):
            guided(case, wrong[0], None).__enter__()
        assert not case.model._forward_pre_hooks


@torch.no_grad()
def test_cogvideox_with_positions_that_were_learned():
    """The text has some as well, of its first tokens on."""
    case = CASES["cogvideox"](use_learned_positional_embeddings=True)
    position = case.model.patch_embed.pos_embedding
    position.copy_(torch.randn(position.shape, generator=torch.Generator().manual_seed(9)))
    negative = case.text_of(7, seed=4)
    expected = case.expected("nasa-cross", [(negative, 0.4, None)])
    with guided(case, negative, NASA(0.4)):
        torch.testing.assert_close(case(), expected, **TOLERANCE)
    longer, too_long = case.text_of(9, seed=4), "has positions for 7; set max_sequence_length"
    with guided(case, longer, NASA(0.4)), pytest.raises(ValueError, match=too_long):
        case()
