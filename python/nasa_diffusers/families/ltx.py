"""LTX-Video 0.9: T5 text, masked, projected once before the blocks.

Latents come packed, `[b, l, c]`, with their frames, height and width beside them. LTX-2 is
another model, with two streams.
"""

from nasa_diffusers.families.dispatched import Dispatched
from nasa_diffusers.families.sana import norm_then_heads
from nasa_diffusers.families.versions import stock_class


class LTXVideo(Dispatched):
    name = "LTX-Video"
    denoisers = ("LTXVideoTransformer3DModel",)
    text_modules = ("caption_projection",)
    text_parts = ("text_encoder", "tokenizer")
    text_options = ("max_sequence_length",)
    masks_text = True
    attention = stock_class("transformer_ltx", "LTXAttention")
    processors = (stock_class("transformer_ltx", "LTXVideoAttnProcessor"),)

    def default_alpha(self, denoiser) -> float:
        """The paper has none for video: PixArt's, whose text path LTX-Video's is built on."""
        return 0.5

    def default_nag(self, denoiser):
        """The NAG paper has none: its for Wan, the video model it does name."""
        return 5.0, 2.5, 0.25

    def grids(self, denoiser, sample, inputs):
        size = tuple(inputs.get(name) for name in ("num_frames", "height", "width"))
        # frames, height and width say nothing beside coordinates
        if None in size or inputs.get("video_coords") is not None:
            raise ValueError(
                "nasa_diffusers: this pipeline gives LTX-Video coordinates instead of frames, "
                "height and width, so a map over the image has no place; give alpha as a number, "
                "or one per image"
            )
        return (size,)

    def keys_values(self, attn, text):
        # its processor leaves fused projections alone
        k, v = attn.to_k(text), attn.to_v(text)
        return norm_then_heads(attn, attn.norm_k, k), v.unflatten(2, (attn.heads, -1))
