"""More small pipelines with a side stream, as in `side_pipes.py`, and in `test_side_walk.py`."""

import functools
import importlib
import inspect

import diffusers
import torch
from nasa_diffusers import testing, testing_side
from nasa_diffusers import testing_hunyuan as small
from PIL import Image

HUNYUAN_VIDEO = {
    "height": 32, "width": 48, "num_frames": 5, "prompt_template": small.TEMPLATE,
    "max_sequence_length": 16,
}  # fmt: skip
HUNYUAN_DIT = {"height": 32, "width": 48, "use_resolution_binning": False}
PIPES = {
    "cogview3+": (
        small.cogview3_plus,
        {"height": 16, "width": 32, "guidance_scale": 1.0, "max_sequence_length": 16},
    ),
    "hunyuan-video": (small.hunyuan_video, HUNYUAN_VIDEO),
    "mochi": (
        small.mochi,
        {
            "height": 32, "width": 48, "num_frames": 7, "guidance_scale": 1.0,
            "max_sequence_length": 16,
        },
    ),
    "easyanimate": (
        small.easyanimate, {"height": 32, "width": 48, "num_frames": 5, "guidance_scale": 1.0}
    ),
    "hunyuan-video-1.5": (
        lambda: small.hunyuan_video15(), {"height": 16, "width": 24, "num_frames": 5}
    ),
    "hunyuan-image": (lambda: small.hunyuan_image(), {"height": 16, "width": 24}),
    "hunyuan-dit": (small.hunyuan_dit, HUNYUAN_DIT | {"guidance_scale": 1.0}),
    "lumina": (small.lumina, {"height": 16, "width": 32, "guidance_scale": 1.0}),
}  # fmt: skip
CFG = {
    "lumina": {"guidance_scale": 3.0, "negative_prompt": "dull"},
    "hunyuan-dit": {"guidance_scale": 3.0, "negative_prompt": "dull"},
    "mochi": {"guidance_scale": 3.0, "negative_prompt": "dull"},
    "easyanimate": {"guidance_scale": 3.0, "negative_prompt": ["dull"]},
    "cogview3+": {"guidance_scale": 3.0, "negative_prompt": "dull"},
    "hunyuan-video": {"true_cfg_scale": 3.0, "negative_prompt": "dull"},
}
NEEDS = {
    "cogview3+": "CogView3PlusPipeline", "hunyuan-video": "HunyuanVideoPipeline",
    "mochi": "MochiPipeline", "easyanimate": "EasyAnimatePipeline",
    "hunyuan-video-1.5": "HunyuanVideo15Pipeline", "hunyuan-image": "HunyuanImagePipeline",
    "hunyuan-dit": "HunyuanDiTPipeline", "lumina": "LuminaPipeline",
}  # fmt: skip
# whose batch is [negative, prompt]
DOUBLED = ("cogview3+", "mochi", "easyanimate", "hunyuan-dit")
TWO_TEXTS = (
    "HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline", "HunyuanImagePipeline",
)  # fmt: skip
# diffusers cannot draw with them in one step
TWO_STEPS = ("mochi",)
ALONE = (*NEEDS.values(), "LuminaText2ImgPipeline")


def photo(width=48, height=32):
    return Image.new("RGB", (width, height), (200, 30, 90))


def noise(*shape):
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(3))


def of_parts(cls, parts):
    asked = inspect.signature(cls.__init__).parameters
    return testing._ready(cls(**{name: x for name, x in parts.items() if name in asked}))


def consisid(_):
    """Its class is not exported without a package that is not used here."""
    module = importlib.import_module("diffusers.pipelines.consisid.pipeline_consisid")
    pipe = testing_side.cogvideox()
    transformer = diffusers.ConsisIDTransformer3DModel(
        in_channels=8, out_channels=4, num_layers=2, text_embed_dim=32, time_embed_dim=16,
        sample_width=2, sample_height=2, sample_frames=9, max_text_seq_length=16,
        use_rotary_positional_embeddings=True, **testing.HEADS,
    )  # fmt: skip
    return of_parts(module.ConsisIDPipeline, pipe.components | {"transformer": transformer})


def hunyuan_video(name, **differs):
    parts = small.hunyuan_video_parts(**differs)
    return of_parts(getattr(diffusers, name), parts | {"image_processor": None})


def easyanimate(name, in_channels):
    cls = getattr(diffusers, name)

    class Fixed(cls):
        """The call of one of them has an option that its encoding does not know."""

        @functools.wraps(cls.encode_prompt)
        def encode_prompt(self, prompt, *, text_encoder_index=0, **options):
            return super().encode_prompt(prompt, **options)

    return of_parts(Fixed, small.easyanimate_parts(in_channels))


def from_image_15(_):
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    vision = SiglipVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        image_size=16, patch_size=8,
    )  # fmt: skip
    parts = small.hunyuan_video15_parts() | {
        "guider": diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
        "image_encoder": SiglipVisionModel(vision),
        "feature_extractor": SiglipImageProcessor(size={"height": 16, "width": 16}),
    }
    return small._with_short_texts(of_parts(diffusers.HunyuanVideo15ImageToVideoPipeline, parts))


def dit_control(name):
    parts = small.hunyuan_dit_parts()
    control = diffusers.HunyuanDiT2DControlNetModel.from_transformer(
        parts["transformer"], transformer_num_layers=4, load_weights_from_transformer=False
    )
    return of_parts(getattr(diffusers, name), parts | {"controlnet": control})


def mix():
    return diffusers.AdaptiveProjectedMixGuidance()


# instead of those that LLaVA makes of a prompt and an image
IMAGE_PROMPT = {
    "prompt": None, "prompt_embeds": noise(9, 32), "pooled_prompt_embeds": noise(8),
    "prompt_attention_mask": (torch.arange(9) < 8).long()[None],
    "negative_prompt_embeds": noise(7, 32) + 1, "negative_pooled_prompt_embeds": noise(8) + 1,
    "negative_prompt_attention_mask": torch.ones(1, 7).long(),
}  # fmt: skip
CALL = HUNYUAN_VIDEO | {"image": photo(), "true_cfg_scale": 3.0}
EASYANIMATE = {
    "height": 32, "width": 48, "num_frames": 5, "guidance_scale": 3.0, "negative_prompt": "dull",
}  # fmt: skip
DIT = HUNYUAN_DIT | {"guidance_scale": 3.0, "negative_prompt": "dull"}
QUOTED = {"prompt": 'a "c"', "negative_prompt": "dull"}
FIRST, LAST = [True, False], [False, True]
RUN = {
    "ConsisIDPipeline": (
        consisid,
        {
            "height": 32, "width": 32, "num_frames": 5, "guidance_scale": 3.0,
            "max_sequence_length": 16, "negative_prompt": "dull", "image": photo(32, 32),
        },
        LAST,
    ),
    "HunyuanVideoImageToVideoPipeline": (
        lambda name: hunyuan_video(name, image_condition_type="token_replace"),
        CALL | IMAGE_PROMPT, FIRST,
    ),
    "HunyuanSkyreelsImageToVideoPipeline": (
        lambda name: hunyuan_video(name, in_channels=8),
        CALL | {"negative_prompt": "dull"}, FIRST,
    ),
    # one window of 5 frames
    "HunyuanVideoFramepackPipeline": (
        lambda _: small.framepack(),
        CALL | {"negative_prompt": "dull", "latent_window_size": 2}, FIRST,
    ),
    "HunyuanVideo15Pipeline": (
        lambda _: small.hunyuan_video15(
            guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0)
        ),
        QUOTED | {"height": 16, "width": 24, "num_frames": 5}, FIRST,
    ),
    "HunyuanVideo15ImageToVideoPipeline": (
        from_image_15, QUOTED | {"image": photo(24, 16), "num_frames": 5}, FIRST
    ),
    "HunyuanImagePipeline": (
        lambda _: small.hunyuan_image(guider=mix()), QUOTED | {"height": 16, "width": 24}, FIRST
    ),
    "HunyuanImageRefinerPipeline": (
        lambda _: small.hunyuan_image_refiner(guider=mix()),
        QUOTED | {"height": 16, "width": 24, "image": noise(4, 1, 4, 6)}, FIRST,
    ),
    "HunyuanDiTControlNetPipeline": (dit_control, DIT | {"control_image": photo()}, LAST),
    # perturbed rows carry the prompt as well
    "HunyuanDiTPAGPipeline": (
        lambda name: of_parts(getattr(diffusers, name), small.hunyuan_dit_parts()), DIT,
        [*LAST, True],
    ),
    "EasyAnimateControlPipeline": (lambda name: easyanimate(name, 12), EASYANIMATE, LAST),
    "EasyAnimateInpaintPipeline": (lambda name: easyanimate(name, 9), EASYANIMATE, LAST),
}  # fmt: skip
