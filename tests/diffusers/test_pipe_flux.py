"""What only FLUX.1 has: positions, two calls for guidance, ControlNet residuals, image to image."""

import diffusers
import joint_cases
import pytest
import torch
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from drawing import assert_same_image, relative_error
from joint_cases import SIZE, negative, random
from nasa_diffusers import enable_nasa, nasa
from nasa_diffusers.joint import image_first, positions, text_first


@pytest.fixture
def case():
    return joint_cases.flux()


def test_negative_tokens_stand_where_positive_ones_do():
    # positions told apart by their number
    ids = torch.arange(2.0)[:, None]
    for lengths, expected in [
        ([2, 1], [0, 1, 0]),
        ([2, 2], [0, 1, 0, 1]),
        ([2, 4], [0, 1, 0, 1, 1, 1]),
        ([2, 1, 3], [0, 1, 0, 0, 1, 1]),
    ]:
        assert positions(ids, lengths).flatten().tolist() == expected
    assert positions(ids[None], [2, 1]).flatten().tolist() == [0, 1, 0]


def test_the_order_of_positions_in_a_block():
    # rows of [positive text; negative text; image], told apart by their number
    rope = torch.arange(6.0)[:, None]
    assert image_first(rope, 4, 4).flatten().tolist() == [4, 5, 0, 1, 2, 3]
    # after the negative prompt has ended
    assert text_first(rope, 2, 4).flatten().tolist() == [0, 1, 4, 5]


@torch.no_grad()
def test_true_guidance_leaves_the_unconditional_call_alone(case, draw):
    """The outputs of one step, in the order of the calls: conditional, unconditional."""
    pipe, outputs = case.pipe, []
    pipe.transformer.register_forward_hook(lambda _, __, out: outputs.append(out[0]))
    draw(pipe, **SIZE, negative_prompt="red", true_cfg_scale=3.0)
    with nasa(pipe, "blurry", alpha=0.5, max_sequence_length=8):
        draw(pipe, **SIZE)
        draw(pipe, **SIZE, negative_prompt="red", true_cfg_scale=3.0)
    conditional, unconditional, alone, guided, left = outputs
    assert torch.equal(left, unconditional)
    assert torch.equal(guided, alone)
    assert relative_error(guided, conditional) > 1e-3


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


# ---- IP-Adapter ----------------------------------------------------------------------------------

IMAGE = torch.linspace(-1, 1, 16).view(1, 1, 16)


def load_ip_adapter(model, tokens=(4,), scales=(0.7,), width=32, dim=16):
    """What `pipe.load_ip_adapter` sets up, with random weights."""
    torch.manual_seed(3)
    projections = [
        ImageProjection(image_embed_dim=dim, cross_attention_dim=width, num_image_text_embeds=n)
        for n in tokens
    ]
    model.encoder_hid_proj = MultiIPAdapterImageProjection(projections)
    processors = {}
    for name, processor in model.attn_processors.items():
        if name.startswith("transformer_blocks"):
            processor = FluxIPAdapterAttnProcessor(width, width, tokens, list(scales))
        processors[name] = processor
    model.set_attn_processor(processors)
    model.requires_grad_(False)


@torch.no_grad()
@pytest.mark.parametrize("order", ["before", "after"])
def test_ip_adapter_alone_is_stock(case, order):
    """The op runs at alpha 0, so all there is beside stock attention are the image terms."""
    images = {"joint_attention_kwargs": {"ip_adapter_image_embeds": [IMAGE.expand(2, -1, -1)]}}
    oracle = joint_cases.flux()
    load_ip_adapter(oracle.model)
    stock = oracle(**images)
    if order == "before":
        load_ip_adapter(case.model)
    forced = torch.zeros((), requires_grad=True)
    with nasa(case.pipe, negative_prompt_embeds=negative(), alpha=forced) as handle:
        if order == "after":
            load_ip_adapter(case.model)
        for _ in range(2):
            assert_same_image(case(**images), stock)
        assert relative_error(stock, case.expected("nasa", [])) > 1e-3
        handle.alpha = 0.5
        assert relative_error(case(**images), stock) > 1e-3
        with pytest.raises(ValueError, match="the call brings no image for it"):
            case()
    assert torch.equal(case(**images), stock)


@torch.no_grad()
def test_ip_adapter_beside_a_negative_prompt(case):
    """One block: the image is what it is without the adapter, and what stock's processor adds."""
    images = {"joint_attention_kwargs": {"ip_adapter_image_embeds": [IMAGE.expand(2, -1, -1)] * 2}}
    load_ip_adapter(case.model, tokens=(4, 2), scales=(0.7, 0.4))
    block, seen = case.model.transformer_blocks[0], []
    options = {"negative_prompt_embeds": negative(), "alpha": 0.5}
    with nasa(case.pipe, **options):
        handle = block.register_forward_hook(lambda _, args, out: seen.append(out[1]))
        case(**images)
        for processor in case.model.attn_processors.values():
            if isinstance(processor, FluxIPAdapterAttnProcessor):
                processor.scale = [0.0, 0.0]
        case(**images)
        handle.remove()
    with_images, without = seen
    # the stock processor, of the block's own image tokens
    image = case.model.x_embedder(case.inputs["hidden_states"])
    times = case.inputs["timestep"] * 1000
    temb = case.model.time_text_embed(times, case.inputs["pooled_projections"])
    normed = block.norm1(image, emb=temb)[0]
    processor = block.attn.processor
    processor.scale = [0.7, 0.4]
    projected = case.model.encoder_hid_proj([IMAGE.expand(2, -1, -1)] * 2)
    stock_attn = joint_cases.flux().model.transformer_blocks[0].attn
    text = torch.zeros(2, 1, 32)
    *_, added = processor(stock_attn, normed, text, ip_hidden_states=projected)
    assert relative_error(with_images, without) > 1e-3
    assert_same_image(with_images - without, added)


@torch.no_grad()
def test_images_are_projected_once(case):
    """Across calls, until an image changes."""
    load_ip_adapter(case.model)
    calls = []
    linear = case.model.transformer_blocks[0].attn.processor.to_k_ip[0]
    linear.register_forward_hook(lambda *_: calls.append(1))
    with nasa(case.pipe, negative_prompt_embeds=negative(), alpha=0.5):
        drawn = []
        for image in (IMAGE, IMAGE.clone(), -IMAGE):
            image = image.expand(2, -1, -1)
            drawn.append(case(joint_attention_kwargs={"ip_adapter_image_embeds": [image]}))
    assert len(calls) == 2
    assert torch.equal(drawn[0], drawn[1]) and not torch.allclose(drawn[0], drawn[2])


# ---- what is refused -----------------------------------------------------------------------------


@torch.no_grad()
def test_a_map_needs_the_tokens_of_one_image(case):
    """Kontext puts the tokens of a reference image behind the others, as an image of its own."""
    enable_nasa(case.pipe, negative_prompt_embeds=negative(), alpha=torch.ones(4, 6))
    case()
    ids, sample = case.inputs["img_ids"], case.inputs["hidden_states"]
    twice = {
        "img_ids": torch.cat([ids, ids + torch.tensor([1.0, 0, 0])]),
        "hidden_states": torch.cat([sample, sample], dim=1),
    }
    for inputs in (twice, {"img_ids": ids.flip(0)}):
        with pytest.raises(ValueError, match="are not the 4 x 6 tokens of one image"):
            case(**inputs)


@torch.no_grad()
def test_a_map_of_another_shape_of_the_same_size(case):
    """4 x 6 tokens, then 6 x 4: the map is pooled anew."""
    region = torch.rand(12, 12, generator=torch.Generator().manual_seed(5))
    y, x = torch.meshgrid(torch.arange(6.0), torch.arange(4.0), indexing="ij")
    ids = torch.stack([torch.zeros(6, 4), y, x], -1).flatten(0, 1)
    with nasa(case.pipe, negative_prompt_embeds=negative(), alpha=region) as handle:
        case()
        ours = case(img_ids=ids)
        handle.alpha = region.clone()
        assert torch.equal(case(img_ids=ids), ours)
    tokens = torch.nn.functional.adaptive_avg_pool2d(region[None, None], (6, 4)).view(1, -1, 1, 1)
    assert_same_image(ours, case.expected("nasa-cross", [(negative(), tokens, None)], img_ids=ids))


@torch.no_grad()
def test_context_parallelism_is_refused(case):
    processor = case.model.transformer_blocks[0].attn.processor
    processor._parallel_config = object()
    with pytest.raises(RuntimeError, match="context parallelism is on"):
        enable_nasa(case.pipe, negative_prompt_embeds=negative())
