"""Add-ons that patch a denoiser, before and after `enable_nasa`: tomesd, DeepCache, cache-dit.

`make test` puts these packages into a folder beside its environment and runs this file with them;
where one is missing its tests are skipped by name. Right is the image that eager attention gives
under the same add-on.
"""

import importlib.util
from types import SimpleNamespace

import carried
import diffusers
import pytest
import torch
from diffusers.pipelines.wan import pipeline_wan
from drawing import assert_same_image, draw, negative_embeds, relative_error
from joint_cases import SIZE, negative
from nasa_diffusers import nasa, testing
from oracle import algorithm_1
from packaging.version import Version


def needs(package, floor="0.35"):
    if importlib.util.find_spec(package) is None:
        return pytest.mark.skip(f"{package} is not installed: pip install {package}")
    too_old = Version(diffusers.__version__) < Version(floor)
    return pytest.mark.skipif(too_old, reason=f"{package} needs diffusers {floor}")


# ---- tomesd --------------------------------------------------------------------------------------


def merge_tokens(pipe):
    import tomesd

    options = {"merge_crossattn": True, "max_downsample": 2, "use_rand": False}
    tomesd.apply_patch(pipe, ratio=0.5, **options)


@needs("tomesd")
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("guidance", [0.0, 5.0], ids=["no-cfg", "cfg"])
@pytest.mark.parametrize("build", [testing.stable_diffusion, testing.stable_diffusion_xl])
def test_token_merging(build, guidance, order):
    import tomesd

    options = {"steps": 2, "guidance": guidance}
    alpha = torch.tensor([0.0, 0.5] if guidance else [0.5]).view(-1, 1, 1, 1)
    oracle, pipe = build(), build()
    with algorithm_1(oracle.unet, [(negative_embeds(oracle), None, alpha)]):
        without = draw(oracle, **options)
        merge_tokens(oracle)
        expected = draw(oracle, **options)
    assert relative_error(expected, without) > 1e-4
    if order == "before":
        merge_tokens(pipe)
    with nasa(pipe, "blurry", alpha=0.5):
        if order == "after":
            draw(pipe, **options)
            merge_tokens(pipe)
        assert_same_image(draw(pipe, **options), expected)
        tomesd.remove_patch(pipe)
        assert_same_image(draw(pipe, **options), without)


# ---- DeepCache -----------------------------------------------------------------------------------


def keep_deep_blocks(pipe):
    """Its helper, without the package's models, which are copies of an older diffusers."""
    (folder,) = importlib.util.find_spec("DeepCache").submodule_search_locations
    path = f"{folder}/extension/deepcache.py"
    spec = importlib.util.spec_from_file_location("deepcache_helper", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    helper = module.DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=3, cache_branch_id=0)
    helper.enable()


@needs("DeepCache")
@pytest.mark.parametrize("order", ["before", "after"])
def test_deep_cache(order):
    oracle, pipe = testing.stable_diffusion(), testing.stable_diffusion()
    with algorithm_1(oracle.unet, [(negative_embeds(oracle), None, 0.5)]):
        without = draw(oracle, steps=6)
        keep_deep_blocks(oracle)
        expected = draw(oracle, steps=6)
    assert relative_error(expected, without) > 1e-4
    if order == "before":
        keep_deep_blocks(pipe)
    with nasa(pipe, "blurry", alpha=0.5):
        if order == "after":
            assert_same_image(draw(pipe, steps=6), without)
            keep_deep_blocks(pipe)
        assert_same_image(draw(pipe, steps=6), expected)


# ---- cache-dit -----------------------------------------------------------------------------------

STEPS = 6


def cache_blocks(pipe, last_blocks=0):
    import cache_dit

    cache_dit.enable_cache(
        pipe,
        cache_config=cache_dit.DBCacheConfig(
            Fn_compute_blocks=1, Bn_compute_blocks=last_blocks,
            residual_diff_threshold=0.8, max_warmup_steps=2, max_continuous_cached_steps=2,
        ),
    )  # fmt: skip


@pytest.fixture
def cache_dit(monkeypatch):
    """cache-dit, whose marks on the classes of pipelines are taken off again."""
    import cache_dit

    classes = [diffusers.FluxPipeline, diffusers.StableDiffusion3Pipeline, diffusers.WanPipeline]
    calls = [cls.__call__ for cls in classes]
    # diffusers 0.36 cleans Wan's prompts with the package ftfy whether it is there or not
    monkeypatch.setattr(pipeline_wan, "ftfy", SimpleNamespace(fix_text=str), raising=False)
    yield cache_dit
    for cls, call in zip(classes, calls, strict=True):
        cls.__call__ = call
        for name in ("_is_cached", "_original_call"):
            if name in vars(cls):
                delattr(cls, name)


@pytest.fixture(params=["one list of blocks", "two lists"])
def lists_of_blocks(request, monkeypatch, cache_dit):
    """FLUX.1's blocks of two kinds are cached as one list, its default, or as two."""
    is_one = request.param == "one list of blocks"
    monkeypatch.setattr(cache_dit.ENV, "CACHE_DIT_FLUX_ENABLE_DUMMY_BLOCKS", is_one)
    # blocks that run in every step, after those that are skipped
    return 1 if is_one else 0


def run(pipe):
    return draw(pipe, steps=STEPS, **SIZE)


@needs("cache_dit", "0.36")
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("build", [testing.flux, testing.stable_diffusion_3])
def test_cache_dit(cache_dit, lists_of_blocks, build, order):
    oracle = build()
    carried.install(oracle.transformer, "nasa-cross", [(negative(), 0.5, None)])
    without = run(oracle)
    cache_blocks(oracle, lists_of_blocks)
    expected = run(oracle)
    assert relative_error(expected, without) > 1e-4
    cache_dit.disable_cache(oracle)

    pipe = build()
    if order == "before":
        cache_blocks(pipe, lists_of_blocks)
    with nasa(pipe, negative_prompt_embeds=negative(), alpha=0.5):
        if order == "after":
            assert_same_image(run(pipe), without)
            cache_blocks(pipe, lists_of_blocks)
        assert_same_image(run(pipe), expected)
        cache_dit.disable_cache(pipe)
        assert_same_image(run(pipe), without)


@needs("cache_dit", "0.36")
@pytest.mark.parametrize("window", [{"start": 2}, {"stop": 3}], ids=str)
def test_cache_dit_and_a_window(cache_dit, lists_of_blocks, window):
    steps = range(window.get("start", 0), window.get("stop", STEPS))
    oracle, factors = testing.flux(), [float(i in steps) for i in range(STEPS)]
    carried.install(oracle.transformer, "nasa-cross", [(negative(), 0.5, None)], factors)
    cache_blocks(oracle, lists_of_blocks)
    expected = run(oracle)
    cache_dit.disable_cache(oracle)
    pipe = testing.flux()
    cache_blocks(pipe, lists_of_blocks)
    with nasa(pipe, negative_prompt_embeds=negative(), alpha=0.5, **window):
        assert_same_image(run(pipe), expected)


@needs("cache_dit", "0.36")
@pytest.mark.parametrize("order", ["before", "after"])
def test_cache_dit_on_wan(cache_dit, order):
    oracle, text = testing.wan(), negative(9)
    with torch.no_grad():
        projected = oracle.transformer.condition_embedder.text_embedder(text)
    with algorithm_1(oracle.transformer, [(projected, None, 0.5)]):
        without = draw(oracle, steps=STEPS)
        cache_blocks(oracle)
        expected = draw(oracle, steps=STEPS)
    assert relative_error(expected, without) > 1e-4
    cache_dit.disable_cache(oracle)
    pipe = testing.wan()
    if order == "before":
        cache_blocks(pipe)
    with nasa(pipe, negative_prompt_embeds=text, alpha=0.5):
        if order == "after":
            draw(pipe, steps=STEPS)
            cache_blocks(pipe)
        assert_same_image(draw(pipe, steps=STEPS), expected)
