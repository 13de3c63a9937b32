"""What is particular to Hunyuan's pipelines and to those with a text like theirs."""

import diffusers
import hunyuan_pipes
import pytest
import torch
from changes import offload_blocks, offload_leaves, offload_sequentially
from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video as text_to_video
from drawing import relative_error
from nasa_diffusers import NASA, VSF, enable_nasa, nasa
from nasa_diffusers import testing_hunyuan as small
from side_pipes import PIPES, draw

HAS_GLYPHS = hasattr(diffusers, "HunyuanImagePipeline")
needs_glyphs = pytest.mark.skipif(not HAS_GLYPHS, reason="a newer diffusers has it")


def test_image_to_video_encodes_a_negative_prompt_as_text_to_video(monkeypatch):
    """Its own encoding asks for an image, whose tokens it puts into the prompt."""
    monkeypatch.setattr(text_to_video, "DEFAULT_PROMPT_TEMPLATE", small.TEMPLATE)
    parts = small.hunyuan_video_parts(image_condition_type="token_replace")
    pipe = hunyuan_pipes.of_parts(
        diffusers.HunyuanVideoImageToVideoPipeline, parts | {"image_processor": None}
    )
    plain = hunyuan_pipes.of_parts(diffusers.HunyuanVideoPipeline, parts)
    embeds, _, mask = plain.encode_prompt("so dull", prompt_template=small.TEMPLATE)
    with nasa(pipe, "so dull") as handle:
        (term,) = handle._settings.negative.terms
        assert torch.equal(term.embeds, embeds[:, : int(mask.sum())]) and term.mask is None
        assert handle.report().dropped == (0,)
        handle.set_negative_prompt("dull", max_sequence_length=4)
        (term,) = handle._settings.negative.terms
        assert term.embeds.shape[1] == 4


def test_frames_that_are_given_are_not_guided():
    """The first attention: of the first frame nothing changes, of the others all; VSF cannot."""
    build, options, _ = hunyuan_pipes.RUN["HunyuanVideoImageToVideoPipeline"]
    torch.manual_seed(0)
    pipe = build("HunyuanVideoImageToVideoPipeline")
    call = options | {"true_cfg_scale": 1.0, "num_inference_steps": 1, "output_type": "latent"}
    seen = []
    layer = pipe.transformer.transformer_blocks[0].attn.to_out[0]
    keep = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    pipe(**call, generator=torch.Generator().manual_seed(0))
    negative = hunyuan_pipes.noise(5, 32)
    with nasa(pipe, negative_prompt_embeds=negative, alpha=0.5) as handle:
        pipe(**call, generator=torch.Generator().manual_seed(0))
        handle.method = VSF(0.5)
        with pytest.raises(ValueError, match="reference images .* cannot be left out"):
            pipe(**call)
    keep.remove()
    before, after = seen[:2]
    assert relative_error(after[:, 6:], before[:, 6:]) > 1e-3
    assert relative_error(after[:, :6], before[:, :6]) < 1e-6


@needs_glyphs
def test_a_quoted_text_acts():
    """As ByT5's tokens, in a negative prompt that is otherwise the same."""
    pipe = small.hunyuan_image()
    options = {"height": 16, "width": 24}
    embeds, mask, glyphs, own = pipe.encode_prompt('a "b"')
    assert own.any() and not pipe.encode_prompt("a b")[3].any()
    images = []
    for masks in ((mask, own), (mask, torch.zeros_like(own))):
        given = {"negative_prompt_embeds": (embeds, glyphs)}
        with nasa(pipe, **given, negative_prompt_attention_mask=masks):
            images.append(draw(pipe, options))
    with nasa(pipe, 'a "b"'):
        images.append(draw(pipe, options))
    assert relative_error(images[0], images[1]) > 1e-4
    assert torch.equal(images[0], images[2])


@needs_glyphs
def test_what_two_texts_must_be():
    pipe = small.hunyuan_video15()
    embeds, mask, glyphs, own = pipe.encode_prompt("a cat")
    with pytest.raises(ValueError, match="HunyuanVideo 1.5 has two texts.*got one"):
        enable_nasa(pipe, negative_prompt_embeds=embeds)
    with pytest.raises(ValueError, match="two texts.*both masks"):
        enable_nasa(
            pipe, negative_prompt_embeds=(embeds, glyphs), negative_prompt_attention_mask=mask
        )
    none = torch.zeros_like(mask), own
    with pytest.raises(ValueError, match="the first text of a negative prompt without any token"):
        enable_nasa(
            pipe, negative_prompt_embeds=(embeds, glyphs), negative_prompt_attention_mask=none
        )
    pipe.tokenizer_2 = None
    with pytest.raises(ValueError, match="tokenizer_2 of this HunyuanVideo15Pipeline is not load"):
        enable_nasa(pipe, "blurry")
    assert not pipe.transformer._forward_pre_hooks
    # the refiner of HunyuanImage has one
    refiner = small.hunyuan_image_refiner()
    enable_nasa(refiner, negative_prompt_embeds=embeds).disable()
    image = small.hunyuan_image()
    one = nasa(image, negative_prompt_embeds=embeds)
    with one, pytest.raises(ValueError, match="32 channels, the prompt has 48"):
        draw(image, {"height": 16, "width": 24})


def test_what_hunyuan_dit_cannot_take():
    pipe = small.hunyuan_dit()
    with pytest.raises(ValueError, match="max_sequence_length is fixed by the text encoders"):
        enable_nasa(pipe, "blurry", max_sequence_length=16)
    texts = torch.randn(1, 78, 32), torch.randn(1, 9, 16)
    with pytest.raises(ValueError, match="77 tokens of BERT.*has 78"):
        enable_nasa(pipe, negative_prompt_embeds=texts)
    long = torch.randn(1, 9, 32), torch.randn(1, 300, 16)
    with nasa(pipe, negative_prompt_embeds=long), pytest.raises(ValueError, match="256 of mT5"):
        draw(pipe, PIPES["hunyuan-dit"][1])


def test_easyanimate_with_a_second_text():
    pipe = small.easyanimate()
    text = torch.randn(1, 5, 32)
    call = {
        "hidden_states": torch.randn(1, 4, 2, 4, 6), "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": text, "encoder_hidden_states_t5": text,
    }  # fmt: skip
    with nasa(pipe, "blurry", cfg=False), pytest.raises(ValueError, match="a second text that"):
        pipe.transformer(**call)


@pytest.mark.parametrize("name", ["hunyuan-video", "hunyuan-dit"])
def test_a_pipeline_made_from_a_guided_one_is_guided(name):
    build, options = PIPES[name]
    pipe = build()
    with nasa(pipe, "blurry", NASA(0.5)):
        expected = draw(pipe, options)
        other = type(pipe).from_pipe(pipe)
        other.set_progress_bar_config(disable=True)
        assert relative_error(draw(other, options), expected) < 2e-5


@pytest.mark.parametrize("change", [offload_sequentially, offload_leaves, offload_blocks])
def test_weights_that_hooks_bring(change):
    """Those of the refiner as well, through which the negative prompt goes in the first block.
    HunyuanDiT cannot be offloaded in parts, with or without NASA."""
    build, options = PIPES["hunyuan-video"]
    pipe = build()
    with nasa(pipe, "blurry", NASA(0.5)):
        expected = draw(pipe, options)
    change(pipe.transformer)
    with nasa(pipe, "blurry", NASA(0.5)):
        assert relative_error(draw(pipe, options), expected) < 2e-5


def test_lumina_next_puts_the_prompt_first():
    """Where the pipeline's own negative prompt is the same text, the order of its batch says it."""
    pipe, options = small.lumina(), PIPES["lumina"][1]
    rows = []
    keep = pipe.transformer.register_forward_hook(lambda _, __, output: rows.extend(output[0]))
    call = options | {"guidance_scale": 3.0, "negative_prompt": "a cat"}
    draw(pipe, call, steps=1)
    with nasa(pipe, "blurry", NASA(0.5)):
        draw(pipe, call, steps=1)
    keep.remove()
    assert relative_error(rows[2], rows[0]) > 1e-4
    assert relative_error(rows[3], rows[1]) < 1e-6


@needs_glyphs
@pytest.mark.parametrize("name", ["hunyuan-video-1.5", "hunyuan-image"])
def test_nasa_as_the_guider_of_the_pipeline(name):
    """It gets both texts of the pipeline's own negative prompt, and leaves no hooks behind."""
    from nasa_diffusers.guider import NASAGuidance

    build, options = PIPES[name]
    pipe = build()
    with nasa(pipe, 'so "dull"', NASA(0.5)):
        expected = draw(pipe, options)
    pipe.guider = NASAGuidance(alpha=0.5)
    drawn = draw(pipe, options | {"negative_prompt": 'so "dull"'})
    assert relative_error(drawn, expected) < 2e-5
    assert not pipe.transformer._forward_pre_hooks
