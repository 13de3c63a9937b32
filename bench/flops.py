"""`bench flops`: FLOPs of one denoiser call by method, counted on the meta device.

The architectures are those of `nasa_diffusers.flops` and some more. Encoding a negative prompt is
no part of a denoiser call and happens once per prompt: it is counted by itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel, WanTransformer3DModel
from nasa_diffusers import flops as counted
from nasa_diffusers.flops import Model
from torch.utils.flop_counter import FlopCounterMode

from bench import baselines
from bench.row import Row
from bench.session import Session


def _meta(*sizes: int) -> torch.Tensor:
    return torch.empty(*sizes, device="meta")


EXTRA: dict[str, Model] = {
    "PixArt-alpha, 1024 px": Model(
        PixArtTransformer2DModel,
        {"sample_size": 128, "caption_channels": 4096, "interpolation_scale": 2},
        (4, 128, 128),
        120,
        4096,
        {"added_cond_kwargs": {"resolution": _meta(1, 2), "aspect_ratio": _meta(1, 1)}},
    ),
    "Wan 2.1 14B, 480p, 81 frames": Model(WanTransformer3DModel, {}, (16, 21, 60, 104), 512, 4096),
}
MODELS = {**counted.MODELS, **EXTRA}

METHODS: dict[str, Callable[[Any, torch.Tensor], contextlib.AbstractContextManager]] = {
    "stock": lambda denoiser, negative: contextlib.nullcontext(),
    "algorithm-1": baselines.algorithm_1,
    "nag": baselines.nag_published,
}


def count(name: str) -> dict[str, int]:
    """FLOPs by method."""
    model = MODELS[name]
    with torch.device("meta"):
        denoiser = model.build(**model.config).eval()
        text, negative = (torch.empty(1, model.tokens, model.channels) for _ in range(2))
    found = {}
    for method, put_on in METHODS.items():
        with put_on(denoiser, negative):
            found[method] = _count_call(denoiser, model, text)
    # two calls, or one with a doubled batch, of the stock model
    found["cfg"] = 2 * found["stock"]
    # the first call fills the cache that the later ones read
    ours = counted.count_model(name, model)
    return {**found, "nasa-first": ours.first, "nasa-later": ours.later}


@torch.no_grad()
def _count_call(denoiser: Any, model: Model, text: torch.Tensor) -> int:
    sample = torch.empty(1, *model.latents, device="meta")
    timestep = torch.ones(1, device="meta")
    with FlopCounterMode(display=False) as counter:
        denoiser(
            sample, timestep=timestep, encoder_hidden_states=text, return_dict=False,
            **model.inputs,
        )  # fmt: skip
    return counter.get_total_flops()


# ---- the text encoders ---------------------------------------------------------------------------


def _clip(**config: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**config))


def _clip_l() -> Any:
    return _clip(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )


def _open_clip_h() -> Any:
    # Stable Diffusion 2.1 leaves out the last of 24 layers
    return _clip(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16
    )


def _open_clip_g() -> Any:
    return _clip(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20
    )


def _t5_xxl(kind: str = "T5") -> Any:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=32128 if kind == "T5" else 256384, d_model=4096, d_kv=64, d_ff=10240,
        num_layers=24, num_heads=64, feed_forward_proj="gated-gelu", is_encoder_decoder=False,
    )  # fmt: skip
    return getattr(transformers, f"{kind}EncoderModel")(config)


def _gemma_2b() -> Any:
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(
        Gemma2Config(
            hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
            num_key_value_heads=4, head_dim=256,
        )
    )  # fmt: skip


ENCODERS: dict[str, tuple[tuple[Callable[[], Any], ...], int]] = {
    "CLIP-L (SD 1.5)": ((_clip_l,), 77),
    "OpenCLIP-H (SD 2.1)": ((_open_clip_h,), 77),
    "CLIP-L and OpenCLIP-G (SDXL)": ((_clip_l, _open_clip_g), 77),
    "T5-XXL (PixArt-alpha)": ((_t5_xxl,), 120),
    "T5-XXL (FLUX.1 schnell)": ((_t5_xxl,), 256),
    "T5-XXL (PixArt-sigma)": ((_t5_xxl,), 300),
    "Gemma 2 2B (Sana)": ((_gemma_2b,), 300),
    "UMT5-XXL (Wan)": ((lambda: _t5_xxl("UMT5"),), 512),
}


@torch.no_grad()
def count_encoder(name: str) -> int:
    """FLOPs of encoding one prompt."""
    builders, tokens = ENCODERS[name]
    total = 0
    for build in builders:
        with torch.device("meta"):
            encoder = build().eval()
            ids = torch.zeros(1, tokens, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            encoder(ids)
        total += counter.get_total_flops()
    return total


# ---- rows ----------------------------------------------------------------------------------------


def run(session: Session, names: Iterable[str] = ()) -> list[Row]:
    rows: list[Row] = []
    for name in list(names) or MODELS:
        rows += [_row(session, name, method, number) for method, number in count(name).items()]
        session.say(f"counted {name}")
    if not names:
        rows += [_row(session, name, "encode", count_encoder(name)) for name in ENCODERS]
    session.write(rows, counted=True)
    return rows


def _row(session: Session, case: str, provider: str, number: int) -> Row:
    return session.row(
        bench="flops", case=case, dtype="", direction="forward", provider=provider,
        timing="counted", flops=number, baseline="" if provider == "encode" else "stock",
    )  # fmt: skip
