"""Mochi: T5's text beside the video in 48 blocks of two streams.

Text is projected token by token; its pooled vector, that of the prompt, is part of the modulation.
Padding is masked. Each head has positions of its own. The last block drops its text. Under
classifier-free guidance the pipeline makes one doubled batch.
"""

import torch
from diffusers.models import attention_processor as stock

from nasa_diffusers.families.base import video_grid
from nasa_diffusers.families.two_streams import TwoStreams
from nasa_diffusers.side import Layout


class Mochi(TwoStreams):
    name = "Mochi"
    denoisers = ("MochiTransformer3DModel",)
    masks_text = True
    text_parts = ("text_encoder", "tokenizer")
    text_options = ("max_sequence_length",)
    processors = (stock.MochiAttnProcessor2_0,)
    block_lists = (
        (
            "transformer_blocks",
            Layout(text="encoder_hidden_states", text_first=False, attention="attn1"),
        ),
    )

    def grids(self, denoiser, sample, inputs):
        patch = denoiser.config.patch_size
        return (video_grid(sample, (1, patch, patch)),)

    def prepare(self, denoiser, side, term):
        return denoiser.time_embed.caption_proj(term.text), term.mask

    def rotate(self, x, rope):
        """By cosines and sines `[l, h, d / 2]`."""
        cos, sin = rope
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
        return turned.flatten(3).type_as(x)

    def text_mask(self, side, options):
        mask = options.get("attention_mask")
        return None if mask is None else mask.bool()
