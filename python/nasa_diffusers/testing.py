"""Small pipelines of the real diffusers classes, made in code with random weights.

Tests, the documentation and demonstrations run on them, since nothing has to be downloaded. The
images are noise; everything else, from tokenizer to scheduler, is what a real checkpoint uses.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLWan,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
    SD3Transformer2DModel,
    SkyReelsV2Transformer3DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.-"


def clip_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose tokens are single characters."""
    tokens = [
        *LETTERS,
        *(letter + "</w>" for letter in LETTERS),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = json.dumps({token: i for i, token in enumerate(tokens)})
        (Path(folder) / "vocab.json").write_text(vocabulary, encoding="utf-8")
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
        return CLIPTokenizer(f"{folder}/vocab.json", f"{folder}/merges.txt", model_max_length=77)


def clip_config(width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=2 * len(LETTERS) + 2,
        bos_token_id=2 * len(LETTERS),
        eos_token_id=2 * len(LETTERS) + 1,
        pad_token_id=2 * len(LETTERS) + 1,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=width,
    )


def vae(shift_factor: float | None = None, channels: int = 4) -> AutoencoderKL:
    """Images twice the size of the latents, those of FLUX.1 and SD3 with a shift."""
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        shift_factor=shift_factor,
    )


def stable_diffusion(seed: int = 0, version_2: bool = False) -> StableDiffusionPipeline:
    """Stable Diffusion 1.5 in small: 16x16 latents, 7 cross-attention layers at two sizes; or
    2.1, with heads of one size, linear projections and v-prediction."""
    torch.manual_seed(seed)
    differs = {"use_linear_projection": True, "upcast_attention": True} if version_2 else {}
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=(4, 8) if version_2 else 4,
        cross_attention_dim=32,
        **differs,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )
    pipe = StableDiffusionPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(clip_config(32)),
        tokenizer=clip_tokenizer(),
        unet=unet,
        scheduler=DDPMScheduler(
            clip_sample=False,
            steps_offset=1,
            prediction_type="v_prediction" if version_2 else "epsilon",
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _ready(pipe)


def stable_diffusion_xl(
    seed: int = 0, time_cond_proj_dim: int | None = None
) -> StableDiffusionXLPipeline:
    """SDXL in small, with two text encoders; LCM's distilled guidance is `time_cond_proj_dim`."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=(4, 8),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        time_cond_proj_dim=time_cond_proj_dim,
        projection_class_embeddings_input_dim=32 + 6 * 8,
        cross_attention_dim=64,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    pipe = StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(clip_config(32)),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(32)),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet,
        scheduler=DDPMScheduler(clip_sample=False, steps_offset=1),
        add_watermarker=False,
    )
    return _ready(pipe)


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer as T5's and Gemma's: padded to the right, closed by </s>, one token a letter."""
    tokens = ["<pad>", "</s>", "<unk>", *LETTERS, " "]
    words = models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        "$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


T5_SIZE: dict[str, Any] = {
    "vocab_size": len(LETTERS) + 4,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 1,
    "num_heads": 4,
}


# of small transformers: 8x8 image tokens of 32 channels
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
LATENTS = {"sample_size": 16, "patch_size": 2, "in_channels": 4}


def pixart(sigma: bool = False, seed: int = 0) -> PixArtAlphaPipeline | PixArtSigmaPipeline:
    """PixArt-alpha or -sigma in small: two blocks over 8x8 tokens."""
    torch.manual_seed(seed)
    transformer = PixArtTransformer2DModel(
        **LATENTS,
        **HEADS,
        num_layers=2,
        cross_attention_dim=32,
        caption_channels=32,
        out_channels=8,
        norm_elementwise_affine=False,
    )
    # the stock multistep scheduler cannot do one step with this pipeline
    pipe = (PixArtSigmaPipeline if sigma else PixArtAlphaPipeline)(
        tokenizer=letter_tokenizer(),
        text_encoder=T5EncoderModel(T5Config(**T5_SIZE)),
        vae=vae(),
        transformer=transformer,
        scheduler=DDPMScheduler(clip_sample=False),
    )
    return _ready(pipe)


def sana(
    seed: int = 0, qk_norm: str | None = None, sprint: bool = False
) -> SanaPipeline | SanaSprintPipeline:
    """Sana or Sana-Sprint in small: two blocks over 16x16 tokens, linear self-attention."""
    torch.manual_seed(seed)
    encoder = Gemma2Config(
        vocab_size=len(LETTERS) + 4,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
    )
    transformer = SanaTransformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=8,
        num_cross_attention_heads=4,
        cross_attention_head_dim=8,
        cross_attention_dim=32,
        caption_channels=32,
        qk_norm=qk_norm,
        guidance_embeds=sprint,
    )
    autoencoder = AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    )
    parts = {
        "tokenizer": letter_tokenizer(),
        "text_encoder": Gemma2Model(encoder),
        "vae": autoencoder,
        "transformer": transformer,
    }
    if sprint:
        scheduler = SCMScheduler(prediction_type="trigflow", sigma_data=0.5)
        return _ready(SanaSprintPipeline(**parts, scheduler=scheduler))
    return _ready(SanaPipeline(**parts, scheduler=FlowMatchEulerDiscreteScheduler()))


WAN_SIZE: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 32,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


def wan_parts() -> dict[str, Any]:
    return {
        "tokenizer": letter_tokenizer(),
        "text_encoder": UMT5EncoderModel(UMT5Config(**T5_SIZE)),
        "vae": AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
            temperal_downsample=[False, True, True],
        ),
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True
        ),
    }  # fmt: skip


def wan(two_transformers: bool = False, seed: int = 0) -> WanPipeline:
    """Wan 2.1 in small, or Wan 2.2 with a second transformer for the later steps."""
    torch.manual_seed(seed)
    pipe = WanPipeline(
        **wan_parts(),
        transformer=WanTransformer3DModel(**WAN_SIZE),
        transformer_2=WanTransformer3DModel(**WAN_SIZE) if two_transformers else None,
        boundary_ratio=0.9 if two_transformers else None,
    )
    return _ready(pipe)


def skyreels_transformer(frames_per_block: int = 2) -> SkyReelsV2Transformer3DModel:
    return SkyReelsV2Transformer3DModel(
        **WAN_SIZE, inject_sample_info=True, num_frame_per_block=frames_per_block
    )


def skyreels(frames_per_block: int = 2, seed: int = 0):
    """SkyReels-V2 in small: blocks of frames that see themselves and what came before."""
    # here, because in diffusers 0.35 this import needs the package ftfy
    from diffusers import SkyReelsV2DiffusionForcingPipeline

    torch.manual_seed(seed)
    transformer = skyreels_transformer(frames_per_block)
    return _ready(SkyReelsV2DiffusionForcingPipeline(**wan_parts(), transformer=transformer))


def flux(dev: bool = False, seed: int = 0) -> FluxPipeline:
    """FLUX.1 schnell in small, two blocks of each kind; or dev, with its guidance embedding."""
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        **HEADS,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=dev,
        axes_dims_rope=(4, 6, 6),
    )
    pipe = FluxPipeline(
        tokenizer=clip_tokenizer(),
        text_encoder=CLIPTextModel(clip_config(32)),
        tokenizer_2=letter_tokenizer(),
        text_encoder_2=T5EncoderModel(T5Config(**T5_SIZE)),
        vae=vae(shift_factor=0.1),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    return _ready(pipe)


def stable_diffusion_3(medium: bool = False, seed: int = 0) -> StableDiffusion3Pipeline:
    """SD3 in small, three blocks; or SD3.5 medium, with norms and a second attention."""
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        **LATENTS,
        **HEADS,
        out_channels=4,
        num_layers=3,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
        dual_attention_layers=(0, 1) if medium else (),
        qk_norm="rms_norm" if medium else None,
    )
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(shift_factor=0.1),
        text_encoder=CLIPTextModelWithProjection(clip_config(16)),
        tokenizer=clip_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(16)),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=T5EncoderModel(T5Config(**T5_SIZE)),
        tokenizer_3=letter_tokenizer(),
    )
    return _ready(pipe)


def _ready(pipe):
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe
