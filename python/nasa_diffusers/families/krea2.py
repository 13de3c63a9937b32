"""Krea 2: twelve layers of Qwen3-VL's text, fused, before the image in one sequence.

The fusion and the projection of the text know nothing of time, and all text stands at position 0.
Its padding is masked. Twelve key heads serve 48 query heads, and a gate, made of the layer's input,
multiplies what the attention gives. Classifier-free guidance is two calls; the one with the
pipeline's own negative prompt is left alone.
"""

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from nasa_diffusers.families.base import ImageTokens
from nasa_diffusers.families.side import SideStream, linears
from nasa_diffusers.side import Layout

try:
    from diffusers.models.transformers.transformer_krea2 import Krea2AttnProcessor
except ImportError:  # before diffusers 0.39
    PROCESSORS: tuple[type, ...] = ()
else:
    PROCESSORS = (Krea2AttnProcessor,)


class Krea2Tokens(ImageTokens):
    """Said by `position_ids`, whose last rows are those of the image."""

    def grids(self, sample, inputs):
        ids = inputs["position_ids"][-sample.shape[1] :]
        _, height, width = (ids.amax(0) - ids.amin(0) + 1).long().tolist()
        return ((1, height, width),)


class Krea2(SideStream):
    name = "Krea 2"
    denoisers = ("Krea2Transformer2DModel",)
    doubles_batch = False
    masks_text = True
    text_parts = ("text_encoder", "tokenizer")
    text_options = ("max_sequence_length",)
    processors = PROCESSORS
    block_lists = (("transformer_blocks", Layout()),)

    def default_nag(self, denoiser):
        """No published code of the paper has it: the NAG paper's for FLUX.1."""
        return 5.0, 2.5, 0.25

    def as_text(self, text):
        """Layer by layer, `[b, n, layers, c]`, as one row of channels a token."""
        return super().as_text(text).flatten(2)

    def encode(self, pipe, prompts, **options):
        return self.read_embeds(*super().encode(pipe, prompts, **options))

    def read_embeds(self, embeds, mask):
        """Without the tokens that no row attends to: the pipeline's padding lies before the last
        tokens, and the text's have all one position."""
        if not isinstance(embeds, Tensor) or embeds.dim() != 4:
            return embeds, mask
        embeds = embeds.flatten(2)
        if mask is None or mask.is_meta or mask.shape != embeds.shape[:2]:
            return embeds, mask
        are = mask.bool().any(0)
        return embeds[:, are], mask[:, are]

    def image_tokens(self, denoiser):
        return Krea2Tokens(self, denoiser)

    def prepare(self, denoiser, side, term):
        layers = denoiser.config.num_text_layers
        mask = None if term.mask is None else term.mask[:, None, None, :]
        x = denoiser.text_fusion(term.text.unflatten(2, (layers, -1)), attention_mask=mask)
        return denoiser.txt_in(x), term.mask

    def arrange(self, denoiser, side, rope):
        n, m = side.lengths[0], side.m
        own = denoiser.rotary_emb(torch.zeros(m, 3, device=rope[0].device))
        return tuple(
            torch.cat([given[n:], given[:n], x]) for given, x in zip(rope, own, strict=True)
        )

    def rotate(self, x, rope):
        return apply_rotary_emb(x, rope, sequence_dim=1)

    def text_mask(self, side, options):
        mask = options.get("attention_mask")
        return None if mask is None else mask[:, 0, 0, : side.lengths[0]].bool()

    def project(self, attn, image, text):
        q = attn.norm_q(attn.to_q(image).unflatten(2, (attn.num_heads, -1)))
        k = attn.norm_k(attn.to_k(image).unflatten(2, (attn.num_kv_heads, -1)))
        v = attn.to_v(image).unflatten(2, (attn.num_kv_heads, -1))
        return q, k, v, attn.to_gate(image)

    def finish(self, attn, o, image, layout, rest):
        return attn.to_out[0](o * torch.sigmoid(rest))

    def text_layers(self, block):
        return linears(block)
