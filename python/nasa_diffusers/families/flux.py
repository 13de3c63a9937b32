"""FLUX.1 dev, schnell and their relatives: T5 text beside the image in 19 blocks of two streams,
then in one sequence with it in 38 blocks of one.

The time, guidance and CLIP vector that modulates a block stays that of the positive prompt, for
the negative stream too: in training all tokens of one attention were modulated by one vector.
Classifier-free guidance (`true_cfg_scale`) is two calls; the one with the pipeline's own negative
prompt is left alone.
"""

from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

from nasa_diffusers.families.base import on_device
from nasa_diffusers.families.joint import TEXT_LAYERS, Joint
from nasa_diffusers.joint import RopeBlockHook, SingleBlockHook

SINGLE = "single_transformer_blocks."


class Flux(Joint):
    name = "FLUX.1"
    denoisers = ("FluxTransformer2DModel",)
    doubles_batch = False
    processors = (FluxAttnProcessor,)

    def encode(self, pipe, prompts, max_sequence_length, **options):
        length = {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}
        embeds, *_ = pipe.encode_prompt(prompts, prompt_2=None, device=on_device(pipe), **length)
        return embeds, None

    def grids(self, denoiser, sample):
        raise ValueError(
            "nasa_diffusers: FLUX.1 is not told the height and width of its image, so alpha cannot "
            "be a map over it; give a number, or one per image"
        )

    def blocks(self, denoiser):
        yield from super().blocks(denoiser)
        for i, block in enumerate(denoiser.single_transformer_blocks):
            yield f"{SINGLE}{i}", block

    def block_hook(self, name, block, is_last):
        hook = SingleBlockHook if name.startswith(SINGLE) else RopeBlockHook
        return hook(name, block, is_last)

    def uses_fused_projection(self, attn):
        return attn.fused_projections

    def text_layers(self, block):
        if hasattr(block, "proj_mlp"):
            return "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out"
        return (*TEXT_LAYERS, "attn.to_add_out", "ff_context")
