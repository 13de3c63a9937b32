"""Every pipeline with a side stream: the rows of its prompt are guided, and no others.

Under classifier-free guidance what the denoiser returns for the pipeline's own negative prompt is
what it returned without NASA, and what it returns for the prompt is not.
"""

import inspect

import diffusers
import hunyuan_pipes
import pytest
import side_pipes  # noqa: F401  with what PRX cleans its text
import torch
from drawing import relative_error
from nasa_diffusers import NASA, nasa, pipelines, testing, testing_joint
from nasa_diffusers import testing_side as side
from nasa_diffusers.families import FAMILIES
from PIL import Image
from seen_calls import check, seen

FAMILY_NAMES = {family.name for family in FAMILIES if family.is_beside}


class Processor:
    """Reads texts as the tokenizer does, and passes over images."""

    def __init__(self):
        self.tokenizer = side.chat_tokenizer()

    def __call__(self, text, images=None, **options):
        made = self.tokenizer(text, **options)
        return type(made)(dict(made) | {"pixel_values": None, "image_grid_thw": None})


def photo(width=48, height=32):
    return Image.new("RGB", (width, height), (200, 30, 90))


def half():
    mask = Image.new("L", (48, 32))
    mask.paste(255, (24, 0, 48, 32))
    return mask


def of_parts(name, pipe, **others):
    """The class of this name from the parts of another pipeline."""
    cls = getattr(diffusers, name)
    parts = dict(pipe.components) | others
    asked = inspect.signature(cls.__init__).parameters
    return testing._ready(cls(**{key: x for key, x in parts.items() if key in asked}))


def qwen(name, **others):
    pipe = of_parts(name, side.qwen_image(), **others)
    # a letter is a token
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "a {}.", 2
    return pipe


def qwen_control(**options):
    return diffusers.QwenImageControlNetModel(
        in_channels=16, out_channels=4, num_layers=1, joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6), **testing.HEADS, **options,
    )  # fmt: skip


def z_control(channels=4):
    return diffusers.ZImageControlNetModel(
        control_layers_places=[0, 1], control_in_dim=channels, dim=32, n_refiner_layers=1,
        n_heads=2, n_kv_heads=2, all_patch_size=(2,), all_f_patch_size=(1,),
    )  # fmt: skip


def with_channels(name, pipe, channels):
    """Its denoiser reads another image beside its own."""
    return of_parts(name, pipe, transformer=changed(pipe.transformer, in_channels=channels))


def changed(model, **options):
    config = {key: x for key, x in model.config.items() if not key.startswith("_")}
    return type(model)(**config | options)


def with_slots():
    """LTX-2.5's denoiser knows frames that stand behind the video."""
    return changed(side.ltx2("2.3").transformer, use_keyframes_abs_pos_embedding=True)


def temporal_refine(name):
    upsampler = diffusers.pipelines.ltx2.LTX2LatentUpsamplerModel(
        in_channels=4, mid_channels=32, num_blocks_per_stage=1, spatial_upsample=False,
        temporal_upsample=True,
    )  # fmt: skip
    return of_parts(
        name, side.ltx2("2.3"), transformer=with_slots(), temporal_latent_upsampler=upsampler,
        scheduler=diffusers.LTXEulerAncestralRFScheduler(),
    )  # fmt: skip


def reference(name):
    kind = getattr(getattr(diffusers.pipelines, "ltx2", None), name, None)
    return None if kind is None else [kind(frames=[photo(32, 32)] * 3)]


class NoPixels:
    """What stands for pixels and for their grid where a text encoder passes over images."""

    def to(self, device):
        return None

    def prod(self):
        return 4


class Reader:
    """The processor of such an encoder, and that of its images."""

    merge_size = 2

    @property
    def image_processor(self):
        return self

    def __call__(self, images, return_tensors):
        return {"pixel_values": NoPixels(), "image_grid_thw": NoPixels()}


def chroma_inpaint(name):
    pipe = of_parts(name, testing_joint.chroma())
    # the pipeline reads it, and the class does not have it
    pipe.transformer.register_to_config(guidance_embeds=False)
    return pipe


def longcat_edit(name):
    pipe = of_parts(name, testing_joint.longcat(), text_processor=Reader())
    pipe.prompt_template_encode_prefix = "a <|vision_start|><|image_pad|><|vision_end|>"
    pipe.prompt_template_encode_suffix, pipe.tokenizer_max_length = ".", 16
    return pipe


def noise(*shape):
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(3))


SMALL = {"height": 32, "width": 48}
OTHER = {"negative_prompt": "dull"}
QWEN = SMALL | OTHER | {"true_cfg_scale": 3.0}
Z_IMAGE = SMALL | OTHER | {"guidance_scale": 3.0, "max_sequence_length": 16}
KLEIN = SMALL | {"guidance_scale": 3.0, "max_sequence_length": 16}
LTX2 = {
    "height": 32, "width": 32, "num_frames": 3, "frame_rate": 25.0, "guidance_scale": 3.0,
    "max_sequence_length": 16, **OTHER,
}  # fmt: skip
CHROMA = SMALL | OTHER | {"guidance_scale": 3.0, "max_sequence_length": 16}
COG = {"height": 32, "width": 32, "guidance_scale": 3.0, "max_sequence_length": 16, **OTHER}
DFR = {"height": 32, "width": 32, "frame_rate": 25.0, "max_sequence_length": 16, "sigmas": [0.9]}
# a reference of half the size behind the video
GIVEN = {"reference_latents": noise(4, 5, 8, 8)}
# of 13 frames, with generated ones at 6 and 12
REFINED = {
    "num_frames": 13, "latents": noise(4, 7, 16, 16), "audio_latents": noise(2, 16, 2),
    "keyframes_latents": noise(4, 2, 16, 16), "keyframe_positions": [6, 12],
}  # fmt: skip
EDITED = {"image": photo(), "mask_image": half(), "strength": 1.0}
# how each is built, what it is called with, and which rows carry the prompt
FIRST, LAST = [True, False], [False, True]
RUN = {
    "QwenImageImg2ImgPipeline": (qwen, QWEN | {"image": photo(), "strength": 1.0}, FIRST),
    "QwenImageInpaintPipeline": (qwen, QWEN | EDITED, FIRST),
    "QwenImageControlNetPipeline": (
        lambda name: qwen(name, controlnet=qwen_control()), QWEN | {"control_image": photo()},
        FIRST,
    ),
    "QwenImageControlNetInpaintPipeline": (
        lambda name: qwen(name, controlnet=qwen_control(extra_condition_channels=4)),
        QWEN | {"control_image": photo(), "control_mask": half()}, FIRST,
    ),
    "QwenImageEditPipeline": (
        lambda name: qwen(name, processor=Processor()), QWEN | {"image": photo()}, FIRST
    ),
    "QwenImageEditInpaintPipeline": (
        lambda name: qwen(name, processor=Processor()), QWEN | EDITED, FIRST
    ),
    "QwenImageEditPlusPipeline": (
        lambda name: qwen(name, processor=Processor()),
        QWEN | {"image": [photo(), photo(32, 32)]}, FIRST,
    ),
    "QwenImageLayeredPipeline": (
        lambda name: qwen(
            name, processor=Processor(),
            transformer=side.qwen_image(use_layer3d_rope=True).transformer,
        ),
        OTHER | {"true_cfg_scale": 3.0, "image": photo(), "layers": 2, "output_type": "pil"}, FIRST,
    ),
    "ZImageImg2ImgPipeline": (
        lambda name: of_parts(name, side.z_image()),
        Z_IMAGE | {"image": photo(), "strength": 1.0}, FIRST,
    ),
    "ZImageInpaintPipeline": (
        lambda name: of_parts(name, side.z_image()), Z_IMAGE | EDITED, FIRST
    ),
    "ZImageControlNetPipeline": (
        lambda name: of_parts(name, side.z_image(), controlnet=z_control()),
        Z_IMAGE | {"control_image": photo()}, FIRST,
    ),
    "ZImageControlNetInpaintPipeline": (
        lambda name: of_parts(name, side.z_image(), controlnet=z_control(channels=9)),
        Z_IMAGE | EDITED | {"control_image": photo()}, FIRST,
    ),
    "Flux2KleinInpaintPipeline": (
        lambda name: of_parts(name, side.klein(is_distilled=False)), KLEIN | EDITED, FIRST
    ),
    # with the calls that it makes besides: they carry the prompt
    "LTX2ConditionPipeline": (
        lambda name: of_parts(name, side.ltx2("2.3")), LTX2, [*LAST, True, True]
    ),
    "LTX2DFRPipeline": (
        lambda name: of_parts(name, side.ltx2("2.5")), DFR | {"num_frames": 9} | GIVEN, [True],
    ),
    # a call for each of two tiles
    "LTX2DFRTemporalRefinePipeline": (
        temporal_refine, DFR | REFINED, [True, True]
    ),
    "LTX2HDRPipeline": (
        lambda name: of_parts(name, side.ltx2("2.3")),
        LTX2 | {"reference_conditions": reference("LTX2HDRReferenceCondition")}, LAST,
    ),
    # without recompressing the image, for which a package need not be there
    "LTX2ImageToVideoPipeline": (
        lambda name: of_parts(name, side.ltx2("2.3")),
        LTX2 | {"image": photo(32, 32), "image_crf": 0}, [*LAST, True, True],
    ),
    "LTX2InContextPipeline": (
        lambda name: of_parts(name, side.ltx2("2.3")),
        LTX2 | {"reference_conditions": reference("LTX2ReferenceCondition")},
        [*LAST, True, True],
    ),
    "CogVideoXVideoToVideoPipeline": (
        lambda name: of_parts(name, side.cogvideox()),
        COG | {"video": [photo(32, 32)] * 5, "strength": 1.0}, LAST,
    ),
    "CogVideoXImageToVideoPipeline": (
        lambda name: with_channels(name, side.cogvideox(), 8),
        COG | {"image": photo(32, 32), "num_frames": 5}, LAST,
    ),
    "CogVideoXFunControlPipeline": (
        lambda name: with_channels(name, side.cogvideox(), 8),
        COG | {"control_video": [photo(32, 32)] * 5}, LAST,
    ),
    "CogView4ControlPipeline": (
        lambda name: with_channels(name, side.cogview4(), 8),
        COG | {"height": 16, "control_image": photo(32, 16)}, FIRST,
    ),
}  # fmt: skip
RUN |= {
    "ChromaImg2ImgPipeline": (
        lambda name: of_parts(name, testing_joint.chroma()),
        CHROMA | {"image": photo(), "strength": 1.0}, FIRST,
    ),
    "ChromaInpaintPipeline": (
        chroma_inpaint, CHROMA | EDITED, FIRST
    ),
    "LongCatImageEditPipeline": (
        longcat_edit, OTHER | {"guidance_scale": 3.0, "image": photo()}, FIRST
    ),
    "PRXPixelPipeline": (
        lambda name: of_parts(name, testing_joint.prx()),
        OTHER | {"guidance_scale": 3.0, "height": 16, "width": 24, "output_type": "pt",
                 "use_resolution_binning": False}, LAST,
    ),
    "BriaFiboEditPipeline": (
        lambda name: of_parts(name, testing_joint.fibo()),
        OTHER | {
            "guidance_scale": 3.0, "image": photo(96, 64), "height": 64, "width": 96,
            "prompt": '{"edit_instruction": "a cat"}', "_auto_resize": False,
        }, LAST,
    ),
} | hunyuan_pipes.RUN  # fmt: skip
# in `test_side_pipes.py`
ALONE = (
    "QwenImagePipeline", "ZImagePipeline", "Flux2Pipeline", "Flux2KleinPipeline", "Krea2Pipeline",
    "LTX2Pipeline", "CogVideoXPipeline", "CogView4Pipeline", "ChromaPipeline",
    "OvisImagePipeline", "LongCatImagePipeline", "BriaPipeline", "BriaFiboPipeline",
    *hunyuan_pipes.ALONE,
    "Lumina2Pipeline", "AuraFlowPipeline", "ErnieImagePipeline", "PRXPipeline",
    "QwenImage21Pipeline", "Ideogram4Pipeline", "HiDreamImagePipeline",
    "JoyImageEditPipeline",
)  # fmt: skip
THERE = [name for name in RUN if hasattr(diffusers, name)]


@pytest.fixture(autouse=True)
def small_edits(monkeypatch):
    """Edit makes images of a million pixels of what it is given."""
    for part, size in (("edit", (48, 32, None)), ("edit_inpaint", (48, 32, None)),
                       ("edit_plus", (48, 32)), ("layered", (48, 32))):  # fmt: skip
        module = getattr(diffusers.pipelines.qwenimage, f"pipeline_qwenimage_{part}", None)
        if module is not None:
            monkeypatch.setattr(module, "calculate_dimensions", lambda *_, size=size: size)
    longcat = getattr(diffusers.pipelines, "longcat_image", None)
    if longcat is not None:
        module = longcat.pipeline_longcat_image_edit
        monkeypatch.setattr(module, "calculate_dimensions", lambda *_: (48, 32))


def run(pipe, options):
    """One step, the same for the same options: some draw noise without the generator."""
    torch.manual_seed(0)
    given = {
        "prompt": "a cat", "num_inference_steps": 1, "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
    } | options  # fmt: skip
    names = inspect.signature(pipe.__call__).parameters
    pipe(**{name: x for name, x in given.items() if name in names})


def rows_of(pipe, options):
    """What the denoiser returns in one step, row by row of all its calls."""
    rows = []
    handle = pipe.transformer.register_forward_hook(lambda _, __, output: rows.extend(output[0]))
    run(pipe, options)
    handle.remove()
    return rows


@pytest.mark.parametrize("name", THERE)
def test_the_rows_of_the_prompt_and_no_others(name):
    build, options, carry = RUN[name]
    torch.manual_seed(0)
    pipe = build(name)
    stock = rows_of(pipe, options)
    with nasa(pipe, "blurry", NASA(0.5)) as handle:
        guided = rows_of(pipe, options)
        assert handle.report().layers_guided > 0
    for a, b, is_guided in zip(stock, guided, carry, strict=True):
        # one batch for both goes through one operator, which rounds in another order
        assert relative_error(b, a) > 1e-3 if is_guided else relative_error(b, a) < 1e-5


# the oracle runs blocks without what a ControlNet adds between them, and after the call, when
# attention is not perturbed any more
PLAIN = [name for name in THERE if not any(word in name for word in ("ControlNet", "PAG"))]


@pytest.mark.parametrize("name", PLAIN)
def test_each_call_is_what_the_oracle_makes_of_it(name):
    build, options, carry = RUN[name]
    torch.manual_seed(0)
    pipe = build(name)
    width = {"Flux2": 96}.get(name[:5], 32)
    negative = noise(5, width)
    if name.startswith("BriaFibo"):
        negative = noise(5, 64), [noise(5, 32)] * 4
    if name.startswith("LTX2"):
        negative = negative, noise(5, 16)
    elif name in hunyuan_pipes.TWO_TEXTS:
        negative = negative, noise(3, 16)
    calls = seen(pipe, lambda: run(pipe, options), negative)
    assert sum(len(call.ours) for call in calls) == len(carry)
    carry = list(carry)
    for call in calls:
        check(call, negative, [carry.pop(0) for _ in call.ours])


def test_every_one_that_works_is_here():
    rows = [row for row in pipelines.rows() if row.family in FAMILY_NAMES and not row.is_modular]
    works = {row.name for row in rows if row.status != pipelines.REFUSED}
    # the name that Lumina2Pipeline had before diffusers 0.34, which no longer builds it
    works.discard("Lumina2Text2ImgPipeline")
    assert works <= {*RUN, *ALONE}
