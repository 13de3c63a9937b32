"""`torch.compile(fullgraph=True)` of the denoiser: same image, no break, no needless recompile."""

import pytest
import torch
from conftest import assert_same_image
from nasa_diffusers import enable_nasa, nasa, testing
from torch._dynamo.utils import counters


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compile_in_place(pipe):
    pipe.unet.compile(fullgraph=True, backend="eager")


def compile_wrapper(pipe):
    pipe.unet = torch.compile(pipe.unet, fullgraph=True, backend="eager")


def compile_blocks(pipe):
    pipe.unet.compile_repeated_blocks(fullgraph=True, backend="eager")


WAYS = [compile_in_place, compile_wrapper, compile_blocks]


def graphs():
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("compile", WAYS, ids=lambda f: f.__name__[8:])
@pytest.mark.parametrize("order", ["before", "after", "after a call"])
def test_same_image(draw, compile, order):
    """Compiled before NASA was enabled, or after, or before and already traced."""
    pipe = testing.stable_diffusion()
    stock = draw(pipe)
    with nasa(pipe, "blurry", alpha=0.5):
        expected = draw(pipe)
    if order != "before":
        compile(pipe)
    if order == "after a call":
        assert_same_image(draw(pipe), stock)
    with nasa(pipe, "blurry", alpha=0.5) as handle:
        if order == "before":
            compile(pipe)
        assert_same_image(draw(pipe), expected)
        assert graphs() > 0
        handle.alpha = 0
        assert_same_image(draw(pipe), stock)
    assert_same_image(draw(pipe), stock)


def test_settings_do_not_recompile(sd, draw):
    """Alpha, steps, seeds and another negative prompt of the same length are data."""
    compile_in_place(sd)
    with nasa(sd, "blurry", alpha=0.5, stop=0.5) as handle:
        draw(sd, steps=4)
        compiled = graphs()
        for alpha in (0.1, 0.7, [0.3], torch.tensor(0.2)):
            handle.alpha = alpha
            draw(sd, steps=4)
        handle.set_negative_prompt("red")
        draw(sd, "a dog", seed=3)
        assert graphs() == compiled


def test_guidance_and_regions(sd, draw):
    region = torch.linspace(0, 1, 256).view(16, 16)
    plain = testing.stable_diffusion()
    compile_in_place(sd)
    for pipe in (plain, sd):
        enable_nasa(pipe, "blurry", alpha=region)
    assert_same_image(draw(sd, guidance=5.0), draw(plain, guidance=5.0))
    assert_same_image(draw(sd, num_images_per_prompt=2), draw(plain, num_images_per_prompt=2))


@pytest.mark.parametrize(
    "build", [testing.pixart, testing.sana, testing.wan], ids=["pixart", "sana", "wan"]
)
def test_other_families(build, draw, monkeypatch):
    pipe = build()
    text = {"negative_prompt_embeds": torch.randn(1, 9, 32), "alpha": 0.5}
    embeds = {"prompt_embeds": torch.randn(1, 7, 32)}
    if build is not testing.wan:
        embeds["prompt_attention_mask"] = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])

    def run(guidance):
        return draw(pipe, guidance=guidance, steps=2, prompt=None, **embeds)

    with nasa(pipe, **text):
        expected = run(1.0)
        pipe.transformer.compile(fullgraph=True, backend="eager")
        assert_same_image(run(1.0), expected)
        assert graphs() > 0


def test_inductor(sd, draw):
    """The whole way down, once: the op is opaque to Inductor, what is around it is not."""
    with nasa(sd, "blurry", alpha=0.5):
        expected = draw(sd)
        attn = sd.unet.mid_block.attentions[0].transformer_blocks[0]
        attn.compile(fullgraph=True)
        assert_same_image(draw(sd), expected)
