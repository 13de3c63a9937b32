"""Stable Diffusion 1.5 and 2.1, SDXL and Kolors, and AnimateDiff's UNet over their frames.

CLIP text reaches the `attn2` layers as it is, Kolors's after one projection. SDXL's pooled
embedding stays the positive one: NASA acts on cross-attention only.
"""

from diffusers.models import attention_processor as stock

from nasa_diffusers.encoding import takes
from nasa_diffusers.families.base import Family, config
from nasa_diffusers.layer import TextHook

MIXES_TEXT = (
    "this UNet mixes its text tokens before the blocks, so a negative prompt cannot travel beside "
    "them; supported are the UNets of Stable Diffusion 1.5, 2.1, SDXL and Kolors"
)


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

    def text_hooks(self, denoiser, cache):
        if config(denoiser, "encoder_hid_dim_type") == "text_proj":
            projection = denoiser.encoder_hid_proj
        else:
            # its place where there is an IP-Adapter
            projection = getattr(denoiser, "text_encoder_hid_proj", None)
        return [] if projection is None else [(projection, TextHook(cache))]

    def check(self, denoiser):
        of_text = (None, "text_proj", "ip_image_proj")
        mixes_text = config(denoiser, "encoder_hid_dim_type") not in of_text or config(
            denoiser, "addition_embed_type"
        ) not in (None, "text_time")
        if mixes_text:
            raise ValueError(f"enable_nasa: {MIXES_TEXT}")
        for name, module in denoiser.named_modules():
            is_text_layer = isinstance(module, stock.Attention) and module.is_cross_attention
            if is_text_layer and not name.endswith(".attn2"):
                raise ValueError(
                    f"enable_nasa: layer {name!r} of this UNet attends to the text as well, which "
                    "those of Stable Diffusion 1.5, 2.1 and SDXL do not; it is not supported"
                )


class AnimateDiff(UNet):
    """The frames of a video are images, each with the text; motion modules attend over time."""

    name = "AnimateDiff"
    denoisers = ("UNetMotionModel",)

    def layers(self, denoiser):
        for name, module in super().layers(denoiser):
            if ".motion_modules." not in name:
                yield name, module

    def grids(self, denoiser, sample, inputs):
        # [b, c, frames, height, width], and the frames are rows
        return super().grids(denoiser, sample[:, :, 0], inputs)
