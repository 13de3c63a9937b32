"""What FLUX.1 and SD3 have in common: a call, and a pipeline, is two full text streams."""

import contextlib
from dataclasses import replace

import diffusers
import pytest
import torch
import torch.nn.functional as F
from drawing import assert_same_image, relative_error
from joint_cases import CASES, RULES, SIZE, STRONG, by_rule, gradients, negative
from nasa_diffusers import NAG, NASA, enable_nasa, nasa
from packaging.version import Version
from streams import Nag

PUBLISHED = Nag(20.0, 2.0)


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]()


def embeds(case, prompt, length=8):
    options = {"prompt_2": None, "device": "cpu", "max_sequence_length": length}
    if isinstance(case.pipe, diffusers.StableDiffusion3Pipeline):
        options |= {"prompt_3": None, "do_classifier_free_guidance": False}
    return case.pipe.encode_prompt(prompt, **options)[0]


@contextlib.contextmanager
def two_streams(case, rule, negatives):
    """The oracle in place of the transformer, for whole pipelines."""
    model = case.model
    model.forward = lambda **inputs: case.oracle(model, rule, negatives, **inputs)
    yield
    del model.forward


# ---- what is computed ----------------------------------------------------------------------------


@torch.no_grad()
def test_the_oracle_without_negatives_is_stock(case):
    assert_same_image(case.expected("nasa", []), case())


@torch.no_grad()
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tokens", [3, 7, 12])
def test_a_call_is_two_full_text_streams(case, rule, tokens):
    """With a negative prompt shorter than the positive one, as long, and longer."""
    text = negative(tokens)
    with nasa(case.pipe, method=by_rule(rule, 0.5), negative_prompt_embeds=text, cfg=False):
        ours = case()
    assert relative_error(ours, case()) > 1e-3
    assert_same_image(ours, case.expected(rule, [(text, 0.5, None)]))


@torch.no_grad()
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "vsf"])
def test_the_op_run_at_alpha_0_is_stock(case, rule):
    """Value sign flip is not: its softmax counts the negative keys whatever alpha is."""
    stock, forced = case(), torch.zeros((), requires_grad=True)
    with nasa(
        case.pipe, method=by_rule(rule, forced), negative_prompt_embeds=negative(), cfg=False
    ):
        assert_same_image(case(), stock)


@torch.no_grad()
@pytest.mark.parametrize("rule", RULES)
def test_masked_negative(one_each, rule):
    case, text = one_each, negative()
    mask = torch.tensor([[1, 1, 0, 1, 1, 0, 1, 1, 1]])
    options = {"negative_prompt_embeds": text, "negative_prompt_attention_mask": mask}
    with nasa(case.pipe, method=by_rule(rule, 0.5), **options, cfg=False):
        expected = case.expected(rule, [(text, 0.5, mask.bool().expand(2, -1))])
        assert_same_image(case(), expected)


@torch.no_grad()
@pytest.mark.parametrize("rule", RULES)
def test_several_negatives_take_what_each_would_take_alone(one_each, rule):
    case, prompts = one_each, [("blurry", 0.3), ("red, and fur", -0.2)]
    with nasa(case.pipe, prompts, by_rule(rule), cfg=False, max_sequence_length=8):
        ours = case()
    negatives = [(embeds(case, prompt), alpha, None) for prompt, alpha in prompts]
    assert_same_image(ours, case.expected(rule, negatives))


@torch.no_grad()
@pytest.mark.parametrize("rule", RULES)
def test_one_alpha_per_image(one_each, rule):
    case, text = one_each, negative()
    stock, options = case(), {"negative_prompt_embeds": text, "cfg": False}
    with nasa(case.pipe, method=by_rule(rule, [0.0, 0.5]), **options):
        ours = case()
    assert_same_image(ours[:1], stock[:1])
    assert_same_image(ours[1:], case.expected(rule, [(text, 0.5, None)])[1:])


@torch.no_grad()
@pytest.mark.parametrize("rule", [*RULES, "nag"])
def test_a_map_over_the_image(one_each, rule):
    """Its values pooled to the 4 x 6 tokens; where it is 0 the image is not guided."""
    case, text = one_each, negative()
    region = torch.rand(9, 12, generator=torch.Generator().manual_seed(5))
    region[:, 6:] = 0
    tokens = F.adaptive_avg_pool2d(region[None, None], (4, 6)).view(1, -1, 1, 1)
    method = replace(STRONG, alpha=region) if rule == "nag" else by_rule(rule, region)
    rule = PUBLISHED if rule == "nag" else rule
    options = {"negative_prompt_embeds": text, "cfg": False}
    with nasa(case.pipe, method=method, **options) as handle:
        assert_same_image(case(), case.expected(rule, [(text, tokens, None)]))
        handle.alpha = torch.full((16, 24), 0.5)
        assert_same_image(case(), case.expected(rule, [(text, 0.5, None)]))


@torch.no_grad()
def test_equal_prompts_cancel_in_the_text_streams(one_each):
    """With rule "nasa" and alpha 1 nothing is left of an image query's attention: Z+ - Z+."""
    case, text = one_each, negative(7)
    inputs = {"encoder_hidden_states": text.expand(2, -1, -1)}
    options = {"negative_prompt_embeds": text, "cfg": False}
    with nasa(case.pipe, method=NASA(1.0, "nasa"), **options):
        ours = case(**inputs)
    assert_same_image(ours, case.expected("nasa", [(text, 1.0, None)], **inputs))


@torch.no_grad()
def test_half_precision(one_each):
    case, text = one_each, negative()
    exact = case.expected("nasa-cross", [(text, 0.5, None)])
    case.model.to(torch.bfloat16)
    cast = {
        name: x.to(torch.bfloat16) if name != "img_ids" and name != "timestep" else x
        for name, x in case.inputs.items()
    }
    eager = case.expected("nasa-cross", [(text.bfloat16(), 0.5, None)], **cast)
    with nasa(case.pipe, negative_prompt_embeds=text, alpha=0.5, cfg=False):
        ours = case(**cast)
    assert ours.dtype == torch.bfloat16
    assert relative_error(ours, exact) <= 1.5 * relative_error(eager, exact)


# ---- NAG -----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("tokens", [3, 12])
def test_nag_is_its_published_formula(case, tokens, backend):
    """The published code's two image streams are one: both leave a block as the same tokens."""
    text = negative(tokens)
    with nasa(
        case.pipe, None, STRONG, negative_prompt_embeds=text, cfg=False, backend=backend
    ) as handle:
        ours = case()
        assert handle.report().method == "NAG, scale 20, tau 2"
    plain = case.expected(PUBLISHED, [(text, 0.5, None)])
    assert_same_image(ours, plain)
    # the clip did something
    assert relative_error(plain, case.expected(Nag(20.0, 1e9), [(text, 0.5, None)])) > 1e-3


@torch.no_grad()
def test_nag_with_a_mask_and_a_share_per_image(one_each):
    case, text = one_each, negative()
    mask = torch.tensor([[1, 1, 0, 1, 1, 0, 1, 1, 1]])
    stock = case()
    options = {"negative_prompt_embeds": text, "negative_prompt_attention_mask": mask}
    with nasa(case.pipe, method=replace(STRONG, alpha=[0.0, 0.5]), **options, cfg=False):
        ours = case()
    assert_same_image(ours[:1], stock[:1])
    expected = case.expected(PUBLISHED, [(text, 0.5, mask.bool().expand(2, -1))])
    assert_same_image(ours[1:], expected[1:])


def test_nag_in_a_pipeline(one_each, draw):
    case, pipe = one_each, one_each.pipe
    stock = draw(pipe, steps=4, **SIZE)
    with nasa(pipe, "blurry", STRONG, max_sequence_length=8) as handle:
        ours = draw(pipe, steps=4, **SIZE)
        handle.alpha = 0
        assert torch.equal(draw(pipe, steps=4, **SIZE), stock)
        with pytest.raises(ValueError, match="takes one negative prompt"):
            handle.set_negative_prompt([("blurry", 0.3), ("red", 0.8)])
    with two_streams(case, PUBLISHED, [(embeds(case, "blurry"), 0.5, None)]):
        assert_same_image(ours, draw(pipe, steps=4, **SIZE))


@torch.no_grad()
def test_nag_with_the_norm_of_its_flux_code(one_each):
    """Published for FLUX with the root of the sum of squares; everything else is the same."""
    case, text = one_each, negative()
    norm_2 = replace(STRONG, norm=2)
    with nasa(case.pipe, None, norm_2, negative_prompt_embeds=text, cfg=False) as handle:
        ours = case()
        assert "NAG, scale 20, tau 2, norm 2" in str(handle.report())
        handle.method = STRONG
        assert relative_error(ours, case()) > 1e-4
    published = PUBLISHED._replace(p=2)
    assert_same_image(ours, case.expected(published, [(text, 0.5, None)]))


def test_nag_leaves_out_layers_and_has_gradients(one_each):
    case, text = one_each, negative()
    case.model.requires_grad_(True)
    with nasa(case.pipe, None, STRONG, negative_prompt_embeds=text, cfg=False):
        ours = gradients(case)
    case.expected(PUBLISHED, [(text, 0.5, None)]).square().mean().backward()
    for name, p in case.model.named_parameters():
        if p.grad is not None:
            assert torch.allclose(ours[name], p.grad, rtol=1e-3, atol=1e-6), name
    with torch.no_grad():
        stock = case()
        options = {"negative_prompt_embeds": text, "layers": "transformer_blocks.0.attn"}
        with nasa(case.pipe, method=STRONG, cfg=False, **options):
            assert relative_error(case(), stock) > 1e-4


def test_defaults_of_nag(one_each):
    """The NAG paper's, its scale counted 1 more."""
    share = 0.25 if isinstance(one_each.pipe, diffusers.FluxPipeline) else 0.125
    handle = enable_nasa(one_each.pipe, method=NAG(), negative_prompt_embeds=negative())
    assert handle.method == NAG(5.0, 2.5, share, norm=1)


# ---- layers --------------------------------------------------------------------------------------


@torch.no_grad()
def test_layers_that_are_not_guided_carry_the_negative(one_each):
    """Only the last layer is guided; the negative prompt reaches it through all the others."""
    case = one_each
    handle = enable_nasa(case.pipe, negative_prompt_embeds=negative(), alpha=0.5, cfg=False)
    everything, last = case(), list(handle._guidances[0].layers)[-1]
    handle.disable()
    stock = case()
    with nasa(
        case.pipe, negative_prompt_embeds=negative(), alpha=0.5, cfg=False, layers=last
    ) as handle:
        ours = case()
        assert handle.report().layers_guided == 1
    assert relative_error(ours, stock) > 1e-4 and relative_error(ours, everything) > 1e-4


@torch.no_grad()
def test_negatives_end_after_the_last_guided_layer(one_each):
    case, seen = one_each, []
    options = {"negative_prompt_embeds": negative(), "alpha": 0.5, "cfg": False}
    with nasa(case.pipe, **options, layers="transformer_blocks.0.attn") as handle:
        for _, (attn, _) in handle._guidances[0].layers.items():
            attn.to_k.register_forward_hook(lambda _, args, out: seen.append(args[0].shape[1]))
        guided = case()
        texts = [h.last_call for _, h in handle._guidances[0].layers.values()]
    assert relative_error(guided, case()) > 1e-4
    # no later layer was told of a negative prompt
    assert [call is not None for call in texts] == [True] + [False] * (len(texts) - 1)


# ---- pipelines -----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4])
def test_alpha_0_and_disable_are_stock_bit_for_bit(case, draw, steps):
    pipe = case.pipe
    stock = draw(pipe, steps=steps, **SIZE)
    modules = {name: set(vars(module)) for name, module in pipe.transformer.named_modules()}
    handle = enable_nasa(pipe, "blurry", alpha=0, max_sequence_length=8)
    assert torch.equal(draw(pipe, steps=steps, **SIZE), stock)
    assert handle.report().attention_flops is None
    handle.alpha = 0.5
    assert not torch.allclose(draw(pipe, steps=steps, **SIZE), stock)
    handle.disable()
    assert torch.equal(draw(pipe, steps=steps, **SIZE), stock)
    assert {n: set(vars(m)) for n, m in pipe.transformer.named_modules()} == modules


@pytest.mark.parametrize("steps", [1, 4])
def test_guided_image_is_two_full_text_streams(case, draw, steps):
    with nasa(case.pipe, "blurry", alpha=0.5, max_sequence_length=8):
        ours = draw(case.pipe, steps=steps, **SIZE)
    with two_streams(case, "nasa-cross", [(embeds(case, "blurry"), 0.5, None)]):
        assert_same_image(ours, draw(case.pipe, steps=steps, **SIZE))


def test_two_prompts_with_a_negative_each_and_two_images(one_each, draw):
    pipe, prompts, negatives = one_each.pipe, ["a cat", "a large dog"], ["blurry", "red fur"]
    size = SIZE | {"num_images_per_prompt": 2}
    stock = draw(pipe, prompts, **size)[:2]
    if relative_error(stock, draw(pipe, prompts[0], **size)) > 2e-5:
        # 0.35 repeats the pooled embeddings of SD3 in another order than its tokens
        assert Version(diffusers.__version__) < Version("0.36")
        size |= {"num_images_per_prompt": 1}
    images = size["num_images_per_prompt"]
    with nasa(pipe, negatives, alpha=0.5, max_sequence_length=8):
        together = draw(pipe, prompts, **size)
    for i in range(2):
        with nasa(pipe, negatives[i], alpha=0.5, max_sequence_length=8):
            alone = draw(pipe, prompts[i], seed=images * i, **size)
            assert_same_image(together[images * i : images * (i + 1)], alone)


def test_default_rule_alpha_and_report(one_each, draw):
    with nasa(one_each.pipe, "blurry", max_sequence_length=8) as handle:
        draw(one_each.pipe, **SIZE)
        report = handle.report()
        assert (handle.method, report.method) == (NASA(0.1, "nasa-cross"), "NASA, rule nasa-cross")
        assert report.layers_guided == report.layers == len(handle._guidances[0].layers)
        assert report.attention_flops > 0 == report.projection_flops


def test_window(one_each, draw):
    pipe, calls = one_each.pipe, []
    with nasa(pipe, "blurry", alpha=0.5, stop=1, max_sequence_length=8) as handle:
        hook = next(iter(handle._guidances[0].guided_layers.values()))
        pipe.transformer.register_forward_hook(lambda *_: calls.append(hook.last_call is not None))
        pipe.transformer.register_forward_hook(lambda *_: setattr(hook, "last_call", None))
        draw(pipe, steps=2, **SIZE)
    assert calls == [True, False]


# ---- errors --------------------------------------------------------------------------------------


def test_settings_that_cannot_be(one_each):
    pipe = one_each.pipe
    for options, message in [
        ({"alpha": float("nan")}, "alpha must be a finite number"),
        ({"alpha": "strong"}, "alpha must be a finite number"),
        ({"layers": "down_blocks.*"}, "matches none of the"),
    ]:
        with pytest.raises(ValueError, match=message):
            enable_nasa(pipe, "blurry", **options)


class StrangeProcessor:
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
        return hidden_states, encoder_hidden_states


@torch.no_grad()
def test_a_processor_nasa_does_not_know_is_an_error(one_each):
    case = one_each
    attn = case.model.transformer_blocks[0].attn
    with nasa(case.pipe, negative_prompt_embeds=negative(), alpha=0.5, cfg=False):
        attn.set_processor(StrangeProcessor())
        with pytest.raises(RuntimeError, match="StrangeProcessor, whose computation NASA does"):
            case()
    with pytest.raises(RuntimeError, match="StrangeProcessor"):
        enable_nasa(case.pipe, negative_prompt_embeds=negative())


@torch.no_grad()
def test_a_replaced_forward_is_an_error(one_each):
    """Of an attention: its text would be all prompts as one. Of a block: positions are off."""
    case = one_each
    handle = enable_nasa(case.pipe, negative_prompt_embeds=negative(), alpha=0.5, cfg=False)
    block = case.model.transformer_blocks[1]
    hooked = block.attn.forward
    block.attn.forward = type(block.attn).forward.__get__(block.attn)
    with pytest.raises(RuntimeError, match="its forward was replaced"):
        case()
    block.attn.forward = hooked
    case()
    block.forward = type(block).forward.__get__(block)
    with pytest.raises(RuntimeError, match="its forward was replaced"):
        case()
    handle.alpha = 0
    case()


@torch.no_grad()
def test_attention_mask_is_an_error(one_each):
    case = one_each
    with (
        nasa(case.pipe, negative_prompt_embeds=negative(), alpha=0.5, cfg=False),
        pytest.raises(ValueError, match="got an attention_mask"),
    ):
        case(joint_attention_kwargs={"attention_mask": torch.ones(2, 31)})
