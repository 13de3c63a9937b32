"""SkyReels-V2, text to video: Wan's text path under diffusion forcing.

Frames are denoised in blocks that see only themselves and what came before; long videos are
made piece by piece. The text is the same in every piece, so its keys and values are kept for all.
"""

from diffusers.models.transformers.transformer_skyreels_v2 import (
    SkyReelsV2Attention,
    SkyReelsV2AttnProcessor,
)

from nasa_diffusers.families.wan import Wan


class SkyReels(Wan):
    name = "SkyReels-V2"
    denoisers = ("SkyReelsV2Transformer3DModel",)
    processors = (SkyReelsV2AttnProcessor,)
    attention = SkyReelsV2Attention
