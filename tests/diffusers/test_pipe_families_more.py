"""The families beside those that the paper names: methods, prompts, maps, layers and what else is
put on a denoiser, each against eager processors of its own.

A pipeline is run once, and the first call of its denoiser is what is computed from then on.
"""

import functools
from types import SimpleNamespace

import changes
import every_pipeline
import pytest
import torch
from drawing import assert_same_image, relative_error
from nasa_diffusers import NAG, VSF, enable_nasa, nasa
from nasa_diffusers.families import skyreels
from oracle import algorithm_1, installed
from test_pipe_adapters import add_lora
from test_pipe_methods import PlainFlip, PlainNag
from test_pipe_rows import Calls, projected, unshared

# frames, height and width of the image tokens; None where a layer has other sizes
GRIDS = {
    "AllegroPipeline": (1, 1, 1),
    "AnimateDiffPipeline": None,
    "AnyFlowPipeline": (2, 1, 2),
    "ChronoEditPipeline": (2, 1, 2),
    "Cosmos2TextToImagePipeline": (1, 2, 2),
    "Cosmos2_5_PredictBasePipeline": (2, 2, 2),
    "CosmosTextToWorldPipeline": (2, 4, 4),
    "HeliosPipeline": None,
    "KolorsPipeline": None,
    "LattePipeline": (1, 4, 4),
    "LTXPipeline": (2, 2, 2),
    "SanaVideoPipeline": (2, 2, 2),
    "SkyReelsV2ImageToVideoPipeline": (2, 1, 2),
    "WanAnimatePipeline": None,
    "WanVACEPipeline": (2, 1, 2),
}
NAMES = [
    name
    for name in GRIDS
    if name in every_pipeline.classes()
    and (skyreels.ATTENTION is not None or not name.startswith("SkyReels"))
]
BESIDE_IMAGES = [n for n in NAMES if n.startswith(("ChronoEdit", "SkyReels", "WanAnimate"))]


@functools.cache
def case(name):
    """A pipeline, its denoiser, and the inputs of its first call; 16 tokens of text or 512."""
    module = every_pipeline.inspect.getmodule(every_pipeline.classes()[name])
    if not hasattr(module, "ftfy"):
        # diffusers cleans prompts with the package ftfy whether it is there or not
        module.ftfy = SimpleNamespace(fix_text=str)
    pipe = every_pipeline.build(name)
    denoiser = every_pipeline.denoiser_of(pipe)
    calls = Calls(denoiser)
    pipe(**every_pipeline.arguments(pipe, ["a cat"], ["bad"], 1.0))
    calls.end()
    return SimpleNamespace(pipe=pipe, denoiser=denoiser, inputs=calls.seen[0], name=name)


@pytest.fixture(params=NAMES)
def one(request):
    return case(request.param)


@torch.no_grad()
def call(one, **others):
    return one.denoiser(**unshared(one.inputs | others))[0]


def negative(one, n=9, seed=2):
    channels = one.inputs["encoder_hidden_states"].shape[-1]
    return torch.randn(1, n, channels, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def of_layers(one, text):
    """A text as the layers see it."""
    return projected(one.denoiser, text)


def guided(one, text, method=None, **options):
    return nasa(one.pipe, None, method, negative_prompt_embeds=text, cfg=False, **options)


def hooked(one):
    """Modules with hooks of diffusers: a context of its caches leaves some."""
    return [n for n, module in one.denoiser.named_modules() if hasattr(module, "_diffusers_hook")]


def test_off_is_stock_bit_for_bit(one):
    stock, before = call(one), hooked(one)
    handle = enable_nasa(one.pipe, negative_prompt_embeds=negative(one), alpha=0, cfg=False)
    assert torch.equal(call(one), stock)
    handle.alpha = 0.5
    assert relative_error(call(one), stock) > 1e-4
    handle.alpha = 0
    assert torch.equal(call(one), stock)
    handle.disable()
    assert torch.equal(call(one), stock)
    assert not one.denoiser._forward_pre_hooks
    assert hooked(one) == before


@pytest.mark.parametrize("method", ["NASA", "NAG", "VSF"])
def test_a_method_is_its_formula(one, method):
    text, stock = negative(one), call(one)
    with torch.no_grad():
        seen = of_layers(one, text)
    make, plain = {
        "NASA": (None, None),
        "NAG": (NAG(scale=20.0, tau=2.0, alpha=0.5), PlainNag(seen, None, 20.0, 2.0, 0.5)),
        "VSF": (VSF(1.5), PlainFlip(seen, None, 1.5)),
    }[method]
    options = {} if make else {"alpha": 0.7}
    eager = installed(one.denoiser, plain) if plain else algorithm_1(
        one.denoiser, [(seen, None, 0.7)]
    )  # fmt: skip
    with eager:
        expected = call(one)
    with guided(one, text, make, **options):
        ours = call(one)
        assert_same_image(ours, expected)
        # keys that were kept are the same keys
        assert_same_image(call(one), expected)
    assert relative_error(ours, stock) > 1e-4


def test_several_at_once_with_masks_in_some_layers(one):
    """A sum, each negative prompt with its alpha, in one layer of all."""
    text, mask = negative(one), torch.arange(9)[None] < 6
    handle = enable_nasa(
        one.pipe, negative_prompt_embeds=text, negative_prompt_attention_mask=mask, cfg=False,
        alpha=0.5, layers="*.attn2",
    )  # fmt: skip
    names = list(handle._guidances[0].layers)
    handle.disable()
    chosen = names[len(names) // 2]
    with algorithm_1(one.denoiser, [(of_layers(one, text), mask, 0.5)], lambda n: n == chosen):
        expected = call(one)
    with guided(one, text, negative_prompt_attention_mask=mask, alpha=0.5, layers=chosen) as handle:
        assert_same_image(call(one), expected)
        report = handle.report()
        assert (report.layers_guided, report.layers) == (1, len(names))
        assert report.attention_flops > 0


@pytest.mark.parametrize("name", [name for name in NAMES if GRIDS[name]])
def test_a_map_over_the_image(name):
    one, (frames, height, width) = case(name), GRIDS[name]
    text, rows, columns = negative(one), max(height, 2), max(width, 2)
    region = torch.rand(rows, columns, generator=torch.Generator().manual_seed(3))
    small = torch.nn.functional.adaptive_avg_pool2d(region[None, None], (height, width))
    tokens = small.flatten().repeat(frames).view(1, 1, -1, 1)
    with algorithm_1(one.denoiser, [(of_layers(one, text), None, tokens)]):
        expected = call(one)
    with guided(one, text, alpha=region):
        assert_same_image(call(one), expected)


@pytest.mark.parametrize("name", [name for name in NAMES if not GRIDS[name]])
def test_a_map_of_one_value_is_that_number(name):
    one = case(name)
    with guided(one, negative(one), alpha=0.5) as handle:
        whole = call(one)
        handle.alpha = torch.full((6, 8), 0.5)
        assert_same_image(call(one), whole)
        handle.alpha = torch.cat([torch.zeros(4, 8), torch.full((4, 8), 0.5)])
        assert relative_error(call(one), whole) > 1e-4


@pytest.mark.parametrize("name", BESIDE_IMAGES)
def test_keys_of_images_are_kept_until_the_images_change(name):
    one, text = case(name), negative(case(name))
    images = one.inputs["encoder_hidden_states_image"]
    layer = next(m for n, m in one.denoiser.named_modules() if n.endswith("attn2"))
    calls = []
    hook = layer.add_k_proj.register_forward_hook(lambda *_: calls.append(1))
    with algorithm_1(one.denoiser, [(of_layers(one, text), None, 0.5)]):
        expected = [call(one), call(one, encoder_hidden_states_image=images.flip(-1))]
    calls.clear()
    with guided(one, text, alpha=0.5):
        assert_same_image(call(one), expected[0])
        assert_same_image(call(one), expected[0])
        assert len(calls) == 1
        assert_same_image(call(one, encoder_hidden_states_image=images.flip(-1)), expected[1])
        assert len(calls) == 2
        assert relative_error(*expected) > 1e-4
        # and until their projection does
        layer.add_k_proj.weight.mul_(2)
        changed = call(one)
        assert len(calls) == 3
    with algorithm_1(one.denoiser, [(of_layers(one, text), None, 0.5)]):
        assert_same_image(changed, call(one))
    hook.remove()
    case.cache_clear()


@pytest.mark.parametrize("name", BESIDE_IMAGES)
def test_images_beside_a_text_of_another_length_are_refused(name):
    one = case(name)
    short = one.inputs["encoder_hidden_states"][:, :20]
    with (
        guided(one, negative(one), alpha=0.5),
        pytest.raises(ValueError, match="must have 512 tokens, got 20.*max_sequence_length=512"),
    ):
        call(one, encoder_hidden_states=short)


def test_lora(one):
    if not hasattr(one.denoiser, "add_adapter"):
        pytest.skip("this denoiser takes no LoRA")
    text, targets = negative(one), ("to_k", "to_v", "to_q")
    before = call(one)
    add_lora(one.denoiser, "first", 1, targets)
    try:
        assert relative_error(call(one), before) > 1e-4
        with algorithm_1(one.denoiser, [(of_layers(one, text), None, 0.5)]):
            expected = call(one)
        with guided(one, text, alpha=0.5):
            assert_same_image(call(one), expected)
    finally:
        case.cache_clear()


@pytest.mark.parametrize(
    "change", [changes.offload_sequentially, changes.offload_leaves], ids=lambda f: f.__name__
)
@pytest.mark.parametrize(
    "name",
    [n for n in NAMES if n.startswith(("LTX", "Cosmos2_5", "SkyReels", "AnimateDiff", "Kolors"))],
)
def test_weights_that_come_and_go(name, change):
    case.cache_clear()
    one = case(name)
    with guided(one, negative(one), alpha=0.5):
        expected = call(one)
        change(one.denoiser)
        assert_same_image(call(one), expected)
        assert_same_image(call(one), expected)
    case.cache_clear()


@pytest.mark.parametrize(
    "name",
    [n for n in NAMES if n.startswith(("LTX", "Cosmos2_5", "SkyReels", "Latte"))],
)
def test_compiled_as_one_graph(name):
    case.cache_clear()
    torch._dynamo.reset()
    one, other = case(name), negative(case(name), 12, seed=5)
    with guided(one, negative(one), alpha=0.5) as handle:
        expected = call(one)
        one.denoiser.compile(fullgraph=True, backend="eager")
        assert_same_image(call(one), expected)
        with torch._dynamo.config.patch(error_on_recompile=True):
            handle.set_negative_prompt(negative_prompt_embeds=other)
            ours = call(one)
    case.cache_clear()
    one = case(name)
    with guided(one, other, alpha=0.5):
        assert_same_image(ours, call(one))
    torch._dynamo.reset()


def test_a_prompt_from_its_words_a_default_and_a_window(one):
    """Through the pipeline: two steps, of which the second is guided."""
    pipe, steps = one.pipe, 3 if "Long" in one.name else 2
    arguments = functools.partial(
        every_pipeline.arguments, pipe, ["a cat"], ["bad"], 1.0, steps=steps
    )
    outputs = []
    hook = one.denoiser.register_forward_hook(lambda _, __, out: outputs.append(out[0]))
    try:
        pipe(**arguments())
        stock, outputs[:] = list(outputs), []
        with nasa(pipe, "blurry", start=1) as handle:
            pipe(**arguments())
            report = handle.report()
    finally:
        hook.remove()
    assert handle.alpha in (0.1, 0.2, 0.5)
    assert report.problem is None and report.keys_neg > 0
    assert torch.equal(outputs[0], stock[0])
    assert relative_error(outputs[1], stock[1]) > 1e-5
