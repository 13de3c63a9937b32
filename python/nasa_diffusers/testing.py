"""Small pipelines of the real diffusers classes, made in code with random weights.

Tests, the documentation and demonstrations run on them, since nothing has to be downloaded. The
images are noise; everything else, from tokenizer to scheduler, is what a real checkpoint uses.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
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
        (Path(folder) / "vocab.json").write_text(vocabulary)
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n")
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


def vae() -> AutoencoderKL:
    """Four latent channels, images twice the size of the latents."""
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    )


def stable_diffusion(seed: int = 0) -> StableDiffusionPipeline:
    """Stable Diffusion 1.5 in small: 16x16 latents, 7 cross-attention layers at two sizes."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )
    pipe = StableDiffusionPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(clip_config(32)),
        tokenizer=clip_tokenizer(),
        unet=unet,
        scheduler=DDPMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _ready(pipe)


def stable_diffusion_xl(seed: int = 0) -> StableDiffusionXLPipeline:
    """SDXL in small: two text encoders, and two transformer blocks in each attention."""
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


def _ready(pipe):
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe
