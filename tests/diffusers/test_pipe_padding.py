"""Wan's padding, hundreds of equal keys, is one key with a bias of log m: found, and exact."""

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers.pipelines.wan import pipeline_wan
from drawing import assert_same_image, draw, relative_error
from nasa_diffusers import NAG, NASA, VSF, ProjectedNASA, enable_nasa, flops, nasa, testing
from nasa_diffusers.cache import Prompts, folded_length
from oracle import algorithm_1


def padded(real, n=512, rows=1, seed=1):
    """`real` tokens and zeros up to n, as Wan's pipeline pads its text."""
    text = torch.randn(rows, n, 32, generator=torch.Generator().manual_seed(seed))
    text[:, real:] = 0
    return text


@torch.no_grad()
def projected(pipe, text):
    return pipe.transformer.condition_embedder.text_embedder(text)


def layer_keys(handle):
    """The keys that the layers attended to in the last call."""
    report = handle.report()
    return report.keys_pos, report.keys_neg


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (padded(7), 8),
        (padded(511), 512),
        (padded(512), 512),
        (padded(0), 1),
        (torch.ones(2, 5, 3), 1),
        # equal tokens that are not zero, and rows of unequal length: the longest decides
        (torch.cat([padded(4, 9), padded(6, 9)]), 7),
        (torch.cat([padded(3, 9), torch.ones(1, 9, 32)]), 4),
        (torch.ones(1, 1, 3), 1),
        (torch.ones(1, 0, 3), 0),
        (torch.ones(1, 6, 3, device="meta"), 6),
    ],
    ids=str,
)
def test_found_from_the_values(text, expected):
    assert folded_length(text) == expected


def test_equal_tokens_in_the_middle_stay():
    text = padded(4, 9)
    text[:, -1] = 1
    assert folded_length(text) == 9


def test_a_bias_of_log_m_for_the_last_key():
    (fold,) = Prompts([padded(7)], [folded_length]).folded
    assert fold.length == 8
    assert torch.equal(fold.bias[:, :-1], torch.zeros(1, 7))
    assert fold.bias[0, -1].item() == pytest.approx(math.log(505), rel=1e-7)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_the_image_is_that_of_all_keys(steps, backend):
    pipe = testing.wan()
    negative, positive = padded(5, seed=2), padded(9)
    with algorithm_1(pipe.transformer, [(projected(pipe, negative), None, 0.5)]):
        eager = draw(pipe, prompt=None, prompt_embeds=positive, steps=steps)
    with nasa(pipe, negative_prompt_embeds=negative, alpha=0.5, backend=backend) as handle:
        ours = draw(pipe, prompt=None, prompt_embeds=positive, steps=steps)
        assert layer_keys(handle) == (10, 6)
        assert_same_image(ours, eager)
        # without the bias, padding would hardly count
        short = draw(pipe, prompt=None, prompt_embeds=positive[:, :10], steps=steps)
        assert relative_error(short, ours) > 1e-4


def test_prompts_of_unequal_length_in_one_batch():
    pipe = testing.wan()
    negatives = torch.cat([padded(5, seed=2), padded(40, seed=3)])
    positives = torch.cat([padded(9), padded(3, seed=4)])
    with nasa(pipe, negative_prompt_embeds=negatives, alpha=0.5) as handle:
        both = draw(pipe, prompt=None, prompt_embeds=positives, seeds=2)
        assert layer_keys(handle) == (10, 41)
    for i in range(2):
        negative = projected(pipe, negatives[i : i + 1])
        with algorithm_1(pipe.transformer, [(negative, None, 0.5)]):
            one = draw(pipe, prompt=None, prompt_embeds=positives[i : i + 1], seed=i)
        assert_same_image(both[i : i + 1], one)


def test_a_string_is_folded_and_the_report_says_so(monkeypatch):
    # diffusers 0.35 cleans prompts with the package ftfy whether it is there or not
    monkeypatch.setattr(pipeline_wan, "ftfy", SimpleNamespace(fix_text=str), raising=False)
    pipe = testing.wan()
    with nasa(pipe, "blurry", alpha=0.5) as handle:
        assert layer_keys(handle) == (None, 512)
        draw(pipe, prompt=None, prompt_embeds=padded(9))
        # letters, the end of the text, and one key for all padding
        assert layer_keys(handle) == (10, 8)
        # guided for the transformer's 2 layers: 4 b h l n d
        b, queries, h, d = next(iter(handle._guidances[0].guided_layers.values())).last_call.q
        assert handle.report().attention_flops == 2 * 4 * b * h * queries * d * 8


def test_a_mask_of_ones_own_is_kept():
    """Masked tokens are absent, not one key: the two must not be mixed up in the cache."""
    pipe = testing.wan()
    negative, positive = padded(5, 20, seed=2), padded(9, 20)
    # the last token is kept, so nothing is trimmed and the texts are equal
    mask = torch.arange(20)[None] % 3 != 0
    call = {"prompt": None, "prompt_embeds": positive}
    for keep in (mask, None, mask):
        options = {"negative_prompt_embeds": negative, "negative_prompt_attention_mask": keep}
        with algorithm_1(pipe.transformer, [(projected(pipe, negative), keep, 0.5)]):
            eager = draw(pipe, **call)
        with nasa(pipe, **options, alpha=0.5):
            assert_same_image(draw(pipe, **call), eager)
    handle = enable_nasa(pipe, negative_prompt_embeds=negative, alpha=0.5)
    first = draw(pipe, **call)
    handle.set_negative_prompt(negative_prompt_embeds=negative, negative_prompt_attention_mask=mask)
    assert not torch.allclose(draw(pipe, **call), first)


def test_layers_that_are_not_guided_see_all_tokens():
    pipe = testing.wan()
    negative, positive = padded(5, seed=2), padded(9)
    only = lambda name: name.startswith("blocks.1.")  # noqa: E731
    with algorithm_1(pipe.transformer, [(projected(pipe, negative), None, 0.5)], only):
        eager = draw(pipe, prompt=None, prompt_embeds=positive)
    with nasa(pipe, negative_prompt_embeds=negative, alpha=0.5, layers="blocks.1.*"):
        assert_same_image(draw(pipe, prompt=None, prompt_embeds=positive), eager)


def test_gradients_see_all_tokens():
    """Nothing is kept and nothing folded while a gradient is recorded: padding could learn."""
    pipe = testing.wan()
    text = padded(5).requires_grad_()
    latents = torch.randn(1, 16, 2, 2, 4)
    with nasa(pipe, negative_prompt_embeds=padded(3, seed=2), alpha=0.5, cfg=False):
        out = pipe.transformer(latents, torch.tensor([500]), text)[0]
        (gradient,) = torch.autograd.grad(out.sum(), text)
    assert gradient[:, 5:].count_nonzero() > 0


@pytest.mark.parametrize("method", [NASA(), NAG(), VSF(), ProjectedNASA()], ids=str)
def test_compiled_and_with_every_method(method):
    """Prompts of other lengths are data: folded lengths do not recompile."""
    torch._dynamo.reset()
    plain, pipe = testing.wan(), testing.wan()
    pipe.transformer.compile(fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for each in (plain, pipe):
            enable_nasa(each, method=method, negative_prompt_embeds=padded(4, seed=2))
        for real in (9, 30, 9):
            call = {"prompt": None, "prompt_embeds": padded(real)}
            assert_same_image(draw(pipe, **call), draw(plain, **call))


def test_flops_of_the_real_architecture():
    """Prompts of 120 + 70 tokens: 190 keys of 1024, counted with the weights on meta."""
    plain = flops.count("Wan 2.1 1.3B, 480p, 81 frames")
    folded = flops.count("Wan 2.1 1.3B, 480p, 81 frames, 120 + 70 words")
    assert folded.stock == plain.stock
    layers, queries, width = 30, 21 * 30 * 52, 1536
    saved = 4 * layers * queries * width * (1024 - 121 - 71)
    assert plain.later - folded.later == saved
    assert folded.later < folded.stock
