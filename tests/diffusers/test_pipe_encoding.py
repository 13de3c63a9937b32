"""Which pipelines encode a prompt, by which method, and with which options of a call."""

import ast
import importlib
import inspect
import pkgutil
import textwrap

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from nasa_diffusers import enable_nasa, encoding, nasa, testing
from nasa_diffusers.families import FAMILIES


class OlderPipeline(diffusers.StableDiffusionPipeline):
    """As InstructPix2Pix and pipelines for long prompts: no `encode_prompt`."""

    encode_prompt = None

    def _encode_prompt(
        self, prompt, device, num_images_per_prompt, do_classifier_free_guidance,
        negative_prompt=None, max_embeddings_multiples=3,
    ):  # fmt: skip
        made = self.tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt")
        return self.text_encoder(made.input_ids.to(device))[0] * max_embeddings_multiples


def as_class(kind, pipe):
    parts = {name: part for name, part in pipe.components.items() if part is not None}
    return kind(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def test_a_pipeline_with_an_encoding_of_its_own_name():
    pipe = as_class(OlderPipeline, testing.stable_diffusion())
    with nasa(pipe, "blurry", alpha=0.5) as handle:
        expected = 3 * testing.stable_diffusion().encode_prompt("blurry", "cpu", 1, False)[0]
        assert torch.equal(handle._guidances[0].settings.negative.terms[0].embeds, expected)


OTHERS = {
    "no encode_prompt": ({"encode_prompt": None}, "it has no encode_prompt"),
    "another text": (
        {"encode_prompt": lambda self, device, editing_prompt=None: None},
        "takes device, editing_prompt, and no prompt",
    ),
    "more than text": (
        {"encode_prompt": lambda self, query_embeds, prompt, device=None: None},
        "asks for query_embeds as well",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_pipeline_that_cannot_encode_a_prompt(case):
    methods, why = OTHERS[case]
    kind = type("Other", (diffusers.StableDiffusionPipeline,), {"_encode_prompt": None, **methods})
    pipe = as_class(kind, testing.stable_diffusion())
    with pytest.raises(ValueError, match="pass negative_prompt_embeds") as error:
        enable_nasa(pipe, "blurry")
    assert why in str(error.value)
    enable_nasa(pipe, negative_prompt_embeds=torch.ones(1, 3, 32))


def denoisers_of(kind):
    """The class names of what a pipeline calls once per step."""
    parameters = inspect.signature(kind.__init__).parameters
    given = (str(parameters[n].annotation) for n in ("unet", "transformer") if n in parameters)
    return " ".join(given)


# their denoisers mix the text before the blocks, or have no cross-attention
REFUSED = ("IF", "AudioLDM", "MusicLDM", "Kandinsky")


def refused(kind):
    return kind.__name__.startswith(REFUSED)


def pipelines():
    """Every pipeline of diffusers with a denoiser that a family knows, and that family."""
    found = {}
    for module in pkgutil.walk_packages(diffusers.pipelines.__path__, "diffusers.pipelines."):
        if ".pipeline_" not in module.name or "flax" in module.name:
            continue
        try:
            names = vars(importlib.import_module(module.name))
        except (ImportError, RuntimeError):  # needs a package that is not there
            continue
        for kind in names.values():
            is_own = isinstance(kind, type) and kind.__module__ == module.name
            if is_own and issubclass(kind, DiffusionPipeline) and not refused(kind):
                for family in FAMILIES:
                    if any(name in denoisers_of(kind) for name in family.denoisers):
                        found[kind.__name__] = kind, family
    return found


PIPELINES = pipelines()
# parameters of an encoding that are no options: texts, rows, guidance, and what was encoded before
NO_OPTIONS = (
    "self", "device", "dtype", "kwargs", "do_classifier_free_guidance", "guidance_scale",
    # of the image
    "grid_h", "grid_w",
)  # fmt: skip


def options_of(kind):
    """The options with which a pipeline's call encodes its prompt, and those of its encoding."""
    encode = getattr(kind, "encode_prompt", None) or getattr(kind, "_encode_prompt", None)
    if encode is None:
        return set(), set()
    known = set(inspect.signature(encode).parameters)
    passed = set()
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(kind.__call__)))):
        is_method = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if is_method and node.func.attr in ("encode_prompt", "_encode_prompt"):
            passed |= {keyword.arg for keyword in node.keywords}
    no_option = {
        name
        for name in known
        if name in NO_OPTIONS or name.startswith(("num_", "prompt", "negative_"))
        or name.endswith(("embeds", "_prompt", "attention_mask"))
    }  # fmt: skip
    return passed - no_option, known - no_option


# what does nothing to a text that is encoded as a negative prompt, by what the name begins with
IRRELEVANT = {
    # of LEdits++ and safety guidance: rows besides the prompt, which is encoded the same
    "": {"enable_edit_guidance", "enable_safety_guidance"},
    # a negative prompt is encoded without the images that are edited or begin a video
    "QwenImageEdit": {"image"},
    "QwenImage21": {"image"},
    "LongCatImageEdit": {"image"},
    "HunyuanVideoImageToVideo": {"image", "image_embed_interleave"},
    # two encoders of fixed lengths, each of which the family calls
    "HunyuanDiT": {"text_encoder_index", "max_sequence_length"},
    # its encoding has no such parameter
    "EasyAnimateControl": {"text_encoder_index"},
    "LuminaPipeline": {"max_sequence_length"},
    "LuminaText2Img": {"max_sequence_length"},
    # rows
    "HunyuanImage": {"batch_size"},
    "HunyuanVideo15": {"batch_size"},
}


@pytest.mark.parametrize("name", PIPELINES)
def test_no_option_of_the_text_is_passed_over(name):
    """Fails for an option that a later diffusers brings, until it is obeyed or known to do
    nothing to a prompt."""
    kind, family = PIPELINES[name]
    passed, known = options_of(kind)
    irrelevant = set().union(*(x for start, x in IRRELEVANT.items() if name.startswith(start)))
    assert passed - irrelevant <= set(family.text_options)
    # what the negative obeys, the prompt obeys as well
    call = set(inspect.signature(kind.__call__).parameters)
    assert (known & set(family.text_options) & call) - passed <= NOT_HANDED_ON.get(name, set())


# its call takes clip_skip and does nothing with it
NOT_HANDED_ON = {"StableUnCLIPImg2ImgPipeline": {"clip_skip"}}


# they encode something else than a prompt alone, or nothing
OF_ANOTHER_FORM = {
    "BlipDiffusionControlNetPipeline",
    "BlipDiffusionPipeline",
    "LDMTextToImagePipeline",
    "LEditsPPPipelineStableDiffusion",
    "LEditsPPPipelineStableDiffusionXL",
    "MarigoldDepthPipeline",
    "MarigoldIntrinsicsPipeline",
    "MarigoldNormalsPipeline",
    "PaintByExamplePipeline",
    "AudioDiffusionPipeline",
    "SemanticStableDiffusionPipeline",
    "StableDiffusionImageVariationPipeline",
    "StableDiffusionPipelineSafe",
    "VisualClozeGenerationPipeline",
    "VisualClozePipeline",
}


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_encodes_or_says_what_to_pass(name):
    kind, family = PIPELINES[name]
    try:
        encoding.check_encodes(kind.__new__(kind), family.encodes_without)
    except ValueError as error:
        assert "pass negative_prompt_embeds" in str(error)
        assert name in OF_ANOTHER_FORM
    else:
        assert name not in OF_ANOTHER_FORM


def test_the_walk_finds_what_is_known():
    there = {f.name for f in FAMILIES if any(hasattr(diffusers, name) for name in f.denoisers)}
    assert {family.name for _, family in PIPELINES.values()} == there
    passed, _ = options_of(PIPELINES["SanaPipeline"][0])
    assert passed >= {"max_sequence_length", "clean_caption", "complex_human_instruction"}
