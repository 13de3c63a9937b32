"""Every modular pipeline that can be guided, in small: made of the parts of a classic one.

A guider calls the denoiser for each branch. Each call that carries the prompt is what an eager
oracle makes of the inputs of that call, every other is stock's bit for bit.
"""

import sys
from types import SimpleNamespace

import diffusers
import every_pipeline
import pytest
import torch
import video_parts
from nasa_diffusers import enable_nasa, nasa, pipelines, testing, testing_joint
from nasa_diffusers import testing_hunyuan as small
from nasa_diffusers import testing_side as side
from PIL import Image
from seen_calls import check, seen
from test_side_walk import Processor, reference

PHOTO = Image.new("RGB", (48, 32), (200, 30, 90))
SQUARE = PHOTO.resize((32, 32))


def text(*shape):
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(2))


TEXT = text(5, 32)
LTX2_TEXT = {"2.0": (TEXT, text(5, 32)), "2.3": (TEXT, text(5, 16))}

# ---- parts ---------------------------------------------------------------------------------------


def wan_from_images():
    """Wan 2.1 sees an encoded image in each layer."""
    parts = video_parts.with_images(testing.wan_parts())
    config = testing.WAN_SIZE | video_parts.IMAGE_KEYS | {"in_channels": 36}
    return parts | {"transformer": diffusers.WanTransformer3DModel(**config)}


def two_of(make):
    """Wan 2.2 has a second transformer for the later steps."""
    parts = make()
    return parts | {"transformer_2": make()["transformer"]}


def distilled_helios():
    scheduler = diffusers.HeliosDMDScheduler(gamma=0.3)
    return video_parts.helios("HeliosPyramid") | {"scheduler": scheduler}


def anima():
    """Cosmos without a padding mask, which is resized with a package that need not be there."""
    conditioner = diffusers.AnimaTextConditioner(
        source_dim=32, target_dim=32, model_dim=32, num_layers=1, num_attention_heads=2,
        target_vocab_size=64, min_sequence_length=8,
    )  # fmt: skip
    transformer = diffusers.CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        mlp_ratio=2, text_embed_dim=32, adaln_lora_dim=4, max_size=(4, 32, 32),
        concat_padding_mask=False,
    )  # fmt: skip
    return {
        "text_encoder": side.z_image().text_encoder, "tokenizer": side.chat_tokenizer(),
        "t5_tokenizer": testing.letter_tokenizer(), "text_conditioner": conditioner,
        "scheduler": video_parts.flow(), "vae": side.qwen_vae(), "transformer": transformer,
    }  # fmt: skip


def qwen(**options):
    return side.qwen_image(**options).components | {"processor": Processor()}


# ---- pipelines -----------------------------------------------------------------------------------

SHORT = {"max_sequence_length": 16}
SMALL = {"height": 32, "width": 32}
WIDE = {"height": 32, "width": 48}
WAN = {"height": 16, "width": 32, "num_frames": 5}
LTX2 = SMALL | SHORT | {"num_frames": 3, "frame_rate": 25.0, "output_type": "latent"}
HELIOS = {"height": 64, "width": 64, "num_frames": 5, "num_latent_frames_per_chunk": 2}
PYRAMID = HELIOS | {"pyramid_num_inference_steps_list": [1, 1, 1]}
# its template has more letters than the prompt
KREA = WIDE | {"max_sequence_length": 512}
KONTEXT = SMALL | SHORT | {"max_area": 1024, "_auto_resize": False, "image": SQUARE}
# what makes the parts, a call, the embeddings of a negative prompt, and whether a guider calls for
# each branch
MODULAR = {
    "AnimaModularPipeline": (anima, WIDE, TEXT, True),
    "EchoModularPipeline": (
        lambda: side.ltx2("2.3").components, LTX2 | {"sigmas": [1.0, 0.0]}, LTX2_TEXT["2.3"], False,
    ),
    "ErnieImageModularPipeline": (
        lambda: testing_joint.ernie().components, {"height": 64, "width": 96}, TEXT, True
    ),
    "Flux2KleinBaseModularPipeline": (
        lambda: side.klein(is_distilled=False).components, SHORT | {"height": 16, "width": 24},
        text(5, 96), True,
    ),
    "Flux2KleinModularPipeline": (
        lambda: side.klein().components,
        SHORT | {"height": 16, "width": 24, "image": PHOTO.resize((64, 64))}, text(5, 96), False,
    ),
    "Flux2ModularPipeline": (
        lambda: side.flux2().components, SHORT | {"height": 16, "width": 24}, text(5, 96), False
    ),
    "FluxKontextModularPipeline": (lambda: testing.flux().components, KONTEXT, TEXT, False),
    "FluxModularPipeline": (lambda: testing.flux().components, SMALL | SHORT, TEXT, False),
    "HeliosModularPipeline": (lambda: video_parts.helios("Helios"), HELIOS, TEXT, True),
    "HeliosPyramidDistilledModularPipeline": (distilled_helios, PYRAMID, TEXT, True),
    "HeliosPyramidModularPipeline": (
        lambda: video_parts.helios("HeliosPyramid"), PYRAMID, TEXT, True
    ),
    "HunyuanVideo15ModularPipeline": (
        small.hunyuan_video15_parts,
        {"height": 16, "width": 24, "num_frames": 5}, (TEXT, text(3, 16)), True,
    ),
    "Ideogram4ModularPipeline": (
        lambda: testing_joint.ideogram4().components,
        SHORT | {"height": 16, "width": 24, "guidance_schedule": [3.0]}, text(5, 13 * 32), False,
    ),
    "Krea2ModularPipeline": (
        lambda: side.krea2(is_distilled=False).components, KREA, text(5, 2, 32), True
    ),
    "Krea2TurboModularPipeline": (
        lambda: side.krea2().components, KREA, text(5, 2, 32), False
    ),
    "LTX25ModularPipeline": (
        lambda: side.ltx2("2.3").components,
        LTX2 | {"reference_conditions": reference("LTX2ReferenceCondition")}, LTX2_TEXT["2.3"],
        True,
    ),
    "LTX2ModularPipeline": (lambda: side.ltx2().components, LTX2, LTX2_TEXT["2.0"], True),
    "LTXModularPipeline": (
        lambda: video_parts.ltx("LTX"), {"height": 64, "width": 64, "num_frames": 9}, TEXT, True
    ),
    "QwenImage21ModularPipeline": (
        lambda: testing_joint.qwen_image_21().components, {"height": 64, "width": 96}, TEXT, True
    ),
    "QwenImage21TurboModularPipeline": (
        lambda: testing_joint.qwen_image_21().components, {"height": 64, "width": 96}, TEXT, False
    ),
    "QwenImageEditModularPipeline": (qwen, {"image": PHOTO}, TEXT, True),
    "QwenImageEditPlusModularPipeline": (qwen, {"image": [PHOTO, PHOTO]}, TEXT, True),
    "QwenImageLayeredModularPipeline": (
        lambda: qwen(use_layer3d_rope=True), {"image": PHOTO, "layers": 2}, TEXT, True
    ),
    "QwenImageModularPipeline": (qwen, WIDE, TEXT, True),
    "StableDiffusion3ModularPipeline": (
        lambda: testing.stable_diffusion_3().components, SMALL, TEXT, True
    ),
    "StableDiffusionXLModularPipeline": (
        lambda: testing.stable_diffusion_xl().components, SMALL, text(5, 64), True
    ),
    "Wan22Image2VideoModularPipeline": (
        lambda: two_of(lambda: every_pipeline.wan_parts("WanImageToVideoPipeline")),
        WAN | {"image": PHOTO.resize((32, 16))}, TEXT, True,
    ),
    "Wan22ModularPipeline": (
        lambda: testing.wan(two_transformers=True).components, WAN, TEXT, True
    ),
    "Wan22VaceModularPipeline": (
        lambda: two_of(lambda: video_parts.vace("WanVACEPipeline")), WAN, TEXT, True
    ),
    "WanImage2VideoModularPipeline": (
        wan_from_images, WAN | {"image": PHOTO.resize((32, 16))}, TEXT, True
    ),
    "WanModularPipeline": (lambda: testing.wan().components, WAN, TEXT, True),
    "ZImageModularPipeline": (
        lambda: side.z_image().components, SHORT | {"height": 16, "width": 32}, TEXT, True
    ),
}  # fmt: skip

THERE = [name for name in MODULAR if hasattr(getattr(diffusers, name, None), "default_blocks_name")]


def prepare(monkeypatch):
    """What the blocks have as numbers in their code, and a package that need not be there."""
    values = {
        "krea2.encoders": {"KREA2_TEXT_ENCODER_SELECT_LAYERS": (1, 2)},
        # Edit makes images of a million pixels of what it is given
        "qwenimage.encoders": {"calculate_dimensions": lambda *_: (48, 32, None)},
    }
    for name, module in list(sys.modules.items()):
        if not name.startswith("diffusers.modular_pipelines."):
            continue
        changes = values.get(name.removeprefix("diffusers.modular_pipelines."), {})
        if "prompt_clean" in vars(module) and not hasattr(module, "ftfy"):
            changes = changes | {"ftfy": SimpleNamespace(fix_text=str)}
        for key, value in changes.items():
            monkeypatch.setattr(module, key, value, raising=key != "ftfy")


@pytest.fixture
def modular(monkeypatch):
    """Makes a pipeline: it, a call, embeddings, and whether a guider calls for each branch."""

    def make(name):
        parts, options, negative, has_guider = MODULAR[name]
        if name not in THERE:
            pytest.skip(f"this diffusers has no {name}, or it does not tell its blocks")
        kind = getattr(diffusers, name)
        package = sys.modules[kind.__module__.rpartition(".")[0]]
        pipe = kind(getattr(package, kind.default_blocks_name)())
        prepare(monkeypatch)
        torch.manual_seed(0)
        made = {part: x for part, x in parts().items() if part != "guider"}
        own = {part: x for part, x in made.items() if part in pipe.component_names}
        pipe.register_components(**own)
        is_off = has_guider and getattr(pipe.guider, "guidance_scale", 3.0) == 1.0
        if has_guider and (is_off or not pipe.guider._enabled):
            pipe.update_components(guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0))
        testing._ready(pipe)
        steps = 3 if "transformer_2" in own else 1
        call = {"prompt": "a cat", "num_inference_steps": steps, "output": "latents"}
        call = {x: call[x] for x in call if x in (*pipe.blocks.input_names, "output")} | options
        if "negative_prompt" in pipe.blocks.input_names:
            call["negative_prompt"] = "bad"
        return pipe, call, negative, has_guider

    return make


def same(text, other):
    """Texts of rows, which Z-Image has as a list."""
    texts = [torch.cat(x) if isinstance(x, list) else x for x in (text, other)]
    return torch.equal(*texts)


@pytest.mark.parametrize("name", MODULAR)
def test_calls_that_carry_the_prompt_are_guided_and_no_others(modular, name):
    pipe, call, negative, has_guider = modular(name)
    with pytest.raises(ValueError, match="does not encode a prompt by itself.*negative_prompt_emb"):
        enable_nasa(pipe, "blurry")
    calls = seen(pipe, lambda: pipe(**call), negative)
    # a guider calls for the prompt first
    carry = [same(each.text, calls[0].text) for each in calls]
    assert all(carry) != has_guider
    for each, is_guided in zip(calls, carry, strict=True):
        check(each, negative, [is_guided] * len(each.ours))
    models = {id(each.model) for each in calls}
    assert len(models) == 1 + ("transformer_2" in pipe.component_names)


def test_every_one_that_is_told_to_work_is_here():
    told = {row.name for row in pipelines.rows() if row.is_modular and row.family}
    assert told <= set(MODULAR)
    assert set(THERE) <= told


def test_a_modular_pipeline_that_does_not_say_what_it_calls(modular):
    pipe, *_ = modular("WanModularPipeline")

    def own_loop(components):
        latents = torch.randn(1, 16, 2, 2, 4)
        return components.transformer(latents, torch.tensor([500]), TEXT)[0]

    with (
        torch.no_grad(),
        nasa(pipe, negative_prompt_embeds=TEXT, alpha=0.5) as handle,
    ):
        with pytest.raises(RuntimeError, match="WanModularPipeline.*carry the prompt.*cfg"):
            own_loop(pipe)
        handle.cfg = False
        own_loop(pipe)


def test_echo_with_images_to_remember_is_refused(modular):
    """They stand before the video that is made, where LTX-2 has what is made."""
    pipe, call, negative, _ = modular("EchoModularPipeline")
    with (
        nasa(pipe, negative_prompt_embeds=negative, alpha=0.5),
        pytest.raises(RuntimeError, match="EchoModularPipeline.*memory_images"),
    ):
        pipe(**call, memory_images=[SQUARE])
    pipe(**call, memory_images=[SQUARE])
