"""Every pipeline that diffusers has for a denoiser that NASA knows: which rows are guided.

A row carries the prompt if its text is one that the denoiser gets when no guidance is on: there
all rows do. Such a row must be what the eager oracle makes of it, with the negative prompt that
belongs to its image; any other row, what stock diffusers makes of it; and a call without a row of
the prompt is stock bit for bit. Or there is one clear error, and the table says which.
"""

import inspect
import sys
from types import SimpleNamespace

import diffusers
import every_pipeline
import pytest
import streams
import torch
from drawing import assert_same_image, relative_error
from nasa_diffusers import enable_nasa, pipelines
from nasa_diffusers.families import skyreels
from oracle import algorithm_1

PROMPTS, NEGATIVES = ["a cat", "a big dog"], ["bad", "so bad"]
ALPHA = 0.7


@pytest.fixture(autouse=True)
def without_ftfy(monkeypatch):
    """Pipelines of Wan clean their prompts with a package that need not be there."""
    for name, module in list(sys.modules.items()):
        cleans = name.startswith("diffusers.pipelines.") and hasattr(module, "prompt_clean")
        if cleans and not hasattr(module, "ftfy"):
            monkeypatch.setattr(module, "ftfy", SimpleNamespace(fix_text=str), raising=False)


class Calls:
    """Every call of a pipeline's denoiser, as it was before NASA saw it."""

    def __init__(self, denoiser, check=None):
        self.seen, self.check, self.is_checking = [], check, False
        self.names = list(inspect.signature(type(denoiser).forward).parameters)[1:]
        self.hooks = [
            denoiser.register_forward_pre_hook(self.before, with_kwargs=True),
            denoiser.register_forward_hook(self.after),
        ]

    def end(self):
        for hook in self.hooks:
            hook.remove()

    def before(self, _, args, kwargs):
        if not self.is_checking:
            inputs = dict(zip(self.names, args, strict=False)) | kwargs
            self.seen.append(unshared(inputs))

    def after(self, _, __, output):
        if self.check is not None and not self.is_checking:
            # the check calls the denoiser, too
            self.is_checking = True
            self.check(self.seen[-1], output[0])
            self.is_checking = False


def unshared(inputs):
    """UNets take the tensors out of lists of residuals."""
    return {name: list(x) if isinstance(x, list) else x for name, x in inputs.items()}


def projected(denoiser, text):
    """The negative text as the attention layers see it."""
    if hasattr(denoiser, "condition_embedder"):
        return denoiser.condition_embedder.text_embedder(text)
    if getattr(denoiser, "encoder_hid_proj", None) is not None:
        text = denoiser.encoder_hid_proj(text)
    if getattr(denoiser, "crossattn_proj", None) is not None:
        text = denoiser.crossattn_proj(text)
    if getattr(denoiser, "caption_projection", None) is not None:
        text = denoiser.caption_projection(text)
    if getattr(denoiser, "caption_norm", None) is not None:
        text = denoiser.caption_norm(text)
    return text


def oracle(denoiser, inputs, negative, alpha):
    """The eager denoiser; `negative` [b, n, c], `alpha` [b, 1, 1, 1] or [b, l, 1, 1]."""
    model = {
        "FluxTransformer2DModel": streams.flux,
        "SD3Transformer2DModel": streams.sd3,
    }.get(type(denoiser).__name__)
    if model is None:
        with algorithm_1(denoiser, [(projected(denoiser, negative), None, alpha)]):
            return denoiser(**unshared(inputs))[0]
    for name in ("controlnet_block_samples", "block_controlnet_hidden_states"):
        if inputs.get(name) is not None:
            blocks = len(denoiser.transformer_blocks)
            samples = inputs[name]
            inputs = inputs | {
                "residuals": [samples[i * len(samples) // blocks] for i in range(blocks)]
            }
    return model(denoiser, "nasa-cross", [(negative, alpha, None)], **inputs)[0]


def check_rows(pipe, prompts, guidance, extra, texts, **options):
    """Draws, and checks each call of the denoiser; the numbers of prompt rows of each."""
    denoiser = every_pipeline.denoiser_of(pipe)
    counts = []
    channels = texts[0].shape[-1]
    generator = torch.Generator().manual_seed(5)
    negatives = torch.randn(len(prompts), 5, channels, generator=generator)

    @torch.no_grad()
    def check(inputs, ours):
        text = inputs["encoder_hidden_states"]
        carried = [
            next((i for i, known in enumerate(texts) if torch.equal(row, known)), -1)
            for row in text
        ]
        counts.append(sum(i >= 0 for i in carried))
        handle.alpha = 0
        stock = denoiser(**unshared(inputs))[0]
        if not any(i >= 0 for i in carried):
            assert torch.equal(ours, stock)
        else:
            rows = torch.tensor([ALPHA if i >= 0 else 0.0 for i in carried]).view(-1, 1, 1, 1)
            if "Kontext" in type(pipe).__name__:
                # reference images are no part of the image that is made
                is_reference = inputs["img_ids"][:, 0] == 1
                rows = torch.where(is_reference.view(1, -1, 1, 1), 0.0, rows)
            eager = oracle(denoiser, inputs, negatives[[max(i, 0) for i in carried]], rows)
            # AnimateDiff's text has a row for each frame
            for i, prompt in enumerate(carried[:: len(carried) // len(ours)]):
                assert_same_image(ours[i], eager[i] if prompt >= 0 else stock[i])
                if prompt >= 0:
                    assert relative_error(eager[i], stock[i]) > 1e-3
        handle.alpha = ALPHA

    # before NASA, so that its hook sees the call first
    calls = Calls(denoiser, check)
    handle = enable_nasa(pipe, negative_prompt_embeds=negatives, alpha=ALPHA)
    try:
        negative = NEGATIVES[: len(prompts)]
        arguments = every_pipeline.arguments(pipe, prompts, negative, guidance, extra)
        pipe(**arguments | options)
    finally:
        handle.disable()
        calls.end()
    return counts


def prompt_texts(name, pipe):
    """What the denoiser gets of each prompt, from calls without any guidance."""
    if name.startswith("Cycle"):
        # it batches another prompt beside it, always
        pipe = every_pipeline.build("StableDiffusionPipeline")
    calls = Calls(every_pipeline.denoiser_of(pipe))
    prompts = PROMPTS[:1] if name.startswith(ONE_PROMPT) else PROMPTS
    pipe(**every_pipeline.arguments(pipe, prompts, NEGATIVES, 1.0, 0.0))
    calls.end()
    texts = calls.seen[0]["encoder_hidden_states"]
    # AnimateDiff's have a row for each frame
    return list(texts[:: len(texts) // len(prompts)])


# ---- classes in which no row is guided: one clear error ------------------------------------------

# as `python -m nasa_diffusers pipelines` tells it: by how names begin, why
REFUSED = {start: each for start, each in pipelines.REFUSALS.items() if not each.in_call}
REFUSED_CALLS = {start: each for start, each in pipelines.REFUSALS.items() if each.in_call}
# these take no prompt, and are asked all the same: what is said in the first call
NO_PROMPT = pipelines.Refusal("", "it holds its prompt under no name that is known")
REFUSED_CALLS |= dict.fromkeys(
    ("StableDiffusionImageVariation", "PaintByExample", "Marigold"), NO_PROMPT
)
# and what works with a condition: that it is one
REFUSED_OTHERWISE = {
    "StableDiffusion3PAG": "PAG.*JointAttnProcessor2_0, whose computation NASA does not know"
}
# two prompts are an error of these, or lose one
ONE_VIDEO = ("AnimateDiffControlNet", "AnimateDiffSparse", "AnimateDiffVideo")
ONE_PROMPT = ("CycleDiffusion", "LucyEdit", "VisualCloze", "WanVACE", "LTXI2VLong", *ONE_VIDEO)
CLASSES = every_pipeline.classes()


def of(table):
    return [name for name in CLASSES if name.startswith(tuple(table))]


RUN = [name for name in CLASSES if name not in of(REFUSED | REFUSED_CALLS)]


@pytest.mark.parametrize("name", RUN)
def test_rows_that_carry_the_prompt_are_guided_and_no_others(name):
    if name.startswith("SkyReels") and skyreels.ATTENTION is None:
        pytest.skip("SkyReels-V2 is supported from diffusers 0.36 on")
    pipe = every_pipeline.build(name)
    texts = prompt_texts(name, pipe)
    for guidance in (1.0, 5.0):
        for prompts in (PROMPTS[:1], PROMPTS):
            if name.startswith(ONE_PROMPT) and len(prompts) > 1:
                continue
            extra = 0 if name.startswith(tuple(REFUSED_OTHERWISE)) else len(prompts) - 1
            counts = check_rows(pipe, prompts, guidance, float(extra), texts)
            assert sum(counts) >= len(prompts)
    # a prompt in words is encoded, or refused as the condition says
    starts = [start for start, why in pipelines.CONDITIONS.items() if why == pipelines.EMBEDS]
    if name.startswith(tuple(starts)):
        with pytest.raises(ValueError, match="enable_nasa: .*pass negative_prompt_embeds"):
            enable_nasa(pipe, "blurry")
    else:
        enable_nasa(pipe, "blurry").disable()


def say(table, name):
    return next(message for start, message in table.items() if name.startswith(start))


def controlnet_xs_unet():
    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "time_embedding_mix": 1.0,
    }
    names = inspect.signature(diffusers.UNetControlNetXSModel.__init__).parameters
    options = {k: v for k, v in every_pipeline.UNET.items() | blocks.items() if k in names}
    return diffusers.UNetControlNetXSModel(
        **options, ctrl_conditioning_embedding_out_channels=(4, 8)
    )


def pixel_unet():
    """As DeepFloyd's: the text is pooled by an attention of its own."""
    return every_pipeline.unet(
        encoder_hid_dim=16, encoder_hid_dim_type="text_proj", addition_embed_type="text",
        addition_embed_type_num_heads=2,
    )  # fmt: skip


def image_unet():
    """As Kandinsky's: images are among the tokens of its text."""
    return every_pipeline.unet(encoder_hid_dim=16, encoder_hid_dim_type="image_proj")


def image_context_transformer():
    return diffusers.CosmosTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=1, mlp_ratio=2,
        text_embed_dim=32, adaln_lora_dim=4, max_size=(4, 32, 32), img_context_dim_in=8,
        img_context_num_tokens=4, img_context_dim_out=32, concat_padding_mask=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", of(REFUSED))
def test_a_denoiser_that_is_refused(name):
    make = {
        "IF": pixel_unet, "Kandinsky": image_unet, "UnCLIP": image_unet,
        "StableDiffusion": controlnet_xs_unet, "Cosmos": image_context_transformer,
    }  # fmt: skip
    denoiser = say(make, name)()
    # not built: only its denoiser is looked at
    pipe = CLASSES[name].__new__(CLASSES[name])
    setattr(pipe, "transformer" if name.startswith("Cosmos") else "unet", denoiser)
    with pytest.raises(ValueError, match=f"enable_nasa: .*{say(REFUSED, name).raised}"):
        enable_nasa(pipe, negative_prompt_embeds=torch.randn(1, 5, 32))
    assert not denoiser._forward_pre_hooks


@pytest.mark.parametrize("name", of(REFUSED_CALLS))
def test_a_call_that_is_refused(name):
    message = f"nasa_diffusers: .*{say(REFUSED_CALLS, name).raised}"
    if name.startswith(("AudioLDM", "MusicLDM")):
        # their sound conditions the UNet as a class does
        sample = torch.randn(1, 4, 8, 8)
        pipe = every_pipeline.build("StableDiffusionPipeline")
        enable_nasa(pipe, negative_prompt_embeds=torch.randn(1, 5, 32))
        with pytest.raises(ValueError, match=message):
            pipe.unet(sample, 500, None)
        return
    pipe = every_pipeline.build(name)
    channels = every_pipeline.denoiser_of(pipe).config
    channels = channels.get("cross_attention_dim") or channels["joint_attention_dim"]
    enable_nasa(pipe, negative_prompt_embeds=torch.randn(1, 5, channels))
    with pytest.raises(RuntimeError, match=message):
        if name.startswith("LEdits"):
            options = every_pipeline.of_class(name, 1, 5.0)
            pipe.invert(**options)
        options = {"guidance_scale": 5.0} if name.startswith("TextToVideo") else {}
        arguments = every_pipeline.arguments(pipe, PROMPTS[:1], NEGATIVES[:1], 5.0)
        pipe(**arguments | options)


@pytest.mark.parametrize("name", of(REFUSED_OTHERWISE))
def test_a_condition_that_is_not_met(name):
    pipe = every_pipeline.build(name)
    channels = pipe.transformer.config["joint_attention_dim"]
    enable_nasa(pipe, negative_prompt_embeds=torch.randn(1, 5, channels))
    with pytest.raises(RuntimeError, match=f"nasa_diffusers: .*{say(REFUSED_OTHERWISE, name)}"):
        pipe(**every_pipeline.arguments(pipe, PROMPTS[:1], NEGATIVES[:1], 5.0))
