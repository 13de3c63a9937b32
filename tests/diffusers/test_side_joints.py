"""What is particular to single families with a side stream: encodings, and what they refuse."""

import diffusers
import pytest
import torch
from joint_cases import random
from nasa_diffusers import NASA, enable_nasa, nasa
from nasa_diffusers.families import family_of
from side_pipes import PIPES, draw


def pipe_of(name):
    if name not in PIPES:
        pytest.skip("a newer diffusers has it")
    build, options = PIPES[name]
    return build(), options


def test_longcat_leaves_out_padding_and_reads_quotes_letter_by_letter():
    pipe, _ = pipe_of("longcat")
    family = family_of(pipe.transformer)
    prompts = ['a "bc" d', "dull"]
    whole, _ = family.encode(pipe, prompts)
    embeds, mask = family.encode_unpadded(pipe, prompts, False)
    # a letter is a token
    assert whole.shape[1] == 16 and mask.sum(1).tolist() == [8, 4]
    assert torch.equal(embeds[mask], torch.cat([whole[0, :8], whole[1, :4]]))


def test_ideogram_encodes_without_the_padding_of_its_pipeline():
    pipe, _ = pipe_of("ideogram4")
    embeds, mask = family_of(pipe.transformer).encode(
        pipe, ["blurry", "dull"], max_sequence_length=40
    )
    packed, *_, indicator = pipe.encode_prompt(["blurry", "dull"], 2, 3, 40, torch.device("cpu"))
    assert embeds.shape[1] == 6 and mask.sum(1).tolist() == [6, 4]
    torch.testing.assert_close(embeds[mask], packed[indicator == 3], rtol=1e-4, atol=1e-4)


def test_lumina_encodes_as_its_own_negative_prompt():
    pipe, _ = pipe_of("lumina2")
    embeds, mask = family_of(pipe.transformer).encode(pipe, ["dull"], max_sequence_length=16)
    *_, expected, own = pipe.encode_prompt("a", negative_prompt="dull", max_sequence_length=16)
    assert torch.equal(embeds, expected) and torch.equal(mask, own)


def test_chroma_weighs_the_padding_of_the_prompt():
    """Its words alone are another image."""
    pipe, options = pipe_of("chroma")
    with nasa(pipe, "blurry", NASA(0.5)) as handle:
        image = draw(pipe, options)
        handle.alpha = 1e-30
        torch.testing.assert_close(draw(pipe, options), draw_stock(), rtol=1e-3, atol=1e-4)
        handle.alpha = 0.5
        shorter = draw(pipe, options | {"max_sequence_length": 7})
    assert not torch.allclose(image, shorter, rtol=1e-2, atol=1e-3)


def draw_stock():
    build, options = PIPES["chroma"]
    return draw(build(), options)


@pytest.mark.parametrize(
    ("name", "negative", "message"),
    [
        ("fibo", random(1, 5, 64), "prompt_embeds, text_encoder_layers"),
        ("hidream", random(1, 5, 32), "two texts; give negative_prompt_embeds=.t5, llama3"),
        ("hidream", (random(1, 5, 32), random(2, 1, 4, 32)), "as many prompts and tokens"),
    ],
)
def test_embeddings_of_another_form_are_an_error(name, negative, message):
    pipe, _ = pipe_of(name)
    with pytest.raises(ValueError, match=message):
        enable_nasa(pipe, negative_prompt_embeds=negative)
    assert not pipe.transformer._forward_pre_hooks


def test_text_that_sees_the_image_is_refused():
    pipe, _ = pipe_of("qwen21")
    config = {k: x for k, x in pipe.transformer.config.items() if not k.startswith("_")}
    kind = diffusers.QwenImage21Transformer2DModel
    pipe.transformer = kind(**config | {"causal_condition": False})
    with pytest.raises(ValueError, match="causal_condition=False"):
        enable_nasa(pipe, "blurry")


def test_a_negative_prompt_longer_than_the_positions():
    pipe, options = pipe_of("lumina2")
    with (
        nasa(pipe, negative_prompt_embeds=random(1, 301, 32)),
        pytest.raises(ValueError, match="positions for 300; set max_sequence_length"),
    ):
        draw(pipe, options, steps=1)


def test_ideogram_with_a_time_for_each_token_is_refused():
    pipe, options = pipe_of("ideogram4")
    calls = []
    keep = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    draw(pipe, options, steps=1)
    keep.remove()
    call = calls[0]
    times = call["timestep"][:, None].expand(-1, call["hidden_states"].shape[1])
    with (
        torch.no_grad(),
        nasa(pipe, "blurry", cfg=False),
        pytest.raises(ValueError, match="a timestep for each token"),
    ):
        pipe.transformer(**call | {"timestep": times})
