"""The pipelines of Wan beside text to video."""

import sys
from types import SimpleNamespace

import diffusers
import PIL.Image
import pytest
import torch
import video_parts
from diffusers import WanTransformer3DModel
from drawing import assert_same_image, relative_error
from nasa_diffusers import enable_nasa, nasa, testing
from oracle import algorithm_1
from transformers import CLIPImageProcessor

TEXT = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1))
NEGATIVE = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(2))
PICTURE = PIL.Image.new("RGB", (32, 16), "red")
MASK_CHANNELS = 4


def build(kind, channels=16, **options):
    torch.manual_seed(0)
    config = testing.WAN_SIZE | {"in_channels": channels} | options.pop("config", {})
    pipe = kind(**testing.wan_parts(), transformer=WanTransformer3DModel(**config), **options)
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder):
        part.eval().requires_grad_(False)
    return pipe


def image_to_video():
    """Wan 2.2: the first frame stands beside the latents, not in the attention."""
    two = {"transformer_2": None, "boundary_ratio": None}
    channels = 16 + 16 + MASK_CHANNELS
    return build(diffusers.WanImageToVideoPipeline, channels, **two), {"image": PICTURE}


def text_and_image_to_video():
    """Wan 2.2 5B: the first frame is one of the latents."""
    pipe = build(diffusers.WanImageToVideoPipeline, expand_timesteps=True)
    return pipe, {"image": PICTURE}


def video_to_video():
    return build(diffusers.WanVideoToVideoPipeline), {"video": [PICTURE] * 5, "strength": 1.0}


def lucy_edit():
    if not hasattr(diffusers, "LucyEditPipeline"):
        pytest.skip("this diffusers has no LucyEditPipeline")
    return build(diffusers.LucyEditPipeline, 32), {"video": [PICTURE] * 5}


def draw(pipe, text=TEXT, **options):
    torch.manual_seed(0)
    return pipe(
        prompt=None, prompt_embeds=text, num_inference_steps=2, guidance_scale=0.0,
        generator=torch.Generator().manual_seed(0), output_type="latent",
        height=16, width=32, **options,
    )[0]  # fmt: skip


@pytest.mark.parametrize(
    "make", [image_to_video, text_and_image_to_video, video_to_video, lucy_edit],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_wan_beside_text_to_video(make, monkeypatch):
    pipe, call = make()
    # diffusers cleans Wan's prompts with the package ftfy whether it is there or not
    module = sys.modules[type(pipe).__module__]
    monkeypatch.setattr(module, "ftfy", SimpleNamespace(fix_text=str), raising=False)
    if "video" not in call:
        call["num_frames"] = 5
    stock = draw(pipe, **call)
    with nasa(pipe, negative_prompt_embeds=NEGATIVE, alpha=0.5):
        ours = draw(pipe, **call)
    text = pipe.transformer.condition_embedder.text_embedder(NEGATIVE)
    with algorithm_1(pipe.transformer, [(text, None, 0.5)]):
        assert_same_image(ours, draw(pipe, **call))
    assert relative_error(ours, stock) > 1e-4
    with nasa(pipe, "blurry") as handle:
        draw(pipe, **call)
        assert handle.report().layers_guided == 2


def test_image_to_video_of_wan_21():
    """Its layers attend to the image besides the text, and the image is not guided."""
    channels = 16 + 16 + MASK_CHANNELS
    pipe = build(
        diffusers.WanImageToVideoPipeline, channels, config=video_parts.IMAGE_KEYS,
        image_processor=CLIPImageProcessor(size=16, crop_size=16),
        image_encoder=video_parts.image_encoder(),
    )  # fmt: skip
    padded = torch.cat([TEXT, TEXT.new_zeros(1, 505, 32)], dim=1)
    call = {"image": PICTURE, "num_frames": 5, "text": padded}
    stock = draw(pipe, **call)
    text = pipe.transformer.condition_embedder.text_embedder(NEGATIVE)
    handle = enable_nasa(pipe, negative_prompt_embeds=NEGATIVE, alpha=0)
    assert torch.equal(draw(pipe, **call), stock)
    handle.alpha = 0.5
    ours = draw(pipe, **call)
    # the zeros of the text are one key, the image's keys are all of their own
    assert handle.report().keys_pos == 8
    handle.disable()
    with algorithm_1(pipe.transformer, [(text, None, 0.5)]):
        assert_same_image(ours, draw(pipe, **call))
    assert relative_error(ours, stock) > 1e-4
