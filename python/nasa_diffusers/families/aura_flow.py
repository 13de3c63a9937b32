"""AuraFlow: text behind eight learned tokens, beside the image in four blocks of two streams, then
in one sequence with it in 32 blocks.

Neither has positions in the attention. The pipeline makes zeros of the text's padding, which are
attended to. A negative prompt gets the learned tokens as a prompt does. Classifier-free guidance is
one doubled batch.
"""

import torch
from diffusers.models import attention_processor as stock

from nasa_diffusers.families.base import nonzero_tokens, token_grid
from nasa_diffusers.families.joint import TEXT_LAYERS
from nasa_diffusers.families.side import SideStream
from nasa_diffusers.side import Layout


class AuraFlow(SideStream):
    name = "AuraFlow"
    denoisers = ("AuraFlowTransformer2DModel",)
    text_parts = ("text_encoder", "tokenizer")
    text_options = ("max_sequence_length", "lora_scale")
    processors = (stock.AuraFlowAttnProcessor2_0, stock.FusedAuraFlowAttnProcessor2_0)
    block_lists = (
        ("joint_transformer_blocks", Layout(text="encoder_hidden_states")),
        ("single_transformer_blocks", Layout()),
    )

    def default_nag(self, denoiser):
        """No published code of the paper has it: the NAG paper's for FLUX.1."""
        return 5.0, 2.5, 0.25

    def own_tokens(self, embeds):
        return nonzero_tokens(embeds)

    def grids(self, denoiser, sample, inputs):
        return (token_grid(sample, denoiser.config.patch_size),)

    def positive_tokens(self, side, inputs):
        return inputs["encoder_hidden_states"].shape[1]

    def prepare(self, denoiser, side, term):
        x = denoiser.context_embedder(term.text)
        learned = denoiser.register_tokens.to(x.device, x.dtype).expand(len(x), -1, -1)
        mask = term.mask
        if mask is not None:
            mask = torch.cat([mask.new_ones(len(mask), learned.shape[1]), mask], dim=1)
        return torch.cat([learned, x], dim=1), mask

    def uses_fused_projection(self, attn):
        return isinstance(attn.processor, stock.FusedAuraFlowAttnProcessor2_0)

    def text_layers(self, block):
        if hasattr(block, "ff_context"):
            return (*TEXT_LAYERS, "attn.to_add_out", "ff_context")
        return "attn", "ff"
