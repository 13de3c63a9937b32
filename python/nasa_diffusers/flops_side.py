"""What NASA adds to a call of the denoisers with a side stream, counted on the meta device.

As `flops.py` counts: nothing is computed and no weight is loaded. Their negative prompts pass the
blocks, or are modulated in them, so that every call is a first one. The negative prompt has the
size of a few words, or the one that the pipeline pads all text to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nasa_diffusers import flops_video as video
from nasa_diffusers.api import choose_layers, in_force, put_on
from nasa_diffusers.families import family_of
from nasa_diffusers.guidance import Settings
from nasa_diffusers.methods import NASA, Method
from nasa_diffusers.negative import Negative
from nasa_diffusers.window import Window

IMAGE = 4096  # tokens of 1024 x 1024 pixels


@dataclass(frozen=True)
class SideModel:
    """A denoiser's real configuration, and the sizes of one call at batch 1."""

    cls: str
    inputs: Callable[[int], dict[str, Any]]  # of a call with so many tokens of text
    negative: Callable[[int], Any]  # embeddings of so many tokens
    tokens: int
    tokens_neg: int
    config: dict[str, Any] = field(default_factory=dict)
    # in place of the denoiser's own, where that looks at values
    forward: Callable | None = None


def meta(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta")


def _qwen(n: int, shapes: tuple = ((1, 64, 64),)) -> dict[str, Any]:
    tokens = sum(f * h * w for f, h, w in shapes)
    return {
        "hidden_states": meta(1, tokens, 64), "encoder_hidden_states": meta(1, n, 3584),
        "timestep": meta(1), "img_shapes": [list(shapes)],
    }  # fmt: skip


def _qwen_edit(n: int) -> dict[str, Any]:
    return _qwen(n, ((1, 64, 64), (1, 64, 64)))


def _z_image(n: int) -> dict[str, Any]:
    return {"x": [meta(16, 1, 128, 128)], "t": meta(1), "cap_feats": [meta(n, 2560)]}


def _flux2(channels: int) -> Callable[[int], dict[str, Any]]:
    def inputs(n: int) -> dict[str, Any]:
        return {
            "hidden_states": meta(1, IMAGE, 128), "encoder_hidden_states": meta(1, n, channels),
            "timestep": meta(1), "img_ids": meta(IMAGE, 4), "txt_ids": meta(n, 4),
            "guidance": meta(1),
        }  # fmt: skip

    return inputs


def _krea2(n: int) -> dict[str, Any]:
    return {
        "hidden_states": meta(1, IMAGE, 64), "encoder_hidden_states": meta(1, n, 12, 2560),
        "timestep": meta(1), "position_ids": meta(n + IMAGE, 3),
    }  # fmt: skip


def _ltx2(video: int, sound: int) -> Callable[[int], dict[str, Any]]:
    def inputs(n: int) -> dict[str, Any]:
        # 768 x 512 pixels, 121 frames
        return {
            "hidden_states": meta(1, 6144, 128), "audio_hidden_states": meta(1, 126, 128),
            "encoder_hidden_states": meta(1, n, video),
            "audio_encoder_hidden_states": meta(1, n, sound), "timestep": meta(1),
            "audio_timestep": meta(1), "sigma": meta(1), "audio_sigma": meta(1), "num_frames": 16,
            "height": 16, "width": 24, "audio_num_frames": 126,
            "video_coords": meta(1, 3, 6144, 2), "audio_coords": meta(1, 1, 126, 2),
        }  # fmt: skip

    return inputs


def _flux_like(channels: int, **others: Any) -> Callable[[int], dict[str, Any]]:
    def inputs(n: int) -> dict[str, Any]:
        return {
            "hidden_states": meta(1, IMAGE, 64), "encoder_hidden_states": meta(1, n, channels),
            "timestep": meta(1), "img_ids": meta(IMAGE, 3), "txt_ids": meta(n, 3),
            **{name: make(n) for name, make in others.items()},
        }  # fmt: skip

    return inputs


def _fibo_layers(n: int) -> list[Tensor]:
    return [meta(1, n, 2048)] * 46


def _latents(channels: int, size: int, text: int) -> Callable[[int], dict[str, Any]]:
    def inputs(n: int) -> dict[str, Any]:
        return {
            "hidden_states": meta(1, channels, size, size), "timestep": meta(1),
            "encoder_hidden_states": meta(1, n, text),
        }  # fmt: skip

    return inputs


KLEIN = {
    "num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32,
    "joint_attention_dim": 12288, "guidance_embeds": False,
}  # fmt: skip
LTX23 = {
    "gated_attn": True, "cross_attn_mod": True, "audio_gated_attn": True,
    "audio_cross_attn_mod": True, "use_prompt_embeddings": False, "perturbed_attn": True,
}  # fmt: skip
QWEN = {"in_channels": 64, "out_channels": 16}
MODELS = {
    "Qwen-Image, 1024 px": SideModel(
        "QwenImageTransformer2DModel", _qwen, lambda m: meta(1, m, 3584), 64, 32, QWEN
    ),
    "Qwen-Image-Edit, 1024 px, one image": SideModel(
        "QwenImageTransformer2DModel", _qwen_edit, lambda m: meta(1, m, 3584), 250, 32, QWEN
    ),
    "Z-Image, 1024 px": SideModel(
        "ZImageTransformer2DModel", _z_image, lambda m: meta(1, m, 2560), 64, 32
    ),
    "FLUX.2 dev, 1024 px": SideModel(
        "Flux2Transformer2DModel", _flux2(15360), lambda m: meta(1, m, 15360), 512, 512
    ),
    "FLUX.2 klein 9B, 1024 px": SideModel(
        "Flux2Transformer2DModel", _flux2(12288), lambda m: meta(1, m, 12288), 512, 512, KLEIN
    ),
    "FLUX.2 klein 9B, 1024 px, 32 tokens": SideModel(
        "Flux2Transformer2DModel", _flux2(12288), lambda m: meta(1, m, 12288), 512, 32, KLEIN
    ),
    "Krea 2, 1024 px": SideModel(
        "Krea2Transformer2DModel", _krea2, lambda m: meta(1, m, 12, 2560), 512, 64
    ),
    "LTX-2, 512p, 121 frames": SideModel(
        "LTX2VideoTransformer3DModel", _ltx2(3840, 3840),
        lambda m: (meta(1, m, 3840), meta(1, m, 3840)), 1024, 1024,
    ),
    "LTX-2.3, 512p, 121 frames": SideModel(
        "LTX2VideoTransformer3DModel", _ltx2(4096, 2048),
        lambda m: (meta(1, m, 4096), meta(1, m, 2048)), 1024, 1024, LTX23,
    ),
    "LTX-2.3, 512p, 121 frames, 256 tokens": SideModel(
        "LTX2VideoTransformer3DModel", _ltx2(4096, 2048),
        lambda m: (meta(1, m, 4096), meta(1, m, 2048)), 1024, 256, LTX23,
    ),
    "Chroma, 1024 px": SideModel(
        "ChromaTransformer2DModel",
        _flux_like(4096, attention_mask=lambda n: meta(1, n + IMAGE)),
        lambda m: meta(1, m, 4096), 512, 32,
    ),
    "Ovis-Image, 1024 px": SideModel(
        "OvisImageTransformer2DModel", _flux_like(2048), lambda m: meta(1, m, 2048), 256, 256
    ),
    "LongCat-Image, 1024 px": SideModel(
        "LongCatImageTransformer2DModel", _flux_like(3584), lambda m: meta(1, m, 3584), 512, 512,
        {"num_layers": 10, "num_single_layers": 20},
    ),
    "Bria Fibo, 1024 px": SideModel(
        "BriaFiboTransformer2DModel", _flux_like(4096, text_encoder_layers=_fibo_layers),
        lambda m: (meta(1, m, 4096), _fibo_layers(m)), 1000, 32,
        {"num_layers": 8, "num_single_layers": 38},
    ),
    "AuraFlow, 1024 px": SideModel(
        "AuraFlowTransformer2DModel", _latents(4, 128, 2048), lambda m: meta(1, m, 2048), 256, 256
    ),
    "PRX, 1024 px": SideModel(
        "PRXTransformer2DModel", _latents(16, 128, 2304), lambda m: meta(1, m, 2304), 256, 32
    ),
}  # fmt: skip
MODELS |= {
    "HunyuanVideo, 544p, 61 frames": SideModel(
        "HunyuanVideoTransformer3DModel", video.hunyuan_video, lambda m: meta(1, m, 4096), 256, 32
    ),
    "HunyuanVideo 1.5, 480p, 121 frames": SideModel(
        "HunyuanVideo15Transformer3DModel", video.hunyuan_video15,
        lambda m: (meta(1, m, 3584), meta(1, m, 1472)), 1000, 32, forward=video.forward_15,
    ),
    "HunyuanImage 2.1, 2048 px": SideModel(
        "HunyuanImageTransformer2DModel", video.hunyuan_image, lambda m: meta(1, m, 3584), 1000, 32,
        video.HUNYUAN_IMAGE,
    ),
    "HunyuanDiT, 1024 px": SideModel(
        "HunyuanDiT2DModel", video.hunyuan_dit, lambda _: (meta(1, 77, 1024), meta(1, 256, 2048)),
        333, 333, video.HUNYUAN_DIT,
    ),
    "EasyAnimate, 512p, 49 frames": SideModel(
        "EasyAnimateTransformer3DModel", video.easyanimate, lambda m: meta(1, m, 3584), 256, 256,
        video.EASYANIMATE,
    ),
    "CogView3+, 1024 px": SideModel(
        "CogView3PlusTransformer2DModel", video.cogview3_plus, lambda m: meta(1, m, 4096), 224, 224
    ),
}  # fmt: skip


@dataclass(frozen=True)
class SideCount:
    """FLOPs of one denoiser call, a multiply-add counted as 2."""

    model: str
    tokens: int
    tokens_neg: int
    stock: int
    guided: int
    later: int  # once more with the same prompt

    @property
    def added(self) -> float:
        return (self.guided - self.stock) / self.stock

    @property
    def added_later(self) -> float:
        return (self.later - self.stock) / self.stock


def count(name: str, method: Method | None = None) -> SideCount:
    """Count one of `MODELS`."""
    model, method = MODELS[name], NASA() if method is None else method
    kind = getattr(diffusers, model.cls)
    if model.forward is not None:
        kind = type(model.cls, (kind,), {"forward": model.forward})
    with torch.device("meta"):
        denoiser = kind(**model.config).eval()
    inputs = model.inputs(model.tokens)

    @torch.no_grad()
    def call() -> int:
        with FlopCounterMode(display=False) as counter:
            denoiser(**inputs, return_dict=False)
        return counter.get_total_flops()

    stock = call()
    family, pipe = family_of(denoiser), SimpleNamespace(transformer=denoiser)
    prompt = Negative.from_embeds(model.negative(model.tokens_neg), None, family)
    read = in_force(method, family, denoiser, prompt)
    settings = Settings(prompt, **read, window=Window(), backend=None, cfg=False)
    handle = put_on(pipe, [denoiser], family, settings, [choose_layers(denoiser, family, None)])  # type: ignore[arg-type]
    # weights are of 4 bytes here, of 2 where models of this size run
    handle.cache_limit *= 2
    return SideCount(name, model.tokens, model.tokens_neg, stock, call(), call())


def markdown(counts: list[SideCount]) -> str:
    """The table of the documentation."""
    lines = [
        "| model, batch 1 | text tokens | stock call, TFLOP | guided call | a later one |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {c.model} | {c.tokens} + {c.tokens_neg} | {c.stock / 1e12:.3f} | {c.added:+.2%} "
        f"| {c.added_later:+.2%} |"
        for c in counts
    ]
    return "\n".join(lines)
