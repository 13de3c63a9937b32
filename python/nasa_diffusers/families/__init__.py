"""The model families, and which one a denoiser belongs to."""

from torch import nn

from nasa_diffusers.families.base import Family
from nasa_diffusers.families.cog import CogVideoX, CogView4
from nasa_diffusers.families.flux import Flux
from nasa_diffusers.families.flux2 import Flux2
from nasa_diffusers.families.krea2 import Krea2
from nasa_diffusers.families.ltx2 import LTX2
from nasa_diffusers.families.pixart import PixArt
from nasa_diffusers.families.qwen import QwenImage
from nasa_diffusers.families.sana import Sana
from nasa_diffusers.families.sd3 import StableDiffusion3
from nasa_diffusers.families.skyreels import SkyReels
from nasa_diffusers.families.unet import UNet
from nasa_diffusers.families.wan import Wan
from nasa_diffusers.families.z_image import ZImage

FAMILIES: tuple[Family, ...] = (
    UNet(),
    PixArt(),
    Sana(),
    Wan(),
    SkyReels(),
    Flux(),
    StableDiffusion3(),
    QwenImage(),
    ZImage(),
    Flux2(),
    Krea2(),
    LTX2(),
    CogVideoX(),
    CogView4(),
)


def family_of(denoiser: nn.Module) -> Family:
    """The family of a denoiser, by its class or a base class of it."""
    names = {cls.__name__ for cls in type(denoiser).__mro__}
    for family in FAMILIES:
        if names & set(family.denoisers):
            return family
    known = ", ".join(name for family in FAMILIES for name in family.denoisers)
    raise ValueError(
        f"enable_nasa: no family knows the denoiser {type(denoiser).__name__}; known are {known}"
    )
