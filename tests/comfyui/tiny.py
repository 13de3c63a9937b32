"""Small models of ComfyUI's own classes with random weights, and calls of them."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import math
import re
import types
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import comfy.conds
import comfy.model_patcher
import comfy.sample
import comfy.supported_models as supported
import pytest
import torch
from torch import Tensor

CPU = torch.device("cpu")


@dataclass
class Tiny:
    patcher: Any
    channels: int  # of the text
    latent: tuple[int, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    # what the sampler says beside the conditioning
    call: dict[str, Any] = field(default_factory=dict)
    # tokens that the mask of a text does not hide; None is all
    shown: int | None = None
    # what a mask adds to the scores, in place of whether a token is there
    is_added: bool = False

    @property
    def net(self) -> Any:
        return self.patcher.model.diffusion_model

    def text(self, n: int, seed: int) -> Tensor:
        return torch.randn(1, n, self.channels, generator=torch.Generator().manual_seed(seed))

    def conditioning(self, text: Tensor) -> list:
        settings = dict(self.settings)
        if "attention_mask" in settings:
            settings["attention_mask"] = torch.ones(text.shape[:2], dtype=torch.int64)
            if self.shown is not None:
                settings["attention_mask"][:, self.shown :] = 0
            if self.is_added:
                settings["attention_mask"] = (settings["attention_mask"] - 1.0) * 1e9
        if "t5xxl_ids" in settings:
            settings["t5xxl_ids"] = torch.arange(text.shape[1])
            settings["t5xxl_weights"] = torch.ones(text.shape[1])
        return [[text, settings]]


@contextlib.contextmanager
def _small_adapters():
    """Anima's adapter of a text has a size of its own."""
    if importlib.util.find_spec("comfy.ldm.anima") is None:
        yield
        return
    module = importlib.import_module("comfy.ldm.anima.model")
    adapter = module.LLMAdapter
    sizes = {"source_dim": 64, "target_dim": 64, "model_dim": 64, "num_layers": 1, "num_heads": 2}
    module.LLMAdapter = lambda **kwargs: adapter(**sizes, **kwargs)
    try:
        yield
    finally:
        module.LLMAdapter = adapter


def _patcher(kind: str, config: dict[str, Any], dtype: torch.dtype) -> Any:
    settings = getattr(supported, kind)({**config, "dtype": dtype})
    settings.set_inference_dtype(dtype, None)
    with _small_adapters():
        model = settings.get_model({}, "", device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.diffusion_model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() > 1:
                weight.copy_(noise * 2 / math.sqrt(max(1, weight[0].numel())))
            else:
                is_norm = "norm" in name and name.endswith(("weight", "scale"))
                weight.copy_(noise * 0.05 + float(is_norm))
        for buffer in model.diffusion_model.buffers():
            if buffer.is_floating_point() and not torch.isfinite(buffer).all():
                buffer.zero_()
    return comfy.model_patcher.ModelPatcher(model, CPU, CPU)


_UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32,
    "num_res_blocks": [1, 1], "channel_mult": [1, 2], "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1, "num_heads": 4,
    "num_head_channels": -1, "use_spatial_transformer": True, "legacy": False, "context_dim": 64,
    "use_linear_in_transformer": False, "use_temporal_attention": False, "adm_in_channels": None,
}  # fmt: skip
_SDXL = {
    **_UNET, "model_channels": 64, "use_linear_in_transformer": True, "num_head_channels": 16,
    "num_heads": -1, "num_classes": "sequential", "adm_in_channels": 2816,
    "transformer_depth": [1, 2], "transformer_depth_output": [1, 1, 2, 2],
    "transformer_depth_middle": 2,
}  # fmt: skip
_FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2,
    "hidden_size": 128, "num_heads": 2, "depth": 2, "depth_single_blocks": 2,
    "axes_dim": [16, 24, 24], "theta": 10000, "mlp_ratio": 4.0, "qkv_bias": True,
    "context_in_dim": 64, "vec_in_dim": 32, "guidance_embed": False,
}  # fmt: skip
_FLUX2 = {
    **_FLUX, "image_model": "flux2", "in_channels": 128, "out_channels": 128, "patch_size": 1,
    "axes_dim": [16, 16, 16, 16], "theta": 2000, "mlp_ratio": 3.0, "qkv_bias": False,
    "ops_bias": False, "vec_in_dim": None, "global_modulation": True, "mlp_silu_act": True,
}  # fmt: skip
_CHROMA = {
    **_FLUX, "image_model": "chroma", "in_channels": 64, "out_channels": 64, "in_dim": 64,
    "out_dim": 128, "hidden_dim": 96, "n_layers": 2,
}  # fmt: skip
for _name in ("vec_in_dim", "guidance_embed"):
    del _CHROMA[_name]
_QWEN = {
    "image_model": "qwen_image", "in_channels": 64, "out_channels": 16, "num_layers": 2,
    "attention_head_dim": 64, "num_attention_heads": 2, "joint_attention_dim": 64,
    "axes_dims_rope": (16, 24, 24),
}  # fmt: skip
_SD3 = {
    "in_channels": 16, "patch_size": 2, "out_channels": 16, "depth": 2, "input_size": None,
    "adm_in_channels": 32, "num_patches": 576, "pos_embed_max_size": 24,
    "pos_embed_scaling_factor": None, "qk_norm": "rms", "x_block_self_attn_layers": [0],
    "context_embedder_config": {
        "target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 128},
    },
}  # fmt: skip
_WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 128, "ffn_dim": 256, "num_heads": 2,
    "num_layers": 3, "patch_size": (1, 2, 2), "freq_dim": 64, "in_dim": 16, "out_dim": 16,
    "text_dim": 64, "text_len": 512, "window_size": (-1, -1), "qk_norm": True,
    "cross_attn_norm": True, "eps": 1e-6,
}  # fmt: skip
_LTXV = {
    "image_model": "ltxv", "in_channels": 16, "cross_attention_dim": 128,
    "attention_head_dim": 64, "num_attention_heads": 2, "caption_channels": 64, "num_layers": 2,
}  # fmt: skip
_PIXART = {
    "image_model": "pixart_alpha", "num_heads": 2, "depth": 2, "hidden_size": 128,
    "input_size": 512, "patch_size": 2, "in_channels": 4, "caption_channels": 64,
    "model_max_length": 20, "pe_interpolation": 1.0, "micro_condition": False,
}  # fmt: skip
_HUNYUAN = {
    "image_model": "hunyuan_video", "in_channels": 16, "out_channels": 16, "patch_size": [1, 2, 2],
    "context_in_dim": 64, "hidden_size": 128, "mlp_ratio": 4.0, "num_heads": 2, "depth": 2,
    "depth_single_blocks": 2, "axes_dim": [16, 24, 24], "theta": 256, "qkv_bias": True,
    "guidance_embed": False, "vec_in_dim": 32, "byt5": False, "meanflow": False,
    "use_cond_type_embedding": False, "vision_in_dim": None,
}  # fmt: skip
_HUNYUAN15 = {
    **_HUNYUAN, "in_channels": 65, "out_channels": 32, "patch_size": [1, 1, 1], "vec_in_dim": None,
    "byt5": True, "use_cond_type_embedding": True, "vision_in_dim": 1152,
}  # fmt: skip
_HUNYUAN_IMAGE = {
    **_HUNYUAN, "in_channels": 64, "out_channels": 64, "patch_size": [1, 1], "axes_dim": [32, 32],
    "vec_in_dim": None,
}  # fmt: skip
_AURA = {
    "max_seq": 1024, "cond_seq_dim": 64, "n_double_layers": 1, "n_layers": 3, "n_heads": 2,
    "dim": 128,
}  # fmt: skip
_COSMOS = {
    "image_model": "cosmos_predict2", "max_img_h": 32, "max_img_w": 32, "max_frames": 8,
    "in_channels": 16, "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1,
    "model_channels": 128, "num_blocks": 2, "num_heads": 2, "concat_padding_mask": True,
    "crossattn_emb_channels": 64, "pos_emb_cls": "rope3d", "pos_emb_learnable": False,
    "pos_emb_interpolation": "crop", "min_fps": 1, "max_fps": 30, "use_adaln_lora": True,
    "adaln_lora_dim": 32, "rope_h_extrapolation_ratio": 1.0, "rope_w_extrapolation_ratio": 1.0,
    "rope_t_extrapolation_ratio": 1.0, "extra_per_block_abs_pos_emb": False,
    "rope_enable_fps_modulation": False,
}  # fmt: skip
_COSMOS1 = {
    **_COSMOS, "image_model": "cosmos", "block_config": "FA-CA-MLP", "block_x_format": "THWBD",
    "affline_emb_norm": True, "extra_per_block_abs_pos_emb": True,
    "extra_per_block_abs_pos_emb_type": "learnable",
}  # fmt: skip
for _name in ("min_fps", "max_fps", "rope_enable_fps_modulation"):
    del _COSMOS1[_name]
_LTX2 = {
    **_LTXV, "image_model": "ltxav", "audio_attention_head_dim": 32, "audio_num_attention_heads": 2,
    "audio_cross_attention_dim": 64, "connector_attention_head_dim": 32,
    "connector_num_attention_heads": 2, "connector_num_layers": 1,
}  # fmt: skip
# of LTX-2.3: the text is ready before the network, which modulates it
_LTX23 = {
    **_LTX2, "caption_proj_before_connector": True, "caption_projection_first_linear": False,
    "cross_attention_adaln": True, "apply_gated_attention": True,
    "audio_attention_head_dim": 32, "audio_num_attention_heads": 2, "num_attention_heads": 2,
    "attention_head_dim": 32, "cross_attention_dim": 64,
}  # fmt: skip
_KREA2 = {
    "image_model": "krea2", "features": 128, "tdim": 64, "txtdim": 32, "heads": 4, "kvheads": 2,
    "multiplier": 4, "layers": 2, "patch": 2, "channels": 16, "txtlayers": 2, "txtheads": 2,
    "txtkvheads": 2,
}  # fmt: skip
_LUMINA = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 128, "n_layers": 2,
    "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "qk_norm": True, "cap_feat_dim": 64,
    "axes_dims": [16, 24, 24], "axes_lens": [300, 512, 512], "norm_eps": 1e-5,
}  # fmt: skip

_ANIMA = {**_COSMOS, "image_model": "anima"}
_VACE = {**_WAN, "model_type": "vace", "vace_layers": 2, "vace_in_dim": 96, "num_layers": 4}
_SHAPES_OF_LTX2 = [(1, 16, 2, 8, 8), (1, 8, 24, 16)]
_PACKED = (1, 1, sum(math.prod(shape) for shape in _SHAPES_OF_LTX2))
_IMAGE = types.SimpleNamespace(
    penultimate_hidden_states=torch.randn(1, 257, 1280, generator=torch.Generator().manual_seed(7))
)

_POOLED = {"pooled_output": torch.linspace(-1, 1, 32)[None]}
_SHAPES: dict[str, tuple[str, dict, tuple[int, ...], dict]] = {
    "sd15": ("SD15", _UNET, (1, 4, 16, 16), {}),
    "sdxl": ("SDXL", _SDXL, (1, 4, 16, 16), {"pooled_output": torch.linspace(-1, 1, 1280)[None]}),
    "wan": ("WAN21_T2V", _WAN, (1, 16, 2, 16, 16), {}),
    "wan-i2v": (
        "WAN21_I2V", {**_WAN, "model_type": "i2v", "in_dim": 36}, (1, 16, 2, 16, 16),
        {"clip_vision_output": _IMAGE},
    ),
    "vace": ("WAN21_Vace", _VACE, (1, 16, 2, 16, 16), {}),
    "wan-camera": (
        "WAN21_Camera", {**_WAN, "model_type": "camera", "in_dim": 32}, (1, 16, 2, 16, 16),
        {"clip_vision_output": _IMAGE},
    ),
    "ltx2": ("LTXAV", _LTX2, _PACKED, {}),
    "ltx2.3": ("LTXAV", _LTX23, _PACKED, {}),
    "cosmos1": ("CosmosT2V", _COSMOS1, (1, 16, 1, 16, 16), {}),
    "anima": ("Anima", _ANIMA, (1, 16, 1, 16, 16), {"t5xxl_ids": None}),
    "krea2": ("Krea2", _KREA2, (1, 16, 1, 16, 16), {}),
    "ltxv": (
        "LTXV", _LTXV, (1, 16, 2, 8, 8), {"attention_mask": None, "frame_rate": 25},
    ),
    "pixart": ("PixArtAlpha", _PIXART, (1, 4, 64, 64), {}),
    "cosmos": ("CosmosT2IPredict2", _COSMOS, (1, 16, 1, 16, 16), {}),
    "flux": ("FluxSchnell", _FLUX, (1, 16, 16, 16), _POOLED),
    "flux2": ("Flux2", _FLUX2, (1, 128, 8, 8), _POOLED),
    "chroma": ("Chroma", _CHROMA, (1, 16, 16, 16), _POOLED),
    "qwen": ("QwenImage", _QWEN, (1, 16, 1, 16, 16), {}),
    "sd3": ("SD3", _SD3, (1, 16, 16, 16), _POOLED),
    "aura": ("AuraFlow", _AURA, (1, 4, 16, 16), {}),
    "hunyuan": ("HunyuanVideo", _HUNYUAN, (1, 16, 2, 16, 16), _POOLED),
    "hunyuan1.5": ("HunyuanVideo15", _HUNYUAN15, (1, 32, 2, 8, 8), _POOLED),
    "hunyuan-image": ("HunyuanImage21", _HUNYUAN_IMAGE, (1, 64, 8, 8), {}),
    "lumina2": ("Lumina2", _LUMINA, (1, 16, 16, 16), {"attention_mask": None}),
    "zimage": (
        "Lumina2", {**_LUMINA, "pad_tokens_multiple": 32}, (1, 16, 16, 16),
        {"attention_mask": None},
    ),
}  # fmt: skip
# what only later trees ask for, and earlier ones do not take
LATER: dict[str, dict[str, Any]] = {
    "flux": {"txt_ids_dims": []},
    "chroma": {"txt_ids_dims": [], "vec_in_dim": None},
    "flux2": {"txt_ids_dims": [3], "default_ref_method": "index", "ref_index_scale": 10.0},
    "hunyuan": {"meanflow_sum": False},
    "hunyuan1.5": {"meanflow_sum": True},
    "hunyuan-image": {"meanflow_sum": False},
}


@cache
def tiny(name: str, dtype: torch.dtype = torch.float32) -> Tiny:
    kind, config, latent, settings = _SHAPES[name]
    if not hasattr(supported, kind):
        pytest.skip(f"this ComfyUI is older than {kind}")
    config = {**config, **LATER.get(name, {})}
    while True:
        try:
            patcher = _patcher(kind, config, dtype)
            break
        except TypeError as error:
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if unknown is None or config.pop(unknown[1], unknown) is unknown:
                raise
            if unknown[1] == "pad_tokens_multiple":
                pytest.skip("this ComfyUI is older than Z-Image")
    return Tiny(
        patcher, 64, latent, settings, {"latent_shapes": _SHAPES_OF_LTX2} if kind == "LTXAV" else {}
    )


def noise(model: Tiny, rows: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn((rows, *model.latent[1:]), generator=generator)


def predict(
    model: Tiny, text: Tensor, patcher: Any = None, sigma: float = 0.7, rows: int = 1,
    patched: bool = True, control: dict | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """One call of the network on the positive text, as a sampler makes it."""
    patcher = model.patcher if patcher is None else patcher
    base, x = patcher.model, noise(model, rows)
    ((_, settings),) = model.conditioning(text)
    size = {"width": x.shape[3] * 8, "height": x.shape[2] * 8} if x.ndim > 3 else {}
    with torch.inference_mode():
        conds = base.extra_conds(
            **settings, **model.call, **size, cross_attn=text, noise=x, device=CPU
        )
        if (concat := base.concat_cond(noise=x, device=CPU)) is not None:
            conds["c_concat"] = comfy.conds.CONDNoiseShape(concat)
    inputs = {
        key: cond.process_cond(batch_size=rows, area=None).cond for key, cond in conds.items()
    }
    given = dict(patcher.model_options["transformer_options"])
    given = {**given, "wrappers": patcher.wrappers, "cond_or_uncond": [0], **options}
    if patched:
        patcher.patch_model()
    try:
        with torch.inference_mode():
            return base.apply_model(
                x,
                torch.full((rows,), sigma),
                control=copy.deepcopy(control),
                transformer_options=given,
                **inputs,
            )
    finally:
        if patched:
            patcher.unpatch_model()


def sample(
    model: Tiny, patcher: Any, positive: Tensor | list, negative: Tensor, cfg=1.0, steps=2
) -> Tensor:
    """Latents of ComfyUI's own sampler; the positive may be a whole conditioning."""
    latent = torch.zeros(model.latent)
    if isinstance(positive, Tensor):
        positive = model.conditioning(positive)
    return comfy.sample.sample(
        patcher, comfy.sample.prepare_noise(latent, 3), steps, cfg, "euler", "simple",
        positive, model.conditioning(negative), latent, disable_pbar=True, seed=3,
    )  # fmt: skip
