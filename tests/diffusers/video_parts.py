"""Parts of small pipelines for the families that make video, beside Wan and SkyReels."""

import inspect

import diffusers
import torch
from nasa_diffusers import testing
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

WAN = testing.WAN_SIZE


class Passing(torch.nn.Module):
    """A safety checker that lets everything pass."""

    dtype, device = torch.float32, torch.device("cpu")

    def check_text_safety(self, prompt):
        return True

    def check_video_safety(self, frames):
        return frames


def image_encoder():
    """As Wan 2.1's: its last but one layer gives 5 tokens of 8 channels."""
    config = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, projection_dim=8, num_hidden_layers=2,
        num_attention_heads=2, image_size=16, patch_size=8,
    )  # fmt: skip
    return CLIPVisionModel(config)


def with_images(parts):
    """Beside the text stand the tokens of an image."""
    processor = CLIPImageProcessor(size=16, crop_size=16)
    return parts | {
        "image_encoder": image_encoder(), "image_processor": processor,
    }  # fmt: skip


IMAGE_KEYS = {"image_dim": 8, "added_kv_proj_dim": 24}


def text_parts():
    parts = testing.wan_parts()
    encoder = testing.T5EncoderModel(testing.T5Config(**testing.T5_SIZE))
    return {"text_encoder": encoder, "tokenizer": parts["tokenizer"]}


def flow():
    return diffusers.FlowMatchEulerDiscreteScheduler()


def ltx(name):
    eights = (8, 8, 8, 8)
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=eights, decoder_block_out_channels=eights,
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5,
    )  # fmt: skip
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, num_layers=2, caption_channels=32,
    )  # fmt: skip
    return text_parts() | {"vae": vae, "transformer": transformer, "scheduler": flow()}


def cosmos(name):
    is_first, is_25 = name.startswith(("CosmosT", "CosmosV")), "2_5" in name
    channels = 4 if is_first else 16
    takes_video = "Video" in name or is_25
    transformer = diffusers.CosmosTransformer3DModel(
        in_channels=channels + takes_video, out_channels=channels, num_attention_heads=2,
        attention_head_dim=16, num_layers=2, mlp_ratio=2, text_embed_dim=32, adaln_lora_dim=4,
        max_size=(4, 32, 32), concat_padding_mask=False,
        extra_pos_embed_type="learnable" if is_first else None,
        **({"use_crossattn_projection": True, "crossattn_proj_in_channels": 32,
            "encoder_hidden_states_channels": 32} if is_25 else {}),
    )  # fmt: skip
    parts = text_parts() | {"transformer": transformer, "safety_checker": Passing()}
    parts["tokenizer"].chat_template = "{{ messages[1]['content'][0]['text'] }}"
    if is_first:
        eights = (8, 8, 8, 8)
        vae = diffusers.AutoencoderKLCosmos(
            latent_channels=4, encoder_block_out_channels=eights, decode_block_out_channels=eights,
            attention_resolutions=(8,), resolution=64, spatial_compression_ratio=4,
            temporal_compression_ratio=4,
        )  # fmt: skip
        scheduler = diffusers.EDMEulerScheduler(
            sigma_min=0.002, sigma_max=80, sigma_data=0.5, final_sigmas_type="sigma_min"
        )
        return parts | {"vae": vae, "scheduler": scheduler}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    if is_25:
        scheduler = diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True
        )
    return parts | {"vae": testing.wan_parts()["vae"], "scheduler": scheduler}


def sana_video(name):
    transformer = diffusers.SanaVideoTransformer3DModel(
        in_channels=16, out_channels=16, num_attention_heads=2, attention_head_dim=12,
        num_layers=2, num_cross_attention_heads=2, cross_attention_head_dim=12,
        cross_attention_dim=24, caption_channels=32, sample_size=4, rope_max_seq_len=32,
    )  # fmt: skip
    parts = testing.sana().components | {"vae": testing.wan_parts()["vae"]}
    return parts | {"transformer": transformer, "scheduler": flow()}


def allegro(name):
    vae = diffusers.AutoencoderKLAllegro(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2, sample_size=64
    )
    transformer = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=2, cross_attention_dim=24,
        sample_width=8, sample_height=8, sample_frames=2, caption_channels=32,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    return text_parts() | {"vae": vae, "transformer": transformer, "scheduler": scheduler}


def latte(name):
    transformer = diffusers.LatteTransformer3DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3,
        caption_channels=32, in_channels=4, cross_attention_dim=24, out_channels=8,
        attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
        video_length=2,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    return text_parts() | {
        "vae": testing.vae(), "transformer": transformer, "scheduler": scheduler,
    }  # fmt: skip


def vace(name):
    transformer = diffusers.WanVACETransformer3DModel(
        **WAN | {"num_layers": 3}, vace_layers=[0, 2], vace_in_channels=96
    )
    return testing.wan_parts() | {"transformer": transformer, "scheduler": flow()}


def chronoedit(name):
    transformer = diffusers.ChronoEditTransformer3DModel(**WAN | IMAGE_KEYS | {"in_channels": 36})
    return with_images(testing.wan_parts()) | {"transformer": transformer, "scheduler": flow()}


def animate(name):
    transformer = diffusers.WanAnimateTransformer3DModel(
        **WAN | IMAGE_KEYS | {"in_channels": 36}, latent_channels=16,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16}, motion_encoder_size=16,
        motion_style_dim=8, motion_dim=4, motion_encoder_dim=16, face_encoder_hidden_dim=16,
        face_encoder_num_heads=2, inject_face_latents_blocks=2,
    )  # fmt: skip
    return with_images(testing.wan_parts()) | {"transformer": transformer}


def anyflow(name):
    names = inspect.signature(diffusers.AnyFlowTransformer3DModel.__init__).parameters
    size = {key: value for key, value in WAN.items() if key in names}
    return testing.wan_parts() | {
        "transformer": diffusers.AnyFlowTransformer3DModel(**size),
        "scheduler": diffusers.FlowMapEulerDiscreteScheduler(),
    }


def helios(name):
    names = inspect.signature(diffusers.HeliosTransformer3DModel.__init__).parameters
    size = {key: value for key, value in WAN.items() if key in names}
    return testing.wan_parts() | {
        "transformer": diffusers.HeliosTransformer3DModel(**size, rope_dim=(4, 4, 4)),
        "scheduler": diffusers.HeliosScheduler(gamma=0.3)
        if "Pyramid" in name
        else diffusers.HeliosScheduler(stages=1, stage_range=[0, 1], gamma=1.0),
    }


# by the class of their denoiser
PARTS = {
    "LTXVideoTransformer3DModel": ltx,
    "CosmosTransformer3DModel": cosmos,
    "SanaVideoTransformer3DModel": sana_video,
    "AllegroTransformer3DModel": allegro,
    "LatteTransformer3DModel": latte,
    "WanVACETransformer3DModel": vace,
    "ChronoEditTransformer3DModel": chronoedit,
    "WanAnimateTransformer3DModel": animate,
    "AnyFlowTransformer3DModel": anyflow,
    "HeliosTransformer3DModel": helios,
}
