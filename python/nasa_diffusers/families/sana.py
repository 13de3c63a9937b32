"""Sana, Sana-Sprint and Sana-Video: Gemma text, masked, projected and normalised before the blocks.

Self-attention is linear there and stays as it is; `attn2` is ordinary cross-attention whose
optional query and key norms act before the heads are split.
"""

from diffusers.models.transformers.sana_transformer import SanaAttnProcessor2_0

from nasa_diffusers.families.base import (
    Family,
    project_keys_values,
    token_grid,
    video_grid,
)
from nasa_diffusers.families.versions import stock_class


class Sana(Family):
    name = "Sana"
    denoisers = ("SanaTransformer2DModel",)
    text_modules = ("caption_projection", "caption_norm")
    text_parts = ("text_encoder", "tokenizer")
    text_options = (
        "lora_scale",
        "max_sequence_length",
        "clean_caption",
        "complex_human_instruction",
    )
    masks_text = True
    processors: tuple[type, ...] = (SanaAttnProcessor2_0,)

    def default_alpha(self, denoiser) -> float:
        """The paper has none: PixArt's, the model whose text path Sana's is built on."""
        return 0.5

    def default_nag(self, denoiser):
        """The NAG paper's."""
        return 5.0, 2.5, 0.375

    def grids(self, denoiser, sample, inputs):
        return (token_grid(sample, denoiser.config.patch_size),)

    def queries(self, attn, hidden_states):
        q = attn.to_q(hidden_states)
        return norm_then_heads(attn, attn.norm_q, q)

    def keys_values(self, attn, text):
        k, v = project_keys_values(attn, text)
        return norm_then_heads(attn, attn.norm_k, k), v.unflatten(2, (attn.heads, -1))


class SanaVideo(Sana):
    name = "Sana-Video"
    denoisers = ("SanaVideoTransformer3DModel",)
    processors = (stock_class("transformer_sana_video", "SanaAttnProcessor2_0"),)

    def grids(self, denoiser, sample, inputs):
        return (video_grid(sample, denoiser.config.patch_size),)


def norm_then_heads(attn, norm, x):
    """`[b, n, h * d]` to `[b, n, h, d]`, normalised over all heads at once."""
    return (x if norm is None else norm(x)).unflatten(2, (attn.heads, -1))
