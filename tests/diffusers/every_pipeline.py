"""A small pipeline of every class in diffusers that denoises with a network known to NASA.

A class is built from the parts that its constructor names and called with what its `__call__`
names, so a class needs an entry of its own only where it wants something unusual.
"""

import functools
import importlib
import inspect
import re
import sys
from types import SimpleNamespace

import diffusers
import torch
import video_parts
from nasa_diffusers import testing
from nasa_diffusers.families import FAMILIES
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

KNOWN = {name for family in FAMILIES if not family.is_beside for name in family.denoisers}
DENOISERS = ("unet", "transformer")
SIZE = 16


def kolors():
    """Kolors' pipelines are not exported without the package of its tokenizer, which is not used
    here."""
    with_stand_in = "sentencepiece" not in sys.modules
    if with_stand_in:
        sys.modules["sentencepiece"] = SimpleNamespace(SentencePieceProcessor=object)
    try:
        folder = "diffusers.pipelines"
        modules = {
            "KolorsPipeline": "kolors.pipeline_kolors",
            "KolorsImg2ImgPipeline": "kolors.pipeline_kolors_img2img",
            "KolorsPAGPipeline": "pag.pipeline_pag_kolors",
        }
        return {
            name: getattr(importlib.import_module(f"{folder}.{module}"), name)
            for name, module in modules.items()
        }
    finally:
        if with_stand_in:
            del sys.modules["sentencepiece"]


@functools.cache
def classes():
    """By name, every exported pipeline whose `unet` or `transformer` may be of a known class."""
    found = kolors()
    for name in dir(diffusers):
        if "Pipeline" not in name:
            continue
        try:
            cls = getattr(diffusers, name)
        except RuntimeError:
            # diffusers 0.35 cannot import SkyReels-V2 without the package ftfy
            assert name.startswith("SkyReels")
            continue
        if not inspect.isclass(cls) or not issubclass(cls, diffusers.DiffusionPipeline):
            continue
        parameters = inspect.signature(cls.__init__).parameters
        annotations = [str(parameters[n].annotation) for n in DENOISERS if n in parameters]
        if any(re.search(rf"\b{known}\b", text) for text in annotations for known in KNOWN):
            found[name] = cls
    return found


def denoiser_of(pipe):
    return next(getattr(pipe, name) for name in DENOISERS if hasattr(pipe, name))


# ---- parts ---------------------------------------------------------------------------------------


UNET = {
    "sample_size": SIZE // 2,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 32,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def unet(**options):
    return diffusers.UNet2DConditionModel(**UNET | options)


XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 32 + 6 * 8,
    "cross_attention_dim": 64,
}


def vision():
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, projection_dim=32, num_hidden_layers=1,
        num_attention_heads=2, image_size=16, patch_size=8,
    )  # fmt: skip
    return CLIPVisionModelWithProjection(config)


def adapter(downscale=2):
    return diffusers.T2IAdapter(
        in_channels=3, channels=[8, 16], num_res_blocks=1, downscale_factor=downscale,
        adapter_type="full_adapter",
    )  # fmt: skip


def motion_adapter():
    return diffusers.MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=2,
        motion_num_attention_heads=2, motion_mid_block_layers_per_block=1,
    )  # fmt: skip


def controlnet(model):
    return diffusers.ControlNetModel.from_unet(model, conditioning_embedding_out_channels=(4, 8))


def controlnet_union(model):
    names = inspect.signature(diffusers.ControlNetUnionModel.__init__).parameters
    same = {name: value for name, value in model.config.items() if name in names}
    return diffusers.ControlNetUnionModel(
        **same, conditioning_embedding_out_channels=(4, 8), num_trans_channel=8, num_trans_head=2,
        num_trans_layer=1, num_proj_channel=8,
    )  # fmt: skip


# options of the UNet, where it is not that of a text-to-image pipeline
UNETS = {
    "StableDiffusionInstructPix2PixPipeline": {"in_channels": 8},
    "StableDiffusionXLInstructPix2PixPipeline": {"in_channels": 8},
    "StableDiffusionUpscalePipeline": {"in_channels": 7, "num_class_embeds": 400},
    "StableDiffusionDepth2ImgPipeline": {"in_channels": 5},
    # its layers norm the text
    "StableDiffusionLatentUpscalePipeline": {
        "in_channels": 8, "out_channels": 5, "act_fn": "gelu", "norm_num_groups": None,
        "attention_head_dim": 8, "block_out_channels": (32, 32, 64, 64), "conv_in_kernel": 1,
        "conv_out_kernel": 1, "mid_block_type": None, "layers_per_block": 2,
        "down_block_types": ("KDownBlock2D", *["KCrossAttnDownBlock2D"] * 3),
        "up_block_types": (*["KCrossAttnUpBlock2D"] * 3, "KUpBlock2D"),
        "resnet_time_scale_shift": "scale_shift", "time_embedding_type": "fourier",
        "timestep_post_act": "gelu", "time_cond_proj_dim": 128 + 32,
    },
    "StableDiffusionGLIGENPipeline": {"attention_type": "gated"},
    "StableDiffusionGLIGENTextImagePipeline": {"attention_type": "gated-text-image"},
    "StableUnCLIPPipeline": {
        "class_embed_type": "projection", "projection_class_embeddings_input_dim": 64,
    },
    "StableUnCLIPImg2ImgPipeline": {
        "class_embed_type": "projection", "projection_class_embeddings_input_dim": 64,
    },
    "LatentConsistencyModelPipeline": {"time_cond_proj_dim": 8},
    "LatentConsistencyModelImg2ImgPipeline": {"time_cond_proj_dim": 8},
    "PaintByExamplePipeline": {"in_channels": 9},
    "PIAPipeline": {"in_channels": 9},
    "MarigoldDepthPipeline": {"in_channels": 8},
    "MarigoldNormalsPipeline": {"in_channels": 8},
    "MarigoldIntrinsicsPipeline": {"in_channels": 12, "out_channels": 8},
}  # fmt: skip


SCHEDULERS = {
    "LatentConsistencyModelPipeline": diffusers.LCMScheduler,
    "LatentConsistencyModelImg2ImgPipeline": diffusers.LCMScheduler,
    "StableDiffusionParadigmsPipeline": diffusers.DDPMParallelScheduler,
    "StableDiffusionLatentUpscalePipeline": diffusers.EulerDiscreteScheduler,
}


PLAIN = {"clip_sample": False, "steps_offset": 1}
SETTINGS = {
    diffusers.DDPMParallelScheduler: {"clip_sample": False},
    diffusers.EulerDiscreteScheduler: {},
}


def sd_parts(name):
    is_xl = "StableDiffusionXL" in name or "SDXL" in name
    model = unet(**(XL if is_xl else {}) | UNETS.get(name, {}))
    with_vision = ("StableDiffusionImageVariation", "StableUnCLIP")
    scheduler = SCHEDULERS.get(name, diffusers.DDIMScheduler)
    parts = {
        "vae": testing.vae(),
        "unet": model,
        "text_encoder": testing.CLIPTextModel(testing.clip_config(32)),
        "tokenizer": testing.clip_tokenizer(),
        "text_encoder_2": testing.CLIPTextModelWithProjection(testing.clip_config(32)),
        "tokenizer_2": testing.clip_tokenizer(),
        "scheduler": scheduler(
            **SETTINGS.get(scheduler, {"clip_sample": False, "steps_offset": 1})
        ),
        "inverse_scheduler": diffusers.DDIMInverseScheduler(clip_sample=False),
        "low_res_scheduler": diffusers.DDPMScheduler(),
        "feature_extractor": CLIPImageProcessor(size=16, crop_size=16),
        "image_encoder": vision() if name.startswith(with_vision) else None,
    }
    if "Sparse" in name:
        parts["controlnet"] = diffusers.SparseControlNetModel(
            block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            cross_attention_dim=32, attention_head_dim=2, motion_num_attention_heads=2,
            conditioning_embedding_out_channels=(4, 8),
        )  # fmt: skip
    elif "Union" in name:
        parts["controlnet"] = controlnet_union(model)
    elif "ControlNet" in name:
        parts["controlnet"] = controlnet(model)
    if "Adapter" in name:
        parts["adapter"] = adapter()
    if name.startswith(("AnimateDiff", "PIA")):
        parts["motion_adapter"] = motion_adapter()
    if "UnCLIP" in name:
        normalizer = diffusers.pipelines.stable_diffusion.StableUnCLIPImageNormalizer
        parts |= {
            "image_normalizer": normalizer(embedding_dim=32),
            "image_noising_scheduler": diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
            "prior_tokenizer": testing.clip_tokenizer(),
            "prior_text_encoder": testing.CLIPTextModelWithProjection(testing.clip_config(32)),
            "prior": diffusers.PriorTransformer(
                num_attention_heads=2, attention_head_dim=8, embedding_dim=32, num_layers=1
            ),
            "prior_scheduler": diffusers.UnCLIPScheduler(
                variance_type="fixed_small_log", prediction_type="sample"
            ),
        }
    if name.startswith("LEdits"):
        parts["scheduler"] = diffusers.DPMSolverMultistepScheduler(
            algorithm_type="sde-dpmsolver++", solver_order=2
        )
    if "LDM3D" in name:
        config = dict(parts["vae"].config) | {"in_channels": 6, "out_channels": 6}
        parts["vae"] = diffusers.AutoencoderKL.from_config(config)
    if name.startswith("PaintByExample"):
        module = inspect.getmodule(diffusers.PaintByExamplePipeline)
        encoder = module.PaintByExampleImageEncoder
        parts["image_encoder"] = encoder(vision().config)
    if name.startswith("LDM"):
        parts |= {"vqvae": parts["vae"], "bert": parts["text_encoder"]}
    return parts


def flux_parts(name):
    pipe = testing.flux(dev=True)
    parts = dict(pipe.components)
    if "Control" in name and "ControlNet" not in name:
        parts["transformer"] = flux_transformer(in_channels=32)
    if "Fill" in name or "VisualCloze" in name:
        # latents, masked latents and a mask of 2x2 pixels for each
        parts["transformer"] = flux_transformer(in_channels=16 + 16 + 16)
    if "ControlNet" in name:
        parts["controlnet"] = diffusers.FluxControlNetModel(
            in_channels=16, num_layers=1, num_single_layers=0, **testing.HEADS,
            joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
    if "VisualCloze" in name:
        parts["resolution"] = 16
    return parts


def flux_transformer(in_channels):
    return diffusers.FluxTransformer2DModel(
        in_channels=in_channels, out_channels=16, num_layers=2, num_single_layers=2,
        **testing.HEADS, joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def sd3_parts(name):
    parts = dict(testing.stable_diffusion_3().components)
    if "ControlNet" in name:
        parts["controlnet"] = diffusers.SD3ControlNetModel.from_transformer(
            parts["transformer"], num_layers=1, load_weights_from_transformer=False,
            num_extra_conditioning_channels=1 if "Inpaint" in name else 0,
        )  # fmt: skip
    elif "Inpaint" in name:
        # it asks for the 16 channels of the published model
        config = dict(parts["transformer"].config) | {"in_channels": 16, "out_channels": 16}
        parts["transformer"] = diffusers.SD3Transformer2DModel.from_config(config)
        config = dict(parts["vae"].config) | {"latent_channels": 16}
        parts["vae"] = diffusers.AutoencoderKL.from_config(config)
    return parts


def sana_parts(name):
    parts = dict(testing.sana(sprint="Sprint" in name).components)
    if "ControlNet" in name:
        names = inspect.signature(diffusers.SanaControlNetModel.__init__).parameters
        config = {k: v for k, v in parts["transformer"].config.items() if k in names}
        parts["controlnet"] = diffusers.SanaControlNetModel(**config | {"num_layers": 1})
    return parts


def wan_parts(name):
    parts = testing.wan_parts()
    if name == "SkyReelsV2ImageToVideoPipeline":
        config = testing.WAN_SIZE | video_parts.IMAGE_KEYS | {"in_channels": 36}
        parts["transformer"] = diffusers.SkyReelsV2Transformer3DModel(**config)
        return video_parts.with_images(parts)
    if "SkyReels" in name:
        parts["transformer"] = diffusers.SkyReelsV2Transformer3DModel(**testing.WAN_SIZE)
    else:
        channels = {"WanImageToVideoPipeline": 36, "LucyEditPipeline": 32}.get(name, 16)
        config = testing.WAN_SIZE | {"in_channels": channels}
        parts["transformer"] = diffusers.WanTransformer3DModel(**config)
    return parts


class LongText(torch.nn.Module):
    """ChatGLM as Kolors sees it: hidden states with the tokens first, and of another width."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(len(testing.LETTERS) + 4, 24)

    def forward(self, input_ids, **_):
        states = self.words(input_ids).transpose(0, 1)
        return SimpleNamespace(hidden_states=[states, states])


class LongTokenizer:
    """Its tokenizer, which numbers positions."""

    def __init__(self):
        self.letters = testing.letter_tokenizer()

    def __call__(self, *args, **kwargs):
        made = self.letters(*args, **kwargs)
        made["position_ids"] = made["input_ids"]
        return made


def kolors_parts(name):
    model = unet(
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8, encoder_hid_dim=24,
        encoder_hid_dim_type="text_proj",
    )  # fmt: skip
    return sd_parts(name) | {
        "unet": model, "text_encoder": LongText(), "tokenizer": LongTokenizer(),
    }  # fmt: skip


class SubjectText(torch.nn.Module):
    """The text encoder of BLIP-Diffusion as its pipelines see it: a subject before the words."""

    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(2 * len(testing.LETTERS) + 2, 32)
        config = SimpleNamespace(max_position_embeddings=77)
        self.text_model = SimpleNamespace(config=config)

    dtype, device = torch.float32, torch.device("cpu")

    def forward(self, input_ids, ctx_embeddings=None, ctx_begin_pos=None):
        words = self.words(input_ids)
        return (words if ctx_embeddings is None else torch.cat([ctx_embeddings, words], dim=1),)


class Subject(torch.nn.Module):
    """The query transformer of BLIP-Diffusion: 16 tokens for a picture."""

    config = SimpleNamespace(num_query_tokens=16)
    dtype, device = torch.float32, torch.device("cpu")

    def forward(self, image_input, text_input, return_dict):
        return image_input.mean((1, 2, 3)).view(-1, 1, 1).expand(-1, 16, 32)


class Passing:
    """An image processor that leaves pictures as they are."""

    def preprocess(self, image, **_):
        return {"pixel_values": image}

    def postprocess(self, image, **_):
        return image


def blip_parts(name):
    return sd_parts(name) | {
        "text_encoder": SubjectText(), "qformer": Subject(), "image_processor": Passing(),
        "mean": [0.5] * 3, "std": [0.5] * 3,
    }  # fmt: skip


def parts_of(name, cls):
    if name.startswith("Blip"):
        return blip_parts(name)
    if name.startswith("Kolors"):
        return kolors_parts(name)
    annotation = str(inspect.signature(cls.__init__).parameters.get("transformer"))
    for denoiser, make in video_parts.PARTS.items():
        if re.search(rf"\b{denoiser}\b", annotation):
            return make(name)
    for word, make in (
        ("Flux", flux_parts), ("SD3", sd3_parts), ("Sana", sana_parts),
        ("PixArt", lambda name: dict(testing.pixart(sigma=True).components)),
        ("Wan", wan_parts), ("SkyReels", wan_parts),
    ):  # fmt: skip
        if f"{word}" in annotation:
            return make(name)
    return sd_parts(name)


def build(name):
    torch.manual_seed(0)
    cls = classes()[name]
    parts = {
        "safety_checker": None, "requires_safety_checker": False, "add_watermarker": False,
        "watermarker": None,
    } | parts_of(name, cls)  # fmt: skip
    wanted = dict(inspect.signature(cls.__init__).parameters)
    del wanted["self"]
    parts["pag_applied_layers"] = "mid" if "unet" in wanted else "blocks.1"
    is_needed = {n: p.default is p.empty and p.kind is not p.VAR_KEYWORD for n, p in wanted.items()}
    given = {n: parts.get(n) for n in wanted if n in parts or is_needed[n]}
    return testing._ready(cls(**given))


# ---- calls ---------------------------------------------------------------------------------------


def picture(n=1, channels=3, size=SIZE):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(1))


def photo():
    return Image.fromarray((picture()[0].permute(1, 2, 0) * 255).byte().numpy())


def right_half(n):
    mask = torch.zeros(n, 1, SIZE, SIZE)
    mask[..., SIZE // 2 :] = 1
    return mask


VIDEO = {"height": 16, "width": 32, "num_frames": 5}


def of_class(name, n, guidance):
    """Arguments of one class only."""
    if name.startswith(("AnimateDiff", "PIA")):
        two = [photo()] * 2
        conditions = {"conditioning_frames": two, "controlnet_frame_indices": [0]}
        own = {"num_frames": 2, "video": two, "generator": torch.Generator().manual_seed(0)}
        return own | conditions | {"image": photo()}
    frames = [photo().resize((32, 16)) for _ in range(5)]
    if name.startswith("WanVACE"):
        # one prompt, as a string
        own = {"prompt": "a cat", "negative_prompt": "bad" if guidance > 1 else None}
        return VIDEO | own | {"generator": torch.Generator().manual_seed(0)}
    if name.startswith("WanAnimate"):
        motion = {"pose_video": frames, "face_video": frames, "segment_frame_length": 5}
        return VIDEO | motion | {"image": photo().resize((32, 16)), "max_sequence_length": 512}
    if name.startswith(("Wan", "SkyReels", "Lucy", "ChronoEdit", "AnyFlow")):
        own = {"overlap_history": 1, "base_num_frames": 5}
        beside_images = ("ChronoEdit", "SkyReelsV2Image")
        own |= {"max_sequence_length": 512} if name.startswith(beside_images) else {}
        video = {} if name.startswith("AnyFlow") else {"video": frames}
        return VIDEO | own | video | {"image": photo().resize((32, 16))}
    if name.startswith("LTX"):
        own = {"height": 64, "width": 64, "num_frames": 9, "image": picture(n, size=64)}
        # it leaves the last step out
        return own | ({"num_inference_steps": 2} if "Long" in name else {})
    if name.startswith("Cosmos"):
        own = {"height": 32, "image": None if "2_5" in name else photo(), "video": None}
        return VIDEO | own | {"generator": torch.Generator().manual_seed(0)}
    if name.startswith("Helios"):
        few = {"num_latent_frames_per_chunk": 2, "pyramid_num_inference_steps_list": [1, 1, 1]}
        return VIDEO | few | {"image": None, "height": 64, "width": 64}
    if name.startswith("Latte"):
        return {"video_length": 2, "mask_feature": False}
    if name.startswith(("SanaVideo", "SanaImage")):
        return {"height": 32, "width": 32, "frames": 5, "image": picture(1, size=32)}
    if name.startswith("Sana"):
        own = {"intermediate_timesteps": None, "control_image": picture(n, size=32)}
        return own | {"height": 32, "width": 32, "image": picture(n, size=32)}
    boxes = {"gligen_phrases": ["x"], "gligen_boxes": [[0, 0, 1, 1]]}
    upscaling = {"upsampling_strength": 0.0, "upsampling_height": 16, "upsampling_width": 16}
    zero = {"video_length": 2, "t0": 0, "t1": 1, "num_inference_steps": 3}
    if name.startswith("Marigold"):
        return {"processing_resolution": 0, "output_type": "np"}
    if name.startswith("LEdits"):
        return {
            "num_inversion_steps": 2,
            "height": 32,
            "width": 32,
            "image": photo().resize((32, 32)),
        }
    if name.startswith("Blip"):
        subjects = {"source_subject_category": ["cat"] * n, "target_subject_category": ["cat"] * n}
        return subjects | {"reference_image": picture(n), "condtioning_image": picture(n)}
    return {
        "CycleDiffusionPipeline": {
            "source_prompt": ["a rat", "a big rat"][:n],
            "num_inference_steps": 2,
        },
        "PaintByExamplePipeline": {"example_image": picture(n)},
        "StableDiffusionAttendAndExcitePipeline": {"token_indices": [[1]] * n},
        "StableDiffusionDepth2ImgPipeline": {"depth_map": picture(n, 1)[:, 0]},
        "StableDiffusionDiffEditPipeline": {
            "image_latents": torch.randn(n, 1, 4, SIZE // 2, SIZE // 2),
            "inpaint_strength": 1.0,
            "mask_image": right_half(n)[..., : SIZE // 2, : SIZE // 2],
        },
        "StableDiffusionGLIGENPipeline": boxes,
        "StableDiffusionGLIGENTextImagePipeline": boxes,
        "StableDiffusionPix2PixZeroPipeline": {
            "source_embeds": torch.randn(2, 77, 32),
            "target_embeds": torch.randn(2, 77, 32),
        },
        "StableDiffusion3ControlNetInpaintingPipeline": {"control_mask": right_half(n)},
        "StableDiffusionParadigmsPipeline": {"parallel": 1},
        "StableDiffusionLatentUpscalePipeline": {"image": torch.rand(n, 4, SIZE, SIZE)},
        "StableDiffusionLDM3DPipeline": {"output_type": "np"},
        "TextToVideoZeroPipeline": zero,
        "TextToVideoZeroSDXLPipeline": zero,
        "VisualClozeGenerationPipeline": CLOZE,
        "VisualClozePipeline": CLOZE | upscaling,
        "SemanticStableDiffusionPipeline": {"editing_prompt": ["fur"] if guidance > 1 else None},
    }.get(name, {})


CLOZE = {
    "task_prompt": "a task", "content_prompt": "a cat",
    "generator": torch.Generator().manual_seed(0),
    "image": [[photo(), photo()], [photo(), None]],
}  # fmt: skip


def arguments(pipe, prompts, negatives, guidance, extra=1.0, steps=1):
    """What the pipeline is called with: its own arguments, as far as it has them."""
    name, n = type(pipe).__name__, len(prompts)
    offered = {
        "prompt": prompts,
        "negative_prompt": negatives if guidance > 1 else None,
        "guidance_scale": guidance,
        "true_cfg_scale": guidance,
        "num_inference_steps": steps,
        "height": SIZE,
        "width": SIZE,
        "strength": 1.0,
        "image": picture(n),
        "mask_image": right_half(n),
        "control_image": picture(n),
        "control_mode": 0,
        "output_type": "latent",
        "generator": [torch.Generator().manual_seed(i) for i in range(n)],
        "pag_scale": extra,
        "sag_scale": extra,
        "image_guidance_scale": 1.5 if guidance > 1 else 1.0,
        "max_sequence_length": 16,
        "use_resolution_binning": False,
        "clean_caption": False,
        "complex_human_instruction": None,
        "_auto_resize": False,
        "max_area": SIZE * SIZE,
    } | of_class(name, n, guidance)
    parameters = inspect.signature(type(pipe).__call__).parameters
    return {k: v for k, v in offered.items() if k in parameters}
