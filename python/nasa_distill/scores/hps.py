"""HPSv2 from its own weights: a fine-tuned CLIP ViT-H/14, so 100 times a cosine.

Its package is not used: `hpsv2` 1.2.0 requires `protobuf<4` and `pytest==7.2.0`, and its wheel
lacks the vocabulary that its tokenizer opens. The weights are read into transformers' `CLIPModel`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from nasa_distill.train.clip import Clip

HEAD_VISION, HEAD_TEXT = 80, 64  # channels of a head of ViT-H/14; not to be seen in its weights
EMBEDDING = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.proj": "visual_projection.weight",
}
NORM = {
    "ln_final": "text_model.final_layer_norm",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
}
BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
LAYER = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")


def load(path: Path, tokenizer: Any, heads: tuple[int, int] = (HEAD_VISION, HEAD_TEXT)) -> Clip:
    """The scorer in a file of weights, `HPS_v2.1_compressed.pt` or that of 2.0.

    Args:
        tokenizer: Of any CLIP; all of them have the same.
        heads: Channels of an attention head, of images and of text.

    Raises:
        ValueError: The file cannot be read, or does not hold a CLIP as open_clip saves it.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        return Clip(to_transformers(state, *heads), tokenizer)
    except (MemoryError, PermissionError):
        raise  # the file itself may be good
    # bytes that are no weights raise errors of any class
    except Exception as error:
        raise ValueError(
            f"hps.load: {path} cannot be read as weights of HPSv2 ({type(error).__name__}: "
            f"{error}); give HPS_v2_compressed.pt or HPS_v2.1_compressed.pt of xswu/HPSv2"
        ) from error


def to_transformers(state: dict[str, Tensor], head_vision: int, head_text: int) -> CLIPModel:
    """Weights with open_clip's names as a `CLIPModel`; the sizes are those of the weights."""
    patch = state["visual.conv1.weight"]
    vision_width, patch_size = patch.shape[0], patch.shape[-1]
    grid = round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
    words, text_width = state["token_embedding.weight"].shape
    shared: dict[str, Any] = {
        "hidden_act": "gelu",
        "projection_dim": state["text_projection"].shape[1],
    }
    config = CLIPConfig(
        text_config={
            "vocab_size": words,
            "hidden_size": text_width,
            "intermediate_size": len(state["transformer.resblocks.0.mlp.c_fc.bias"]),
            "num_hidden_layers": _depth(state, "transformer"),
            "num_attention_heads": text_width // head_text,
            "max_position_embeddings": len(state["positional_embedding"]),
            "bos_token_id": words - 2,
            "eos_token_id": words - 1,
            **shared,
        },
        vision_config={
            "image_size": grid * patch_size,
            "patch_size": patch_size,
            "hidden_size": vision_width,
            "intermediate_size": len(state["visual.transformer.resblocks.0.mlp.c_fc.bias"]),
            "num_hidden_layers": _depth(state, "visual.transformer"),
            "num_attention_heads": vision_width // head_vision,
            **shared,
        },
        projection_dim=shared["projection_dim"],
    )
    model: Any = CLIPModel(config)
    renamed: dict[str, Tensor] = {}
    for name, weight in state.items():
        renamed |= _rename(name, weight.float())
    model.load_state_dict(renamed)
    return model


def _depth(state: dict[str, Tensor], tower: str) -> int:
    return sum(name.startswith(tower) and name.endswith("ln_1.weight") for name in state)


def _rename(name: str, weight: Tensor) -> dict[str, Tensor]:
    if name in EMBEDDING:
        # the projections multiply from the right
        turned = weight.T if name in ("text_projection", "visual.proj") else weight
        return {EMBEDDING[name]: turned}
    if found := LAYER.fullmatch(name):
        visual, number, part, kind = found.groups()
        layer = f"{'vision' if visual else 'text'}_model.encoder.layers.{number}"
        if part == "attn.in_proj":
            parts = zip("qkv", weight.chunk(3), strict=True)
            return {f"{layer}.self_attn.{x}_proj.{kind}": rows for x, rows in parts}
        return {f"{layer}.{BLOCK[part]}.{kind}": weight}
    norm, _, kind = name.rpartition(".")
    return {f"{NORM[norm]}.{kind}": weight}
