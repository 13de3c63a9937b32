"""Text is projected once for as long as that is right, and no longer."""

import pytest
import torch
from counting import Projections
from drawing import assert_same_image, negative_embeds
from nasa_diffusers import enable_nasa, nasa, testing
from oracle import algorithm_1


@pytest.fixture
def count(sd):
    return Projections(sd.unet)


LAYERS = 7


def test_one_projection_per_layer_then_none(sd, draw, count):
    """Across steps, images and calls; both prompts go through it together."""
    with nasa(sd, "blurry", alpha=0.5) as handle:
        draw(sd, steps=4)
        assert count.take() == LAYERS
        assert count.tokens == 2 * 77
        draw(sd, steps=2)
        draw(sd, seed=5)
        handle.alpha = 0.1
        draw(sd)
        assert count.take() == 0


def test_images_of_one_prompt_are_projected_as_one(sd, draw, count):
    with nasa(sd, "blurry", alpha=0.5):
        draw(sd, num_images_per_prompt=3)
        assert count.tokens == 2 * 77
        draw(sd, ["a cat", "a dog"])
        assert count.tokens == 3 * 77


def test_what_a_call_computes_does_not_depend_on_earlier_calls(sd, draw):
    with nasa(sd, "blurry", alpha=0.5) as handle:
        alone = draw(sd)
        handle.clear_cache()
        draw(sd, "a dog")
        handle.set_negative_prompt("red")
        draw(sd)
        handle.set_negative_prompt("blurry")
        assert torch.equal(draw(sd), alone)


def test_prompts_are_recognised_by_their_values(sd, draw, count):
    with nasa(sd, "blurry", alpha=0.5):
        a_cat = draw(sd)
        draw(sd, "a dog")
        assert count.take() == 2 * LAYERS
        assert torch.equal(draw(sd), a_cat)
        assert count.take() == 0


def test_prompt_written_in_place(sd, draw, count):
    """The same tensor object with other values is another prompt."""
    text = negative_embeds(sd, "a cat")
    other = negative_embeds(sd, "a dog")
    sample = torch.randn(1, 4, 16, 16)
    with torch.no_grad(), nasa(sd, "blurry", alpha=0.5) as handle:
        sd.unet(sample, 500, text)
        text.copy_(other)
        written = sd.unet(sample, 500, text).sample
        handle.clear_cache()
        assert torch.equal(sd.unet(sample, 500, other).sample, written)


def test_prompt_written_in_place_in_inference_mode(sd):
    with torch.inference_mode(), nasa(sd, "blurry", alpha=0.5) as handle:
        text, other = negative_embeds(sd, "a cat").clone(), negative_embeds(sd, "a dog").clone()
        sample = torch.randn(1, 4, 16, 16)
        sd.unet(sample, 500, text)
        text.copy_(other)
        written = sd.unet(sample, 500, text).sample
        handle.clear_cache()
        assert torch.equal(sd.unet(sample, 500, other).sample, written)


def attn(pipe):
    return pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2


def test_weights_made_in_inference_mode_are_not_cached(sd, draw, count):
    """PyTorch counts no writes to them, so nothing they make is kept."""
    with torch.inference_mode():
        weight = torch.nn.Parameter(attn(sd).to_k.weight.clone(), requires_grad=False)
    attn(sd).to_k.weight = weight
    with nasa(sd, "blurry", alpha=0.5):
        before = draw(sd)
        count.take()
        with torch.inference_mode():
            weight.mul_(2)
        assert not torch.allclose(draw(sd), before)
        assert count.take() == 1


def test_gradients_go_around_the_cache(sd, draw, count):
    sample, text = torch.randn(1, 4, 16, 16), negative_embeds(sd, "a cat")
    with nasa(sd, "blurry", alpha=0.5):
        for _ in range(2):
            sd.unet(sample, 500, text)
            assert count.take() == LAYERS


@pytest.mark.parametrize("limit", [0, 200_000])
def test_a_limit_holds_and_changes_no_image(sd, draw, limit):
    with nasa(sd, "blurry", alpha=0.5) as handle:
        expected = draw(sd, steps=2)
        used = handle.report().cache_bytes
        handle.clear_cache()
        assert handle.report().cache_bytes == 0
        handle.cache_limit = limit
        for _ in range(2):
            assert torch.equal(draw(sd, steps=2), expected)
        # two texts are held besides what was made of them
        assert handle.report().cache_bytes <= max(limit, 2 * 77 * 32 * 4)
        assert handle.report().cache_bytes < used


def test_the_least_recent_prompts_leave_first(sd, draw, count):
    with nasa(sd, "blurry", alpha=0.5) as handle:
        for prompt in "abcdefgh":
            draw(sd, prompt)
        held = handle.report().cache_bytes
        draw(sd, "i")
        assert handle.report().cache_bytes == held
        count.take()
        draw(sd, "h")
        assert count.take() == 0
        draw(sd, "a")
        assert count.take() == LAYERS


def test_reported_bytes_are_those_of_the_tensors(sd, draw):
    handle = enable_nasa(sd, "blurry", alpha=0.5)
    draw(sd)
    # K and V of 77 + 77 tokens, fp32, over the widths of the layers, and the two texts
    widths = [hook[0].inner_dim for hook in handle._guidances[0].layers.values()]
    expected = 2 * 77 * 4 * (2 * sum(widths) + 32)
    # the values by which to_k and to_v are recognised: of small ones all
    expected += 2 * 4 * 32 * sum(widths)
    assert handle.report().cache_bytes == expected
    handle.disable()
    assert handle.report().cache_bytes == 0


def test_projected_text_is_kept_too(draw):
    """PixArt and Sana project the text before the blocks; that, too, once."""
    for pipe in (testing.pixart(), testing.sana()):
        calls = []
        linear = pipe.transformer.caption_projection.linear_1
        linear.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with nasa(pipe, "blurry", alpha=0.5):
            kept = draw(pipe)
            assert len(calls) == 2
            calls.clear()
            assert torch.equal(draw(pipe), kept)
            assert not calls
            with torch.no_grad():
                linear.weight.mul_(2)
            assert not torch.allclose(draw(pipe), kept)
            assert len(calls) == 2


def test_algorithm_1_with_two_negatives_from_the_cache(sd, draw):
    terms = [(negative_embeds(sd, "blurry"), None, 0.3), (negative_embeds(sd, "red"), None, 0.8)]
    with algorithm_1(sd.unet, terms):
        eager = draw(sd, steps=2)
    with nasa(sd, [("blurry", 0.3), ("red", 0.8)]):
        draw(sd, steps=2)
        assert_same_image(draw(sd, steps=2), eager)
