"""The model families, and which one a denoiser belongs to."""

from torch import nn

from nasa_diffusers.families.aura_flow import AuraFlow
from nasa_diffusers.families.base import Family
from nasa_diffusers.families.cog import CogVideoX, CogView3Plus, CogView4
from nasa_diffusers.families.cosmos import Cosmos
from nasa_diffusers.families.easyanimate import EasyAnimate
from nasa_diffusers.families.ernie import ErnieImage
from nasa_diffusers.families.flux import Flux
from nasa_diffusers.families.flux2 import Flux2
from nasa_diffusers.families.flux_like import Bria, Chroma, Fibo, LongCat, Ovis
from nasa_diffusers.families.hidream import HiDream
from nasa_diffusers.families.hunyuan_dit import HunyuanDiT
from nasa_diffusers.families.hunyuan_glyphs import HunyuanImage, HunyuanVideo15
from nasa_diffusers.families.hunyuan_video import Framepack, HunyuanVideo
from nasa_diffusers.families.ideogram4 import Ideogram4
from nasa_diffusers.families.joy import JoyImageEdit
from nasa_diffusers.families.krea2 import Krea2
from nasa_diffusers.families.ltx import LTXVideo
from nasa_diffusers.families.ltx2 import LTX2
from nasa_diffusers.families.lumina import LuminaNext
from nasa_diffusers.families.lumina2 import Lumina2
from nasa_diffusers.families.mochi import Mochi
from nasa_diffusers.families.pixart import Allegro, Latte, PixArt
from nasa_diffusers.families.prx import PRX
from nasa_diffusers.families.qwen import QwenImage
from nasa_diffusers.families.qwen21 import QwenImage21
from nasa_diffusers.families.sana import Sana, SanaVideo
from nasa_diffusers.families.sd3 import StableDiffusion3
from nasa_diffusers.families.skyreels import SkyReels
from nasa_diffusers.families.unet import AnimateDiff, UNet
from nasa_diffusers.families.unsupported import REASONS
from nasa_diffusers.families.wan import Wan
from nasa_diffusers.families.wan_like import AnyFlow, ChronoEdit, Helios, WanAnimate
from nasa_diffusers.families.z_image import ZImage

FAMILIES: tuple[Family, ...] = (
    UNet(),
    AnimateDiff(),
    PixArt(),
    Allegro(),
    Latte(),
    Sana(),
    SanaVideo(),
    LTXVideo(),
    Cosmos(),
    Wan(),
    WanAnimate(),
    ChronoEdit(),
    AnyFlow(),
    Helios(),
    SkyReels(),
    Flux(),
    StableDiffusion3(),
    QwenImage(),
    ZImage(),
    Flux2(),
    Krea2(),
    LTX2(),
    CogVideoX(),
    CogView3Plus(),
    CogView4(),
    HunyuanVideo(),
    Framepack(),
    HunyuanVideo15(),
    HunyuanImage(),
    HunyuanDiT(),
    LuminaNext(),
    Mochi(),
    EasyAnimate(),
    Chroma(),
    Ovis(),
    LongCat(),
    Bria(),
    Fibo(),
    Lumina2(),
    AuraFlow(),
    ErnieImage(),
    PRX(),
    QwenImage21(),
    Ideogram4(),
    HiDream(),
    JoyImageEdit(),
)


def family_of(denoiser: nn.Module) -> Family:
    """The family of a denoiser, by its class or a base class of it."""
    for cls in type(denoiser).__mro__:
        for family in FAMILIES:
            if cls.__name__ in family.denoisers:
                return family
        if cls.__name__ in REASONS:
            # though a family may know what it is made from
            break
    raise ValueError(
        f"enable_nasa: {not_known(type(denoiser).__name__)}; run it without NASA, "
        "`python -m nasa_diffusers pipelines` lists what is supported"
    )


def not_known(denoiser: str) -> str:
    """What is said of a class of denoisers that no family knows."""
    reason = f": {REASONS[denoiser]}" if denoiser in REASONS else ""
    return f"no family knows the denoiser {denoiser}{reason}"
