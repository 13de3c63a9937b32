"""The world's models: tokenizer, text encoder, U-Net, and the pipeline they make."""

from __future__ import annotations

import copy
import json
import string
import tempfile
from collections.abc import Iterable
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    LCMScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.normalization import AdaLayerNormZero
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
    T5EncoderModel,
)

from nasa_distill.world.code import CHANNELS, GRID
from nasa_distill.world.kinds import SMALL, World

Autoencoder = AutoencoderTiny | AutoencoderKL
TEXT_WIDTH = 64
CHANNELS_OF_UNET = (64, 96)
START, END = "<|startoftext|>", "<|endoftext|>"
# The noise of DDPM, which is more than Stable Diffusion's. An attribute of 8x8 latents can be seen
# until the signal is a tenth of the noise; the prompt can only decide in steps beyond that. At the
# last step, alpha_T = 0.006, almost nothing of the image is left. The networks predict the image,
# one of 288; to predict noise they would have to reproduce every number of it.
NOISE: dict[str, Any] = {
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "prediction_type": "sample",
    "clip_sample": False,
}
PATCHES: dict[str, Any] = {
    "sample_size": GRID,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
}
# Shift, scale and gate of attention, then of the feed-forward network, without modulation by time.
# A transformer that starts there learns faster than one with random gates.
UNMODULATED = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 1.0])


def alpha_sigma(scheduler: Any, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """`x_t = alpha x_0 + sigma noise`: `[b, 1, 1, 1]` each, in fp32."""
    kept = scheduler.alphas_cumprod.to(timesteps.device, torch.float32)[timesteps]
    return kept.sqrt().view(-1, 1, 1, 1), (1 - kept).sqrt().view(-1, 1, 1, 1)


def make_tokenizer(world: World = SMALL) -> CLIPTokenizer:
    """CLIP's byte-pair encoding in which every word of the world is one token.

    Other words fall apart into letters, for which no model of the world was trained.
    """
    letters = string.ascii_lowercase + string.digits + ",."
    tokens = [token for letter in letters for token in (letter, letter + "</w>")]
    merges = []
    for word in _inner_first(sorted(world.words)):
        prefix = word[0]
        for i, letter in enumerate(word[1:], start=2):
            suffix = letter + ("</w>" if i == len(word) else "")
            merges.append(f"{prefix} {suffix}")
            prefix += suffix
            tokens.append(prefix)
    tokens = list(dict.fromkeys(tokens)) + [START, END]
    merges = list(dict.fromkeys(merges))
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, rules = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocabulary.write_text(
            json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8"
        )
        rules.write_text(
            "#version: 0.2\n" + "".join(f"{merge}\n" for merge in merges), encoding="utf-8"
        )
        return CLIPTokenizer(str(vocabulary), str(rules), model_max_length=world.max_tokens)


def _inner_first(words: list[str]) -> Iterable[str]:
    """Those in which others begin come before them.

    Byte pairs merge in the order of this list: "and" would join two letters of "triangle" before
    "triangle" came to them.
    """
    after = {
        word: [other for other in words if word[:2] in other[1:] and len(word) > 1]
        for word in words
    }
    return TopologicalSorter(after).static_order()


def text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(text_config(tokenizer))


def make_unet(channels: tuple[int, ...] = CHANNELS_OF_UNET) -> UNet2DConditionModel:
    """2.8 M parameters where nothing else is said; text cross-attention at 8x8 and 4x4."""
    levels = len(channels)
    return UNet2DConditionModel(
        sample_size=GRID,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=16,
        attention_head_dim=4,
        cross_attention_dim=TEXT_WIDTH,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
    )


def make_pipeline(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    vae: Autoencoder,
    few_step: bool = False,
    world: World = SMALL,
) -> StableDiffusionPipeline:
    """A stock pipeline: DDIM for a teacher, LCM's scheduler for a one- or few-step student."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=make_tokenizer(world),
        unet=unet,
        scheduler=make_scheduler(few_step),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make_scheduler(few_step: bool) -> DDIMScheduler | LCMScheduler:
    if few_step:
        # of four steps, LCM's are 999, 749, 499 and 249, the beginnings of quarters
        return LCMScheduler(**NOISE, original_inference_steps=8)
    return DDIMScheduler(**NOISE, timestep_spacing="trailing")


def make_joint(width: int, layers: int, patch: int = 2) -> SD3Transformer2DModel:
    """Image and text in one attention, with the norms of SD3.5."""
    transformer: Any = SD3Transformer2DModel(
        **PATCHES,
        patch_size=patch,
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=width // 32,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=width,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=GRID // patch,
        qk_norm="rms_norm",
    )
    for module in transformer.modules():
        if isinstance(module, AdaLayerNormZero):
            torch.nn.init.zeros_(module.linear.weight)
            module.linear.bias.data.copy_(UNMODULATED.repeat_interleave(width))
    return transformer


def make_pixart(heads: int, layers: int) -> PixArtTransformer2DModel:
    """Heads of 72 numbers as PixArt's, text in cross-attention."""
    transformer: Any = PixArtTransformer2DModel(
        **PATCHES,
        patch_size=2,
        num_layers=layers,
        attention_head_dim=72,
        num_attention_heads=heads,
        cross_attention_dim=72 * heads,
        caption_channels=TEXT_WIDTH,
    )
    torch.nn.init.zeros_(transformer.adaln_single.linear.weight)
    torch.nn.init.zeros_(transformer.scale_shift_table)
    for block in transformer.transformer_blocks:
        block.scale_shift_table.data.copy_(UNMODULATED[:, None].expand(-1, 72 * heads))
    return transformer


def make_joint_pipeline(
    transformer: SD3Transformer2DModel,
    text_encoder: CLIPTextModelWithProjection,
    vae: Autoencoder,
    world: World = SMALL,
) -> StableDiffusion3Pipeline:
    """A stock pipeline without a T5; both its CLIPs are the world's. For a few steps.

    The scheduler is that of the other students and not a rectified flow's: to predict a flow the
    network would have to reproduce every number of the noise.
    """
    tokenizer = make_tokenizer(world)
    shifted: Any = copy.deepcopy(vae)
    if shifted.config.get("shift_factor") is None:
        # the pipeline adds it to every latent
        shifted.register_to_config(shift_factor=0.0)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=make_scheduler(few_step=True),
        vae=shifted,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def make_pixart_pipeline(
    transformer: PixArtTransformer2DModel,
    text_encoder: T5EncoderModel,
    tokenizer: PreTrainedTokenizerBase,
    vae: Autoencoder,
) -> PixArtAlphaPipeline:
    """A stock pipeline with a T5 of the world's. For a few steps."""
    return PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=make_scheduler(few_step=True),
    )


def tokenize(tokenizer: PreTrainedTokenizerBase, captions: list[str]) -> Tensor:
    """`[b, max_tokens]`, padded and cut as the pipeline does it."""
    return tokenizer(
        captions,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


@torch.no_grad()
def encode(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, captions: list[str]) -> Tensor:
    """`[b, max_tokens, c]`."""
    tokens = tokenize(tokenizer, captions).to(text_encoder.device)
    return text_encoder(tokens)[0]
