"""More small pipelines, as in `nasa_diffusers/testing_side.py`: of further families in which text
and image share their attention.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from transformers import T5Config, T5EncoderModel

from nasa_diffusers.testing import HEADS, T5_SIZE, _ready, letter_tokenizer, vae
from nasa_diffusers.testing_side import TEXT_SIZE, chat_tokenizer, qwen_vl

FLUX_LIKE: dict[str, Any] = {
    "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 32,
    "axes_dims_rope": (4, 6, 6), **HEADS,
}  # fmt: skip


def _t5() -> dict[str, Any]:
    return {"tokenizer": letter_tokenizer(), "text_encoder": T5EncoderModel(T5Config(**T5_SIZE))}


def chroma(seed: int = 0):
    """Chroma in small: two blocks of each kind."""
    from diffusers import ChromaPipeline, ChromaTransformer2DModel

    torch.manual_seed(seed)
    transformer = ChromaTransformer2DModel(
        in_channels=16, approximator_num_channels=8, approximator_hidden_dim=16,
        approximator_layers=1, **FLUX_LIKE,
    )  # fmt: skip
    pipe = ChromaPipeline(
        **_t5(),
        vae=vae(shift_factor=0.1),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    return _ready(pipe)


def ovis(seed: int = 0):
    """Ovis-Image in small: two blocks of each kind."""
    from diffusers import OvisImagePipeline, OvisImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(seed)
    pipe: Any = OvisImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(shift_factor=0.1),
        text_encoder=Qwen3Model(Qwen3Config(**TEXT_SIZE)),
        tokenizer=chat_tokenizer(),
        transformer=OvisImageTransformer2DModel(in_channels=16, out_channels=16, **FLUX_LIKE),
    )
    # a letter is a token
    pipe.system_prompt, pipe.user_prompt_begin_id = "a ", 2
    return _ready(pipe)


def longcat(seed: int = 0):
    """LongCat-Image in small: two blocks of each kind."""
    from diffusers import LongCatImagePipeline, LongCatImageTransformer2DModel

    torch.manual_seed(seed)
    pipe: Any = LongCatImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(shift_factor=0.1, channels=16),
        text_encoder=qwen_vl(),
        tokenizer=letter_tokenizer(),
        text_processor=None,
        transformer=LongCatImageTransformer2DModel(
            in_channels=64, pooled_projection_dim=32, **FLUX_LIKE
        ),
    )
    pipe.prompt_template_encode_prefix, pipe.prompt_template_encode_suffix = "a ", "."
    pipe.tokenizer_max_length = 16
    return _ready(pipe)


def bria(seed: int = 0):
    """Bria 3 in small: two blocks of each kind."""
    from diffusers import BriaPipeline, BriaTransformer2DModel

    torch.manual_seed(seed)
    pipe = BriaPipeline(
        **_t5(),
        transformer=BriaTransformer2DModel(in_channels=16, **FLUX_LIKE),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(shift_factor=0.1),
    )
    return _ready(pipe)


def fibo(seed: int = 0):
    """Bria's Fibo in small: two blocks of each kind, a text encoder of three layers."""
    from diffusers import AutoencoderKLWan, BriaFiboPipeline, BriaFiboTransformer2DModel
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    torch.manual_seed(seed)
    size = {name: x for name, x in TEXT_SIZE.items() if name != "head_dim"}
    config = SmolLM3Config(**size | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1})
    pipe = BriaFiboPipeline(
        transformer=BriaFiboTransformer2DModel(
            in_channels=16, text_encoder_dim=32, **FLUX_LIKE | {"joint_attention_dim": 64}
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
            temperal_downsample=[False, True, True],
        ),
        text_encoder=SmolLM3ForCausalLM(config),
        tokenizer=letter_tokenizer(),
    )  # fmt: skip
    return _ready(pipe)
