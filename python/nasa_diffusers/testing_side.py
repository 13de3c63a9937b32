"""More small pipelines, as in `nasa_diffusers/testing.py`: of the families with a side stream.

Their classes need a newer diffusers than 0.35, but for Qwen-Image's, so each is imported where
it is built.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler, FlowMatchEulerDiscreteScheduler
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from nasa_diffusers.testing import HEADS, LETTERS, T5_SIZE, _ready, letter_tokenizer, vae

PLAIN = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
IN_PARTS = (
    "{% for message in messages %}{% for part in message['content'] %}{{ part['text'] }}"
    "{% endfor %}{% endfor %}"
)
TEXT_SIZE: dict[str, Any] = {
    "vocab_size": len(LETTERS) + 4,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
}
MROPE = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}
VISION: dict[str, Any] = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}


def chat_tokenizer(template: str = PLAIN) -> PreTrainedTokenizerFast:
    """The tokenizer of letters, with a chat template that adds nothing."""
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def qwen_vl():
    """Qwen2.5-VL, which encodes the text of Qwen-Image."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {k: x for k, x in TEXT_SIZE.items() if k != "head_dim"} | {"rope_scaling": MROPE}
    tokens: dict[str, Any] = {
        "vision_start_token_id": 0,
        "vision_end_token_id": 0,
        "image_token_id": 1,
    }
    vision = VISION | {"out_hidden_size": 32}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen_vae():
    """Four latent channels, images four times the size of the latents."""
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip


def qwen_image(seed: int = 0, **differs: Any):
    """Qwen-Image in small: two blocks of two streams."""
    from diffusers import QwenImagePipeline, QwenImageTransformer2DModel

    torch.manual_seed(seed)
    config = {"num_layers": 2, "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6), **HEADS}
    pipe: Any = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=qwen_vae(),
        text_encoder=qwen_vl(),
        tokenizer=chat_tokenizer(),
        transformer=QwenImageTransformer2DModel(in_channels=16, out_channels=4, **config | differs),
    )
    # a letter is a token
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "a {}.", 2
    return _ready(pipe)


def z_image(seed: int = 0):
    """Z-Image in small: two blocks over one sequence, and one of each refiner."""
    from diffusers import ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(seed)
    transformer: Any = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=32, axes_dims=[4, 6, 6], axes_lens=[128, 64, 64],
    )  # fmt: skip
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token)
    pipe = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(shift_factor=0.1),
        text_encoder=Qwen3Model(Qwen3Config(**TEXT_SIZE)),
        tokenizer=chat_tokenizer(),
        transformer=transformer,
    )
    return _ready(pipe)


def _flux2_vae():
    from diffusers import AutoencoderKLFlux2

    return AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _flux2_parts(channels: int, guidance: bool) -> dict[str, Any]:
    from diffusers import Flux2Transformer2DModel

    transformer = Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2,
        joint_attention_dim=channels, axes_dims_rope=(4, 4, 4, 4), timestep_guidance_channels=16,
        guidance_embeds=guidance, **HEADS,
    )  # fmt: skip
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "vae": _flux2_vae(),
        "transformer": transformer,
    }


def flux2(seed: int = 0):
    """FLUX.2 dev in small, two blocks of each kind; its text encoder has the 30 layers it needs."""
    from diffusers import Flux2Pipeline
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    torch.manual_seed(seed)
    config = Mistral3Config(
        text_config={"model_type": "mistral", **TEXT_SIZE, "num_hidden_layers": 30},
        vision_config={
            "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "head_dim": 8,
            "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
        },
        image_token_index=1,
        spatial_merge_size=1,
    )  # fmt: skip
    pipe: Any = Flux2Pipeline(
        **_flux2_parts(32 * 3, guidance=True),
        text_encoder=Mistral3ForConditionalGeneration(config),
        tokenizer=chat_tokenizer(IN_PARTS),
    )
    pipe.system_message = ""
    return _ready(pipe)


def klein(seed: int = 0, is_distilled: bool = True):
    """FLUX.2 klein in small; three of 27 layers of its text encoder count."""
    from diffusers import Flux2KleinPipeline
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    pipe = Flux2KleinPipeline(
        **_flux2_parts(32 * 3, guidance=False),
        text_encoder=Qwen3ForCausalLM(Qwen3Config(**TEXT_SIZE | {"num_hidden_layers": 27})),
        tokenizer=chat_tokenizer(),
        is_distilled=is_distilled,
    )
    return _ready(pipe)


def qwen3_vl_config() -> Any:
    """Of a small Qwen3-VL."""
    from transformers import Qwen3VLConfig

    return Qwen3VLConfig(
        text_config=TEXT_SIZE
        | {"rope_scaling": {"mrope_section": [2, 1, 1], "rope_type": "default"}},
        vision_config=VISION | {"out_hidden_size": 32, "deepstack_visual_indexes": [0]},
        image_token_id=1, video_token_id=2, vision_start_token_id=0, vision_end_token_id=0,
    )  # fmt: skip


def krea2(seed: int = 0, is_distilled: bool = True):
    """Krea 2 Turbo in small, or Krea 2: two blocks over one sequence."""
    from diffusers import Krea2Pipeline, Krea2Transformer2DModel
    from transformers import Qwen3VLModel

    torch.manual_seed(seed)
    config = qwen3_vl_config()
    transformer: Any = Krea2Transformer2DModel(
        in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=32, timestep_embed_dim=16, text_hidden_dim=32,
        num_text_layers=2, text_num_attention_heads=2, text_num_key_value_heads=2,
        text_intermediate_size=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    for name, weight in transformer.named_parameters():
        if "scale_shift" in name:
            torch.nn.init.normal_(weight)
    pipe: Any = Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, max_image_seq_len=6400
        ),
        vae=qwen_vae(),
        text_encoder=Qwen3VLModel(config),
        tokenizer=chat_tokenizer(),
        transformer=transformer,
        text_encoder_select_layers=(1, 2),
        is_distilled=is_distilled,
    )
    # a letter is a token
    pipe.prompt_template_encode_prefix, pipe.prompt_template_encode_start_idx = "a ", 2
    pipe.prompt_template_encode_suffix, pipe.prompt_template_encode_num_suffix_tokens = ".", 2
    return _ready(pipe)


# by release: what a block of the denoiser and the connectors have more
LTX2_VERSIONS: dict[str, dict[str, Any]] = {
    "2.0": {},
    "2.3": {
        "gated_attn": True, "cross_attn_mod": True, "audio_gated_attn": True,
        "audio_cross_attn_mod": True, "use_prompt_embeddings": False, "perturbed_attn": True,
    },
}  # fmt: skip
# its texts are modulated, and not by the time
LTX2_VERSIONS["2.5"] = LTX2_VERSIONS["2.3"] | {
    "use_prompt_adaln_single": False, "use_keyframes_abs_pos_embedding": True,
}  # fmt: skip


def ltx2(version: str = "2.0", seed: int = 0):
    """LTX-2, 2.3 or 2.5 in small: two blocks of video and sound, a connector for each text."""
    import diffusers
    from diffusers.pipelines.ltx2 import LTX2TextConnectors
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
    from transformers import Gemma3TextConfig, Gemma3TextModel

    torch.manual_seed(seed)
    differs = LTX2_VERSIONS[version]
    transformer = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16,
        cross_attention_dim=32, audio_in_channels=4, audio_out_channels=4,
        audio_num_attention_heads=2, audio_attention_head_dim=8, audio_cross_attention_dim=16,
        num_layers=2, caption_channels=32, rope_double_precision=False, rope_type="split",
        **differs,
    )  # fmt: skip
    each = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 1}
    connectors = {f"{kind}_connector_{name}": x for name, x in each.items() for kind in LTX2_TEXTS}
    connectors |= {f"{kind}_connector_num_learnable_registers": 16 for kind in LTX2_TEXTS}
    if not differs.get("use_prompt_embeddings", True):
        connectors |= {
            "per_modality_projections": True, "video_hidden_dim": 32, "audio_hidden_dim": 16,
            "audio_connector_attention_head_dim": 4,
        }  # fmt: skip
    connectors = LTX2TextConnectors(
        caption_channels=32, text_proj_in_factor=3, rope_double_precision=False, rope_type="split",
        **connectors,
    )  # fmt: skip
    autoencoder = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4, block_out_channels=(8,), decoder_block_out_channels=(8,),
        layers_per_block=(1,), decoder_layers_per_block=(1, 1), spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,), decoder_inject_noise=(False, False),
        downsample_type=("spatial",), upsample_residual=(False,), upsample_factor=(1,),
        patch_size=1, patch_size_t=1,
    )  # fmt: skip
    sound = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4, output_channels=2, ch_mult=(1,), num_res_blocks=1, resolution=32,
        latent_channels=2, mel_bins=8,
    )  # fmt: skip
    vocoder = LTX2Vocoder(
        in_channels=16, hidden_channels=32, upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2],
        resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]], output_sampling_rate=16000,
    )  # fmt: skip
    pipe = diffusers.LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder,
        audio_vae=sound,
        text_encoder=Gemma3TextModel(Gemma3TextConfig(**TEXT_SIZE)),
        tokenizer=letter_tokenizer(),
        connectors=connectors,
        transformer=transformer,
        vocoder=vocoder,
    )
    return _ready(pipe)


LTX2_TEXTS = ("video", "audio")


def cogvideox(seed: int = 0):
    """CogVideoX in small: two blocks over two frames, with rotary positions."""
    from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline, CogVideoXTransformer3DModel

    torch.manual_seed(seed)
    transformer = CogVideoXTransformer3DModel(
        in_channels=4, out_channels=4, num_layers=2, text_embed_dim=32, time_embed_dim=16,
        sample_width=2, sample_height=2, sample_frames=9, max_text_seq_length=16,
        use_rotary_positional_embeddings=True, **HEADS,
    )  # fmt: skip
    autoencoder = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    pipe = CogVideoXPipeline(
        tokenizer=letter_tokenizer(),
        text_encoder=T5EncoderModel(T5Config(**T5_SIZE)),
        vae=autoencoder,
        transformer=transformer,
        scheduler=CogVideoXDDIMScheduler(),
    )
    return _ready(pipe)


def cogview4(seed: int = 0):
    """CogView4 in small: two blocks."""
    from diffusers import CogView4Pipeline, CogView4Transformer2DModel
    from transformers import GlmConfig, GlmModel

    torch.manual_seed(seed)
    transformer = CogView4Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, text_embed_dim=32, time_embed_dim=16,
        condition_dim=4, rope_axes_dim=(16, 16), **HEADS,
    )  # fmt: skip
    pipe = CogView4Pipeline(
        tokenizer=chat_tokenizer(),
        text_encoder=GlmModel(GlmConfig(**TEXT_SIZE, pad_token_id=0)),
        vae=vae(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, time_shift_type="linear"
        ),
    )
    return _ready(pipe)
