"""Beside what else changes a pipeline: a correct image, or an error that says what to do.

Whatever is applied, before or after `enable_nasa`, the image is that of Algorithm 1 on a
pipeline to which the same was applied.
"""

import copy
import threading

import changes
import diffusers
import pytest
import torch
from diffusers.models import attention_processor as stock
from drawing import assert_same_image, negative_embeds, relative_error
from nasa_diffusers import NASA, disable_nasa, enable_nasa, nasa, testing
from nasa_diffusers.guided_text import GuidedText
from oracle import algorithm_1


def apply_nothing(pipe):
    pass


def apply_slicing(pipe):
    pipe.enable_attention_slicing(1)


def apply_fusion(pipe):
    pipe.unet.fuse_qkv_projections()


def apply_other_stock_processor(pipe):
    pipe.unet.set_attn_processor(stock.AttnProcessor())


def apply_model_offload(pipe):
    pipe.enable_model_cpu_offload(device="cpu")


def apply_sequential_offload(pipe):
    changes.offload_sequentially(pipe.unet)


def apply_leaf_group_offload(pipe):
    changes.offload_leaves(pipe.unet)


def apply_block_group_offload(pipe):
    changes.offload_blocks(pipe.unet)


def apply_fp8(pipe):
    changes.cast_to_fp8(pipe.unet)


CHANGES = [
    apply_slicing,
    apply_fusion,
    apply_other_stock_processor,
    apply_model_offload,
    apply_sequential_offload,
    apply_leaf_group_offload,
    apply_block_group_offload,
    apply_fp8,
]


@pytest.mark.parametrize("order", ["before", "after", "between calls"])
@pytest.mark.parametrize("apply", CHANGES, ids=lambda f: f.__name__[6:])
def test_change(draw, apply, order):
    """Two calls in a row: some changes act only when a first call has ended."""
    # the oracle replaces processors, so it meets the change's weights but not its processors
    oracle = testing.stable_diffusion()
    negative = negative_embeds(oracle)
    if apply not in (apply_slicing, apply_fusion, apply_other_stock_processor):
        apply(oracle)
    with algorithm_1(oracle.unet, [(negative, None, 0.5)]):
        expected = draw(oracle, steps=2)

    pipe = testing.stable_diffusion()
    if order == "before":
        apply(pipe)
    handle = enable_nasa(pipe, "blurry", alpha=0.5)
    if order == "between calls":
        draw(pipe, steps=2)
    if order != "before":
        apply(pipe)
    assert_same_image(draw(pipe, steps=2), expected)
    assert_same_image(draw(pipe, steps=2), expected)

    plain = testing.stable_diffusion()
    apply(plain)
    handle.disable()
    assert torch.equal(draw(pipe, steps=2), draw(plain, steps=2))


def test_undoing_changes(sd, draw):
    with nasa(sd, "blurry", alpha=0.5):
        expected = draw(sd)
        sd.enable_attention_slicing()
        sd.disable_attention_slicing()
        assert torch.equal(draw(sd), expected)
        sd.unet.fuse_qkv_projections()
        sd.unet.unfuse_qkv_projections()
        assert_same_image(draw(sd), expected)
        sd.remove_all_hooks()
        assert_same_image(draw(sd), expected)


@pytest.mark.filterwarnings("ignore:torch")
@pytest.mark.parametrize("is_first", [True, False], ids=["before", "after"])
def test_quantised_linears(sd, draw, is_first):
    """Both prompts share a dynamic scale, so the rounding differs from Algorithm 1's: no worse."""

    def quantise(pipe):
        torch.backends.quantized.engine = torch.backends.quantized.supported_engines[-1]
        torch.ao.quantization.quantize_dynamic(pipe.unet, {torch.nn.Linear}, inplace=True)

    oracle = testing.stable_diffusion()
    with algorithm_1(oracle.unet, [(negative_embeds(oracle), None, 0.5)]):
        exact = draw(oracle)
        quantise(oracle)
        eager = draw(oracle)
    if is_first:
        quantise(sd)
    with nasa(sd, "blurry", alpha=0.5):
        if not is_first:
            draw(sd)
            quantise(sd)
        assert relative_error(draw(sd), exact) <= 1.5 * relative_error(eager, exact)
        # from the cache now
        assert relative_error(draw(sd), exact) <= 1.5 * relative_error(eager, exact)


# ---- processors of others ------------------------------------------------------------------------


class StrangeProcessor:
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
        return torch.zeros_like(hidden_states)


def test_a_processor_nasa_does_not_know_is_an_error(sd, draw):
    with nasa(sd, "blurry"):
        sd.unet.set_attn_processor(StrangeProcessor())
        with pytest.raises(RuntimeError, match="StrangeProcessor, whose computation NASA does not"):
            draw(sd)
        sd.unet.set_attn_processor(stock.AttnProcessor2_0())
        draw(sd)


def test_a_strange_processor_in_a_layer_that_is_not_guided(sd, draw):
    mid = sd.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    mid.set_processor(StrangeProcessor())
    stock_image = draw(sd)
    with nasa(sd, "blurry", alpha=0.5, layers="up_blocks.*"):
        assert not torch.allclose(draw(sd), stock_image)


def test_a_replaced_forward_is_an_error(sd, draw):
    """Code that overwrites a layer's forward takes the hook away; it does not do so silently."""
    enable_nasa(sd, "blurry")
    attn = sd.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    attn.forward = stock.Attention.forward.__get__(attn)
    with pytest.raises(AttributeError, match="not one that enable_nasa prepared"):
        draw(sd)


def test_operators_that_are_given_the_guided_text():
    """A cache around blocks adds to the text what they added, which is 0. No other may have it."""
    text = GuidedText(torch.randn(1, 3, 4), (), NASA(0.5), backend=None, prompts=None)
    assert torch.zeros(()) + text is text  # what `text - text` gives
    for operator in (torch.cat, torch.relu):
        with pytest.raises(AttributeError, match=f"for {operator.__name__}, so it is not one"):
            operator([text] if operator is torch.cat else text)


# ---- dtype and device ----------------------------------------------------------------------------


def test_to_another_dtype_and_back(sd, draw):
    with nasa(sd, "blurry", alpha=0.5):
        draw(sd)
        half = draw(sd.to(torch.bfloat16))
        back = draw(sd.to(torch.float32))
    fresh = testing.stable_diffusion().to(torch.bfloat16)
    with nasa(fresh, "blurry", alpha=0.5):
        assert torch.equal(draw(fresh), half)
    # the weights are rounded now, and the negative prompt is encoded by rounded weights
    with nasa(fresh.to(torch.float32), "blurry", alpha=0.5):
        assert torch.equal(draw(fresh), back)


def test_autocast(sd, draw):
    with nasa(sd, "blurry", alpha=0.5):
        ours = draw_in_bf16(sd, draw)
    oracle = testing.stable_diffusion()
    with algorithm_1(oracle.unet, [(negative_embeds(oracle), None, 0.5)]):
        exact, eager = draw(oracle), draw_in_bf16(oracle, draw)
    assert relative_error(ours, exact) <= 1.5 * relative_error(eager, exact)


def draw_in_bf16(pipe, draw):
    with torch.autocast("cpu", torch.bfloat16):
        return draw(pipe)


def test_autocast_between_calls_with_the_same_text(sd):
    """Keys that were kept in fp32 are not those of an autocast call."""
    sample, text = torch.randn(1, 4, 16, 16), negative_embeds(sd, "a cat")
    with torch.no_grad(), nasa(sd, "blurry", alpha=0.5) as handle:
        plain = sd.unet(sample, 500, text).sample
        with torch.autocast("cpu", torch.bfloat16):
            half = sd.unet(sample, 500, text).sample
            handle.clear_cache()
            assert torch.equal(sd.unet(sample, 500, text).sample, half)
        assert torch.equal(sd.unet(sample, 500, text).sample, plain)


def test_inference_mode(sd, draw):
    with nasa(sd, "blurry", alpha=0.5):
        expected = draw(sd)
        with torch.inference_mode():
            assert torch.equal(draw(sd, steps=1), expected)
            assert torch.equal(draw(sd, steps=1), expected)
        assert torch.equal(draw(sd), expected)


# ---- several pipelines ---------------------------------------------------------------------------


def test_from_pipe_shares_the_denoiser_and_nasa(sd, draw):
    """The second pipeline is guided too, and its own guidance decides which rows are."""
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    options = {"image": picture, "strength": 0.5, "output_type": "latent"}

    def redraw(pipe, guidance):
        generator = torch.Generator().manual_seed(0)
        options["num_inference_steps"] = 4
        return pipe("a cat", generator=generator, guidance_scale=guidance, **options).images

    with nasa(sd, "blurry", alpha=0.5):
        # the first pipeline was last called without guidance, the second one uses it
        draw(sd, guidance=0.0)
        second = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(sd)
        second.set_progress_bar_config(disable=True)
        ours = redraw(second, guidance=5.0)
    rows = torch.tensor([0.0, 0.5]).view(-1, 1, 1, 1)
    with algorithm_1(sd.unet, [(negative_embeds(sd), None, rows)]):
        assert_same_image(ours, redraw(second, guidance=5.0))
    enable_nasa(second, "blurry")
    disable_nasa(sd)
    with pytest.raises(RuntimeError, match="not on"):
        disable_nasa(second)


def test_window_counts_the_steps_that_image_to_image_runs(sd):
    second = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(sd)
    second.set_progress_bar_config(disable=True)
    calls = []
    with nasa(second, "blurry", stop=1) as handle:
        hook = next(iter(handle._guidances[0].guided_layers.values()))
        second.unet.register_forward_hook(lambda *_: calls.append(hook.last_call is not None))
        second.unet.register_forward_hook(lambda *_: setattr(hook, "last_call", None))
        picture = torch.zeros(1, 3, 32, 32)
        second("a cat", image=picture, strength=0.5, num_inference_steps=4, guidance_scale=0)
    assert calls == [True, False]


def test_two_pipelines_are_independent(draw):
    first, second = testing.stable_diffusion(0), testing.stable_diffusion(1)
    plain = draw(second)
    with nasa(first, "blurry", alpha=0.5):
        alone = draw(first)
        assert torch.equal(draw(second), plain)
        with nasa(second, "red", alpha=0.2):
            assert not torch.equal(draw(second), plain)
            assert torch.equal(draw(first), alone)


def test_two_threads_share_a_denoiser(sd, draw):
    """Different prompts, guidance and schedulers at once, each as if it were alone."""
    pipes = []
    for _ in range(2):
        pipe = diffusers.StableDiffusionPipeline(**sd.components, requires_safety_checker=False)
        pipe.scheduler = copy.deepcopy(sd.scheduler)
        pipe.set_progress_bar_config(disable=True)
        pipes.append(pipe)
    calls = [{"prompt": "a cat", "guidance": 0.0}, {"prompt": "a dog", "guidance": 5.0}]
    with nasa(sd, "blurry", alpha=0.5):
        alone = [draw(p, steps=4, **c) for p, c in zip(pipes, calls, strict=True)]
        together = [None, None]

        def work(i):
            together[i] = draw(pipes[i], steps=4, **calls[i])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i in range(2):
        assert_same_image(together[i], alone[i])


def test_save_and_load_keeps_nothing_of_nasa(sd, draw, tmp_path):
    plain = draw(sd)
    keys = sd.unet.state_dict().keys()
    with nasa(sd, "blurry", alpha=0.5):
        draw(sd)
        assert sd.unet.state_dict().keys() == keys
        sd.save_pretrained(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(draw(loaded), plain)


# ---- a loop of one's own -------------------------------------------------------------------------


def test_own_loop(sd):
    sample, text = torch.randn(1, 4, 16, 16), negative_embeds(sd, "a cat")
    with torch.no_grad():
        stock_output = sd.unet(sample, 500, text).sample
        with nasa(sd, "blurry", alpha=0.5) as handle:
            # positional and keyword arguments are the same call
            alone = sd.unet(sample, 500, text).sample
            keywords = {"timestep": 500, "encoder_hidden_states": text}
            assert torch.equal(sd.unet(sample=sample, **keywords).sample, alone)
            twice, texts = sample.repeat(2, 1, 1, 1), text.repeat(2, 1, 1)
            with pytest.raises(RuntimeError, match="pass cfg=True"):
                sd.unet(twice, 500, texts)
            # latents that differ cannot be a doubled batch
            different = torch.cat([sample, sample + 1])
            assert_same_image(sd.unet(different, 500, texts).sample[:1], alone)
            handle.disable()
        with nasa(sd, "blurry", alpha=0.5, cfg=True):
            both = sd.unet(twice, 500, texts).sample
            assert_same_image(both[:1], stock_output)
            assert_same_image(both[1:], alone)
            with pytest.raises(RuntimeError, match="the batch must be even, it has 1"):
                sd.unet(sample, 500, text)
        with nasa(sd, "blurry", alpha=0.5, cfg=False):
            assert_same_image(sd.unet(twice, 500, texts).sample, alone.expand(2, -1, -1, -1))
        with (
            nasa(sd, "blurry", start=1),
            pytest.raises(RuntimeError, match="set handle.alpha to 0"),
        ):
            sd.unet(sample, 500, text)


def test_rows_nasa_does_not_know(sd, draw):
    class PerturbedPipeline(diffusers.StableDiffusionPipeline):
        do_perturbed_attention_guidance = True

    pipe = PerturbedPipeline(**sd.components, requires_safety_checker=False)
    with nasa(pipe, "blurry"), pytest.raises(RuntimeError, match="batches more than"):
        draw(pipe)


def test_a_copy_would_run_with_the_weights_of_the_original(sd, draw):
    with nasa(sd, "blurry"), pytest.raises(RuntimeError, match="cannot be copied while NASA is on"):
        copy.deepcopy(sd.unet)
    sd.unet = copy.deepcopy(sd.unet)
    draw(sd)


# ---- few-step recipes of SDXL --------------------------------------------------------------------

RECIPES = {
    "turbo-1": {"scheduler": diffusers.EulerAncestralDiscreteScheduler, "steps": 1},
    "turbo-4": {"scheduler": diffusers.EulerAncestralDiscreteScheduler, "steps": 4},
    "dmd2-1": {"scheduler": diffusers.LCMScheduler, "steps": 1, "timesteps": [399]},
    "dmd2-4": {"scheduler": diffusers.LCMScheduler, "steps": 4, "timesteps": [999, 749, 499, 249]},
    "lcm-1": {"scheduler": diffusers.LCMScheduler, "steps": 1, "guidance": 8.0},
    "lcm-4": {"scheduler": diffusers.LCMScheduler, "steps": 4, "guidance": 8.0},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_few_step_recipes(recipe, draw):
    options = dict(RECIPES[recipe])
    scheduler = options.pop("scheduler")

    def build():
        pipe = testing.stable_diffusion_xl(
            time_cond_proj_dim=8 if recipe.startswith("lcm") else None
        )
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
        return pipe

    pipe, oracle = build(), build()
    stock_image = draw(pipe, **options)
    with nasa(pipe, "blurry", alpha=0.5):
        ours = draw(pipe, **options)
    with algorithm_1(oracle.unet, [(negative_embeds(oracle), None, 0.5)]):
        assert_same_image(ours, draw(oracle, **options))
    assert not torch.allclose(ours, stock_image)
