"""Every family beyond Stable Diffusion: its own text path, masks, CFG and alpha."""

import contextlib
from types import SimpleNamespace

import changes
import diffusers
import pytest
import torch
from diffusers.pipelines.wan import pipeline_wan
from drawing import OPTIONS, assert_same_image
from nasa_diffusers import enable_nasa, nasa, testing
from oracle import algorithm_1

FAMILIES = {
    "pixart-alpha": testing.pixart,
    "pixart-sigma": lambda: testing.pixart(sigma=True),
    "sana": testing.sana,
    "sana-qk-norm": lambda: testing.sana(qk_norm="rms_norm_across_heads"),
    "wan-2.1": testing.wan,
    "wan-2.2": lambda: testing.wan(two_transformers=True),
}


@pytest.fixture(params=FAMILIES)
def pipe(request, monkeypatch):
    # diffusers 0.35 cleans Wan's prompts with the package ftfy whether it is there or not
    monkeypatch.setattr(pipeline_wan, "ftfy", SimpleNamespace(fix_text=str), raising=False)
    return FAMILIES[request.param]()


def denoisers(pipe):
    names = ("transformer", "transformer_2")
    return [model for name in names if (model := getattr(pipe, name, None)) is not None]


@torch.no_grad()
def projected_negative(pipe, transformer, prompt):
    """The negative text as the blocks of `transformer` see it, and its mask."""
    if isinstance(pipe, diffusers.WanPipeline):
        embeds, _ = pipe.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=512
        )
        return transformer.condition_embedder.text_embedder(embeds), None
    options = {} if is_sprint(pipe) else {"do_classifier_free_guidance": False}
    embeds, mask, *_ = pipe.encode_prompt(prompt, **options)
    text = transformer.caption_projection(embeds)
    if isinstance(pipe, diffusers.SanaPipeline | diffusers.SanaSprintPipeline):
        text = transformer.caption_norm(text)
    return text, mask.bool()


def is_sprint(pipe):
    return isinstance(pipe, diffusers.SanaSprintPipeline)


class Outputs:
    """What each call of a pipeline's denoisers returned."""

    def __init__(self, pipe):
        self.tensors = []
        for model in denoisers(pipe):
            model.register_forward_hook(lambda _, __, out: self.tensors.append(out[0]))

    def take(self):
        tensors, self.tensors = self.tensors, []
        return tensors


@pytest.mark.parametrize("steps", [1, 4])
def test_alpha_0_and_disable_are_stock_bit_for_bit(pipe, draw, steps):
    stock = draw(pipe, steps=steps)
    handle = enable_nasa(pipe, "blurry", alpha=0)
    assert torch.equal(draw(pipe, steps=steps), stock)
    handle.alpha = 0.5
    assert not torch.allclose(draw(pipe, steps=steps), stock)
    handle.disable()
    assert torch.equal(draw(pipe, steps=steps), stock)


@pytest.mark.parametrize("steps", [1, 4])
def test_guided_image_is_algorithm_1(pipe, draw, steps):
    with nasa(pipe, "blurry", alpha=0.5):
        ours = draw(pipe, steps=steps)
    with contextlib.ExitStack() as stack:
        for model in denoisers(pipe):
            negative = projected_negative(pipe, model, "blurry")
            stack.enter_context(algorithm_1(model, [(*negative, 0.5)]))
        assert_same_image(ours, draw(pipe, steps=steps))


def test_guidance_leaves_the_unconditional_half_alone(pipe, draw):
    """The outputs of one step: unconditional rows as in stock, conditional ones as without CFG."""
    outputs = Outputs(pipe)
    draw(pipe, guidance=5.0)
    stock = torch.cat(outputs.take())
    with nasa(pipe, "blurry", alpha=0.5):
        draw(pipe)
        guided = torch.cat(outputs.take())
        draw(pipe, guidance=5.0)
        ours = torch.cat(outputs.take())
    # Wan calls the conditional rows first, all others batch them last
    first, last = (1, 0) if isinstance(pipe, diffusers.WanPipeline) else (0, 1)
    assert_same_image(ours[first], stock[first])
    assert_same_image(ours[last], guided[0])
    assert not torch.allclose(ours[last], stock[last])


def test_two_prompts_with_a_negative_each(pipe, draw):
    prompts, negatives = ["a cat", "a large dog"], ["blurry", "red, and fur"]
    with nasa(pipe, negatives, alpha=0.5):
        both = draw(pipe, prompts)
    for i in range(2):
        with nasa(pipe, negatives[i], alpha=0.5):
            assert_same_image(both[i : i + 1], draw(pipe, prompts[i], seed=i))


def test_several_negatives_are_a_sum(pipe, draw):
    """Each under its own softmax, with its own mask and alpha."""
    terms = [("blurry", 0.3), ("red, and fur", -0.2)]
    with nasa(pipe, terms):
        ours = draw(pipe)
    with contextlib.ExitStack() as stack:
        for model in denoisers(pipe):
            negatives = [(*projected_negative(pipe, model, text), alpha) for text, alpha in terms]
            stack.enter_context(algorithm_1(model, negatives))
        assert_same_image(ours, draw(pipe))


def test_window_of_steps(pipe, draw):
    """The outputs of two steps: before the window as in stock, in it not."""
    outputs = Outputs(pipe)
    draw(pipe, steps=2)
    stock = outputs.take()
    with nasa(pipe, "blurry", alpha=0.5, start=1):
        draw(pipe, steps=2)
        late = outputs.take()
    with nasa(pipe, "blurry", alpha=0.5, stop=0.5):
        draw(pipe, steps=2)
        early = outputs.take()
    assert torch.equal(late[0], stock[0]) and not torch.allclose(late[1], stock[1])
    assert not torch.allclose(early[0], stock[0])


def test_max_sequence_length(pipe, draw):
    """The negative prompt is cut there; what is encoded at most is the default."""
    with nasa(pipe, "blurry and red", alpha=0.5, max_sequence_length=5) as handle:
        draw(pipe)
        assert handle.report().keys_neg == 5
        short = draw(pipe)
    with nasa(pipe, "blurry and red", alpha=0.5):
        assert not torch.allclose(draw(pipe), short)


def offload_model(pipe):
    pipe.enable_model_cpu_offload(device="cpu")


def of_denoisers(change):
    def offload(pipe):
        for model in denoisers(pipe):
            change(model)

    offload.__name__ = change.__name__
    return offload


@pytest.mark.parametrize("order", ["before", "between calls"])
@pytest.mark.parametrize(
    "offload",
    [
        offload_model,
        of_denoisers(changes.offload_sequentially),
        of_denoisers(changes.offload_leaves),
        of_denoisers(changes.offload_blocks),
    ],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("build", [testing.pixart, testing.sana, testing.wan])
def test_offload(build, offload, order, draw, monkeypatch):
    """Text passes a projection before the blocks, whose weights come and go as well."""
    monkeypatch.setattr(pipeline_wan, "ftfy", SimpleNamespace(fix_text=str), raising=False)
    pipe = build()
    with nasa(pipe, "blurry", alpha=0.5):
        expected = draw(pipe, steps=2)
        if order == "between calls":
            offload(pipe)
            assert_same_image(draw(pipe, steps=2), expected)
            assert_same_image(draw(pipe, steps=2), expected)
    if order == "before":
        offload(pipe)
        with nasa(pipe, "blurry", alpha=0.5):
            assert_same_image(draw(pipe, steps=2), expected)
            assert_same_image(draw(pipe, steps=2), expected)


def test_default_alpha_and_report(pipe, draw):
    handle = enable_nasa(pipe, "blurry")
    draw(pipe, steps=4)
    report = handle.report()
    assert handle.alpha == 0.5
    assert report.layers_guided == report.layers == 2 * len(denoisers(pipe))
    assert report.attention_flops > 0 and report.projection_flops > 0
    assert 0 < report.cache_bytes < report.cache_limit


def test_region_follows_the_tokens(pipe, draw):
    """A map of one value is that number; a map of half the image is neither."""
    with nasa(pipe, "blurry", alpha=0.5) as handle:
        whole = draw(pipe)
        handle.alpha = torch.full((64, 48), 0.5)
        assert_same_image(draw(pipe), whole)
        handle.alpha = torch.cat([torch.zeros(32, 64), torch.full((32, 64), 0.5)])
        assert not torch.allclose(draw(pipe), whole)


def test_sana_sprint_never_doubles_its_batch():
    """Two prompts with one seed are two rows to guide: its guidance is an input of the model."""
    pipe = testing.sana(sprint=True, qk_norm="rms_norm_across_heads")

    def draw(prompts):
        return pipe(
            prompts,
            generator=[torch.Generator().manual_seed(0) for _ in prompts],
            num_inference_steps=1,
            intermediate_timesteps=None,
            **OPTIONS["SanaPipeline"],
            output_type="latent",
        )[0]

    stock = draw(["a cat", "a dog"])
    with nasa(pipe, "blurry", alpha=0.5):
        both = draw(["a cat", "a dog"])
        assert not any(torch.allclose(both[i], stock[i]) for i in range(2))
        assert_same_image(both[:1], draw(["a cat"]))
    with algorithm_1(
        pipe.transformer, [(*projected_negative(pipe, pipe.transformer, "blurry"), 0.5)]
    ):
        assert_same_image(both, draw(["a cat", "a dog"]))
