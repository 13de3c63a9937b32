"""What only FLUX.1 has: positions, two calls for guidance, ControlNet residuals, image to image."""

import diffusers
import joint_cases
import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from drawing import assert_same_image, relative_error
from joint_cases import SIZE, negative, random
from nasa_diffusers import enable_nasa, nasa
from nasa_diffusers.joint import image_first


@pytest.fixture
def case():
    return joint_cases.flux()


def test_negative_tokens_stand_where_positive_ones_do():
    # rows of [positive text; image], told apart by their number
    rope = torch.arange(5.0)[:, None]
    assert image_first(rope, [2, 1]).flatten().tolist() == [2, 3, 4, 0, 1, 0]
    assert image_first(rope, [2, 2]).flatten().tolist() == [2, 3, 4, 0, 1, 0, 1]
    assert image_first(rope, [2, 4]).flatten().tolist() == [2, 3, 4, 0, 1, 0, 1, 1, 1]
    assert image_first(rope, [2, 1, 3]).flatten().tolist() == [2, 3, 4, 0, 1, 0, 0, 1, 1]


@torch.no_grad()
def test_true_guidance_leaves_the_unconditional_call_alone(case, draw):
    """The outputs of one step, in the order of the calls: conditional, unconditional."""
    pipe, outputs = case.pipe, []
    pipe.transformer.register_forward_hook(lambda _, __, out: outputs.append(out[0]))
    draw(pipe, **SIZE, negative_prompt="red", true_cfg_scale=3.0)
    with nasa(pipe, "blurry", alpha=0.5, max_sequence_length=8):
        draw(pipe, **SIZE)
        draw(pipe, **SIZE, negative_prompt="red", true_cfg_scale=3.0)
    conditional, unconditional, alone, steered, left = outputs
    assert torch.equal(left, unconditional)
    assert torch.equal(steered, alone)
    assert relative_error(steered, conditional) > 1e-3


@torch.no_grad()
def test_controlnet_residuals_join_the_one_image_stream(case):
    residuals = [random(2, 24, 32, seed=i) for i in range(2)]
    with nasa(case.pipe, negative_prompt_embeds=negative(), alpha=0.5):
        ours = case(controlnet_block_samples=residuals)
        assert relative_error(ours, case()) > 1e-2
    expected = case.expected("nasa-cross", [(negative(), 0.5, None)], residuals=residuals)
    assert_same_image(ours, expected)


def test_image_to_image_shares_the_transformer(case):
    second = diffusers.FluxImg2ImgPipeline.from_pipe(case.pipe)
    second.set_progress_bar_config(disable=True)
    picture = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(3))

    def redraw():
        generator = torch.Generator().manual_seed(0)
        options = SIZE | {"image": picture, "strength": 0.5, "num_inference_steps": 2}
        return second("a cat", generator=generator, output_type="latent", **options).images

    stock = redraw()
    with nasa(second, "blurry", alpha=0.5, max_sequence_length=8):
        assert relative_error(redraw(), stock) > 1e-4
    assert torch.equal(redraw(), stock)


@torch.no_grad()
def test_fused_projections(case):
    with nasa(case.pipe, negative_prompt_embeds=negative(), alpha=0.5):
        expected = case()
        case.model.fuse_qkv_projections()
        assert_same_image(case(), expected)


@torch.no_grad()
def test_ip_adapter_is_refused(case):
    processors = {
        name: FluxIPAdapterAttnProcessor(32, 32)
        if name.startswith("transformer_blocks")
        else processor
        for name, processor in case.model.attn_processors.items()
    }
    with nasa(case.pipe, negative_prompt_embeds=negative()):
        case.model.set_attn_processor(processors)
        with pytest.raises(RuntimeError, match=r"pipe\.unload_ip_adapter\(\)"):
            case(joint_attention_kwargs={"ip_hidden_states": [random(2, 4, 32)]})


@torch.no_grad()
def test_a_map_over_the_image_is_refused(case):
    enable_nasa(case.pipe, negative_prompt_embeds=negative(), alpha=torch.ones(4, 6))
    with pytest.raises(ValueError, match="not told the height and width of its image"):
        case()


@torch.no_grad()
def test_context_parallelism_is_refused(case):
    processor = case.model.transformer_blocks[0].attn.processor
    processor._parallel_config = object()
    with pytest.raises(RuntimeError, match="context parallelism is on"):
        enable_nasa(case.pipe, negative_prompt_embeds=negative())
