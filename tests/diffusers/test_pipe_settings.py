"""Every form of negative prompt, alpha, step window and layer choice, and every wrong one."""

import pytest
import torch
from drawing import assert_same_image, negative_embeds
from nasa_diffusers import disable_nasa, enable_nasa, nasa, testing
from oracle import algorithm_1
from PIL import Image

# ---- negative prompts ----------------------------------------------------------------------------


def test_several_negatives_are_a_sum(pipe, draw):
    """Each one under its own softmax, with its own alpha."""
    terms = [
        (negative_embeds(pipe, "blurry"), None, 0.3),
        (negative_embeds(pipe, "red"), None, 0.8),
    ]
    with algorithm_1(pipe.unet, terms):
        eager = draw(pipe)
    with nasa(pipe, [("blurry", 0.3), ("red", 0.8)]) as handle:
        assert_same_image(draw(pipe), eager)
        assert handle.report().keys_neg == 2 * 77


def test_several_negatives_under_guidance(pipe, draw):
    rows = torch.tensor([0.0, 1.0]).view(-1, 1, 1, 1)
    texts = [(negative_embeds(pipe, "blurry"), 0.3), (negative_embeds(pipe, "red"), 0.8)]
    with algorithm_1(pipe.unet, [(text, None, alpha * rows) for text, alpha in texts]):
        eager = draw(pipe, guidance=5.0)
    with nasa(pipe, [("blurry", 0.3), ("red", 0.8)]):
        assert_same_image(draw(pipe, guidance=5.0), eager)


def test_alpha_is_a_factor_on_several_negatives(pipe, draw):
    with nasa(pipe, [("blurry", 0.3), ("red", 0.8)], alpha=0.5) as handle:
        half = draw(pipe)
        handle.alpha = 1.0
        handle.set_negative_prompt([("blurry", 0.15), ("red", 0.4)])
        assert_same_image(draw(pipe), half)


@pytest.mark.parametrize("guidance", [0.0, 5.0], ids=["no-cfg", "cfg"])
@pytest.mark.parametrize("images", [1, 3])
def test_one_negative_per_prompt(pipe, draw, images, guidance):
    """Rows are prompt-major: all images of the first prompt come first."""
    prompts, negatives = ["a cat", "a dog"], ["blurry", "red"]
    call = {"guidance": guidance, "num_images_per_prompt": images}
    with nasa(pipe, negatives, alpha=0.5):
        both = draw(pipe, prompts, **call)
    for i in range(2):
        with nasa(pipe, negatives[i], alpha=0.5):
            alone = draw(pipe, prompts[i], seed=i * images, **call)
        assert_same_image(both[i * images : (i + 1) * images], alone)


def test_embeddings_instead_of_a_prompt(pipe, draw):
    with nasa(pipe, "blurry", alpha=0.5):
        prompted = draw(pipe)
    with nasa(pipe, negative_prompt_embeds=negative_embeds(pipe), alpha=0.5):
        assert torch.equal(draw(pipe), prompted)


@pytest.mark.parametrize("tokens", [1, 5, 200])
def test_embeddings_of_any_length(pipe, draw, tokens):
    channels = pipe.unet.config.cross_attention_dim
    text = torch.randn(1, tokens, channels, generator=torch.Generator().manual_seed(1))
    with algorithm_1(pipe.unet, [(text, None, 0.5)]):
        eager = draw(pipe)
    with nasa(pipe, negative_prompt_embeds=text, alpha=0.5):
        assert_same_image(draw(pipe), eager)


def test_masked_tokens_are_absent(pipe, draw):
    """Whatever they hold; in the middle, and as padding, which is not even projected."""
    channels = pipe.unet.config.cross_attention_dim
    text = torch.randn(1, 6, channels, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1, 0, 1, 1, 0, 0]])
    with nasa(pipe, negative_prompt_embeds=text[:, [0, 2, 3]], alpha=0.5):
        short = draw(pipe)
    options = {"negative_prompt_embeds": text, "negative_prompt_attention_mask": mask}
    with nasa(pipe, **options, alpha=0.5) as handle:
        assert_same_image(draw(pipe), short)
        assert handle.report().keys_neg == 4


def test_set_negative_prompt_between_calls(pipe, draw):
    with nasa(pipe, "red", alpha=0.5):
        red = draw(pipe)
    with nasa(pipe, "blurry", alpha=0.5) as handle:
        blurry = draw(pipe)
        handle.set_negative_prompt("red")
        assert torch.equal(draw(pipe), red)
        handle.set_negative_prompt(negative_prompt_embeds=negative_embeds(pipe, "blurry"))
        assert torch.equal(draw(pipe), blurry)


def test_default_alpha_follows_the_kind_of_prompt(sd):
    handle = enable_nasa(sd, "blurry")
    assert handle.alpha == 0.1
    handle.set_negative_prompt([("blurry", 0.3)])
    assert handle.alpha == 1.0
    handle.alpha = 0.4
    handle.set_negative_prompt("red")
    assert handle.alpha == 0.4


def test_default_alphas_of_the_families():
    assert enable_nasa(testing.stable_diffusion_xl(), "blurry").alpha == 0.2
    sd2 = testing.stable_diffusion()
    sd2.unet.register_to_config(cross_attention_dim=1024)
    assert enable_nasa(sd2, "blurry").alpha == 0.2


# ---- alpha ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [0.0, 5.0], ids=["no-cfg", "cfg"])
def test_one_alpha_per_image(pipe, draw, guidance):
    prompts = ["a cat", "a dog"]
    for alphas in ([0.2, 0.7], torch.tensor([0.2, 0.7])):
        with nasa(pipe, "blurry", alpha=alphas) as handle:
            both = draw(pipe, prompts, guidance=guidance)
            for i, alpha in enumerate([0.2, 0.7]):
                handle.alpha = alpha
                assert_same_image(
                    both[i : i + 1], draw(pipe, prompts[i], seed=i, guidance=guidance)
                )


def layer_map(region):
    """The map as the layers of the small UNets see it, 16x16 and 8x8 tokens."""

    def alpha(queries):
        size = int(queries**0.5)
        return torch.nn.functional.adaptive_avg_pool2d(region[None, None], size).view(1, 1, -1, 1)

    return alpha


@pytest.mark.parametrize("size", [(16, 16), (8, 8), (40, 24)], ids=str)
def test_a_map_over_the_image(pipe, draw, size):
    region = torch.rand(size, generator=torch.Generator().manual_seed(1))
    with algorithm_1(pipe.unet, [(negative_embeds(pipe), None, layer_map(region))]):
        eager = draw(pipe)
    with nasa(pipe, "blurry", alpha=region):
        assert_same_image(draw(pipe), eager)


def test_a_mask_is_white_where_the_default_holds(sd, draw):
    mask = Image.new("L", (32, 32))
    mask.paste(255, (16, 0, 32, 32))
    region = torch.zeros(32, 32)
    region[:, 16:] = 0.1
    with nasa(sd, "blurry", alpha=mask) as handle:
        masked = draw(sd)
        handle.alpha = region
        assert torch.equal(draw(sd), masked)


def test_a_map_on_an_odd_size(sd):
    """Levels of the UNet round up; every layer still finds its grid."""
    sample, text = torch.randn(1, 4, 9, 13), negative_embeds(sd, "a cat")
    with torch.no_grad(), nasa(sd, "blurry", alpha=0.5) as handle:
        whole = sd.unet(sample, 500, text).sample
        handle.alpha = torch.full((10, 10), 0.5)
        assert_same_image(sd.unet(sample, 500, text).sample, whole)


def test_settings_are_values_not_references(sd, draw):
    """Writing into a tensor after it was handed over changes nothing."""
    region, embeds = torch.full((16, 16), 0.5), negative_embeds(sd).clone()
    with nasa(sd, negative_prompt_embeds=embeds, alpha=region):
        before = draw(sd)
        region.zero_()
        embeds.zero_()
        assert torch.equal(draw(sd), before)
        assert torch.equal(draw(sd, "a cat", height=32, width=32), before)


# ---- steps ---------------------------------------------------------------------------------------


def guided_steps(pipe, draw, steps, **window):
    """Which of the denoiser's calls were guided, seen from inside a layer."""
    seen = []
    handle = enable_nasa(pipe, "blurry", **window)
    hook = next(iter(handle._guidances[0].guided_layers.values()))
    pipe.unet.register_forward_hook(lambda *_: seen.append(hook.last_call is not None))
    pipe.unet.register_forward_hook(lambda *_: setattr(hook, "last_call", None))
    draw(pipe, steps=steps)
    handle.disable()
    return [i for i, was_guided in enumerate(seen) if was_guided]


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ({}, [0, 1, 2, 3]),
        ({"start": 0, "stop": 1}, [0]),
        ({"start": 1}, [1, 2, 3]),
        ({"start": 1, "stop": 3}, [1, 2]),
        ({"stop": 100}, [0, 1, 2, 3]),
        ({"start": 0.5}, [2, 3]),
        ({"stop": 0.25}, [0]),
        ({"start": 0.25, "stop": 0.75}, [1, 2]),
        ({"start": 0.0, "stop": 1.0}, [0, 1, 2, 3]),
        ({"start": 3, "stop": 1.0}, [3]),
    ],
    ids=str,
)
def test_window_of_steps(sd, draw, window, expected):
    assert guided_steps(sd, draw, 4, **window) == expected


@pytest.mark.parametrize("window", [{"stop": 1}, {"stop": 0.1}, {"start": 0.0}], ids=str)
def test_a_one_step_model_has_step_0(sd, draw, window):
    assert guided_steps(sd, draw, 1, **window) == [0]


def test_second_order_schedulers_visit_a_step_twice(sd, draw):
    from diffusers import HeunDiscreteScheduler

    sd.scheduler = HeunDiscreteScheduler()
    # 3 steps are 5 calls, two for each step but the last
    assert guided_steps(sd, draw, 3, start=1, stop=2) == [2, 3]


def test_steps_outside_the_window_are_stock(sd, draw):
    sd.unet.register_forward_hook(lambda _, __, out: outputs.append(out[0]))
    outputs = []
    draw(sd, steps=2)
    stock, outputs = outputs, []
    with nasa(sd, "blurry", start=1):
        draw(sd, steps=2)
    assert torch.equal(outputs[0], stock[0])
    assert not torch.allclose(outputs[1], stock[1])


# ---- layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("patterns", ["up_blocks.*", ["mid_block.*", "down_blocks.1.*"]], ids=str)
def test_layers_by_pattern(pipe, draw, patterns):
    prefixes = [p[:-1] for p in ([patterns] if isinstance(patterns, str) else patterns)]
    chosen = lambda name: name.startswith(tuple(prefixes))  # noqa: E731
    with algorithm_1(pipe.unet, [(negative_embeds(pipe), None, 0.5)], chosen):
        eager = draw(pipe)
    with nasa(pipe, "blurry", alpha=0.5, layers=patterns) as handle:
        assert_same_image(draw(pipe), eager)
        report = handle.report()
        assert 0 < report.layers_guided < report.layers


# ---- what is refused -----------------------------------------------------------------------------

TEXT = torch.zeros(1, 4, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either negative_prompt or negative_prompt_embeds, got none"),
        ({"negative_prompt": "a", "negative_prompt_embeds": TEXT}, "got both"),
        ({"negative_prompt": ""}, "the negative prompt is empty"),
        ({"negative_prompt": ["a", " "]}, "the negative prompt is empty"),
        ({"negative_prompt": []}, "a string, a list of strings"),
        ({"negative_prompt": [("a", 0.5), "b"]}, "a string, a list of strings"),
        ({"negative_prompt": 3}, "a string, a list of strings"),
        ({"negative_prompt": [("a", 0)]}, "a finite number other than 0"),
        ({"negative_prompt": [("a", "b")]}, "a finite number other than 0"),
        ({"negative_prompt": "a", "max_sequence_length": 9}, "fixed by the text encoder"),
        ({"negative_prompt_embeds": TEXT, "max_sequence_length": 9}, "embeddings have a length"),
        ({"negative_prompt_embeds": TEXT[0]}, "n >= 1, c], got"),
        ({"negative_prompt_embeds": TEXT[:, :0]}, "n >= 1, c], got"),
        (
            {"negative_prompt": "a", "negative_prompt_attention_mask": TEXT[..., 0]},
            "goes with negative_prompt_embeds",
        ),
        (
            {"negative_prompt_embeds": TEXT, "negative_prompt_attention_mask": TEXT[:, :2, 0]},
            "to match negative_prompt_embeds, got",
        ),
        (
            {"negative_prompt_embeds": TEXT, "negative_prompt_attention_mask": TEXT[..., 0]},
            "without any token",
        ),
        ({"negative_prompt": "a", "alpha": "much"}, "alpha must be a finite number"),
        ({"negative_prompt": "a", "alpha": True}, "alpha must be a finite number"),
        ({"negative_prompt": "a", "alpha": float("nan")}, "alpha must be a finite number"),
        ({"negative_prompt": "a", "alpha": torch.ones(1, 2, 2)}, "a map over the image"),
        ({"negative_prompt": "a", "alpha": torch.tensor([])}, "a map over the image"),
        ({"negative_prompt": "a", "start": -1}, "start must be a step"),
        ({"negative_prompt": "a", "stop": 1.5}, "stop must be a step"),
        ({"negative_prompt": "a", "start": True}, "start must be a step"),
        ({"negative_prompt": "a", "layers": "attn2"}, "matches none of the 7 layers"),
        ({"negative_prompt": "a", "layers": ["up_blocks.*", "x"]}, "layers='x' matches none"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments(sd, draw, arguments, message):
    stock = draw(sd)
    with pytest.raises(ValueError, match="^(enable_nasa|NASA): ") as error:
        enable_nasa(sd, **arguments)
    assert message in str(error.value)
    # nothing was left behind
    assert torch.equal(draw(sd), stock)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"negative_prompt": ["a", "b", "c"]}, "one negative prompt per image, 3 in all"),
        ({"negative_prompt": "a", "alpha": [0.1, 0.2, 0.3]}, "one alpha per image, 3 in all"),
        ({"negative_prompt_embeds": torch.zeros(1, 4, 48)}, "48 channels, the prompt has 32"),
        ({"negative_prompt": "a", "start": 5}, "leave none of the 1 steps guided"),
        ({"negative_prompt": "a", "backend": "none"}, "backend must be None or one of"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_for_this_call(sd, draw, arguments, message):
    enable_nasa(sd, **arguments)
    with pytest.raises(ValueError, match=message):
        draw(sd, ["a cat", "a dog"])


def test_enabling_twice(sd):
    enable_nasa(sd, "blurry")
    with pytest.raises(RuntimeError, match="NASA is on already"):
        enable_nasa(sd, "red")
    disable_nasa(sd)
    enable_nasa(sd, "red")


def test_a_handle_that_is_off(sd):
    handle = enable_nasa(sd, "blurry")
    handle.disable()
    assert not handle.is_enabled
    with pytest.raises(RuntimeError, match="NASA is off already"):
        handle.disable()
    # a new handle does not bring the old one back
    enable_nasa(sd, "blurry")
    assert not handle.is_enabled


def test_without_text_encoder(sd):
    sd.text_encoder = None
    with pytest.raises(ValueError, match="pass negative_prompt_embeds"):
        enable_nasa(sd, "blurry")


def test_a_denoiser_of_no_family(sd):
    sd.unet = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="no family knows the denoiser Linear"):
        enable_nasa(sd, "blurry")


def test_a_unet_that_mixes_its_text(sd):
    sd.unet.register_to_config(addition_embed_type="text")
    with pytest.raises(ValueError, match="mixes its text tokens before the blocks"):
        enable_nasa(sd, "blurry")


def test_a_unet_whose_self_attention_reads_text(sd):
    block = sd.unet.mid_block.attentions[0].transformer_blocks[0]
    block.attn1.is_cross_attention = True
    with pytest.raises(ValueError, match="attn1' of this UNet attends to the text as well"):
        enable_nasa(sd, "blurry")


def test_a_layer_that_does_more(sd):
    sd.unet.mid_block.attentions[0].transformer_blocks[0].attn2.rescale_output_factor = 2.0
    with pytest.raises(ValueError, match="uses rescale_output_factor"):
        enable_nasa(sd, "blurry")
    enable_nasa(sd, "blurry", layers="up_blocks.*")
