"""CogVideoX and CogView4: blocks of two streams that share their projections.

Text is projected token by token and has no positions; those of the image turn its own queries and
keys alone. CogVideoX pads T5's text and does not mask it, as FLUX.1 does; CogView4 puts up to 15
tokens of padding before GLM's. Under classifier-free guidance CogVideoX makes one doubled batch and
CogView4 two calls.
"""

import torch
from diffusers.models import attention_processor as stock
from diffusers.models.embeddings import apply_rotary_emb

from nasa_diffusers.encoding import side_by_side, token_counts
from nasa_diffusers.families.base import config, token_grid
from nasa_diffusers.families.side import SideStream
from nasa_diffusers.side import Layout

try:
    from diffusers.models.transformers.transformer_cogview4 import CogView4AttnProcessor
except ImportError:  # pragma: no cover
    COGVIEW4: tuple[type, ...] = ()
else:
    COGVIEW4 = (CogView4AttnProcessor,)

MAX_TOKENS = 226


class SharedProjections(SideStream):
    """The answers for layers that treat text and image alike."""

    text_parts = ("text_encoder", "tokenizer")
    text_options = ("max_sequence_length",)
    block_lists = (
        (
            "transformer_blocks",
            Layout(text="encoder_hidden_states", text_first=False, attention="attn1"),
        ),
    )
    # of a pair of channels that turn together: neighbours (-1), or one of each half (-2)
    halves = -1

    def default_nag(self, denoiser):
        """No published code of the paper has it: the NAG paper's for FLUX.1."""
        return 5.0, 2.5, 0.25

    def arrange(self, denoiser, side, rope):
        """Nothing turns the text: cosine 1 and sine 0."""
        count = sum(side.lengths)
        return tuple(
            torch.cat([x, x.new_full((count, x.shape[1]), value)])
            for x, value in zip(rope, (1.0, 0.0), strict=True)
        )

    def rotate(self, x, rope):
        return apply_rotary_emb(x, rope, use_real_unbind_dim=self.halves, sequence_dim=1)

    def project(self, attn, image, text):
        return *self.image_heads(attn, torch.cat([image, text], dim=1)), None

    def finish(self, attn, o, image, layout, rest):
        o = self.output(attn, o)
        return o[:, :image], o[:, image:]

    def text_layers(self, block):
        return "attn1", "ff"


class CogVideoX(SharedProjections):
    name = "CogVideoX"
    denoisers = ("CogVideoXTransformer3DModel",)
    processors = (stock.CogVideoXAttnProcessor2_0, stock.FusedCogVideoXAttnProcessor2_0)

    def encode_unpadded(self, pipe, prompts, length_is_named, **options):
        if length_is_named:
            return self.encode(pipe, prompts, **options)
        # T5 sees its padding: a prompt without any is one encoded to its own length
        limit, rows = options.get("max_sequence_length", MAX_TOKENS), []
        for prompt, count in zip(prompts, token_counts(pipe, "tokenizer", prompts), strict=True):
            length = {"max_sequence_length": min(count, limit)}
            rows.append(self.encode(pipe, [prompt], **options | length)[0][0])
        return side_by_side(rows)

    def prepare(self, denoiser, side, term):
        embed = denoiser.patch_embed
        x = embed.text_proj(term.text)
        if embed.use_learned_positional_embeddings:
            if x.shape[1] > embed.max_text_seq_length:
                raise ValueError(
                    f"nasa_diffusers: the negative prompt has {x.shape[1]} tokens, and this model "
                    f"has positions for {embed.max_text_seq_length}; set max_sequence_length"
                )
            x = x + embed.pos_embedding[:, : x.shape[1]].to(x.dtype)
        return x, term.mask

    def grids(self, denoiser, sample, inputs):
        patch, frames = denoiser.config.patch_size, config(denoiser, "patch_size_t") or 1
        # [b, frames, c, height, width]
        return ((sample.shape[1] // frames, *token_grid(sample, patch)[1:]),)

    def uses_fused_projection(self, attn):
        return isinstance(attn.processor, stock.FusedCogVideoXAttnProcessor2_0)


class CogView4(SharedProjections):
    name = "CogView4"
    denoisers = ("CogView4Transformer2DModel",)
    doubles_batch = False
    processors = COGVIEW4
    halves = -2

    def encode_unpadded(self, pipe, prompts, length_is_named, **options):
        rows = []
        for prompt, count in zip(prompts, token_counts(pipe, "tokenizer", prompts), strict=True):
            embeds, _ = self.encode(pipe, [prompt], **options)
            rows.append(embeds[0, -min(count, embeds.shape[1]) :])
        return side_by_side(rows)

    def check_call(self, denoiser, inputs):
        super().check_call(denoiser, inputs)
        if inputs.get("attention_mask") is not None:
            raise ValueError(
                "nasa_diffusers: the call brings an attention_mask, which the pipelines of "
                "CogView4 never give; leave it out"
            )

    def prepare(self, denoiser, side, term):
        return denoiser.patch_embed.text_proj(term.text), term.mask

    def grids(self, denoiser, sample, inputs):
        return (token_grid(sample, denoiser.config.patch_size),)
