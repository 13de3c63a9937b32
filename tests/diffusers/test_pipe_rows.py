"""Every pipeline that diffusers has for a denoiser that NASA knows: which rows are guided.

A row carries the prompt if its text is one that the denoiser gets when no guidance is on: there
all rows do. Such a row must be what the eager oracle makes of it, with the negative prompt that
belongs to its image; any other row, what stock diffusers makes of it; and a call without a row of
the prompt is stock bit for bit. Or there is one clear error, and the table says which.
"""

import inspect
import sys
from types import SimpleNamespace

import every_pipeline
import pytest
import streams
import torch
from drawing import assert_same_image, relative_error
from nasa_diffusers import enable_nasa
from oracle import algorithm_1

PROMPTS, NEGATIVES = ["a cat", "a big dog"], ["bad", "so bad"]
ALPHA = 0.7
# their own class of UNet, which no family knows
OTHER_UNETS = ("AnimateDiff", "PIA")
# what their UNet is made of is refused
MIXED_TEXT = ("IF", "Kandinsky")
# what the denoiser gets is no text, or not the prompt
NO_PROMPT = ()


@pytest.fixture(autouse=True)
def without_ftfy(monkeypatch):
    """Pipelines of Wan clean their prompts with a package that need not be there."""
    for name, module in list(sys.modules.items()):
        if name.startswith("diffusers.pipelines.") and not hasattr(module, "ftfy"):
            if "wan" in name or "skyreels" in name:
                monkeypatch.setattr(module, "ftfy", SimpleNamespace(fix_text=str), raising=False)


class Calls:
    """Every call of a pipeline's denoiser, as it was before NASA saw it."""

    def __init__(self, denoiser, check=None):
        self.seen, self.check, self.is_checking = [], check, False
        self.names = list(inspect.signature(type(denoiser).forward).parameters)[1:]
        denoiser.register_forward_pre_hook(self.before, with_kwargs=True)
        denoiser.register_forward_hook(self.after)

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


def check_rows(pipe, prompts, guidance, extra, texts):
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
            for i, prompt in enumerate(carried):
                assert_same_image(ours[i], eager[i] if prompt >= 0 else stock[i])
                if prompt >= 0:
                    assert relative_error(eager[i], stock[i]) > 1e-3
        handle.alpha = ALPHA

    # before NASA, so that its hook sees the call first
    Calls(denoiser, check)
    handle = enable_nasa(pipe, negative_prompt_embeds=negatives, alpha=ALPHA)
    try:
        negative = NEGATIVES[: len(prompts)]
        pipe(**every_pipeline.arguments(pipe, prompts, negative, guidance, extra))
    finally:
        handle.disable()
    return counts


def prompt_texts(name):
    """What the denoiser gets of each prompt, from calls without any guidance."""
    pipe = every_pipeline.build(name)
    calls = Calls(every_pipeline.denoiser_of(pipe))
    pipe(**every_pipeline.arguments(pipe, PROMPTS, NEGATIVES, 1.0, 0.0))
    return list(calls.seen[0]["encoder_hidden_states"])


RUN = [
    name
    for name in every_pipeline.classes()
    if not name.startswith((*OTHER_UNETS, *MIXED_TEXT, *NO_PROMPT))
]


@pytest.mark.parametrize("name", RUN)
def test_rows_that_carry_the_prompt_are_guided_and_no_others(name):
    texts = prompt_texts(name)
    for guidance in (1.0, 5.0):
        for prompts in (PROMPTS[:1], PROMPTS):
            pipe = every_pipeline.build(name)
            counts = check_rows(pipe, prompts, guidance, float(len(prompts) - 1), texts)
            assert sum(counts) >= len(prompts)
