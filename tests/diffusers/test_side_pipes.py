"""Pipelines with a side stream, as their users call them."""

from pathlib import Path

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from drawing import assert_same_image, relative_error
from hunyuan_pipes import TWO_STEPS
from nasa_diffusers import NAG, NASA, VSF, enable_nasa, flops_side, nasa, testing_side
from nasa_diffusers.families.qwen import MASKS_TEXT
from peft import LoraConfig
from PIL import Image
from side_pipes import CFG, DOUBLED, PIPES, draw


@pytest.fixture(scope="module", params=PIPES)
def pipe(request):
    build, options = PIPES[request.param]
    made = build()
    made.draw = lambda *args, **others: draw(made, options, *args, **others)
    made.short_name = request.param
    return made


class Calls:
    """What the denoiser returned in each call, row by row."""

    def __init__(self, denoiser):
        self.outputs = []
        self.handle = denoiser.register_forward_hook(self.keep)

    def keep(self, _, __, output):
        rows = output[0]
        self.outputs.append(torch.stack(rows) if isinstance(rows, list) else rows.clone())

    def __enter__(self):
        return self.outputs

    def __exit__(self, *_):
        self.handle.remove()


def test_every_method_moves_the_image_and_alpha_0_does_not(pipe):
    stock = pipe.draw()
    images = [stock]
    with nasa(pipe, "blurry", NASA(0.5)) as handle:
        images.append(pipe.draw())
        report = handle.report()
        for method in (NAG(), VSF(0.5), NASA([0.3])):
            handle.method = method
            images.append(pipe.draw())
        handle.set_negative_prompt([("blurry", 0.3), ("fuzz", 0.2)])
        handle.method = NASA()
        images.append(pipe.draw())
        handle.alpha = 0
        assert torch.equal(pipe.draw(), stock)
    assert torch.equal(pipe.draw(), stock)
    for i, image in enumerate(images):
        assert image.isfinite().all() and all(relative_error(image, x) > 1e-4 for x in images[:i])
    assert report.layers_guided == report.layers > 0 and report.attention_flops > 0
    assert "blurry" in report.negatives[0] and report.problem is None


def test_prompts_of_unequal_length_with_a_negative_each(pipe):
    """Each image is what it is alone."""
    prompts, negatives = ["a cat", "a big dog"], ["blurry", "so dull"]
    if pipe.short_name == "qwen-image" and not MASKS_TEXT:
        # stock attended to its padding, too, before diffusers 0.37
        prompts = ["a cat", "a dog"]
    if pipe.short_name in ("qwen21", "joy"):
        # the image stands where the longest prompt ends; padding is attended to
        prompts = ["a cat", "a dog"]
    with nasa(pipe, negatives, NASA(0.5)):
        both = pipe.draw(prompts)
    for i in range(2):
        with nasa(pipe, negatives[i], NASA(0.5)):
            alone = pipe.draw(prompts[i], seed=i)
        assert relative_error(both[i : i + 1], alone) < 1e-3


def steps_of(pipe):
    """The fewest."""
    return 2 if pipe.short_name in TWO_STEPS else 1


def test_guidance_leaves_the_pipelines_own_negative_alone(pipe):
    """Rows and calls of the unconditional branch are stock's, and the others are not."""
    if pipe.short_name not in CFG:
        pytest.skip("is distilled")
    options, steps = CFG[pipe.short_name], steps_of(pipe)
    with Calls(pipe.transformer) as stock:
        pipe.draw(steps=steps, **options)
    with nasa(pipe, "blurry", NASA(0.5)), Calls(pipe.transformer) as guided:
        pipe.draw(steps=steps, **options)
    # of the first step
    rows, others = (
        [row for output in outputs[: len(outputs) // steps] for row in output]
        for outputs in (stock, guided)
    )
    assert len(rows) == 2
    moved = [relative_error(other, row) > 1e-4 for row, other in zip(rows, others, strict=True)]
    # Z-Image puts the prompt first; two calls begin with it, too
    is_last = pipe.short_name in DOUBLED
    assert moved == ([False, True] if is_last else [True, False])


def test_window(pipe):
    with Calls(pipe.transformer) as stock:
        pipe.draw(steps=3)
    with nasa(pipe, "blurry", NASA(0.5), start=1, stop=2), Calls(pipe.transformer) as guided:
        pipe.draw(steps=3)
    assert torch.equal(stock[0], guided[0])
    assert not torch.equal(stock[1], guided[1])


def test_a_speed_lora_at_guidance_1(pipe):
    """The negative prompt passes the adapter as the prompt does, at the scale that is set."""
    if not hasattr(pipe.transformer, "add_adapter"):
        pytest.skip("diffusers has no LoRA for it")
    names = ["to_q", "to_k", "add_k_proj", "to_qkv_mlp_proj"]
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=names, init_lora_weights=False))
    try:
        stock = pipe.draw()
        with nasa(pipe, "blurry", NASA(0.5)) as handle:
            guided = pipe.draw()
            pipe.transformer.disable_adapters()
            without = pipe.draw()
            handle.alpha = 0
            plain = pipe.draw()
            pipe.transformer.enable_adapters()
            assert torch.equal(pipe.draw(), stock)
        pipe.transformer.disable_adapters()
        with nasa(pipe, "blurry", NASA(0.5)):
            assert_same_image(pipe.draw(), without)
        assert relative_error(guided, without) > 1e-4 and relative_error(guided, stock) > 1e-4
        assert relative_error(without, plain) > 1e-4
    finally:
        pipe.transformer.delete_adapters("default")


def test_a_loop_of_ones_own_has_to_say_what_is_doubled(pipe):
    """No pipeline in the call stack, and both halves have the same latents."""
    calls = []
    keep = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    if pipe.short_name in ("z-image", "lumina", *DOUBLED):
        pipe.draw(steps=steps_of(pipe), **CFG[pipe.short_name])
    else:
        pipe.draw(["a cat", "a dog"], steps=1)
    keep.remove()
    args, kwargs = calls[0]
    if "hidden_states" in kwargs:
        x = kwargs["hidden_states"]
        kwargs["hidden_states"] = x[:1].expand_as(x)
    with nasa(pipe, "blurry", NASA(0.5)) as handle, torch.no_grad():
        with pytest.raises(RuntimeError, match="both halves of the batch"):
            pipe.transformer(*args, **kwargs)
        handle.cfg = [True, False]
        pipe.transformer(*args, **kwargs)


# ---- families ------------------------------------------------------------------------------------


def test_klein_with_two_reference_images():
    """Only the image that is made is guided; VSF, which cannot do that, is refused."""
    if "klein" not in PIPES:
        pytest.skip("a newer diffusers has it")
    build, options = PIPES["klein"]
    made = build()
    photos = [Image.new("RGB", size, color) for size, color in (((64, 64), "red"), ((96, 64), 9))]
    stock = draw(made, options, image=photos, steps=1)
    seen = []
    layer = made.transformer.transformer_blocks[0].attn.to_out[0]
    keep = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    draw(made, options, image=photos, steps=1)
    with nasa(made, "blurry", NASA(0.5)) as handle:
        guided = draw(made, options, image=photos, steps=1)
        handle.method = VSF(0.5)
        with pytest.raises(ValueError, match="reference images .* cannot be left out"):
            draw(made, options, image=photos, steps=1)
    keep.remove()
    assert relative_error(guided, stock) > 1e-4
    before, after = seen[:2]
    # what the first attention gives: 24 tokens that are made, then 256 and 384 of references
    assert before.shape[1] == 24 + 256 + 384
    assert relative_error(after[:, :24], before[:, :24]) > 1e-3
    assert relative_error(after[:, 24:], before[:, 24:]) < 1e-6


def test_klein_with_a_cache_of_keys_is_refused():
    if "klein" not in PIPES:
        pytest.skip("a newer diffusers has it")
    made = testing_side.klein()
    embeds = torch.randn(1, 7, 96)
    ids = torch.zeros(6, 4)
    with nasa(made, "blurry", NASA(0.5), cfg=False), pytest.raises(RuntimeError, match="klein KV"):
        made.transformer(
            hidden_states=torch.randn(1, 6, 16), encoder_hidden_states=embeds,
            timestep=torch.ones(1), img_ids=ids, txt_ids=torch.zeros(7, 4), kv_cache_mode="extract",
        )  # fmt: skip


def test_ltx2_guides_its_further_calls_and_each_stream_alone():
    """Spatio-temporal guidance and isolated modalities call with the prompt once more."""
    if "ltx2" not in PIPES:
        pytest.skip("a newer diffusers has it")
    _, options = PIPES["ltx2"]
    made = testing_side.ltx2("2.3")
    further = {
        "guidance_scale": 1.0,
        "stg_scale": 1.0,
        "spatio_temporal_guidance_blocks": [1],
        "modality_scale": 2.0,
    }
    with Calls(made.transformer) as stock:
        draw(made, options, steps=1, **further)
    with nasa(made, "blurry", NASA(0.5)), Calls(made.transformer) as guided:
        draw(made, options, steps=1, **further)
    assert len(stock) == len(guided) == 3
    assert all(relative_error(b, a) > 1e-4 for a, b in zip(stock, guided, strict=True))
    images = [draw(made, options)]
    for layers in ("*.attn2", "*.audio_attn2"):
        with nasa(made, "blurry", NASA(0.5), layers=layers) as handle:
            images.append(draw(made, options))
            assert handle.report().layers_guided == 2
    assert relative_error(images[1], images[2]) > 1e-4
    made.connectors = None
    with pytest.raises(ValueError, match="connectors of this LTX2Pipeline is not loaded"):
        enable_nasa(made, "blurry")


def test_a_cache_of_blocks():
    """What it keeps is the denoiser's own; it may leave out all blocks after the first."""
    build, options = PIPES["qwen-image"]
    made = build()
    with nasa(made, "blurry", NASA(0.5)):
        expected = draw(made, options, steps=3)
    for threshold in (0.0, 10.0):
        made.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
        stock = draw(made, options, steps=3)
        with nasa(made, "blurry", NASA(0.5)):
            guided = draw(made, options, steps=3)
        made.transformer.disable_cache()
        assert relative_error(guided, stock) > 1e-4
        assert torch.equal(guided, expected) == (threshold == 0)


def test_z_image_omni_is_refused():
    if "z-image" not in PIPES:
        pytest.skip("a newer diffusers has it")
    made = testing_side.z_image()
    text = [[torch.randn(5, 32)]]
    with nasa(made, "blurry", NASA(0.5), cfg=False), pytest.raises(ValueError, match="Omni"):
        made.transformer([[torch.randn(4, 1, 8, 8)]], torch.ones(1), text)


def test_qwen_image_21_makes_keys_of_a_negative_prompt_once():
    """As long as the pipeline keeps those of its prompt, and not in another run."""
    if "qwen21" not in PIPES:
        pytest.skip("a newer diffusers has it")
    build, options = PIPES["qwen21"]
    made, texts = build(), []
    made.transformer.txt_in.register_forward_hook(lambda _, args, __: texts.append(args[0]))
    stock = draw(made, options, steps=3)
    assert len(texts) == 3
    with nasa(made, "blurry", NASA(0.5)) as handle:
        guided = draw(made, options, steps=3)
        assert len(texts) == 3 + 3 + 1
        assert torch.equal(draw(made, options, steps=3), guided)
        assert len(texts) == 7 + 3 + 1
        texts.clear()
        # without what is kept every call makes them
        each = draw(made, options, steps=3, use_kv_cache=False)
        assert len(texts) == 6
        assert_same_image(each, guided)
        handle.set_negative_prompt("fuzzy")
        assert relative_error(draw(made, options, steps=3), guided) > 1e-4
    assert relative_error(guided, stock) > 1e-4


def test_the_table_is_what_is_counted():
    """One row is counted here, the smallest; `flops_side.count` counts them all."""
    page = Path(__file__).parents[2] / "docs" / "diffusers" / "side.md"
    rows = [row for row in page.read_text().splitlines() if " + " in row and "%" in row]
    assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in flops_side.MODELS]
    if "z-image" in PIPES:
        assert flops_side.markdown([flops_side.count("Z-Image, 1024 px")]).splitlines()[-1] in rows
