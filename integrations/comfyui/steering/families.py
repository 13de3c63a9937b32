"""Which networks are known. One that is not here is refused by its name."""

from __future__ import annotations

from typing import Any

from .cross_families import Cosmos, Ltxav, Ltxv, PixArt, UNet, Vace, Wan
from .family import Family
from .joint_families import AuraFlow, Flux, HunyuanVideo, Krea2, Lumina, Qwen, Sd3

# by the name of the network's class, so that a ComfyUI without one of them is served as well
FAMILIES: dict[str, type[Family]] = {
    "UNetModel": UNet,
    "WanModel": Wan,
    "VaceWanModel": Vace,
    "CameraWanModel": Wan,
    "LTXVModel": Ltxv,
    "LTXAVModel": Ltxav,
    "GeneralDIT": Cosmos,
    "MiniTrainDIT": Cosmos,
    "Anima": Cosmos,
    "Flux": Flux,
    "Chroma": Flux,
    "QwenImageTransformer2DModel": Qwen,
    "OpenAISignatureMMDITWrapper": Sd3,
    "MMDiT": AuraFlow,
    "HunyuanVideo": HunyuanVideo,
    "NextDiT": Lumina,
    "SingleStreamDiT": Krea2,
    "PixArt": PixArt,
    "PixArtMS": PixArt,
}


def family_of(net: Any) -> Family:
    kind = type(net).__name__
    if kind not in FAMILIES:
        raise ValueError(
            f"NASA negative prompt: the network {kind} is not known to this node; it knows "
            f"{', '.join(FAMILIES)}"
        )
    if getattr(net, "num_frames", None) is not None or getattr(net, "use_temporal_attention", 0):
        raise ValueError("NASA negative prompt: SVD has no text, so no negative prompt either")
    return FAMILIES[kind](net)
