"""FLUX.1 and SD3 in common: two full text streams as the oracle, and everything around a call."""

import contextlib
import copy

import accelerate
import diffusers
import joint_cases
import pytest
import torch
import torch.nn.functional as F
from drawing import assert_same_image, relative_error
from joint_cases import RULES, SIZE, negative
from nasa_diffusers import enable_nasa, flops, nasa, testing
from packaging.version import Version
from peft import LoraConfig
from streams import Nag

CASES = {
    "flux-schnell": joint_cases.flux,
    "flux-dev": lambda **sizes: joint_cases.flux(dev=True, **sizes),
    "sd3": joint_cases.sd3,
    "sd3.5-medium": lambda **sizes: joint_cases.sd3(medium=True, **sizes),
}


NAG = {"method": "nag", "nag_scale": 20.0, "nag_tau": 2.0, "nag_alpha": 0.5}
PUBLISHED = Nag(20.0, 2.0)


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]()


@pytest.fixture(params=["flux-schnell", "sd3.5-medium"])
def one_each(request):
    """One case of each family, where the models of a family cannot differ."""
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
    with nasa(case.pipe, negative_prompt_embeds=text, alpha=0.5, rule=rule, cfg=False):
        ours = case()
    assert relative_error(ours, case()) > 1e-3
    assert_same_image(ours, case.expected(rule, [(text, 0.5, None)]))


@torch.no_grad()
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "vsf"])
def test_the_op_run_at_alpha_0_is_stock(case, rule):
    """Value sign flip is not: its softmax counts the negative keys whatever alpha is."""
    stock, forced = case(), torch.zeros((), requires_grad=True)
    with nasa(case.pipe, negative_prompt_embeds=negative(), alpha=forced, rule=rule, cfg=False):
        assert_same_image(case(), stock)


@torch.no_grad()
@pytest.mark.parametrize("rule", RULES)
def test_masked_negative(one_each, rule):
    case, text = one_each, negative()
    mask = torch.tensor([[1, 1, 0, 1, 1, 0, 1, 1, 1]])
    options = {"negative_prompt_embeds": text, "negative_prompt_attention_mask": mask}
    with nasa(case.pipe, **options, alpha=0.5, rule=rule, cfg=False):
        expected = case.expected(rule, [(text, 0.5, mask.bool().expand(2, -1))])
        assert_same_image(case(), expected)


@torch.no_grad()
@pytest.mark.parametrize("rule", RULES)
def test_several_negatives_take_what_each_would_take_alone(one_each, rule):
    case, prompts = one_each, [("blurry", 0.3), ("red, and fur", -0.2)]
    with nasa(case.pipe, prompts, rule=rule, cfg=False, max_sequence_length=8):
        ours = case()
    negatives = [(embeds(case, prompt), alpha, None) for prompt, alpha in prompts]
    assert_same_image(ours, case.expected(rule, negatives))


@torch.no_grad()
@pytest.mark.parametrize("rule", RULES)
def test_one_alpha_per_image(one_each, rule):
    case, text = one_each, negative()
    stock, options = case(), {"negative_prompt_embeds": text, "cfg": False, "rule": rule}
    with nasa(case.pipe, **options, alpha=[0.0, 0.5]):
        ours = case()
    assert_same_image(ours[:1], stock[:1])
    assert_same_image(ours[1:], case.expected(rule, [(text, 0.5, None)])[1:])


@torch.no_grad()
@pytest.mark.parametrize("rule", [*RULES, "nag"])
def test_a_map_over_the_image(one_each, rule):
    """Its values pooled to the 4 x 6 tokens; where it is 0 the image is not steered."""
    case, text = one_each, negative()
    region = torch.rand(9, 12, generator=torch.Generator().manual_seed(5))
    region[:, 6:] = 0
    tokens = F.adaptive_avg_pool2d(region[None, None], (4, 6)).view(1, -1, 1, 1)
    options = {"rule": rule, "alpha": region}
    if rule == "nag":
        rule, options = PUBLISHED, NAG | {"nag_alpha": region}
    with nasa(case.pipe, negative_prompt_embeds=text, cfg=False, **options) as handle:
        assert_same_image(case(), case.expected(rule, [(text, tokens, None)]))
        handle.alpha = torch.full((16, 24), 0.5)
        assert_same_image(case(), case.expected(rule, [(text, 0.5, None)]))


@torch.no_grad()
def test_equal_prompts_cancel_in_the_text_streams(one_each):
    """With rule "nasa" and alpha 1 nothing is left of an image query's attention: Z+ - Z+."""
    case, text = one_each, negative(7)
    inputs = {"encoder_hidden_states": text.expand(2, -1, -1)}
    options = {"negative_prompt_embeds": text, "cfg": False, "rule": "nasa"}
    with nasa(case.pipe, **options, alpha=1.0):
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
    with nasa(case.pipe, negative_prompt_embeds=text, cfg=False, backend=backend, **NAG) as handle:
        ours = case()
        assert handle.report().rule == "nag, scale 20, tau 2"
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
    with nasa(case.pipe, **options, cfg=False, **NAG | {"nag_alpha": [0.0, 0.5]}):
        ours = case()
    assert_same_image(ours[:1], stock[:1])
    expected = case.expected(PUBLISHED, [(text, 0.5, mask.bool().expand(2, -1))])
    assert_same_image(ours[1:], expected[1:])


def test_nag_in_a_pipeline(one_each, draw):
    case, pipe = one_each, one_each.pipe
    stock = draw(pipe, steps=4, **SIZE)
    with nasa(pipe, "blurry", **NAG, max_sequence_length=8) as handle:
        ours = draw(pipe, steps=4, **SIZE)
        handle.alpha = 0
        assert torch.equal(draw(pipe, steps=4, **SIZE), stock)
        with pytest.raises(ValueError, match="takes one negative prompt"):
            handle.set_negative_prompt([("blurry", 0.3), ("red", 0.8)])
    with two_streams(case, PUBLISHED, [(embeds(case, "blurry"), 0.5, None)]):
        assert_same_image(ours, draw(pipe, steps=4, **SIZE))


def test_nag_leaves_out_layers_and_has_gradients(one_each):
    case, text = one_each, negative()
    case.model.requires_grad_(True)
    with nasa(case.pipe, negative_prompt_embeds=text, cfg=False, **NAG):
        ours = gradients(case)
    case.expected(PUBLISHED, [(text, 0.5, None)]).square().mean().backward()
    for name, p in case.model.named_parameters():
        if p.grad is not None:
            assert torch.allclose(ours[name], p.grad, rtol=1e-3, atol=1e-6), name
    with torch.no_grad():
        stock = case()
        options = {"negative_prompt_embeds": text, "layers": "transformer_blocks.0.attn"}
        with nasa(case.pipe, cfg=False, **options, **NAG):
            assert relative_error(case(), stock) > 1e-4


def test_defaults_of_nag(one_each):
    """The NAG paper's, its scale counted 1 more."""
    share = 0.25 if isinstance(one_each.pipe, diffusers.FluxPipeline) else 0.125
    handle = enable_nasa(one_each.pipe, negative_prompt_embeds=negative(), method="nag")
    nag = handle._steerings[0].settings.nag
    assert (nag.scale, nag.tau, handle.alpha) == (5.0, 2.5, share)


# ---- layers --------------------------------------------------------------------------------------


@torch.no_grad()
def test_layers_that_are_not_guided_carry_the_negative(one_each):
    """Only the last layer is steered; the negative prompt reaches it through all the others."""
    case = one_each
    handle = enable_nasa(case.pipe, negative_prompt_embeds=negative(), alpha=0.5, cfg=False)
    everything, last = case(), list(handle._steerings[0].layers)[-1]
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
        for _, (attn, _) in handle._steerings[0].layers.items():
            attn.to_k.register_forward_hook(lambda _, args, out: seen.append(args[0].shape[1]))
        steered = case()
        texts = [h.last_call for _, h in handle._steerings[0].layers.values()]
    assert relative_error(steered, case()) > 1e-4
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
def test_steered_image_is_two_full_text_streams(case, draw, steps):
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
        assert (handle.alpha, report.rule) == (0.25, "nasa-cross")
        assert report.layers_guided == report.layers == len(handle._steerings[0].layers)
        assert report.attention_flops > 0 == report.projection_flops


def test_window(one_each, draw):
    pipe, calls = one_each.pipe, []
    with nasa(pipe, "blurry", alpha=0.5, stop=1, max_sequence_length=8) as handle:
        hook = next(iter(handle._steerings[0].guided_layers.values()))
        pipe.transformer.register_forward_hook(lambda *_: calls.append(hook.last_call is not None))
        pipe.transformer.register_forward_hook(lambda *_: setattr(hook, "last_call", None))
        draw(pipe, steps=2, **SIZE)
    assert calls == [True, False]


# ---- errors --------------------------------------------------------------------------------------


def test_settings_that_cannot_be(one_each):
    pipe = one_each.pipe
    for options, message in [
        ({"rule": "nasa-image"}, "rule must be one of 'nasa-cross', 'nasa-text', 'nasa', 'vsf'"),
        ({"alpha": float("nan")}, "alpha must be a finite number"),
        ({"alpha": "strong"}, "alpha must be a finite number"),
        ({"method": "nag", "alpha": 0.5}, "method='nag' takes nag_alpha"),
        ({"method": "nag", "rule": "nasa"}, "rule='nasa' goes with method='nasa'"),
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
    """Of an attention: its text would be all prompts as one. Of a block: it is handed no tensor."""
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
    with pytest.raises(TypeError, match="Steered"):
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


# ---- together with what else changes a pipeline --------------------------------------------------


def add_lora(case):
    torch.manual_seed(1)
    targets = ["to_k", "to_q", "to_v", "add_k_proj", "add_v_proj", "to_add_out", "ff_context.net.2"]
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    case.model.add_adapter(config)
    case.model.requires_grad_(False)


def offload_sequentially(case):
    accelerate.cpu_offload(case.model, torch.device("cpu"))


def offload_leaves(case):
    case.model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")


def offload_blocks(case):
    case.model.enable_group_offload(
        torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )


def cast_to_fp8(case):
    case.model.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )


CHANGES = [add_lora, offload_sequentially, offload_leaves, offload_blocks, cast_to_fp8]


@torch.no_grad()
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["flux-schnell", "sd3.5-medium"])
def test_change(name, change, order):
    needs_accelerator = Version(diffusers.__version__) < Version("0.36")
    if change in (offload_leaves, offload_blocks) and needs_accelerator:
        pytest.skip("group offloading of diffusers 0.35 needs an accelerator")
    # the oracle calls parts of a block by themselves: where weights move with a block it has a
    # copy whose weights stay
    case, still = CASES[name](), CASES[name]()
    if change in (add_lora, cast_to_fp8):
        change(still)
    expected = still.expected("nasa-cross", [(negative(), 0.5, None)])
    if order == "before":
        change(case)
    with nasa(case.pipe, negative_prompt_embeds=negative(), alpha=0.5, cfg=False):
        if order == "after":
            assert (relative_error(case(), expected) < 2e-5) == ("offload" in change.__name__)
            change(case)
        assert_same_image(case(), expected)
        assert_same_image(case(), expected)


def test_model_offload(one_each, draw):
    pipe = one_each.pipe
    with nasa(pipe, "blurry", alpha=0.5, max_sequence_length=8):
        expected = draw(pipe, **SIZE)
        pipe.enable_model_cpu_offload(device="cpu")
        assert_same_image(draw(pipe, **SIZE), expected)
        assert_same_image(draw(pipe, **SIZE), expected)


@torch.no_grad()
def test_a_copy_would_run_with_the_weights_of_the_original(one_each):
    with (
        nasa(one_each.pipe, negative_prompt_embeds=negative()),
        pytest.raises(RuntimeError, match="cannot be copied while NASA is on"),
    ):
        copy.deepcopy(one_each.model)


# ---- gradients -----------------------------------------------------------------------------------


def gradients(case):
    case().square().mean().backward()
    found = {name: p.grad for name, p in case.model.named_parameters() if p.grad is not None}
    case.model.zero_grad()
    return found


def test_gradients_are_those_of_two_full_text_streams(one_each):
    case, text = one_each, negative()
    case.model.requires_grad_(True)
    with nasa(case.pipe, negative_prompt_embeds=text, alpha=0.5, cfg=False):
        ours = gradients(case)
    case.expected("nasa-cross", [(text, 0.5, None)]).square().mean().backward()
    for name, p in case.model.named_parameters():
        if p.grad is not None:
            assert torch.allclose(ours[name], p.grad, rtol=1e-3, atol=1e-6), name


def test_checkpointing_sees_the_settings_of_its_forward(one_each):
    case = one_each
    case.model.train().requires_grad_(True)
    handle = enable_nasa(case.pipe, negative_prompt_embeds=negative(), alpha=0.5, cfg=False)
    plain = gradients(case)
    case.model.enable_gradient_checkpointing()
    checkpointed = gradients(case)
    loss = case().square().mean()
    handle.alpha = 5.0
    loss.backward()
    later = {name: p.grad for name, p in case.model.named_parameters() if p.grad is not None}
    assert plain.keys() == checkpointed.keys() == later.keys()
    for name in plain:
        assert torch.equal(plain[name], checkpointed[name]), name
        assert torch.equal(plain[name], later[name]), name
    case.model.zero_grad()
    assert any(not torch.equal(plain[n], g) for n, g in gradients(case).items())


def test_reentrant_checkpointing_is_refused(one_each):
    case = one_each
    case.model.train().requires_grad_(True)
    case.model.enable_gradient_checkpointing(
        lambda module, *args: torch.utils.checkpoint.checkpoint(module, *args, use_reentrant=True)
    )
    with (
        nasa(case.pipe, negative_prompt_embeds=negative(), alpha=0.5, cfg=False),
        pytest.raises(RuntimeError, match="as reentrant checkpointing does"),
    ):
        case()


def test_alpha_learns(one_each):
    alpha = torch.tensor([0.3, 0.6], requires_grad=True)
    with nasa(one_each.pipe, negative_prompt_embeds=negative(), alpha=alpha, cfg=False):
        one_each().square().mean().backward()
    assert alpha.grad.abs().min() > 0


# ---- cost ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "share"), [("FLUX.1 schnell, 1024 px", 0.07), ("SD3 medium, 1024 px", 0.096)]
)
def test_flops_of_the_real_architectures(name, share):
    """The negative stream, its keys for the image, and not one more token of the image."""
    counted = flops.count(name)
    assert counted.first == counted.later
    assert 0.97 * share < counted.added_first < share


@pytest.mark.parametrize("name", ["FLUX.1 schnell, 1024 px", "SD3 medium, 1024 px"])
def test_nag_is_one_more_attention_of_the_image(name):
    """The image's stream is computed once: two attentions, and nothing else, count it twice."""
    plain, counted = flops.count(name), flops.count(name, method="nag")
    config = flops.MODELS[name].config
    if name.startswith("FLUX"):
        layers, width = 19 + 38, 24 * 128
    else:
        layers, width = config["num_layers"], config["num_attention_heads"] * 64
    assert counted.stock == plain.stock
    assert counted.first - plain.first == layers * 4 * 4096**2 * width


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"method": "nag"}], ids=["nasa", "nag"])
def test_report_counts_what_the_counter_counts(one_each, options):
    case = one_each
    case.model.to("meta")
    inputs = {name: x.to("meta") for name, x in case.inputs.items()}

    def call():
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            case(**inputs)
        return counter.get_total_flops()

    stock, text = call(), negative(9).to("meta")
    with nasa(case.pipe, negative_prompt_embeds=text, cfg=False, **options) as handle:
        longer, report = call(), handle.report()
        handle.set_negative_prompt(negative_prompt_embeds=negative(5).to("meta"))
        difference = longer - call()
        reported = report.attention_flops - handle.report().attention_flops
    # the projection before the blocks, of one row of 4 tokens, is not in the report
    assert difference - 2 * 4 * 32 * 32 == reported
    # the last block of SD3 drops its text, whose 7 tokens stock lets attend to all 31 before
    is_flux = isinstance(case.pipe, diffusers.FluxPipeline)
    saved = 0 if is_flux else 2 * 4 * 7 * 31 * 32
    assert longer - stock - 2 * 9 * 32 * 32 == report.attention_flops - saved


# ---- torch.compile -------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("options", [{"alpha": 0.5}, NAG], ids=["nasa", "nag"])
def test_compiled_whole(one_each, fresh_compiler, options):
    case = one_each
    stock = case()
    with nasa(case.pipe, negative_prompt_embeds=negative(), **options, cfg=False) as handle:
        expected = case()
        case.model.compile(fullgraph=True, backend="eager")
        assert_same_image(case(), expected)
        compiled = fresh_compiler["unique_graphs"]
        assert compiled > 0
        for alpha in (0.1, 0.7):
            handle.alpha = alpha
            case()
        handle.set_negative_prompt(negative_prompt_embeds=negative(seed=5))
        case()
        assert fresh_compiler["unique_graphs"] == compiled
        handle.alpha = 0
        assert_same_image(case(), stock)
    assert_same_image(case(), stock)


@torch.no_grad()
def test_compiled_blocks(one_each, fresh_compiler):
    case = one_each
    with nasa(case.pipe, negative_prompt_embeds=negative(), alpha=0.5, cfg=False):
        expected = case()
        for block in case.model.transformer_blocks:
            block.compile(fullgraph=True, backend="eager")
        assert_same_image(case(), expected)
        assert fresh_compiler["unique_graphs"] > 0


@pytest.mark.parametrize("build", [testing.flux, testing.stable_diffusion_3])
def test_save_and_load_keeps_nothing_of_nasa(build, tmp_path):
    pipe = build()
    keys = pipe.transformer.state_dict().keys()
    with nasa(pipe, "blurry", max_sequence_length=8):
        assert pipe.transformer.state_dict().keys() == keys
        pipe.transformer.save_pretrained(tmp_path)
    type(pipe.transformer).from_pretrained(tmp_path)
