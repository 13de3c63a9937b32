"""More small pipelines, as in `nasa_diffusers/testing_side.py`: of further families in which text
and image share their attention.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from transformers import T5Config, T5EncoderModel

from nasa_diffusers.testing import (
    HEADS,
    T5_SIZE,
    _ready,
    clip_config,
    clip_tokenizer,
    letter_tokenizer,
    vae,
)
from nasa_diffusers.testing_side import (
    IN_PARTS,
    TEXT_SIZE,
    VISION,
    _flux2_vae,
    chat_tokenizer,
    qwen3_vl_config,
    qwen_vl,
)

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


def lumina2(seed: int = 0):
    """Lumina-Image 2.0 in small: two blocks, and one of each refiner."""
    from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(seed)
    transformer = Lumina2Transformer2DModel(
        in_channels=4, hidden_size=64, num_layers=2, num_refiner_layers=1, num_attention_heads=4,
        num_kv_heads=2, multiple_of=16, axes_dim_rope=(4, 6, 6), axes_lens=(300, 64, 64),
        cap_feat_dim=32,
    )  # fmt: skip
    pipe: Any = Lumina2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(shift_factor=0.1),
        text_encoder=Gemma2Model(Gemma2Config(**TEXT_SIZE)),
        tokenizer=letter_tokenizer(),
    )
    pipe.system_prompt = "a"
    return _ready(pipe)


def aura_flow(seed: int = 0):
    """AuraFlow in small: two blocks of each kind."""
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    transformer: Any = AuraFlowTransformer2DModel(
        sample_size=16, num_mmdit_layers=2, num_single_dit_layers=2, joint_attention_dim=32,
        caption_projection_dim=32, pos_embed_max_size=64, **HEADS,
    )  # fmt: skip
    for name, weight in transformer.named_parameters():
        if ".norm1" in name or "to_out" in name:
            # what the attention gives is little of a block in the beginning
            torch.nn.init.normal_(weight, std=0.5)
    tokenizer = letter_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    pipe = AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(UMT5Config(**T5_SIZE)),
        vae=vae(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    return _ready(pipe)


def ernie(seed: int = 0):
    """ERNIE-Image in small: two blocks."""
    from diffusers import ErnieImagePipeline, ErnieImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(seed)
    transformer: Any = ErnieImageTransformer2DModel(
        hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=32, in_channels=16,
        out_channels=16, text_in_dim=32, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    for part in (transformer.adaLN_modulation[-1], transformer.final_linear):
        torch.nn.init.normal_(part.weight, std=0.2)
    pipe = ErnieImagePipeline(
        transformer=transformer,
        vae=_flux2_vae(),
        text_encoder=Qwen3Model(Qwen3Config(**TEXT_SIZE)),
        tokenizer=letter_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    return _ready(pipe)


def prx(seed: int = 0):
    """PRX in small: two blocks."""
    from diffusers import PRXPipeline, PRXTransformer2DModel
    from transformers import T5GemmaConfig
    from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

    torch.manual_seed(seed)
    transformer: Any = PRXTransformer2DModel(
        in_channels=4, context_in_dim=32, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=2,
        axes_dim=[8, 8],
    )  # fmt: skip
    for name, weight in transformer.named_parameters():
        if "modulation.lin" in name:
            torch.nn.init.normal_(weight, std=0.2)
    config: Any = T5GemmaConfig(
        encoder=TEXT_SIZE, decoder=TEXT_SIZE, vocab_size=TEXT_SIZE["vocab_size"]
    )
    tokenizer = letter_tokenizer()
    tokenizer.model_max_length = 16
    pipe = PRXPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=T5GemmaEncoder(config.encoder),
        tokenizer=tokenizer,
        vae=vae(shift_factor=0.1),
    )
    return _ready(pipe)


class ReadsText:
    """The processor of a model of texts and images, of its texts alone."""

    def __init__(self):
        self.tokenizer = chat_tokenizer()
        self.tokenizer.add_special_tokens({"additional_special_tokens": ["<|image_pad|>"]})

    def __call__(self, text: list[str], images: Any = None, **options: Any):
        made = self.tokenizer(text, **options)
        return type(made)({name: made[name] for name in ("input_ids", "attention_mask")})

    def apply_chat_template(self, messages: Any, **_: Any) -> list[list[int]]:
        # the template of the pipeline begins with as many
        return [[0, 0]]


def qwen_image_21(seed: int = 0):
    """Qwen-Image 2.1 in small: two blocks."""
    from diffusers import (
        AutoencoderKLQwenImage21,
        QwenImage21Pipeline,
        QwenImage21Transformer2DModel,
    )
    from transformers import Qwen3VLForConditionalGeneration

    torch.manual_seed(seed)
    config = qwen3_vl_config()
    autoencoder = AutoencoderKLQwenImage21(
        base_dim=8, decoder_base_dim=8, z_dim=8, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False] * 4, latents_mean=[0.0] * 8, latents_std=[1.0] * 8,
    )  # fmt: skip
    pipe: Any = QwenImage21Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
        ),
        vae=autoencoder,
        text_encoder=Qwen3VLForConditionalGeneration(config),
        processor=ReadsText(),
        transformer=QwenImage21Transformer2DModel(
            in_channels=8, out_channels=8, num_layers=2, context_in_dim=32,
            axes_dims_rope=(4, 6, 6), **HEADS,
        ),
    )  # fmt: skip
    # a letter is a token
    pipe.prompt_template_t2i = "a {}."
    return _ready(pipe)


def ideogram4(seed: int = 0):
    """Ideogram 4 in small: two blocks; of 36 layers of its text encoder thirteen count."""
    from diffusers import Ideogram4Pipeline, Ideogram4Transformer2DModel
    from transformers import Qwen3VLConfig, Qwen3VLModel

    torch.manual_seed(seed)
    config = Qwen3VLConfig(
        text_config=TEXT_SIZE
        | {
            "num_hidden_layers": 36,
            "rope_scaling": {"mrope_section": [2, 1, 1], "rope_type": "default"},
        },
        vision_config=VISION | {"out_hidden_size": 32, "deepstack_visual_indexes": [0]},
        image_token_id=1, video_token_id=2, vision_start_token_id=0, vision_end_token_id=0,
    )  # fmt: skip

    def transformer() -> Any:
        return Ideogram4Transformer2DModel(
            in_channels=16, num_layers=2, intermediate_size=32, adaln_dim=16,
            llm_features_dim=13 * 32, mrope_section=(4, 2, 2), **HEADS,
        )  # fmt: skip

    pipe = Ideogram4Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_flux2_vae(),
        text_encoder=Qwen3VLModel(config),
        tokenizer=chat_tokenizer(IN_PARTS),
        transformer=transformer(),
        unconditional_transformer=transformer(),
    )
    return _ready(pipe)


def hidream(seed: int = 0):
    """HiDream-I1 in small: two blocks of each kind, three layers of Llama."""
    from diffusers import HiDreamImagePipeline, HiDreamImageTransformer2DModel
    from transformers import CLIPTextModelWithProjection, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    transformer = HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, num_layers=2, num_single_layers=2, caption_channels=[32, 32],
        text_emb_dim=64, num_routed_experts=2, num_activated_experts=1, axes_dims_rope=(8, 4, 4),
        max_resolution=(12, 12), llama_layers=[0, 1, 1, 1], **HEADS,
    )  # fmt: skip
    config = clip_config(32)
    # a CLIP of long texts
    config.max_position_embeddings = 248
    pipe: Any = HiDreamImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(shift_factor=0.1),
        text_encoder=CLIPTextModelWithProjection(config),
        tokenizer=clip_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=T5EncoderModel(T5Config(**T5_SIZE)),
        tokenizer_3=letter_tokenizer(),
        text_encoder_4=LlamaForCausalLM(LlamaConfig(**TEXT_SIZE)),
        tokenizer_4=letter_tokenizer(),
        transformer=transformer,
    )
    # its images have as many pixels as a square of these latents
    pipe.default_sample_size = 12
    return _ready(pipe)


def joy_image_edit(seed: int = 0):
    """JoyImage Edit in small: two blocks."""
    from diffusers import AutoencoderKLWan, JoyImageEditPipeline, JoyImageEditTransformer3DModel
    from transformers import Qwen3VLForConditionalGeneration

    torch.manual_seed(seed)
    config = qwen3_vl_config()
    transformer: Any = JoyImageEditTransformer3DModel(
        in_channels=16, hidden_size=32, num_attention_heads=2, text_dim=32, mlp_width_ratio=2.0,
        num_layers=2, rope_dim_list=[4, 6, 6],
    )  # fmt: skip
    for name, weight in transformer.named_parameters():
        if "modulate_table" in name:
            torch.nn.init.normal_(weight)
    pipe: Any = JoyImageEditPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
            temperal_downsample=[False, True, True],
        ),
        text_encoder=Qwen3VLForConditionalGeneration(config),
        tokenizer=chat_tokenizer(),
        transformer=transformer,
        processor=ReadsText(),
    )  # fmt: skip
    # a letter is a token
    pipe.prompt_template_encode = dict.fromkeys(("image", "multiple_images"), "a {}.")
    pipe.prompt_template_encode_start_idx = dict.fromkeys(("image", "multiple_images"), 2)
    return _ready(pipe)
