"""Same bits where nothing is guided, Algorithm 1 where something is, stock again afterwards."""

import pytest
import torch
from drawing import assert_same_image, denoise, negative_embeds, relative_error
from nasa_diffusers import disable_nasa, enable_nasa, nasa, testing
from oracle import algorithm_1

NEGATIVE = "blurry"


@pytest.mark.parametrize("guidance", [0.0, 5.0], ids=["no-cfg", "cfg"])
@pytest.mark.parametrize("steps", [1, 4])
def test_alpha_0_is_stock_bit_for_bit(pipe, draw, steps, guidance):
    stock = draw(pipe, steps=steps, guidance=guidance)
    with nasa(pipe, NEGATIVE, alpha=0) as handle:
        assert torch.equal(draw(pipe, steps=steps, guidance=guidance), stock)
        # no layer was guided: nothing was computed that stock does not compute
        assert handle.report().attention_flops is None
        assert handle.report().cache_bytes == 0


@pytest.mark.parametrize("guidance", [0.0, 5.0], ids=["no-cfg", "cfg"])
@pytest.mark.parametrize("steps", [1, 4])
def test_disable_restores_bit_for_bit(pipe, draw, steps, guidance):
    stock = draw(pipe, steps=steps, guidance=guidance)
    modules = {name: dict(module.__dict__) for name, module in pipe.unet.named_modules()}
    handle = enable_nasa(pipe, NEGATIVE, alpha=0.5)
    assert not torch.equal(draw(pipe, steps=steps, guidance=guidance), stock)
    handle.disable()
    assert torch.equal(draw(pipe, steps=steps, guidance=guidance), stock)
    assert {n: m.__dict__.keys() for n, m in pipe.unet.named_modules()} == {
        name: attributes.keys() for name, attributes in modules.items()
    }


def test_disable_nasa_finds_the_pipeline(pipe, draw):
    stock = draw(pipe)
    enable_nasa(pipe, NEGATIVE)
    disable_nasa(pipe)
    assert torch.equal(draw(pipe), stock)
    with pytest.raises(RuntimeError, match="not on"):
        disable_nasa(pipe)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0, -0.5])
def test_guided_call_is_algorithm_1(pipe, alpha):
    """Against fp64, no worse than the eager computation; twice, since their roundings differ."""
    positive, negative = negative_embeds(pipe, "a cat"), negative_embeds(pipe)
    with torch.no_grad():
        with algorithm_1(pipe.unet, [(negative, None, alpha)]):
            eager = denoise(pipe, positive)
        with nasa(pipe, NEGATIVE, alpha=alpha):
            ours = denoise(pipe, positive)
        pipe.unet.double()
        with algorithm_1(pipe.unet, [(negative.double(), None, alpha)]):
            exact = denoise(pipe, positive.double())
    assert relative_error(eager, exact) > 0
    assert relative_error(ours, exact) <= 2 * relative_error(eager, exact)


@pytest.mark.parametrize("steps", [1, 4])
def test_guided_image_is_algorithm_1(pipe, draw, steps):
    with algorithm_1(pipe.unet, [(negative_embeds(pipe), None, 0.5)]):
        eager = draw(pipe, steps=steps)
    with nasa(pipe, NEGATIVE, alpha=0.5):
        assert_same_image(draw(pipe, steps=steps), eager)


@pytest.mark.parametrize("steps", [1, 4])
def test_stable_diffusion_2(draw, steps):
    pipe = testing.stable_diffusion(version_2=True)
    stock = draw(pipe, steps=steps)
    with algorithm_1(pipe.unet, [(negative_embeds(pipe), None, 0.5)]):
        eager = draw(pipe, steps=steps)
    with nasa(pipe, NEGATIVE, alpha=0.5) as handle:
        assert_same_image(draw(pipe, steps=steps), eager)
        handle.alpha = 0
        assert torch.equal(draw(pipe, steps=steps), stock)


@pytest.mark.parametrize("images", [1, 3])
def test_only_conditional_rows_are_guided(pipe, draw, images):
    """Under classifier-free guidance the first half of the batch has alpha 0."""
    rows = torch.tensor([0.0] * images + [0.5] * images).view(-1, 1, 1, 1)
    with algorithm_1(pipe.unet, [(negative_embeds(pipe), None, rows)]):
        eager = draw(pipe, guidance=5.0, num_images_per_prompt=images)
    with nasa(pipe, NEGATIVE, alpha=0.5):
        ours = draw(pipe, guidance=5.0, num_images_per_prompt=images)
    assert_same_image(ours, eager)


def test_rows_with_alpha_0_are_stock_when_the_op_runs(pipe, draw):
    """One image of two is guided, so the op runs for both."""
    prompts = ["a cat", "a dog"]
    stock = draw(pipe, prompts)
    with nasa(pipe, NEGATIVE, alpha=[0, 0.5]):
        ours = draw(pipe, prompts)
    assert_same_image(ours[0], stock[0])
    assert not torch.allclose(ours[1], stock[1])


def test_same_latents_twice_is_not_taken_for_guidance(sd):
    """Two prompts with one seed: equal halves, and still every row is guided."""
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    options = {"num_inference_steps": 1, "guidance_scale": 0, "output_type": "latent"}
    stock = sd(["a cat", "a dog"], generator=generators, **options).images
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    with nasa(sd, NEGATIVE, alpha=0.5):
        ours = sd(["a cat", "a dog"], generator=generators, **options).images
    assert all(not torch.allclose(ours[i], stock[i]) for i in range(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(pipe, dtype):
    """The error against fp64 is at most that of the eager computation, and a rounding."""
    positive, negative = negative_embeds(pipe, "a cat"), negative_embeds(pipe)
    with torch.no_grad():
        pipe.unet.double()
        with algorithm_1(pipe.unet, [(negative.double(), None, 0.5)]):
            exact = denoise(pipe, positive.double())
        pipe.unet.to(dtype)
        with algorithm_1(pipe.unet, [(negative.to(dtype), None, 0.5)]):
            eager = denoise(pipe, positive.to(dtype))
        with nasa(pipe, NEGATIVE, alpha=0.5):
            ours = denoise(pipe, positive.to(dtype))
    assert ours.dtype == dtype
    assert relative_error(ours, exact) <= 1.5 * relative_error(eager, exact)
