"""Beside others' hooks, patches and caches on the same modules, in either order.

Right is the image that eager attention gives under the same add-on, put on the same kind of
pipeline: for `attn2` Algorithm 1, for joint blocks the oracle of `carried.py`.
"""

from types import SimpleNamespace

import carried
import diffusers
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
    options |= {"taylor_factors_dtype": torch.float32, "cache_identifiers": [r".*blocks.*\.attn\d?"]}
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


CACHES = [first_block, mag, taylor_seer, broadcast]


def put_on(cache, model):
    """`model.enable_cache` where there is one; SD3 has none, but people apply them to it."""
    settings, name = cache()
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


JOINT = [
    (testing.flux, cache) for cache in CACHES
] + [
    # its last block returns no text, from which diffusers' first-block cache subtracts
    (testing.stable_diffusion_3, cache) for cache in CACHES if cache is not first_block
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
        assert [n for n, (_, h) in handle._steerings[0].layers.items() if h.last_call is None] == []


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
