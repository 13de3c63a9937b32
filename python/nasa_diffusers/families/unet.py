"""Stable Diffusion 1.5 and 2.1, and SDXL: every UNet2DConditionModel fed by CLIP text.

Text reaches the `attn2` layers as it is. SDXL's pooled embedding stays the positive one: NASA
acts on cross-attention only.
"""

from diffusers.models import attention_processor as stock

from nasa_diffusers.encoding import takes
from nasa_diffusers.families.base import Family, config


class UNet(Family):
    name = "Stable Diffusion"
    denoisers = ("UNet2DConditionModel",)
    # the last one is of pipelines that take longer prompts
    text_options = ("clip_skip", "lora_scale", "max_embeddings_multiples")

    def default_alpha(self, denoiser) -> float:
        """The paper's 0.1 for SD 1.5 and 0.2 for SD 2.1. It has none for SDXL: as SD 2.1, whose
        OpenCLIP text encoder is also one of SDXL's two."""
        is_sdxl = config(denoiser, "addition_embed_type") == "text_time"
        is_sd2 = config(denoiser, "cross_attention_dim") == 1024
        return 0.2 if is_sdxl or is_sd2 else 0.1

    def default_nag(self, denoiser):
        """The NAG paper's for SD 1.5 and SDXL. It has none for SD 2.1: as SD 1.5."""
        is_sdxl = config(denoiser, "addition_embed_type") == "text_time"
        return 3.0, 2.5, 0.5 if is_sdxl else 0.375

    def token_limits(self, pipe, tokens, **options):
        # a pipeline that joins pieces of 77 tokens counts in its own way
        if takes(pipe, "max_embeddings_multiples"):
            return {}
        return {"tokenizer": tokens, "tokenizer_2": tokens}

    def grids(self, denoiser, sample, inputs):
        # each level halves the image, rounding up
        height, width = sample.shape[-2:]
        grids = [(1, height, width)]
        for _ in denoiser.config.down_block_types[1:]:
            height, width = -(-height // 2), -(-width // 2)
            grids.append((1, height, width))
        return tuple(grids)

    def check(self, denoiser):
        mixes_text = (
            config(denoiser, "encoder_hid_dim_type") not in (None, "ip_image_proj")
            or config(denoiser, "addition_embed_type") not in (None, "text_time")
            or getattr(denoiser, "text_encoder_hid_proj", None) is not None
        )
        if mixes_text:
            raise ValueError(
                "enable_nasa: this UNet mixes its text tokens before the blocks, so a negative "
                "prompt cannot travel beside them; supported are the UNets of Stable Diffusion "
                "1.5, 2.1 and SDXL"
            )
        for name, module in denoiser.named_modules():
            is_text_layer = isinstance(module, stock.Attention) and module.is_cross_attention
            if is_text_layer and not name.endswith(".attn2"):
                raise ValueError(
                    f"enable_nasa: layer {name!r} of this UNet attends to the text as well, which "
                    "those of Stable Diffusion 1.5, 2.1 and SDXL do not; it is not supported"
                )
