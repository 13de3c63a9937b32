"""The small pipelines of families with a side stream, and how each is called."""

import importlib
from types import SimpleNamespace

import diffusers
import hunyuan_pipes
import torch
from nasa_diffusers import testing_joint
from nasa_diffusers import testing_side as testing

# everything off that the pipeline switches on by itself
DISTILLED = {
    "guidance_scale": 1.0, "audio_guidance_scale": 1.0, "stg_scale": 0.0, "audio_stg_scale": 0.0,
    "modality_scale": 1.0, "audio_modality_scale": 1.0,
}  # fmt: skip
SMALL = {"height": 32, "width": 48}
PIPES = {
    "qwen-image": (testing.qwen_image, SMALL | {"true_cfg_scale": 1.0}),
    "z-image": (testing.z_image, SMALL | {"guidance_scale": 0.0, "max_sequence_length": 16}),
    "flux2": (testing.flux2, {"height": 16, "width": 24, "max_sequence_length": 16}),
    "klein": (testing.klein, {"height": 16, "width": 24, "max_sequence_length": 16}),
    "krea2": (testing.krea2, SMALL | {"guidance_scale": 0.0, "max_sequence_length": 16}),
    "cogvideox": (
        testing.cogvideox,
        {
            "height": 32, "width": 32, "num_frames": 5, "guidance_scale": 1.0,
            "max_sequence_length": 16,
        },
    ),
    "cogview4": (testing.cogview4, {"height": 16, "width": 32, "guidance_scale": 1.0}),
    "ltx2": (
        testing.ltx2,
        {
            "height": 32, "width": 32, "num_frames": 3, "frame_rate": 25.0,
            "max_sequence_length": 16, **DISTILLED,
        },
    ),
}  # fmt: skip
PIPES |= {
    "chroma": (testing_joint.chroma, SMALL | {"guidance_scale": 1.0, "max_sequence_length": 16}),
    "ovis": (testing_joint.ovis, SMALL | {"guidance_scale": 1.0, "max_sequence_length": 16}),
    "longcat": (
        testing_joint.longcat, SMALL | {"guidance_scale": 1.0, "enable_prompt_rewrite": False}
    ),
    "bria": (testing_joint.bria, SMALL | {"guidance_scale": 1.0, "max_sequence_length": 16}),
    "fibo": (testing_joint.fibo, {"height": 64, "width": 96, "guidance_scale": 1.0}),
    "lumina2": (testing_joint.lumina2, SMALL | {"guidance_scale": 1.0, "max_sequence_length": 40}),
    "aura-flow": (
        testing_joint.aura_flow,
        {"height": 16, "width": 16, "guidance_scale": 1.0, "max_sequence_length": 16},
    ),
    "ernie": (testing_joint.ernie, {"height": 64, "width": 96, "guidance_scale": 1.0}),
    "qwen21": (testing_joint.qwen_image_21, {"height": 64, "width": 96}),
    "ideogram4": (
        testing_joint.ideogram4,
        {
            "height": 16, "width": 24, "max_sequence_length": 16, "guidance_scale": 1.0,
            "guidance_schedule": None,
        },
    ),
    "hidream": (
        testing_joint.hidream,
        {"height": 16, "width": 24, "max_sequence_length": 16, "guidance_scale": 1.0},
    ),
    "joy": (testing_joint.joy_image_edit, {"height": 32, "width": 48, "guidance_scale": 1.0}),
    "prx": (
        testing_joint.prx,
        {"height": 16, "width": 24, "guidance_scale": 1.0, "use_resolution_binning": False},
    ),
}  # fmt: skip
# under guidance these put both branches into one batch, the pipeline's own negative prompt first
DOUBLED = ("ltx2", "cogvideox", "bria", "fibo", "aura-flow", "ernie", "prx", "hidream")
# what switches on classifier-free guidance
CFG = {
    "qwen-image": {"true_cfg_scale": 3.0, "negative_prompt": "dull"},
    "z-image": {"guidance_scale": 3.0, "negative_prompt": "dull"},
    "krea2": {"guidance_scale": 3.0, "negative_prompt": "dull"},
    "ltx2": {"guidance_scale": 3.0, "negative_prompt": "dull"},
    "cogvideox": {"guidance_scale": 3.0, "negative_prompt": "dull"},
    "cogview4": {"guidance_scale": 3.0, "negative_prompt": "dull"},
}
CFG |= {
    name: {"guidance_scale": 3.0, "negative_prompt": "dull"}
    for name in (
        "chroma",
        "ovis",
        "longcat",
        "bria",
        "fibo",
        "lumina2",
        "aura-flow",
        "ernie",
        "prx",
    )
}
CFG["joy"] = CFG["prx"]
CFG["hidream"] = CFG["prx"]
CFG["qwen21"] = {"true_cfg_scale": 3.0, "negative_prompt": "dull"}
NEEDS = {
    "qwen-image": "QwenImagePipeline", "z-image": "ZImagePipeline", "flux2": "Flux2Pipeline",
    "klein": "Flux2KleinPipeline", "krea2": "Krea2Pipeline", "ltx2": "LTX2Pipeline",
    "cogvideox": "CogVideoXPipeline", "cogview4": "CogView4Pipeline",
    "chroma": "ChromaPipeline", "ovis": "OvisImagePipeline", "longcat": "LongCatImagePipeline",
    "bria": "BriaPipeline", "fibo": "BriaFiboPipeline", "lumina2": "Lumina2Pipeline",
    "aura-flow": "AuraFlowPipeline", "ernie": "ErnieImagePipeline",
    "prx": "PRXPipeline", "qwen21": "QwenImage21Pipeline",
    "ideogram4": "Ideogram4Pipeline", "hidream": "HiDreamImagePipeline",
    "joy": "JoyImageEditPipeline",
}  # fmt: skip
PIPES |= hunyuan_pipes.PIPES
CFG |= hunyuan_pipes.CFG
NEEDS |= hunyuan_pipes.NEEDS
DOUBLED = (*DOUBLED, *hunyuan_pipes.DOUBLED)
PIPES = {name: each for name, each in PIPES.items() if hasattr(diffusers, NEEDS[name])}

if hasattr(diffusers, "PRXPipeline"):
    # they clean text with a package that need not be there
    for each in ("pipeline_prx", "pipeline_prx_pixel"):
        module = importlib.import_module(f"diffusers.pipelines.prx.{each}")
        if not hasattr(module, "ftfy"):
            module.ftfy = SimpleNamespace(fix_text=str)


def draw(pipe, options, prompt="a cat", *, steps=2, seed=0, **others):
    """The final latents of each image, `[images, ...]`; of LTX-2 those of video and sound."""
    prompts = len(prompt) if isinstance(prompt, list) else 1
    each = next((x for name, x in others.items() if name.startswith("num_") and "_per_" in name), 1)
    made = pipe(
        prompt=prompt, num_inference_steps=steps, output_type="latent", return_dict=False,
        generator=[torch.Generator().manual_seed(seed + i) for i in range(prompts * each)],
        **options | others,
    )  # fmt: skip
    return torch.cat([x.flatten(1) for x in made if x is not None], 1)
