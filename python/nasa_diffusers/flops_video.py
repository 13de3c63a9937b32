"""The models of `flops_side.py` whose text has no positions: most of them make video."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, device="meta", dtype=dtype)


def mask(n: int) -> Tensor:
    return meta(1, n, dtype=torch.bool)


def hunyuan_video(n: int, frames: int = 16) -> dict[str, Any]:
    # 960 x 544 pixels
    return {
        "hidden_states": meta(1, 16, frames, 68, 120), "timestep": meta(1),
        "encoder_hidden_states": meta(1, n, 4096), "encoder_attention_mask": mask(n),
        "pooled_projections": meta(1, 768), "guidance": meta(1),
    }  # fmt: skip


def hunyuan_video15(n: int) -> dict[str, Any]:
    # 848 x 480 pixels; ByT5's tokens are as many as the pipeline has, whatever n
    return {
        "hidden_states": meta(1, 65, 31, 30, 53), "timestep": meta(1),
        "encoder_hidden_states": meta(1, n, 3584), "encoder_attention_mask": mask(n),
        "encoder_hidden_states_2": meta(1, 256, 1472), "encoder_attention_mask_2": mask(256),
        "image_embeds": meta(1, 729, 1152),
    }  # fmt: skip


def forward_15(
    self, hidden_states, timestep, encoder_hidden_states, encoder_attention_mask,
    encoder_hidden_states_2, encoder_attention_mask_2, image_embeds, return_dict=False,
):  # fmt: skip
    """What HunyuanVideo 1.5 computes; its own forward looks at the values of the masks, to put
    tokens into another order."""
    rope, temb, x = self.rope(hidden_states), self.time_embed(timestep), hidden_states
    texts = (
        self.image_embedder(image_embeds),
        self.context_embedder_2(encoder_hidden_states_2),
        self.context_embedder(encoder_hidden_states, timestep, encoder_attention_mask),
    )
    x, text = self.x_embedder(x), torch.cat(texts, dim=1)
    are = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
    for block in self.transformer_blocks:
        x, text = block(x, text, temb, are, rope)
    return (self.proj_out(self.norm_out(x, temb)),)


def hunyuan_image(n: int) -> dict[str, Any]:
    # 2048 x 2048 pixels, and nothing that is quoted
    return {
        "hidden_states": meta(1, 64, 64, 64), "timestep": meta(1),
        "encoder_hidden_states": meta(1, n, 3584), "encoder_attention_mask": mask(n),
    }  # fmt: skip


def hunyuan_dit(_: int) -> dict[str, Any]:
    return {
        "hidden_states": meta(1, 4, 128, 128), "timestep": meta(1),
        "encoder_hidden_states": meta(1, 77, 1024), "text_embedding_mask": mask(77),
        "encoder_hidden_states_t5": meta(1, 256, 2048), "text_embedding_mask_t5": mask(256),
        "image_rotary_emb": (meta(4096, 88), meta(4096, 88)),
    }  # fmt: skip


def easyanimate(n: int) -> dict[str, Any]:
    # 512 x 512 pixels, 49 frames
    return {
        "hidden_states": meta(1, 16, 13, 64, 64), "timestep": meta(1),
        "encoder_hidden_states": meta(1, n, 3584),
    }  # fmt: skip


def cogview3_plus(n: int) -> dict[str, Any]:
    return {
        "hidden_states": meta(1, 16, 128, 128), "encoder_hidden_states": meta(1, n, 4096),
        "timestep": meta(1), "original_size": meta(1, 2), "target_size": meta(1, 2),
        "crop_coords": meta(1, 2),
    }  # fmt: skip


HUNYUAN_IMAGE = {"text_embed_2_dim": 1472}
HUNYUAN_DIT = {
    "in_channels": 4, "patch_size": 2, "sample_size": 128, "hidden_size": 1408, "num_layers": 40,
    "mlp_ratio": 4.3637, "use_style_cond_and_image_meta_size": False,
}  # fmt: skip
EASYANIMATE = {"in_channels": 16, "out_channels": 16, "patch_size": 2}
