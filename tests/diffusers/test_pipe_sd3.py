"""What only SD3 has: a doubled batch under guidance, skipped layers, its own kinds of attention."""

import joint_cases
import pytest
import torch
from drawing import assert_same_image, relative_error
from joint_cases import RULES, SIZE, by_rule, negative, random
from nasa_diffusers import NASA, VSF, nasa


@pytest.fixture(params=[False, True], ids=["sd3", "sd3.5-medium"])
def case(request):
    return joint_cases.sd3(medium=request.param)


@pytest.mark.parametrize("rule", RULES)
def test_guidance_leaves_the_unconditional_half_alone(case, draw, rule):
    pipe, outputs = case.pipe, []
    pipe.transformer.register_forward_hook(lambda _, __, out: outputs.append(out[0]))
    draw(pipe, guidance=5.0, **SIZE)
    with nasa(pipe, "blurry", by_rule(rule, 0.5), max_sequence_length=8):
        draw(pipe, **SIZE)
        draw(pipe, guidance=5.0, **SIZE)
    stock, alone, guided = outputs
    assert_same_image(guided[:1], stock[:1])
    assert_same_image(guided[1:], alone)
    assert relative_error(alone, stock[1:]) > 1e-4


@torch.no_grad()
def test_fused_projections():
    """Stock leaves out the norms of SD3.5 when it fuses, so there it is refused."""
    plain, medium = joint_cases.sd3(), joint_cases.sd3(medium=True)
    with nasa(plain.pipe, negative_prompt_embeds=negative(), alpha=0.5, cfg=False):
        expected = plain()
        plain.model.fuse_qkv_projections()
        assert_same_image(plain(), expected)
        plain.model.unfuse_qkv_projections()
        assert_same_image(plain(), expected)
    with nasa(medium.pipe, negative_prompt_embeds=negative(), alpha=0.5, cfg=False):
        medium.model.fuse_qkv_projections()
        with pytest.raises(RuntimeError, match="leaves out the norms"):
            medium()


@torch.no_grad()
def test_skipped_layers_are_refused(case):
    with (
        nasa(case.pipe, negative_prompt_embeds=negative(), alpha=0.5, cfg=False),
        pytest.raises(RuntimeError, match="leave out skip_guidance_layers"),
    ):
        case(skip_layers=[1])


@torch.no_grad()
def test_controlnet_residuals_join_the_one_image_stream(case):
    """They are added after a block, to the image, however many texts there are."""
    residuals = [random(2, 24, 32, seed=i) for i in range(2)]
    stock = case(block_controlnet_hidden_states=residuals)
    forced = torch.zeros((), requires_grad=True)
    with nasa(case.pipe, negative_prompt_embeds=negative(), alpha=forced, cfg=False) as handle:
        assert_same_image(case(block_controlnet_hidden_states=residuals), stock)
        handle.alpha = 0.5
        ours = case(block_controlnet_hidden_states=residuals)
    assert relative_error(ours, stock) > 1e-3


@torch.no_grad()
def test_the_text_encoders_are_all_three(case):
    """A change of any is seen: the negative prompt is encoded again."""
    from nasa_diffusers.negative import text_encoders

    assert text_encoders(case.pipe) == [
        case.pipe.text_encoder,
        case.pipe.text_encoder_2,
        case.pipe.text_encoder_3,
    ]


def test_without_a_t5_the_prompt_may_have_none_of_its_tokens(draw):
    pipe = joint_cases.sd3().pipe
    with pytest.raises(ValueError, match="number of tokens, from 1, got 0"):
        nasa(pipe, "blurry", max_sequence_length=0).__enter__()
    pipe.text_encoder_3 = pipe.tokenizer_3 = None
    size = SIZE | {"max_sequence_length": 0}
    options = {"device": "cpu", "do_classifier_free_guidance": False, "max_sequence_length": 0}
    # diffusers 0.35 puts 77 zeros where T5's tokens would be, whatever length is asked for
    expected = pipe.encode_prompt("blurry", None, None, **options)[0].shape[1]
    for method in (NASA(0.5), VSF(0.5)):
        stock = draw(pipe, **size)
        with nasa(pipe, "blurry", method, max_sequence_length=0) as handle:
            assert not torch.allclose(draw(pipe, **size), stock)
            assert handle.report().keys_neg == expected
    with pytest.raises(ValueError, match="number of tokens, from 0, got -1"):
        nasa(pipe, "blurry", max_sequence_length=-1).__enter__()
