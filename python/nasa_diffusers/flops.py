"""What NASA adds to a denoiser call, counted on the real architectures on the meta device.

Nothing is computed and no weight is loaded: `FlopCounterMode` counts the operations of a stock
call, of the first guided call and of a later one, whose text keys and values are cached. The
positive prompt's are cached too, so a later call leaves out work that the stock call repeats.
Encoding the negative prompt is not part of a denoiser call and is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    CosmosTransformer3DModel,
    FluxTransformer2DModel,
    LTXVideoTransformer3DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nasa_diffusers.api import choose_layers, in_force, put_on
from nasa_diffusers.families import Family, family_of
from nasa_diffusers.guidance import Settings
from nasa_diffusers.methods import NASA, Method
from nasa_diffusers.negative import Negative
from nasa_diffusers.window import Window


@dataclass(frozen=True)
class Model:
    """A denoiser's real configuration, and the sizes of one call at batch 1."""

    build: Any  # a denoiser class
    config: dict[str, Any]
    latents: tuple[int, ...]  # [c, height, width], of video [c, frames, ...], of FLUX.1 [l, c]
    tokens: int
    channels: int
    inputs: dict[str, Any] = field(default_factory=dict)
    # tokens of both prompts before padding, where padding is folded; None: as many as there are
    words: tuple[int, int] | None = None


SDXL_INPUTS = {
    "added_cond_kwargs": {
        "text_embeds": torch.empty(1, 1280, device="meta"),
        "time_ids": torch.empty(1, 6, device="meta"),
    }
}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
PIXART_INPUTS = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
FLUX_INPUTS = {
    "pooled_projections": torch.empty(1, 768, device="meta"),
    "img_ids": torch.empty(4096, 3, device="meta"),
    "txt_ids": torch.empty(256, 3, device="meta"),
}

MODELS = {
    "SD 1.5, 512 px": Model(
        UNet2DConditionModel, {"cross_attention_dim": 768}, (4, 64, 64), 77, 768
    ),
    "SD 2.1-base, 512 px": Model(
        UNet2DConditionModel,
        {
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        },
        (4, 64, 64),
        77,
        1024,
    ),
    "SDXL, 512 px": Model(UNet2DConditionModel, SDXL, (4, 64, 64), 77, 2048, SDXL_INPUTS),
    "SDXL, 1024 px": Model(UNet2DConditionModel, SDXL, (4, 128, 128), 77, 2048, SDXL_INPUTS),
    "PixArt-alpha, 512 px": Model(
        PixArtTransformer2DModel,
        {"sample_size": 64, "caption_channels": 4096},
        (4, 64, 64),
        120,
        4096,
        PIXART_INPUTS,
    ),
    "PixArt-sigma, 1024 px": Model(
        PixArtTransformer2DModel,
        {
            "sample_size": 128,
            "caption_channels": 4096,
            "interpolation_scale": 2,
            "use_additional_conditions": False,
        },
        (4, 128, 128),
        300,
        4096,
        PIXART_INPUTS,
    ),
    "Sana 0.6B, 1024 px": Model(
        SanaTransformer2DModel,
        {
            "num_layers": 28,
            "num_attention_heads": 36,
            "attention_head_dim": 32,
            "num_cross_attention_heads": 16,
            "cross_attention_head_dim": 72,
            "cross_attention_dim": 1152,
            "caption_channels": 2304,
        },
        (32, 32, 32),
        300,
        2304,
    ),
    "FLUX.1 schnell, 1024 px": Model(
        FluxTransformer2DModel, {}, (4096, 64), 256, 4096, FLUX_INPUTS
    ),
    "SD3 medium, 1024 px": Model(
        SD3Transformer2DModel,
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 192,
        },
        (16, 128, 128),
        333,
        4096,
        {"pooled_projections": torch.empty(1, 2048, device="meta")},
    ),
    "Wan 2.1 1.3B, 480p, 81 frames": Model(
        WanTransformer3DModel,
        {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960},
        (16, 21, 60, 104),
        512,
        4096,
    ),
}
MODELS["Wan 2.1 1.3B, 480p, 81 frames, 120 + 70 words"] = replace(
    MODELS["Wan 2.1 1.3B, 480p, 81 frames"], words=(120, 70)
)
MODELS |= {
    "Wan 2.1 14B, image to video, 480p, 81 frames, 120 + 70 words": Model(
        WanTransformer3DModel,
        {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
        (36, 21, 60, 104),
        512,
        4096,
        {"encoder_hidden_states_image": torch.empty(1, 257, 1280, device="meta")},
        words=(120, 70),
    ),
    "Cosmos-Predict2 2B, 1024 px": Model(
        CosmosTransformer3DModel,
        {
            "num_attention_heads": 16,
            # the pipeline's padding mask is one channel more of 17
            "concat_padding_mask": False,
            "extra_pos_embed_type": None,
        },
        (16, 1, 128, 128),
        512,
        1024,
    ),
    "LTX-Video 2B, 768x512, 97 frames": Model(
        LTXVideoTransformer3DModel,
        {},
        (4992, 128),
        128,
        4096,
        {"encoder_attention_mask": None, "num_frames": 13, "height": 16, "width": 24},
    ),
    "Kolors, 1024 px": Model(
        UNet2DConditionModel,
        SDXL
        | {
            "encoder_hid_dim": 4096,
            "encoder_hid_dim_type": "text_proj",
            "projection_class_embeddings_input_dim": 5632,
        },
        (4, 128, 128),
        256,
        4096,
        {
            "added_cond_kwargs": {
                "text_embeds": torch.empty(1, 4096, device="meta"),
                "time_ids": torch.empty(1, 6, device="meta"),
            }
        },
    ),
}


def folded(family: Family, positive: Tensor, words: tuple[int, int]) -> Family:
    """Tensors on meta have no values, so it is said here which tokens are padding."""

    class Folded(type(family)):  # type: ignore[misc]
        def folded_length(self, text: Tensor) -> int:
            return words[0 if text is positive else 1] + 1

    return Folded()


@dataclass(frozen=True)
class Count:
    """FLOPs of one denoiser call, a multiply-add counted as 2."""

    model: str
    tokens: int
    stock: int
    first: int  # the negative prompt's first call
    later: int  # every call after it
    words: tuple[int, int] | None = None

    @property
    def keys(self) -> str:
        """Keys of both prompts in a layer: all padding is one."""
        both = (self.tokens,) * 2 if self.words is None else [words + 1 for words in self.words]
        return " + ".join(map(str, both))

    @property
    def added_first(self) -> float:
        return (self.first - self.stock) / self.stock

    @property
    def added_later(self) -> float:
        return (self.later - self.stock) / self.stock


def count(name: str, method: Method | None = None) -> Count:
    """Count one of `MODELS`."""
    return count_model(name, MODELS[name], method)


def count_model(name: str, model: Model, method: Method | None = None) -> Count:
    """Count an architecture, with a negative prompt as long as the positive one."""
    method = NASA() if method is None else method
    with torch.device("meta"):
        denoiser = model.build(**model.config).eval()
        sample = torch.empty(1, *model.latents)
        text = torch.empty(1, model.tokens, model.channels)
        negative = torch.empty(1, model.tokens, model.channels)
        timestep = torch.ones(1)

    @torch.no_grad()
    def call() -> int:
        with FlopCounterMode(display=False) as counter:
            denoiser(
                sample, timestep=timestep, encoder_hidden_states=text, return_dict=False,
                **model.inputs,
            )  # fmt: skip
        return counter.get_total_flops()

    stock = call()
    pipe: Any = SimpleNamespace(transformer=denoiser)
    family: Family = family_of(denoiser)
    if model.words is not None:
        family = folded(family, text, model.words)
    prompt = Negative.from_embeds(negative, None, family, method.drops_padding)
    read = in_force(method, family, denoiser, prompt)
    settings = Settings(prompt, **read, window=Window(), backend=None, cfg=None)
    handle = put_on(pipe, [denoiser], family, settings, [choose_layers(denoiser, family, None)])
    # what is kept is fp32 here, twice as much as in a call of a real model
    handle.cache_limit *= 2
    return Count(name, model.tokens, stock, first=call(), later=call(), words=model.words)


def markdown(counts: list[Count]) -> str:
    """The table of the documentation."""
    lines = [
        "| model, batch 1 | text keys | stock call, TFLOP | first guided call | later calls |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {c.model} | {c.keys} | {c.stock / 1e12:.3f} "
        f"| {c.added_first:+.2%} | {c.added_later:+.2%} |"
        for c in counts
    ]
    return "\n".join(lines)
