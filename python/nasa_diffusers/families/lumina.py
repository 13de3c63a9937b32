"""Lumina-Next: Gemma's text in cross-attention of 24 blocks, beside the image's own attention.

A block norms its text before it attends to it, and adds what it finds, by a gate for each head, to
what the image gives, before one projection for both. Keys have fewer heads than queries. Padding
is masked. The pooled text, that of the prompt, is part of the modulation. Under classifier-free
guidance the pipeline makes one batch, the prompts first.
"""

import torch
from diffusers.models import attention_processor as stock
from diffusers.models.embeddings import apply_rotary_emb

from nasa_diffusers.families.base import token_grid
from nasa_diffusers.families.side_cross import SideCross


class LuminaNext(SideCross):
    name = "Lumina-Next"
    denoisers = ("LuminaNextDiT2DModel",)
    block_list = "layers"
    masks_text = True
    text_parts = ("text_encoder", "tokenizer")
    text_options = ("clean_caption",)
    processors = (stock.LuminaAttnProcessor2_0,)

    def default_alpha(self, denoiser):
        """The paper has none: PixArt's."""
        return 0.5

    def default_nag(self, denoiser):
        """The NAG paper has none: its for PixArt-sigma."""
        return 5.0, 2.5, 0.375

    def token_limits(self, pipe, tokens, **options):
        return {"tokenizer": pipe.max_sequence_length}

    def begin(self, denoiser, side, inputs):
        rows, n, _ = inputs["encoder_hidden_states"].shape
        side.terms = side.text.terms
        side.lengths = [n, *(term.text.shape[1] for term in side.terms)]
        texts = [term.text.expand(rows, -1, -1) for term in side.terms]
        return {"encoder_hidden_states": torch.cat(texts, dim=1)}

    def in_block(self, block):
        return [block.norm1_context]

    # ---- one layer ---------------------------------------------------------------------------

    def grids(self, denoiser, sample, inputs):
        return (token_grid(sample, denoiser.config.patch_size),)

    def text_mask(self, name, mask, tokens):
        return mask

    def queries(self, attn, hidden_states):
        return attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))

    def turn(self, q, options):
        return apply_rotary_emb(q, options["query_rotary_emb"], use_real=False)

    def projections(self, attn):
        return attn.to_k, attn.to_v, attn.norm_k

    def keys_values(self, attn, text):
        head_dim = attn.inner_dim // attn.heads
        k, v = attn.norm_k(attn.to_k(text)), attn.to_v(text)
        return k.unflatten(2, (-1, head_dim)), v.unflatten(2, (-1, head_dim))

    def finish(self, attn, o, hidden_states):
        # the block projects it, with what the image gives
        return o.unflatten(2, (attn.heads, -1))
