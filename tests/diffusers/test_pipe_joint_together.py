"""FLUX.1 and SD3 beside what else is done with a model: offloading, casting, LoRA, training,
compiling, saving; and what a negative prompt costs.
"""

import copy

import diffusers
import pytest
import torch
from changes import cast_to_fp8, offload_blocks, offload_leaves, offload_sequentially
from drawing import assert_same_image, relative_error
from joint_cases import CASES, ONE_EACH, SIZE, STRONG, gradients, negative
from nasa_diffusers import NAG, enable_nasa, flops, nasa, testing
from peft import LoraConfig

from nasa_kernels import ops

# ---- what changes the weights --------------------------------------------------------------------


def add_lora(model):
    torch.manual_seed(1)
    targets = ["to_k", "to_q", "to_v", "add_k_proj", "add_v_proj", "to_add_out", "ff_context.net.2"]
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model.add_adapter(config)
    model.requires_grad_(False)


CHANGES = [add_lora, offload_sequentially, offload_leaves, offload_blocks, cast_to_fp8]


@torch.no_grad()
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ONE_EACH)
def test_change(name, change, order):
    # the oracle calls parts of a block by themselves: where weights move with a block it has a
    # copy whose weights stay
    case, still = CASES[name](), CASES[name]()
    if change in (add_lora, cast_to_fp8):
        change(still.model)
    expected = still.expected("nasa-cross", [(negative(), 0.5, None)])
    if order == "before":
        change(case.model)
    with nasa(case.pipe, negative_prompt_embeds=negative(), alpha=0.5, cfg=False):
        if order == "after":
            assert (relative_error(case(), expected) < 2e-5) == ("offload" in change.__name__)
            change(case.model)
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


def test_reentrant_checkpointing(one_each):
    """Text and image are a block's arguments, and have their gradients; alpha is not one."""
    case = one_each
    case.model.train().requires_grad_(True)
    with nasa(case.pipe, negative_prompt_embeds=negative(), alpha=0.5, cfg=False) as handle:
        plain = gradients(case)
        case.model.enable_gradient_checkpointing(
            lambda module, *args: torch.utils.checkpoint.checkpoint(
                module, *args, use_reentrant=True
            )
        )
        checkpointed = gradients(case)
        assert plain.keys() == checkpointed.keys()
        for name in plain:
            assert torch.allclose(plain[name], checkpointed[name], rtol=1e-4, atol=1e-7), name
        handle.alpha = torch.tensor(0.5, requires_grad=True)
        with pytest.raises(RuntimeError, match="as reentrant checkpointing does"):
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
def test_flops_of_the_real_architectures(name, share, monkeypatch):
    """The negative stream, its keys for the image, and not one more token of the image."""
    counted = flops.count(name)
    assert counted.first == counted.later
    assert 0.97 * share < counted.added_first < share
    # Z+ and Z- are one operator, and elsewhere two attentions of the image, and nothing else
    assert flops.count(name, NAG()).first == counted.first
    for operators in ("NAG", "JOINT_NAG", "JOINT_PAIR"):
        monkeypatch.setattr(ops, operators, {})
    in_two = flops.count(name, NAG())
    config = flops.MODELS[name].config
    if name.startswith("FLUX"):
        layers, width = 19 + 38, 24 * 128
    else:
        layers, width = config["num_layers"], config["num_attention_heads"] * 64
    assert in_two.stock == counted.stock
    assert in_two.first - counted.first == layers * 4 * 4096**2 * width


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"method": NAG()}], ids=["nasa", "nag"])
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
    # the projection before the blocks, of two rows of 4 tokens, is not in the report
    assert difference - 2 * 2 * 4 * 32 * 32 == reported
    # the last block of SD3 drops its text, whose 7 tokens stock lets attend to all 31 before
    is_flux = isinstance(case.pipe, diffusers.FluxPipeline)
    saved = 0 if is_flux else 2 * 4 * 7 * 31 * 32
    assert longer - stock - 2 * 2 * 9 * 32 * 32 == report.attention_flops - saved


# ---- torch.compile -------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("options", [{"alpha": 0.5}, {"method": STRONG}], ids=["nasa", "nag"])
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
