"""Stable Diffusion 3 and 3.5: CLIP and T5 tokens, one after the other, beside the image.

The time and pooled vector that modulates a block stays that of the positive prompt, for the
negative stream too, as in FLUX.1. The second attention of SD3.5 medium's first blocks is over the
image alone and stays as it is; the last block drops its text.
"""

import torch
from diffusers.models import attention_processor as stock

from nasa_diffusers.encoding import side_by_side, token_counts
from nasa_diffusers.families.base import token_grid
from nasa_diffusers.families.joint import TEXT_LAYERS, Joint
from nasa_diffusers.joint import PlainAttentionHook


class StableDiffusion3(Joint):
    name = "Stable Diffusion 3"
    denoisers = ("SD3Transformer2DModel",)
    processors = (
        stock.JointAttnProcessor2_0,
        stock.FusedJointAttnProcessor2_0,
        stock.XFormersJointAttnProcessor,
    )
    text_options = ("clip_skip", "lora_scale", "max_sequence_length")
    text_parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")

    def default_nag(self, denoiser):
        """The NAG paper's for SD3.5 large."""
        return 5.0, 2.5, 0.125

    def encode_unpadded(self, pipe, prompts, length_is_named, **options):
        if length_is_named:
            return self.encode(pipe, prompts, **options)
        rows, limits = [], self.token_limits(pipe, 0, **options)
        for prompt in prompts:
            counts = {
                name: min(limit, *token_counts(pipe, name, [prompt]))
                for name, limit in limits.items()
                if getattr(pipe, name) is not None
            }
            t5 = counts.get("tokenizer_3", 0)
            length = {"max_sequence_length": max(t5, 1)}
            embeds, _ = self.encode(pipe, [prompt], **options | length)
            clip = max(counts["tokenizer"], counts["tokenizer_2"])
            start = pipe.tokenizer_max_length
            rows.append(torch.cat([embeds[0, :clip], embeds[0, start : start + t5]]))
        return side_by_side(rows)

    def token_limits(self, pipe, tokens, **options):
        clip = pipe.tokenizer_max_length
        t5 = options.get("max_sequence_length", tokens - clip)
        return {"tokenizer": clip, "tokenizer_2": clip, "tokenizer_3": t5}

    def least_tokens(self, pipe):
        # it is the length of T5's tokens; without a T5 the pipeline puts as many zeros there
        return 0 if pipe.text_encoder_3 is None else 1

    def grids(self, denoiser, sample, inputs):
        return (token_grid(sample, denoiser.config.patch_size),)

    def check_call(self, denoiser, inputs):
        super().check_call(denoiser, inputs)
        if inputs.get("skip_layers") is not None:
            raise RuntimeError(
                "nasa_diffusers: skip-layer guidance calls the transformer once more, for its "
                "conditional rows only, and NASA cannot tell that call from the others; leave out "
                "skip_guidance_layers, or call disable_nasa(pipe)"
            )

    def block_hooks(self, denoiser, guided):
        second = [block.attn2 for _, block in self.blocks(denoiser)]
        plain = [(attn, PlainAttentionHook()) for attn in second if attn is not None]
        return super().block_hooks(denoiser, guided) + plain

    def check_attention(self, name, attn, attention_mask):
        super().check_attention(name, attn, attention_mask)
        if self.uses_fused_projection(attn) and attn.norm_q is not None:
            raise RuntimeError(
                f"nasa_diffusers: layer {name!r} has the processor FusedJointAttnProcessor2_0, "
                "which leaves out the norms of SD3.5's queries and keys; call "
                "transformer.unfuse_qkv_projections()"
            )

    def uses_fused_projection(self, attn):
        # unfusing restores the processor and leaves the fused linears where they are
        return isinstance(attn.processor, stock.FusedJointAttnProcessor2_0)

    def text_layers(self, block):
        if block.context_pre_only:
            return TEXT_LAYERS
        return (*TEXT_LAYERS, "attn.to_add_out", "ff_context")
