"""What a layer of diffusers can be made to compute, and what NASA makes of each: a table.

Every argument of the attention classes that our families use, and every processor, is computed,
refused, or has no part in text attention. One that is not in the tables fails here: it is new in
diffusers, and somebody has to look.
"""

import inspect
from types import SimpleNamespace

import diffusers
import joint_cases
import pytest
import torch
from diffusers.models import attention_processor as stock
from diffusers.models.transformers import (
    sana_transformer,
    transformer_flux,
    transformer_skyreels_v2,
    transformer_wan,
)
from drawing import assert_same_image, denoise, negative_embeds, relative_error
from nasa_diffusers import enable_nasa, ip_adapter, nasa, testing
from nasa_diffusers.families import FAMILIES
from nasa_diffusers.families.joint import Joint
from nasa_diffusers.families.versions import NotThere
from nasa_diffusers.layer import CrossAttentionHook
from oracle import algorithm_1

# ---- arguments -----------------------------------------------------------------------------------

SIZE = {"query_dim": 64, "cross_attention_dim": 32, "heads": 4, "dim_head": 16}
COMPUTED = {
    "heads": [{"heads": 2}],
    "dim_head": [{"dim_head": 24}],
    "dropout": [{"dropout": 0.5}],
    "bias": [{"bias": True}],
    "upcast_attention": [{"upcast_attention": True}],
    "upcast_softmax": [{"upcast_softmax": True}],
    "cross_attention_norm": [{"cross_attention_norm": "layer_norm"}],
    "qk_norm": [{"qk_norm": kind} for kind in ("layer_norm", "fp32_layer_norm", "rms_norm", "l2")],
    "out_bias": [{"out_bias": False}],
    "eps": [{"qk_norm": "rms_norm", "eps": 0.1}],
    "elementwise_affine": [{"qk_norm": "rms_norm", "elementwise_affine": False}],
    "out_dim": [{"out_dim": 64, "dim_head": 32}],
    "processor": [
        {"processor": stock.AttnProcessor()},
        {"processor": stock.AttnProcessor(), "qk_norm": "rms_norm"},
        {"processor": stock.AttnProcessor(), "cross_attention_norm": "layer_norm"},
        {"processor": stock.SlicedAttnProcessor(1)},
        {"processor": stock.SlicedAttnProcessor(1), "qk_norm": "rms_norm"},
        {"processor": stock.AttnProcessor2_0(), "qk_norm": "rms_norm"},
    ],
    # those below have no part in it: what is computed is the same
    "added_proj_bias": [{"added_proj_bias": False}],
    "_from_deprecated_attn_block": [{"_from_deprecated_attn_block": True}],
    "out_context_dim": [{"out_context_dim": 7}],
    "context_pre_only": [{"context_pre_only": True}],
    "is_causal": [{"is_causal": True}],
    "cross_attention_norm_num_groups": [{"cross_attention_norm_num_groups": 4}],
    "norm_num_groups": [{"norm_num_groups": None}],
}
REFUSED = {
    "kv_heads": {"kv_heads": 2},
    "cross_attention_norm": {
        "cross_attention_norm": "group_norm",
        "cross_attention_norm_num_groups": 4,
    },
    "added_kv_proj_dim": {"added_kv_proj_dim": 32},
    "only_cross_attention": {"only_cross_attention": True, "added_kv_proj_dim": 32},
    "norm_num_groups": {"norm_num_groups": 8},
    "spatial_norm_dim": {"spatial_norm_dim": 8},
    "scale_qk": {"scale_qk": False},
    "rescale_output_factor": {"rescale_output_factor": 2.0},
    "residual_connection": {"residual_connection": True},
    "pre_only": {"pre_only": True},
}
# of the other classes: what is computed with them by the tests of their families, except where
# it says refused; `dim`s are sizes that follow from the others
WAN = {
    "dim", "heads", "dim_head", "eps", "dropout", "processor",
    "cross_attention_dim_head",  # keys as wide as queries, or stock cannot attend
    "is_cross_attention",  # how projections are fused
    "added_kv_proj_dim",  # refused
}  # fmt: skip
FLUX = {
    "query_dim", "heads", "dim_head", "dropout", "bias", "added_kv_proj_dim", "added_proj_bias",
    "out_bias", "eps", "out_dim", "context_pre_only", "pre_only", "elementwise_affine",
    "processor",
}  # fmt: skip


def arguments(cls):
    return set(list(inspect.signature(cls.__init__).parameters)[1:])


def test_every_argument_is_in_a_table():
    assert arguments(stock.Attention) <= {*SIZE, *COMPUTED, *REFUSED}
    assert arguments(transformer_wan.WanAttention) <= WAN
    if hasattr(transformer_skyreels_v2, "SkyReelsV2Attention"):
        assert arguments(transformer_skyreels_v2.SkyReelsV2Attention) <= WAN
    assert arguments(transformer_flux.FluxAttention) <= FLUX


def with_layer(**options):
    """A UNet with one layer made with `options`, and the layer."""
    pipe = testing.stable_diffusion()
    torch.manual_seed(1)
    layer = stock.Attention(**SIZE | options).eval().requires_grad_(False)
    for name, weight in layer.named_parameters():
        if "norm" in name:
            # as after training
            weight.data = torch.rand_like(weight) + 0.5
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2 = layer
    return pipe, layer


def name_of(case):
    return ",".join(f"{k}={type(v).__name__ if k == 'processor' else v}" for k, v in case.items())


@torch.no_grad()
@pytest.mark.parametrize("options", [c for cases in COMPUTED.values() for c in cases], ids=name_of)
def test_computed(options):
    """A layer's own stock output for both texts gives what is right: it is linear in Z."""
    if not arguments(stock.Attention) >= set(options):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name_of(options)}")
    pipe, layer = with_layer(**options)
    calls = []
    record = layer.register_forward_hook(lambda _, args, out: calls.append((args[0], out)))
    pos, neg = negative_embeds(pipe, "a cat"), negative_embeds(pipe, "blurry")
    with nasa(pipe, negative_prompt_embeds=neg, alpha=0.5, layers="mid_block.*", cfg=False):
        denoise(pipe, pos)
    record.remove()
    ((hidden, ours),) = calls
    bias = 0 if layer.to_out[0].bias is None else layer.to_out[0].bias
    z_pos, z_neg = (layer(hidden, text.expand(2, -1, -1)) - bias for text in (pos, neg))
    assert relative_error(z_neg, z_pos) > 1e-3
    assert_same_image(ours, z_pos - 0.5 * z_neg + bias)


@pytest.mark.parametrize("options", REFUSED.values(), ids=name_of)
def test_refused(options):
    pipe, _ = with_layer(**options)
    which = "|".join(options)
    with pytest.raises(ValueError, match=rf"transformer_blocks.0.attn2' uses .*({which})"):
        enable_nasa(pipe, "blurry")
    enable_nasa(pipe, "blurry", layers="up_blocks.*")


# ---- processors ----------------------------------------------------------------------------------

MODULES = [
    stock, sana_transformer, transformer_flux, transformer_skyreels_v2, transformer_wan
]  # fmt: skip
# every other one is refused, where it is not a name that makes one of these
PROCESSORS = {
    "UNet": {
        "AttnProcessor",
        "AttnProcessor2_0",
        "FusedAttnProcessor2_0",
        "SlicedAttnProcessor",
        "XFormersAttnProcessor",
    },
    "PixArt": {
        "AttnProcessor",
        "AttnProcessor2_0",
        "FusedAttnProcessor2_0",
        "SlicedAttnProcessor",
        "XFormersAttnProcessor",
    },
    "Allegro": {"AllegroAttnProcessor2_0"},
    "Sana": {"SanaAttnProcessor2_0"},
    "SanaVideo": {"SanaAttnProcessor2_0"},
    "LTXVideo": {"LTXVideoAttnProcessor"},
    "Cosmos": {"CosmosAttnProcessor2_0"},
    "Wan": {"WanAttnProcessor"},
    "WanAnimate": {"WanAttnProcessor"},
    "ChronoEdit": {"WanAttnProcessor"},
    "AnyFlow": {"AnyFlowCrossAttnProcessor"},
    "Helios": {"HeliosAttnProcessor"},
    "SkyReels": {"SkyReelsV2AttnProcessor"},
    "Flux": {"FluxAttnProcessor", "FluxIPAdapterAttnProcessor"},
    "StableDiffusion3": {
        "JointAttnProcessor2_0",
        "FusedJointAttnProcessor2_0",
        "XFormersJointAttnProcessor",
    },
    "QwenImage": {"QwenDoubleStreamAttnProcessor2_0"},
    "ZImage": {"ZSingleStreamAttnProcessor"},
    "Flux2": {"Flux2AttnProcessor", "Flux2ParallelSelfAttnProcessor"},
    "Krea2": {"Krea2AttnProcessor"},
    "LTX2": {"LTX2AudioVideoAttnProcessor", "LTX2PerturbedAttnProcessor"},
    "CogVideoX": {"CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0"},
    "CogView4": {"CogView4AttnProcessor"},
    "Chroma": {"FluxAttnProcessor"},
    "Ovis": {"OvisImageAttnProcessor"},
    "LongCat": {"LongCatImageAttnProcessor"},
    "Bria": {"BriaAttnProcessor"},
    "Lumina2": {"Lumina2AttnProcessor2_0"},
    "AuraFlow": {"AuraFlowAttnProcessor2_0", "FusedAuraFlowAttnProcessor2_0"},
    "ErnieImage": {"ErnieImageSingleStreamAttnProcessor"},
    "PRX": {"PRXAttnProcessor2_0"},
    "QwenImage21": {"QwenImage21AttnProcessor"},
    "Ideogram4": {"Ideogram4AttnProcessor"},
    "HiDream": {"HiDreamAttnProcessor"},
    "JoyImageEdit": {"JoyImageAttnProcessor"},
    "CogView3Plus": {"CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0"},
    "HunyuanVideo": {"HunyuanVideoAttnProcessor2_0"},
    "Framepack": {"HunyuanVideoAttnProcessor2_0"},
    "HunyuanVideo15": {"HunyuanVideo15AttnProcessor2_0"},
    "HunyuanImage": {"HunyuanImageAttnProcessor"},
    "HunyuanDiT": {"FusedHunyuanAttnProcessor2_0", "HunyuanAttnProcessor2_0"},
    "LuminaNext": {"LuminaAttnProcessor2_0"},
    "Mochi": {"MochiAttnProcessor2_0"},
    "EasyAnimate": {"EasyAnimateAttnProcessor2_0"},
    "Fibo": {"BriaAttnProcessor", "BriaFiboAttnProcessor"},
}
PROCESSORS |= {"AnimateDiff": PROCESSORS["UNet"], "Latte": PROCESSORS["PixArt"]}
WITH_IMAGES = {
    "IPAdapterAttnProcessor",
    "IPAdapterXFormersAttnProcessor",
    "IPAdapterAttnProcessor2_0",
}
# looked at: what they compute besides text attention is nothing that NASA computes
LOOKED_AT = {
    "AllegroAttnProcessor2_0", "AttnAddedKVProcessor", "AttnAddedKVProcessor2_0",
    "AttnProcessorNPU", "AuraFlowAttnProcessor2_0", "CogVideoXAttnProcessor2_0",
    "CustomDiffusionAttnProcessor", "CustomDiffusionAttnProcessor2_0",
    "CustomDiffusionXFormersAttnProcessor", "FluxAttnProcessor2_0", "FluxAttnProcessor2_0_NPU",
    "FluxIPAdapterJointAttnProcessor2_0", "FluxSingleAttnProcessor2_0",
    "FusedAuraFlowAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0",
    "FusedFluxAttnProcessor2_0", "FusedFluxAttnProcessor2_0_NPU", "FusedHunyuanAttnProcessor2_0",
    "HunyuanAttnProcessor2_0", "IPAdapterMaskProcessor", "LoRAAttnAddedKVProcessor",
    "LoRAAttnProcessor", "LoRAAttnProcessor2_0", "LoRAXFormersAttnProcessor",
    "LuminaAttnProcessor2_0", "MochiAttnProcessor2_0", "MochiVaeAttnProcessor2_0",
    "PAGCFGHunyuanAttnProcessor2_0", "PAGCFGIdentitySelfAttnProcessor2_0",
    "PAGCFGJointAttnProcessor2_0", "PAGCFGSanaLinearAttnProcessor2_0",
    "PAGHunyuanAttnProcessor2_0", "PAGIdentitySanaLinearAttnProcessor2_0",
    "PAGIdentitySelfAttnProcessor2_0", "PAGJointAttnProcessor2_0",
    "SD3IPAdapterJointAttnProcessor2_0", "SanaLinearAttnProcessor2_0",
    "SanaMultiscaleAttnProcessor2_0", "SlicedAttnAddedKVProcessor",
    "StableAudioAttnProcessor2_0", "WanAttnProcessor2_0", "XFormersAttnAddedKVProcessor",
    "XLAFlashAttnProcessor2_0", "XLAFluxFlashAttnProcessor2_0",
    "SkyReelsV2AttnProcessor2_0",
}  # fmt: skip


def processors():
    return {
        name: cls
        for module in MODULES
        for name, cls in inspect.getmembers(module, inspect.isclass)
        if "Processor" in name
    }


def is_there(family):
    """Whether this diffusers has the family's classes."""
    return bool(family.processors) and NotThere not in family.processors


def test_every_processor_is_in_a_table():
    assert processors().keys() <= {*LOOKED_AT, *WITH_IMAGES, *set().union(*PROCESSORS.values())}
    assert {cls.__name__ for cls in ip_adapter.PROCESSORS} == WITH_IMAGES
    for family in FAMILIES:
        if not is_there(family):
            continue
        names = {
            cls.__name__.replace("AttnProcessor2_0", "AttnProcessor") for cls in family.processors
        }
        table = PROCESSORS[type(family).__name__]
        assert names == {name.replace("AttnProcessor2_0", "AttnProcessor") for name in table}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: type(family).__name__)
def test_every_other_processor_is_refused(family):
    if not is_there(family):
        pytest.skip("a newer diffusers has it")
    for name, cls in processors().items():
        processor = object.__new__(cls)
        if type(processor) in family.processors:
            continue
        layer = SimpleNamespace(processor=processor)
        with pytest.raises(RuntimeError, match=f"has the processor {name}, whose computation"):
            if isinstance(family, Joint):
                family.check_attention("attn", layer, None)
            else:
                CrossAttentionHook("attn2", family, None, True)._check_processor(layer, None)


# ---- instances -----------------------------------------------------------------------------------


def latent_upscaler():
    """The UNet of StableDiffusionLatentUpscalePipeline, whose layers normalise the text."""
    pipe = testing.stable_diffusion()
    torch.manual_seed(0)
    pipe.unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        act_fn="gelu",
        attention_head_dim=8,
        norm_num_groups=None,
        block_out_channels=[32, 32, 64, 64],
        conv_in_kernel=1,
        conv_out_kernel=1,
        cross_attention_dim=32,
        down_block_types=("KDownBlock2D", *["KCrossAttnDownBlock2D"] * 3),
        mid_block_type=None,
        only_cross_attention=False,
        resnet_time_scale_shift="scale_shift",
        time_embedding_type="fourier",
        timestep_post_act="gelu",
        up_block_types=(*["KCrossAttnUpBlock2D"] * 3, "KUpBlock2D"),
    )
    pipe.unet.eval().requires_grad_(False)
    for name, weight in pipe.unet.named_parameters():
        if "norm_cross" in name:
            weight.data = torch.rand_like(weight) + 0.5
    return pipe


@torch.no_grad()
def test_the_text_is_normalised_in_a_latent_upscaler():
    pipe = latent_upscaler()
    pos, neg = negative_embeds(pipe, "a cat"), negative_embeds(pipe, "blurry")
    stock_output = denoise(pipe, pos)
    with nasa(pipe, negative_prompt_embeds=neg, alpha=1e-7, cfg=False) as handle:
        assert_same_image(denoise(pipe, pos), stock_output)
        handle.alpha = 0.5
        ours = denoise(pipe, pos)
    assert relative_error(ours, stock_output) > 1e-3
    with algorithm_1(pipe.unet, [(neg, None, 0.5)]):
        assert_same_image(ours, denoise(pipe, pos))


@pytest.mark.parametrize("name", ["WanTransformer3DModel", "SkyReelsV2Transformer3DModel"])
def test_images_among_the_keys_of_the_text_are_refused(name):
    """Where layers have no keys of their own for them, the negative prompt would be one of all."""
    if name.startswith("Sky") and not hasattr(transformer_skyreels_v2, "SkyReelsV2Attention"):
        pytest.skip(f"diffusers {diffusers.__version__} has other layers in SkyReels-V2")
    pipe = testing.wan()
    size = testing.WAN_SIZE | {"image_dim": 16, "added_kv_proj_dim": None}
    pipe.register_modules(transformer=getattr(diffusers, name)(**size))
    with pytest.raises(ValueError, match=r"image_dim=16 .* is not supported"):
        enable_nasa(pipe, "blurry")


@torch.no_grad()
@pytest.mark.parametrize("where", ["flux", "sd3"])
def test_masks_of_images_are_not_passed_over(where):
    case = joint_cases.flux() if where == "flux" else joint_cases.sd3()
    options = {"joint_attention_kwargs": {"ip_adapter_masks": [torch.ones(1, 1, 32, 32)]}}
    with (
        nasa(case.pipe, negative_prompt_embeds=joint_cases.negative(), alpha=0.5, cfg=False),
        pytest.raises(ValueError, match="ip_adapter_masks, which diffusers takes for .* passes"),
    ):
        case(**options)
