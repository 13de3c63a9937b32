"""SkyReels-V2, to video from text, images or videos: Wan's text path under diffusion forcing.

Frames are denoised in blocks that see only themselves and what came before; long videos are
made piece by piece. The text is the same in every piece, so its keys and values are kept for all.
"""

from diffusers.models.transformers import transformer_skyreels_v2 as skyreels
from torch import nn

from nasa_diffusers.families.wan import Wan

# before diffusers 0.36 its layers were others
ATTENTION: type | None = getattr(skyreels, "SkyReelsV2Attention", None)


class SkyReels(Wan):
    name = "SkyReels-V2"
    denoisers = ("SkyReelsV2Transformer3DModel",)
    processors = (
        getattr(skyreels, "SkyReelsV2AttnProcessor", skyreels.SkyReelsV2AttnProcessor2_0),
    )
    attention = ATTENTION or nn.Module

    missing = "" if ATTENTION else "SkyReels-V2 is supported from diffusers 0.36 on"

    def check(self, denoiser):
        if self.missing:
            raise ValueError(f"enable_nasa: {self.missing}; pip install -U diffusers")
        super().check(denoiser)
