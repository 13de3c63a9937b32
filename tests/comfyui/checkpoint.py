"""A checkpoint that ComfyUI's loader takes for Stable Diffusion 1.5, small, of random weights."""

from pathlib import Path

import comfy.sd1_clip
import comfy.supported_models
import comfy.taesd.taesd
import safetensors.torch
import torch

# what the loader knows SD 1.5 by, in one level
_UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320,
    "num_res_blocks": [1], "channel_mult": [1], "transformer_depth": [1],
    "transformer_depth_output": [1, 1], "transformer_depth_middle": 1, "num_heads": 8,
    "num_head_channels": -1, "use_spatial_transformer": True, "legacy": False, "context_dim": 768,
    "use_linear_in_transformer": False, "use_temporal_attention": False, "adm_in_channels": None,
}  # fmt: skip


def write(path: Path) -> None:
    f16 = torch.float16
    settings = comfy.supported_models.SD15({**_UNET, "dtype": f16})
    settings.set_inference_dtype(f16, None)
    text = comfy.sd1_clip.SDClipModel(dtype=f16).transformer
    parts = {
        "model.diffusion_model.": settings.get_model({}, "", device="cpu").diffusion_model,
        "cond_stage_model.transformer.": text,
        "first_stage_model.": comfy.taesd.taesd.TAESD(),
    }
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for prefix, module in parts.items():
        for name, weight in module.state_dict().items():
            if not weight.is_floating_point():
                weights[prefix + name] = weight
                continue
            if weight.ndim > 1:
                value = torch.randn(weight.shape, generator=generator) / weight[0].numel() ** 0.5
            else:
                # a norm's weight, or a bias
                value = torch.full(weight.shape, float(name.endswith("weight")))
            weights[prefix + name] = value.to(f16)
    weights["first_stage_model.vae_scale"] = torch.tensor(1.0)
    safetensors.torch.save_file(weights, path)
