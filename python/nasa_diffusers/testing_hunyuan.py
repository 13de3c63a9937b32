"""More small pipelines, as in `nasa_diffusers/testing.py`: those whose text has no positions."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler, FlowMatchEulerDiscreteScheduler
from transformers import CLIPTextModel, T5Config, T5EncoderModel

from nasa_diffusers.testing import (
    HEADS,
    T5_SIZE,
    _ready,
    clip_config,
    clip_tokenizer,
    letter_tokenizer,
    vae,
)
from nasa_diffusers.testing_side import IN_PARTS, TEXT_SIZE, chat_tokenizer, qwen_vl

# a letter is a token
TEMPLATE = {"template": "a {}.", "crop_start": 2}


def cogview3_plus(seed: int = 0):
    """CogView3+ in small: two blocks."""
    from diffusers import CogView3PlusPipeline, CogView3PlusTransformer2DModel

    torch.manual_seed(seed)
    transformer = CogView3PlusTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, text_embed_dim=32, time_embed_dim=16,
        condition_dim=4, pos_embed_max_size=32, sample_size=16, **HEADS,
    )  # fmt: skip
    pipe = CogView3PlusPipeline(
        tokenizer=letter_tokenizer(),
        text_encoder=T5EncoderModel(T5Config(**T5_SIZE)),
        vae=vae(),
        transformer=transformer,
        scheduler=CogVideoXDDIMScheduler(),
    )
    return _ready(pipe)


def video_vae():
    """Four latent channels, a latent for 8 x 8 pixels of 4 frames."""
    from diffusers import AutoencoderKLHunyuanVideo

    return AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4
    )


HUNYUAN_VIDEO: dict[str, Any] = {
    "out_channels": 4, "num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 1,
    "text_embed_dim": 32, "pooled_projection_dim": 8, "rope_axes_dim": (4, 6, 6), **HEADS,
}  # fmt: skip


def hunyuan_video_parts(in_channels: int = 4, **differs: Any) -> dict[str, Any]:
    from diffusers import HunyuanVideoTransformer3DModel
    from transformers import LlamaConfig, LlamaModel

    config = TEXT_SIZE | {"num_hidden_layers": 3}
    return {
        "text_encoder": LlamaModel(LlamaConfig(**config)),
        "tokenizer": letter_tokenizer(),
        "text_encoder_2": CLIPTextModel(clip_config(8)),
        "tokenizer_2": clip_tokenizer(),
        "vae": video_vae(),
        "transformer": HunyuanVideoTransformer3DModel(
            in_channels=in_channels, **HUNYUAN_VIDEO | differs
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
    }


def hunyuan_video(seed: int = 0):
    """HunyuanVideo in small, two blocks of each kind. Call it with `prompt_template=TEMPLATE`."""
    from diffusers import HunyuanVideoPipeline

    torch.manual_seed(seed)
    return _ready(HunyuanVideoPipeline(**hunyuan_video_parts()))


def framepack(seed: int = 0):
    """Framepack in small, two blocks of each kind."""
    from diffusers import HunyuanVideoFramepackPipeline, HunyuanVideoFramepackTransformer3DModel
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(seed)
    transformer = HunyuanVideoFramepackTransformer3DModel(
        in_channels=4, has_image_proj=True, image_proj_dim=8, has_clean_x_embedder=True,
        **HUNYUAN_VIDEO,
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        image_size=16, patch_size=8,
    )  # fmt: skip
    parts = hunyuan_video_parts() | {
        "transformer": transformer,
        "image_encoder": SiglipVisionModel(vision),
        "feature_extractor": SiglipImageProcessor(size={"height": 16, "width": 16}),
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    }
    return _ready(HunyuanVideoFramepackPipeline(**parts))


def mochi(seed: int = 0):
    """Mochi in small: two blocks, the last of which drops its text."""
    from diffusers import AutoencoderKLMochi, MochiPipeline, MochiTransformer3DModel

    torch.manual_seed(seed)
    transformer: Any = MochiTransformer3DModel(
        in_channels=4, num_layers=2, pooled_projection_dim=24, text_embed_dim=32, time_embed_dim=8,
        max_sequence_length=16, **HEADS,
    )  # fmt: skip
    torch.nn.init.normal_(transformer.pos_frequencies)
    autoencoder = AutoencoderKLMochi(
        encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4,
        latent_channels=4, layers_per_block=(1,) * 5, latents_mean=(0.0,) * 4,
        latents_std=(1.0,) * 4,
    )  # fmt: skip
    pipe = MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=autoencoder,
        text_encoder=T5EncoderModel(T5Config(**T5_SIZE)),
        tokenizer=letter_tokenizer(),
        transformer=transformer,
    )
    return _ready(pipe)


def easyanimate_parts(in_channels: int = 4) -> dict[str, Any]:
    from diffusers import AutoencoderKLMagvit, EasyAnimateTransformer3DModel

    transformer = EasyAnimateTransformer3DModel(
        in_channels=in_channels, out_channels=4, num_layers=2, mmdit_layers=1, patch_size=2,
        time_embed_dim=16, text_embed_dim=32, sample_width=6, sample_height=4, **HEADS,
    )  # fmt: skip
    autoencoder = AutoencoderKLMagvit(
        latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4
    )
    return {
        "vae": autoencoder,
        "text_encoder": qwen_vl(),
        "tokenizer": chat_tokenizer(IN_PARTS),
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(),
    }


def easyanimate(seed: int = 0):
    """EasyAnimate in small: a block with projections of the text's own, and one without."""
    from diffusers import EasyAnimatePipeline

    torch.manual_seed(seed)
    return _ready(EasyAnimatePipeline(**easyanimate_parts()))


def _two_encoders() -> dict[str, Any]:
    """Qwen's with three layers, the first of which counts, and ByT5's."""
    from transformers import Qwen2Config, Qwen2Model

    config = {x: y for x, y in TEXT_SIZE.items() if x != "head_dim"} | {"num_hidden_layers": 3}
    return {
        "text_encoder": Qwen2Model(Qwen2Config(**config)),
        "tokenizer": chat_tokenizer(),
        "text_encoder_2": T5EncoderModel(T5Config(**T5_SIZE | {"d_model": 16})),
        "tokenizer_2": letter_tokenizer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
    }


def _with_short_texts(pipe: Any) -> Any:
    """A letter is a token."""
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length = 16, 12
    pipe.system_message, pipe.prompt_template_encode = "", "a {}."
    pipe.prompt_template_encode_start_idx = 2
    return _ready(pipe)


HUNYUAN_TEXTS: dict[str, Any] = {
    "out_channels": 4, "num_layers": 2, "num_refiner_layers": 1, "text_embed_dim": 32,
    "text_embed_2_dim": 16, **HEADS,
}  # fmt: skip


def hunyuan_video15_parts() -> dict[str, Any]:
    from diffusers import (
        AutoencoderKLHunyuanVideo15,
        ClassifierFreeGuidance,
        HunyuanVideo15Transformer3DModel,
    )

    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=9, image_embed_dim=8, rope_axes_dim=(4, 6, 6), target_size=16, **HUNYUAN_TEXTS
    )
    autoencoder = AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(32, 32, 32), layers_per_block=1,
        spatial_compression_ratio=4,
    )  # fmt: skip
    return _two_encoders() | {
        "vae": autoencoder,
        "transformer": transformer,
        "guider": ClassifierFreeGuidance(enabled=False),
    }


def hunyuan_video15(seed: int = 0, **others: Any):
    """HunyuanVideo 1.5 in small: two blocks, and a guider that is off."""
    from diffusers import HunyuanVideo15Pipeline

    torch.manual_seed(seed)
    pipe: Any = HunyuanVideo15Pipeline(**hunyuan_video15_parts() | others)
    pipe.vision_num_semantic_tokens = 3
    return _with_short_texts(pipe)


def hunyuan_image(seed: int = 0, **others: Any):
    """HunyuanImage in small, distilled: two blocks of each kind."""
    from diffusers import (
        AutoencoderKLHunyuanImage,
        HunyuanImagePipeline,
        HunyuanImageTransformer2DModel,
    )

    torch.manual_seed(seed)
    transformer = HunyuanImageTransformer2DModel(
        in_channels=4, num_single_layers=2, rope_axes_dim=(8, 8), guidance_embeds=True,
        **HUNYUAN_TEXTS,
    )  # fmt: skip
    autoencoder = AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32, 32),
        layers_per_block=1, spatial_compression_ratio=4, sample_size=16, scaling_factor=1.0,
    )  # fmt: skip
    parts = _two_encoders() | {"vae": autoencoder, "transformer": transformer}
    return _with_short_texts(HunyuanImagePipeline(**parts | others))


def hunyuan_image_refiner(seed: int = 0, **others: Any):
    """The refiner of HunyuanImage in small: one text."""
    from diffusers import (
        AutoencoderKLHunyuanImageRefiner,
        HunyuanImageRefinerPipeline,
        HunyuanImageTransformer2DModel,
    )

    torch.manual_seed(seed)
    transformer = HunyuanImageTransformer2DModel(
        in_channels=8, num_single_layers=2, rope_axes_dim=(4, 6, 6), guidance_embeds=True,
        patch_size=(1, 1, 1), **HUNYUAN_TEXTS | {"text_embed_2_dim": None},
    )  # fmt: skip
    autoencoder = AutoencoderKLHunyuanImageRefiner(
        latent_channels=4, block_out_channels=(32, 32, 32), layers_per_block=1,
        spatial_compression_ratio=4,
    )  # fmt: skip
    parts = _two_encoders() | {"vae": autoencoder, "transformer": transformer}
    del parts["text_encoder_2"], parts["tokenizer_2"]
    return _with_short_texts(HunyuanImageRefinerPipeline(**parts | others))


def hunyuan_dit_parts() -> dict[str, Any]:
    from diffusers import AutoencoderKL, DDPMScheduler, HunyuanDiT2DModel
    from transformers import BertConfig, BertModel

    transformer = HunyuanDiT2DModel(
        in_channels=4, patch_size=2, sample_size=8, hidden_size=32, num_layers=4, mlp_ratio=2.0,
        cross_attention_dim=32, cross_attention_dim_t5=16, pooled_projection_dim=16, **HEADS,
    )  # fmt: skip
    # a latent is eight pixels wide, as the pipelines have it in their code
    autoencoder = AutoencoderKL(
        block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=4,
    )  # fmt: skip
    bert = BertConfig(
        vocab_size=TEXT_SIZE["vocab_size"], hidden_size=32, num_hidden_layers=1,
        num_attention_heads=4, intermediate_size=32,
    )  # fmt: skip
    return {
        "vae": autoencoder,
        "text_encoder": BertModel(bert),
        "tokenizer": letter_tokenizer(),
        "text_encoder_2": T5EncoderModel(T5Config(**T5_SIZE | {"d_model": 16})),
        "tokenizer_2": letter_tokenizer(),
        "transformer": transformer,
        "scheduler": DDPMScheduler(prediction_type="v_prediction"),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def hunyuan_dit(seed: int = 0):
    """HunyuanDiT in small: four blocks, one of which takes a skip."""
    from diffusers import HunyuanDiTPipeline

    torch.manual_seed(seed)
    return _ready(HunyuanDiTPipeline(**hunyuan_dit_parts()))


def lumina(seed: int = 0):
    """Lumina-Next in small: two blocks with gates that are open."""
    from diffusers import LuminaNextDiT2DModel, LuminaPipeline
    from transformers import GemmaConfig, GemmaModel

    torch.manual_seed(seed)
    transformer: Any = LuminaNextDiT2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=32, num_layers=2,
        num_attention_heads=2, num_kv_heads=1, multiple_of=8, cross_attention_dim=32,
    )  # fmt: skip
    for layer in transformer.layers:
        torch.nn.init.normal_(layer.gate)
    pipe = LuminaPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(),
        text_encoder=GemmaModel(GemmaConfig(**TEXT_SIZE)),
        tokenizer=letter_tokenizer(),
    )
    return _ready(pipe)
