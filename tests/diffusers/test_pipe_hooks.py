"""Beside others' hooks, patches and caches on the same modules, in either order.

Right is the image that eager attention gives under the same add-on, put on the same kind of
pipeline: for `attn2` Algorithm 1, for joint blocks the oracle of `carried.py`.
"""

from types import SimpleNamespace

import carried
import changes
import diffusers
import joint_cases
import pytest
import torch
from diffusers import hooks
from diffusers.hooks import HookRegistry
from diffusers.pipelines.wan import pipeline_wan
from drawing import assert_same_image, relative_error
from joint_cases import SIZE, negative
from nasa_diffusers import enable_nasa, nasa, testing
from oracle import algorithm_1

STEPS = 6


# ---- caches of diffusers on joint blocks ---------------------------------------------------------


def config(name, *args, **options):
    """A cache's configuration, where this diffusers has that cache."""
    if not hasattr(hooks, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    return getattr(hooks, name)(*args, **options)


def first_block():
    return config("FirstBlockCacheConfig", threshold=0.5), "first_block_cache"


def mag():
    ratios = torch.ones(STEPS)
    options = {"threshold": 10.0, "max_skip_steps": 2, "retention_ratio": 0.3}
    options |= {"num_inference_steps": STEPS, "mag_ratios": ratios}
    return config("MagCacheConfig", **options), "mag_cache"


def taylor_seer():
    options = {"cache_interval": 3, "disable_cache_before_step": 2, "max_order": 1}
    # its own patterns do not know the names of Wan's layers
    options |= {
        "taylor_factors_dtype": torch.float32,
        "cache_identifiers": [r".*blocks.*\.attn\d?"],
    }
    return config("TaylorSeerCacheConfig", **options), "taylorseer_cache"


def broadcast():
    options = {
        "spatial_attention_block_skip_range": 2,
        "spatial_attention_timestep_skip_range": (-1, 1001),
        "cross_attention_block_skip_range": 2,
        "cross_attention_timestep_skip_range": (-1, 1001),
        "current_timestep_callback": lambda: 500,
    }
    return config("PyramidAttentionBroadcastConfig", **options), "pyramid_attention_broadcast"


class Clock:
    """Timesteps that fall from 900 by 100 in each call."""

    def __init__(self):
        self.timestep = 1000

    def tick(self, *_):
        self.timestep -= 100

    def __call__(self):
        return self.timestep


def faster(distilled=True):
    options = {
        "spatial_attention_block_skip_range": 2,
        "spatial_attention_timestep_skip_range": (-1, 750),
        "spatial_attention_block_identifiers": ("blocks.*attn",),
        "unconditional_batch_skip_range": 2,
        "unconditional_batch_timestep_skip_range": (-1, 750),
        "attention_weight_callback": lambda _: 0.3,
        "current_timestep_callback": Clock(),
        "tensor_format": "BCHW",
        "is_guidance_distilled": distilled,
    }
    return config("FasterCacheConfig", **options), "faster_cache"


CACHES = [first_block, mag, taylor_seer, broadcast, faster]


def put_on(cache, model):
    """`model.enable_cache` where there is one; SD3 has none, but people apply them to it."""
    settings, name = cache()
    if isinstance(clock := getattr(settings, "current_timestep_callback", None), Clock):
        model.register_forward_pre_hook(clock.tick)
    if hasattr(model, "enable_cache"):
        model.enable_cache(settings)
        return
    getattr(hooks, f"apply_{name}")(model, settings)
    registry = HookRegistry.check_if_exists_or_initialize(model)
    getattr(registry, "invalidate_child_registries_cache", lambda: None)()


def set_context(model, name):
    """What a pipeline does around a call of its transformer; that of SD3 does not."""
    if hasattr(hooks.hooks, "_set_cache_context"):
        hooks.hooks._set_cache_context(model, hooks.hooks.CacheContext(name))
    else:
        HookRegistry.check_if_exists_or_initialize(model)._set_context(name)


def run(pipe, draw):
    if isinstance(pipe, diffusers.StableDiffusion3Pipeline):
        set_context(pipe.transformer, "cond")
    return draw(pipe, steps=STEPS, **SIZE)


JOINT = [(testing.flux, cache) for cache in CACHES] + [
    # its last block returns no text, from which diffusers' first-block cache subtracts
    (testing.stable_diffusion_3, cache)
    for cache in CACHES
    if cache is not first_block
]


@pytest.fixture(params=JOINT, ids=lambda case: f"{case[0].__name__}-{case[1].__name__}")
def cached(request):
    return request.param


@pytest.mark.parametrize("order", ["before", "after"])
def test_cache_on_joint_blocks(draw, cached, order):
    build, cache = cached
    oracle, pipe = build(), build()
    carried.install(oracle.transformer, "nasa-cross", [(negative(), 0.5, None)])
    without = run(oracle, draw)
    put_on(cache, oracle.transformer)
    expected = run(oracle, draw)
    assert relative_error(expected, without) > 1e-4
    if order == "before":
        put_on(cache, pipe.transformer)
    with nasa(pipe, negative_prompt_embeds=negative(), alpha=0.5):
        if order == "after":
            assert_same_image(run(pipe, draw), without)
            put_on(cache, pipe.transformer)
        assert_same_image(run(pipe, draw), expected)


@pytest.mark.parametrize("window", [{"start": 2}, {"stop": 3}], ids=str)
def test_cache_and_a_window(draw, cached, window):
    """The negative prompt is carried in all steps, so that what is kept has the same tokens."""
    build, cache = cached
    steps = range(window.get("start", 0), window.get("stop", STEPS))
    oracle, pipe = build(), build()
    factors = [float(i in steps) for i in range(STEPS)]
    carried.install(oracle.transformer, "nasa-cross", [(negative(), 0.5, None)], factors)
    for each in (oracle, pipe):
        put_on(cache, each.transformer)
    with nasa(pipe, negative_prompt_embeds=negative(), alpha=0.5, **window):
        assert_same_image(run(pipe, draw), run(oracle, draw))


def test_cache_and_alpha_set_within_a_run(draw, cached):
    build, cache = cached
    oracle, pipe = build(), build()
    factors = [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    carried.install(oracle.transformer, "nasa-cross", [(negative(), 0.5, None)], factors)
    for each in (oracle, pipe):
        put_on(cache, each.transformer)
    handle = enable_nasa(pipe, negative_prompt_embeds=negative(), alpha=0.5)

    def set_alpha(values):
        def callback(_, i, __, kwargs):
            handle.alpha = values.get(i, handle.alpha)
            return kwargs

        return draw(pipe, steps=STEPS, callback_on_step_end=callback, **SIZE)

    if build is testing.stable_diffusion_3:
        for each in (oracle, pipe):
            set_context(each.transformer, "cond")
    assert_same_image(set_alpha({1: 0}), run(oracle, draw))
    if build is testing.flux and cache is not faster:
        # the cache starts anew with each run; alpha is 0 now, so it is stock
        plain = build()
        put_on(cache, plain.transformer)
        assert torch.equal(run(pipe, draw), run(plain, draw))
        with pytest.raises(RuntimeError, match="which had no negative prompt; say from which step"):
            set_alpha({1: 0.5})


@pytest.mark.parametrize("change", [changes.offload_blocks, changes.cast_to_fp8])
def test_hooks_that_keep_nothing_are_no_cache(draw, change):
    """In steps that are not guided the text is the positive prompt alone."""
    pipe, tokens = testing.flux(), []
    change(pipe.transformer)
    pipe.transformer.context_embedder.register_forward_pre_hook(
        lambda _, args: tokens.append(args[0].shape[1])
    )
    with nasa(pipe, negative_prompt_embeds=negative(9), alpha=0.5, stop=1):
        run(pipe, draw)
    assert tokens == [16 + 9] + [16] * (STEPS - 1)


def test_cache_and_layers_left_out(draw, cached):
    """Only the first layer is guided; the negative prompt is carried on, for the cache's sake."""
    build, cache = cached
    pipe = build()
    put_on(cache, pipe.transformer)
    options = {"negative_prompt_embeds": negative(), "layers": "transformer_blocks.0.attn"}
    stock = run(build(), draw)
    with nasa(pipe, alpha=0.5, **options) as handle:
        ours = run(pipe, draw)
        assert relative_error(ours, stock) > 1e-4
        assert [n for n, (_, h) in handle._guidances[0].layers.items() if h.last_call is None] == []


@pytest.mark.parametrize("ours_first", [True, False], ids=["nasa first", "cache first"])
def test_each_is_taken_off_by_itself(draw, ours_first):
    """Of two hooks on a module, either may go first, and the other stays what it was."""
    build, cache = testing.flux, broadcast
    oracle, plain, pipe = build(), build(), build()
    carried.install(oracle.transformer, "nasa-cross", [(negative(), 0.5, None)])
    stock = run(plain, draw)
    put_on(cache, plain.transformer)
    for cache_first in (True, False):
        if cache_first:
            put_on(cache, pipe.transformer)
        handle = enable_nasa(pipe, negative_prompt_embeds=negative(), alpha=0.5)
        if not cache_first:
            put_on(cache, pipe.transformer)
        run(pipe, draw)
        if ours_first:
            handle.disable()
            assert torch.equal(run(pipe, draw), run(plain, draw))
            pipe.transformer.disable_cache()
        else:
            pipe.transformer.disable_cache()
            assert_same_image(run(pipe, draw), run(oracle, draw))
            handle.disable()
        assert torch.equal(run(pipe, draw), stock)


# ---- caches and other hooks on cross-attention ---------------------------------------------------


@pytest.fixture
def fix_text(monkeypatch):
    # diffusers 0.35 cleans Wan's prompts with the package ftfy whether it is there or not
    monkeypatch.setattr(pipeline_wan, "ftfy", SimpleNamespace(fix_text=str), raising=False)


@torch.no_grad()
def projected(transformer, text):
    return transformer.condition_embedder.text_embedder(text)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("cache", CACHES, ids=lambda f: f.__name__)
def test_cache_on_wan(draw, fix_text, cache, order):
    oracle, pipe = testing.wan(), testing.wan()
    text = negative(9)
    options = {"steps": STEPS}
    with algorithm_1(oracle.transformer, [(projected(oracle.transformer, text), None, 0.5)]):
        without = draw(oracle, **options)
        put_on(cache, oracle.transformer)
        expected = draw(oracle, **options)
    assert relative_error(expected, without) > 1e-4
    if order == "before":
        put_on(cache, pipe.transformer)
    with nasa(pipe, negative_prompt_embeds=text, alpha=0.5):
        if order == "after":
            draw(pipe, **options)
            put_on(cache, pipe.transformer)
        assert_same_image(draw(pipe, **options), expected)


@torch.no_grad()
def test_half_of_the_batch_is_left_out(draw):
    """FasterCache computes the conditional rows alone in some steps, of text and all."""
    oracle, pipe = testing.pixart(), testing.pixart()
    text, alpha = negative(9), torch.tensor([0.0, 0.5]).view(-1, 1, 1, 1)
    options, rows = {"steps": STEPS, "guidance": 4.0}, []
    projected = oracle.transformer.caption_projection(text)

    def alpha_of_rows(_):
        attn = rows[-1]
        return alpha[-attn:] if attn == 1 else alpha

    with algorithm_1(oracle.transformer, [(projected, None, alpha_of_rows)]):
        first = oracle.transformer.transformer_blocks[0]
        first.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
        without = draw(oracle, **options)
        put_on(lambda: faster(distilled=False), oracle.transformer)
        expected = draw(oracle, **options)
    assert set(rows) == {1, 2} and relative_error(expected, without) > 1e-4
    put_on(lambda: faster(distilled=False), pipe.transformer)
    with nasa(pipe, negative_prompt_embeds=text, alpha=0.5):
        assert_same_image(draw(pipe, **options), expected)


@torch.no_grad()
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("whole", [True, False], ids=["blocks", "feed-forwards"])
def test_skipped_layers(draw, whole, order):
    def skip(model):
        options = {"fqn": "transformer_blocks", "skip_attention": whole}
        settings = hooks.layer_skip.LayerSkipConfig(indices=[1], **options)
        hooks.layer_skip.apply_layer_skip(model, settings)

    oracle, pipe, text = testing.pixart(), testing.pixart(), negative(9)
    projected = oracle.transformer.caption_projection(text)
    with algorithm_1(oracle.transformer, [(projected, None, 0.5)]):
        without = draw(oracle)
        skip(oracle.transformer)
        expected = draw(oracle)
    assert relative_error(expected, without) > 1e-3
    if order == "before":
        skip(pipe.transformer)
    with nasa(pipe, negative_prompt_embeds=text, alpha=0.5):
        if order == "after":
            assert_same_image(draw(pipe), without)
            skip(pipe.transformer)
        assert_same_image(draw(pipe), expected)


@torch.no_grad()
def test_skipped_scores_are_refused(one_each):
    """They are skipped inside PyTorch's attention, which does not run here."""
    case = one_each
    hook = hooks.layer_skip.AttentionProcessorSkipHook(None, skip_attention_scores=True)
    registry = HookRegistry.check_if_exists_or_initialize(case.model.transformer_blocks[1].attn)
    registry.register_hook(hook, "skip")
    with (
        nasa(case.pipe, negative_prompt_embeds=negative(), alpha=0.5, cfg=False),
        pytest.raises(RuntimeError, match="replaces the scores of layer"),
    ):
        case()


@torch.no_grad()
def test_an_attention_put_in_later_is_an_error(one_each):
    case = one_each
    with nasa(case.pipe, negative_prompt_embeds=negative(), alpha=0.5, cfg=False):
        other = joint_cases.CASES["flux-schnell"] if "txt_ids" in case.inputs else joint_cases.sd3
        case.model.transformer_blocks[1].attn = other().model.transformer_blocks[1].attn
        with pytest.raises(RuntimeError, match="is not the one that enable_nasa prepared"):
            case()


CROSS = {"sd": testing.stable_diffusion, "pixart": testing.pixart, "sana": testing.sana}


@torch.no_grad()
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", CROSS)
def test_broadcast_on_cross_attention(draw, name, order):
    """Pyramid Attention Broadcast keeps what a layer made, of both prompts."""
    oracle, pipe = CROSS[name](), CROSS[name]()
    model, text = getattr(oracle, "unet", None) or oracle.transformer, negative(9)
    projected = text
    for part in ("caption_projection", "caption_norm"):
        projected = getattr(model, part, lambda x: x)(projected)
    put_on(broadcast, model)
    with algorithm_1(model, [(projected, None, 0.5)]):
        expected = draw(oracle, steps=4)
    model = getattr(pipe, "unet", None) or pipe.transformer
    if order == "before":
        put_on(broadcast, model)
    with nasa(pipe, negative_prompt_embeds=text, alpha=0.5):
        if order == "after":
            assert relative_error(draw(pipe, steps=4), expected) > 1e-4
            put_on(broadcast, model)
        assert_same_image(draw(pipe, steps=4), expected)


# ---- arguments and forwards ----------------------------------------------------------------------


@pytest.mark.parametrize("order", ["before", "after"])
def test_positional_arguments_stay_positional(sd, order):
    """A pipeline calls its UNet with latents and timestep by position, and hooks read them so."""
    seen = []

    def read(module, args):
        seen.append([tuple(x.shape) for x in args])

    if order == "before":
        sd.unet.register_forward_pre_hook(read)
    with nasa(sd, "blurry", alpha=0.5):
        if order == "after":
            sd.unet.register_forward_pre_hook(read)
        sd("a cat", num_inference_steps=1, guidance_scale=0, output_type="latent")
    assert seen == [[(1, 4, 16, 16), ()]]


@torch.no_grad()
def test_positional_arguments_of_a_block(one_each):
    """As gradient checkpointing calls it."""
    case, seen = one_each, []
    block = case.model.transformer_blocks[0]
    with nasa(case.pipe, negative_prompt_embeds=negative(), alpha=0.5, cfg=False):
        expected = case()
        block.register_forward_pre_hook(lambda _, args: seen.append(len(args)))
        case.model.train().enable_gradient_checkpointing()
        with torch.enable_grad():
            assert_same_image(case().detach(), expected)
    assert seen[0] > 3


def layer_of(pipe):
    if hasattr(pipe, "unet"):
        return pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    block = pipe.transformer.transformer_blocks[0]
    return getattr(block, "attn2", None) or block.attn


LAYERED = {"sd": testing.stable_diffusion, "pixart": testing.pixart, "flux": testing.flux}
QUICK = {"flux": SIZE, "pixart": {}, "sd": {}}


@pytest.fixture(params=LAYERED)
def layered(request):
    return LAYERED[request.param](), QUICK[request.param]


def zeros(hidden_states, *args, **kwargs):
    """A layer that computes nothing, and says nothing about it."""
    text = kwargs.get("encoder_hidden_states")
    out = torch.zeros_like(hidden_states)
    return (out, torch.zeros_like(text)) if isinstance(text, torch.Tensor) else out


def test_a_forward_replaced_before_is_refused(layered, draw):
    pipe, options = layered
    layer = layer_of(pipe)
    stock = draw(pipe, **options)
    layer.forward = zeros
    with pytest.raises(ValueError, match="was replaced by test_pipe_hooks.zeros, which NASA would"):
        enable_nasa(pipe, negative_prompt_embeds=negative(9))
    del layer.forward
    with nasa(pipe, negative_prompt_embeds=negative(9), alpha=0.5):
        assert relative_error(draw(pipe, **options), stock) > 1e-4


def test_a_forward_replaced_after_is_an_error(layered, draw):
    """One that asks nothing of the text, so that only we can tell."""
    pipe, options = layered
    layer = layer_of(pipe)
    with nasa(pipe, negative_prompt_embeds=negative(9), alpha=0.5) as handle:
        expected, ours = draw(pipe, **options), layer.forward
        layer.forward = zeros
        with pytest.raises(RuntimeError, match="forward.* was replaced"):
            draw(pipe, **options)
        layer.forward = ours
        assert torch.equal(draw(pipe, **options), expected)
        # an error of its own is not ours to judge, nor does it outlive the call
        layer.forward = None
        with pytest.raises(TypeError, match="not callable"):
            draw(pipe, **options)
        layer.forward = ours
        handle.alpha = 0
        draw(pipe, **options)


def test_a_forward_wrapped_after_is_called(layered, draw):
    """It may leave the layer out now and then, as a cache does, once it has led to it."""
    pipe, options = layered
    layer, calls = layer_of(pipe), []
    stock = draw(pipe, **options)
    with nasa(pipe, negative_prompt_embeds=negative(9), alpha=0.5):
        expected, ours = draw(pipe, **options), layer.forward

        def wrapped(*args, **kwargs):
            if len(calls) != 1:
                calls.append(ours(*args, **kwargs))
            else:
                calls.append(None)
            return calls[0]

        layer.forward = wrapped
        assert torch.equal(draw(pipe, **options), expected)
        assert torch.equal(draw(pipe, **options), expected)
        assert len(calls) == 2
    # the wrapper stays, and leads to the layer itself
    calls.clear()
    assert torch.equal(draw(pipe, **options), stock)
    assert len(calls) == 1
