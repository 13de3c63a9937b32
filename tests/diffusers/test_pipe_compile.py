"""`torch.compile(fullgraph=True)` of the denoiser: same image, no break, no needless recompile."""

import pytest
import torch
from drawing import assert_same_image
from nasa_diffusers import enable_nasa, nasa, testing
from torch._dynamo.utils import counters


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compile_in_place(pipe):
    pipe.transformer.compile(fullgraph=True, backend="eager")


def compile_wrapper(pipe):
    pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend="eager")


def compile_blocks(pipe):
    for block in pipe.transformer.transformer_blocks:
        block.compile(fullgraph=True, backend="eager")


def graphs():
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("order", ["compiled last", "compiled first"])
@pytest.mark.parametrize(
    "compile", [compile_in_place, compile_wrapper, compile_blocks], ids=lambda f: f.__name__[8:]
)
def test_same_image(draw, compile, order):
    """Compiled after NASA was enabled, or before, and then traced already without it."""
    pipe = testing.pixart()
    stock = draw(pipe)
    with nasa(pipe, "blurry", alpha=0.5):
        expected = draw(pipe)
    if order == "compiled first":
        compile(pipe)
        assert_same_image(draw(pipe), stock)
    with nasa(pipe, "blurry", alpha=0.5) as handle:
        if order == "compiled last":
            compile(pipe)
        assert_same_image(draw(pipe), expected)
        assert graphs() > 0
        handle.alpha = 0
        assert_same_image(draw(pipe), stock)
    assert_same_image(draw(pipe), stock)


def test_settings_do_not_recompile(draw):
    """Alpha, steps, seeds and another negative prompt of the same length are data."""
    pipe = testing.pixart()
    compile_in_place(pipe)
    with nasa(pipe, "blur", alpha=0.5, stop=0.5) as handle:
        draw(pipe, steps=4)
        compiled = graphs()
        assert compiled > 0
        for alpha in (0.1, 0.7, [0.3], torch.tensor(0.2)):
            handle.alpha = alpha
            draw(pipe, steps=4)
        handle.set_negative_prompt("fuzz")
        draw(pipe, "a dog", seed=3)
        assert graphs() == compiled


def test_unet_with_guidance_and_a_region(sd, draw):
    plain = testing.stable_diffusion()
    sd.unet.compile(fullgraph=True, backend="eager")
    for pipe in (plain, sd):
        enable_nasa(pipe, "blurry", alpha=torch.linspace(0, 1, 256).view(16, 16))
    assert_same_image(draw(sd, guidance=5.0), draw(plain, guidance=5.0))
    assert graphs() > 0


@pytest.mark.parametrize("build", [testing.sana, testing.wan], ids=["sana", "wan"])
def test_other_families(build, draw):
    pipe = build()
    text = {"prompt_embeds": torch.randn(1, 7, 32)}
    if build is testing.sana:
        text["prompt_attention_mask"] = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
    with nasa(pipe, negative_prompt_embeds=torch.randn(1, 9, 32), alpha=0.5):
        expected = draw(pipe, prompt=None, **text)
        pipe.transformer.compile(fullgraph=True, backend="eager")
        assert_same_image(draw(pipe, prompt=None, **text), expected)
    assert graphs() > 0


def test_inductor(draw):
    """The whole way down, once: the op is opaque to Inductor, what is around it is not."""
    pipe = testing.pixart()
    with nasa(pipe, "blurry", alpha=0.5):
        expected = draw(pipe)
        pipe.transformer.transformer_blocks[0].attn2.compile(fullgraph=True)
        assert_same_image(draw(pipe), expected)
